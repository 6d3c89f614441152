"""Baseline defences against naive loops, their properties, and bad input."""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medsec.core import guards, seeds
from medsec.core.errors import InputError
from medsec.inversion import defences as gd
from medsec.nets import convnet

SIZE = 12


def image_noise(model, x, y, round, **numbers):
    return gd.send(partial(gd.noisy_image, **numbers))(model, x, y, round)


ALL = {
    "none": gd.none,
    "gradient_noise": partial(gd.gradient_noise, ratio=0.5, seed=1),
    "dp_sgd": partial(gd.dp_sgd, clip=0.1, noise_multiplier=0.7, seed=1),
    "topk": partial(gd.topk, keep=0.1),
    "soteria": partial(gd.soteria, prune=0.3),
    "image_noise": partial(image_noise, rms=0.1, kind="gaussian", seed=1),
}
RANDOM = ["gradient_noise", "dp_sgd", "image_noise"]


def network(channels=1, size=SIZE, width=4, norm=False):
    model = convnet.new(size, channels, 3, width=width, seed=3, norm=norm)
    if norm:  # running statistics that are not those of an untrained network
        rng = torch.Generator().manual_seed(5)
        for layer in model.body:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(0.2 * torch.randn(width, generator=rng))
                layer.running_var.copy_(0.5 + torch.rand(width, generator=rng))
    return model


def batch(n=3, channels=1, size=SIZE, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng), torch.arange(n) % 3


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ALL)
def test_a_defence_gives_one_tensor_a_parameter_and_touches_nothing(name):
    model, (x, y) = network(norm=True), batch()
    before, drawn, image = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state(), x.clone()
    sent = ALL[name](model, x, y, 0)
    assert [g.shape for g in sent] == [p.shape for p in model.parameters()]
    assert all(g.dtype == torch.float32 and not g.requires_grad for g in sent)
    assert same(sent, ALL[name](model, x, y, 0))
    assert torch.equal(torch.get_rng_state(), drawn), "the global random stream was used"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(x, image)
    assert all(p.grad is None for p in model.parameters())
    assert same(sent, gd.none(model, x, y, 0)) == (name == "none")


@pytest.mark.parametrize("name", RANDOM)
def test_noise_differs_by_seed_round_and_batch(name):
    model, (x, y) = network(), batch()
    defend = ALL[name]
    noise = [
        convnet.flat(d(model, image, y, t)) - convnet.flat(plain(model, image, y, t))
        for d, image, t in [(defend, x, 0), (defend, x, 1), (partial(defend, seed=2), x, 0), (defend, x.flip(3), 0)]
        for plain in [partial(gd.dp_sgd, clip=0.1, noise_multiplier=0.0, seed=0) if name == "dp_sgd" else gd.none]
    ]
    similar = torch.corrcoef(torch.stack(noise)) - torch.eye(4)
    assert similar.abs().max() < (0.9 if name == "image_noise" else 0.1)


@pytest.mark.parametrize("name", [n for n in ALL if n != "none"])
def test_inputs_that_are_wrong_are_named(name):
    model, (x, y) = network(), batch()
    for image, label, message in [
        (2 * x, y, r"images range from .* to .*; scale them to \[0, 1\]"),
        (x * math.nan, y, "images range from nan"),
        (x, y[:2], r"labels of shape \(2,\).* for 3 images"),
        (x, y.float(), "torch.float32"),
        (x, y + 2, "labels from 2 to 4, but the model knows the classes 0 to 2"),
        (x, y - 1, "labels from -1"),
    ]:
        with pytest.raises(InputError, match=message):
            ALL[name](model, image, label, 0)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"gradient of .* holds NaN or infinite values: the model diverged"):
        ALL[name](model, x, y, 0)
    trained = network(norm=True).train()
    with pytest.raises(InputError, match="BatchNorm in training mode"):
        ALL[name](trained, x[:1], y[:1], 0)


@pytest.mark.parametrize(
    ("defend", "message"),
    [
        (partial(gd.gradient_noise, ratio=-1.0, seed=0), "ratio -1.0"),
        (partial(gd.gradient_noise, ratio=math.nan, seed=0), "ratio nan"),
        (partial(gd.dp_sgd, clip=0.0, noise_multiplier=1.0, seed=0), "clip 0.0"),
        (partial(gd.dp_sgd, clip=1.0, noise_multiplier=-1.0, seed=0), "noise_multiplier -1.0"),
        (partial(gd.topk, keep=0.0), "topk: keep 0.0 must be a share"),
        (partial(gd.topk, keep=1.1), "keep 1.1"),
        (partial(gd.soteria, prune=0.0), "soteria: prune 0.0"),
        (partial(gd.soteria, prune=80), "prune 80"),
        (partial(image_noise, rms=0.1, kind="salt", seed=0), "kind 'salt' must be gaussian or uniform"),
        (partial(image_noise, rms=-0.1, kind="uniform", seed=0), "rms -0.1"),
    ],
)
def test_numbers_out_of_range_are_named(defend, message):
    with pytest.raises(InputError, match=message):
        defend(network(), *batch(), 0)


# -------------------------------------------------------------------------------------------------------- noise, DP-SGD


def test_gradient_noise_has_the_stated_norm():
    model, (x, y) = network(), batch()
    clean = convnet.flat(gd.none(model, x, y, 0))
    noise = [convnet.flat(gd.gradient_noise(model, x, y, t, ratio=2.5, seed=0)) - clean for t in range(40)]
    squares = torch.stack(noise).square().sum(1) / clean.square().sum()
    # 40 draws of a chi-square with as many degrees as parameters
    assert float(squares.mean()) == pytest.approx(2.5**2, rel=4 * math.sqrt(2 / 40 / len(clean)))
    parts = torch.stack(noise).square().mean(0).sqrt()  # the same everywhere, also where the gradient is small
    assert float(parts[:36].mean()) == pytest.approx(float(parts[-300:].mean()), rel=0.1)
    assert same(gd.gradient_noise(model, x, y, 0, ratio=0.0, seed=0), gd.none(model, x, y, 0))


@pytest.mark.parametrize(("channels", "norm"), [(1, False), (3, True)])
def test_per_example_gradients_are_those_of_a_loop(channels, norm):
    model, (x, y) = network(channels, norm=norm), batch(4, channels)
    each = gd.per_example_gradients(model, x, y)
    for i in range(4):
        for found, expected in zip(each, convnet.gradients(model, x[i : i + 1], y[i : i + 1]), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_dp_sgd_clips_each_example():
    model, (x, y) = network(), batch(4)
    own = [convnet.flat(convnet.gradients(model, x[i : i + 1], y[i : i + 1])) for i in range(4)]
    clip = float(torch.stack(own).norm(dim=1).median())  # some are longer, some are not
    expected = torch.zeros_like(own[0])
    for g in own:
        expected += g if g.norm() <= clip else g * clip / g.norm()
    sent = convnet.flat(gd.dp_sgd(model, x, y, 0, clip=clip, noise_multiplier=0.0, seed=0))
    torch.testing.assert_close(sent, expected / 4, rtol=1e-4, atol=1e-6)
    # Nobody moves the sum by more than clip.
    tight = [
        len(image) * convnet.flat(gd.dp_sgd(model, image, label, 0, clip=1e-3, noise_multiplier=0.0, seed=0))
        for image, label in [(x, y), (x[1:], y[1:])]
    ]
    assert float((tight[0] - tight[1]).norm()) <= 1e-3 * (1 + 1e-4)
    loose = gd.dp_sgd(model, x, y, 0, clip=1e6, noise_multiplier=0.0, seed=0)
    torch.testing.assert_close(loose, gd.none(model, x, y, 0), rtol=1e-4, atol=1e-6)


def test_dp_sgd_adds_noise_in_proportion_to_the_clip():
    model, (x, y) = network(width=16), batch(4)
    clean = convnet.flat(gd.dp_sgd(model, x, y, 0, clip=0.2, noise_multiplier=0.0, seed=0))
    noise = convnet.flat(gd.dp_sgd(model, x, y, 0, clip=0.2, noise_multiplier=1.5, seed=0)) - clean
    assert float(noise.std()) == pytest.approx(1.5 * 0.2 / 4, rel=0.05)
    assert abs(float(noise.mean())) < 4 * 1.5 * 0.2 / 4 / math.sqrt(len(noise))


def test_dp_sgd_needs_examples_that_do_not_depend_on_each_other():
    with pytest.raises(InputError, match=r"mixes the images of a batch: use model.eval\(\)"):
        gd.dp_sgd(network(norm=True).train(), *batch(), 0, clip=1.0, noise_multiplier=1.0, seed=0)


def test_epsilon_of_the_gaussian_mechanism():
    pytest.importorskip("opacus")
    sigma, steps, delta = 2.0, 10, 1e-5

    def renyi(order):  # Mironov 2017, table II; conversion: Canonne, Kamath & Steinke 2020, proposition 12
        return (
            steps * order / (2 * sigma**2)
            + math.log((order - 1) / order)
            - (math.log(delta) + math.log(order)) / (order - 1)
        )

    best = min(renyi(1 + k / 100) for k in range(1, 6000))
    assert gd.epsilon(sigma, 1.0, steps, delta) == pytest.approx(best, rel=5e-3)
    found = [gd.epsilon(sigma, q, steps, delta) for q in (0.01, 0.1, 1.0)]
    assert 0 < found[0] < found[1] < found[2]
    assert gd.epsilon(4.0, 0.1, steps, delta) < gd.epsilon(2.0, 0.1, steps, delta) < gd.epsilon(2.0, 0.1, 99, delta)


def test_epsilon_without_noise_or_without_opacus(monkeypatch):
    assert gd.epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(InputError, match=r"Opacus, which is not installed: pip install -e '.\[privacy\]'"):
        gd.epsilon(1.0, 0.1, 1, 1e-5)
    for numbers in [
        (-1.0, 0.1, 1, 1e-5),
        (1.0, 0.0, 1, 1e-5),
        (1.0, 1.1, 1, 1e-5),
        (1.0, 0.1, 0, 1e-5),
        (1.0, 0.1, 1, 1.0),
    ]:
        with pytest.raises(InputError, match="epsilon: need"):
            gd.epsilon(*numbers)


# ------------------------------------------------------------------------------------------------- compression, Soteria


@pytest.mark.parametrize("keep", [1e-6, 0.01, 0.37, 1.0])
def test_topk_keeps_the_largest_of_all(keep):
    model, (x, y) = network(), batch()
    clean = convnet.flat(gd.none(model, x, y, 0))
    sent = convnet.flat(gd.topk(model, x, y, 0, keep=keep))
    n = max(1, math.floor(keep * len(clean) + 0.5))
    order = sorted(range(len(clean)), key=lambda i: -abs(float(clean[i])))
    expected = torch.zeros_like(clean)
    for i in order[:n]:
        expected[i] = clean[i]
    assert torch.equal(sent, expected)
    assert int((sent != 0).sum()) == n


@pytest.mark.parametrize(("channels", "size", "norm"), [(1, 8, False), (3, 20, False), (1, 28, True)])
def test_feature_gradient_norms_are_those_of_a_loop(channels, size, norm):
    """Images smaller and larger than the field of a feature (13 px), one feature and one image after the other."""
    model, (x, _) = network(channels, size, width=2, norm=norm), batch(2, channels, size)
    found = gd.feature_gradient_norms(model, x)
    for b in range(2):
        image = x[b : b + 1].clone().requires_grad_()
        r = model.features(image)[0]
        expected = torch.stack([torch.autograd.grad(r[i], image, retain_graph=True)[0].norm() for i in range(len(r))])
        torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-6)


def test_feature_gradient_norms_are_taken_in_pieces(monkeypatch):
    model, (x, _) = network(), batch()
    whole = gd.feature_gradient_norms(model, x)
    monkeypatch.setattr(gd, "DIRECTIONS", 7)
    torch.testing.assert_close(gd.feature_gradient_norms(model, x), whole)


def test_receptive_field_is_what_a_feature_sees():
    model = network(size=40, width=2)
    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    middle = model.body(x)[0, 0, 5, 5]
    (g,) = torch.autograd.grad(middle, x)
    rows = g[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == gd.receptive_field(model) == 13
    model.body.append(nn.AdaptiveAvgPool2d(1))
    assert gd.receptive_field(model) == math.inf


def test_estimated_gradient_norms_come_near_the_exact_ones():
    model, (x, _) = network(), batch(3)
    exact = gd.feature_gradient_norms(model, x)
    ratio = gd.feature_gradient_norms(model, x, 2000, torch.Generator().manual_seed(0)) / exact
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert ratio.std().item() < 2 * (2 / 2000) ** 0.5


def test_soteria_hides_nearly_the_same_features_of_a_batch_as_exact_norms_would():
    model, (x, y) = network(size=28, width=16), batch(16, size=28)
    at = [name for name, _ in model.named_parameters()].index("head.weight")
    sent, clean = gd.soteria(model, x, y, 3, prune=0.8)[at], gd.none(model, x, y, 3)[at]
    hidden = (sent == 0).all(0) & (clean != 0).any(0)
    score = (model.features(x).detach().abs() / gd.feature_gradient_norms(model, x)).mean(0)
    exact = torch.zeros_like(hidden).index_fill(0, score.topk(int(0.8 * len(score))).indices, True)
    assert (hidden & exact).sum() / exact.sum() > 0.95
    again = gd.soteria(model, x, y, 3, prune=0.8)
    assert torch.equal(again[at], sent), "the same batch in the same round: the same columns"


def test_soteria_hides_the_features_that_tell_most():
    n = 1
    model, (x, y) = network(), batch(n)
    sent, clean = gd.soteria(model, x, y, 0, prune=0.3), gd.none(model, x, y, 0)
    r = model.features(x).detach()
    scores = []
    for i in range(r.shape[1]):
        ratio = 0.0
        for b in range(n):
            image = x[b : b + 1].clone().requires_grad_()
            (g,) = torch.autograd.grad(model.features(image)[0, i], image)
            ratio += float(r[b, i].abs() / g.norm())
        scores.append(ratio / n)
    hidden = sorted(range(len(scores)), key=lambda i: -scores[i])[: round(0.3 * len(scores))]
    at = [name for name, _ in model.named_parameters()].index("head.weight")
    expected = clean[at].clone()
    expected[:, hidden] = 0
    assert torch.equal(sent[at], expected)
    assert same(sent[:at] + sent[at + 1 :], clean[:at] + clean[at + 1 :]), "only the head's weight is touched"


def test_soteria_hides_everything_or_names_the_model():
    model, (x, y) = network(), batch(1)
    assert not gd.soteria(model, x, y, 0, prune=1.0)[-2].any()
    with pytest.raises(InputError, match=r"soteria needs a convnet.ConvNet, .* not Linear"):
        gd.soteria(nn.Linear(2, 3), x, y, 0, prune=0.5)


# --------------------------------------------------------------------------------------------------------- image noise


@pytest.mark.parametrize(("kind", "kurtosis"), [("gaussian", 3.0), ("uniform", 1.8)])
def test_image_noise_has_the_stated_size_and_is_not_clipped(kind, kurtosis):
    model, (x, y) = network(size=28), batch(8, size=28)
    x[0] = 0.0
    changed = gd.noisy_image(model, x, y, 2, rms=0.2, kind=kind, seed=4)
    noise = (changed - x).double()
    assert float(noise.square().mean().sqrt()) == pytest.approx(0.2, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float((noise**4).mean() / noise.square().mean() ** 2) == pytest.approx(kurtosis, rel=0.1)
    assert changed.min() < 0 < 1 < changed.max()
    assert float(changed[0].clamp_min(0).square().mean()) == pytest.approx(0.2**2 / 2, rel=0.15)
    if kind == "uniform":
        assert noise.abs().max() <= 0.2 * 3**0.5 + 1e-6
    perturb = partial(gd.noisy_image, rms=0.2, kind=kind, seed=4)
    sent = gd.send(perturb)(model, x, y, 2)
    loss = F.cross_entropy(model(changed), y)
    torch.testing.assert_close(sent, list(torch.autograd.grad(loss, list(model.parameters()))))


# ------------------------------------------------------------------------------------------------------ what is shared


def test_gradients_at_an_image_outside_the_range():
    model, (x, y) = network(), batch()
    assert same(gd.gradients_at(model, x, y), convnet.gradients(model, x, y))
    with torch.no_grad():
        assert len(gd.gradients_at(model, x + 5, y)) == len(list(model.parameters()))
    with pytest.raises(InputError, match="holds NaN"):
        gd.gradients_at(model, x * math.nan, y)
    with pytest.raises(InputError, match="batch of 1"):
        gd.gradients_at(network(norm=True).train(), x[:1], y[:1])


def test_lists_of_gradients_are_checked():
    model, (x, y) = network(), batch()
    found = gd.none(model, x, y, 0)
    assert same(gd.unflat(convnet.flat(found), found), found)
    for wrong, message in [
        (found[:-1], "9 gradients for 10 parameters"),
        ([found[1], *found[1:]], r"gradient of body.0.weight has shape \(4,\), the parameter \(4, 1, 3, 3\)"),
        ([*found[:-1], found[-1] / 0], "gradient of head.bias holds NaN or infinite values"),
    ]:
        with pytest.raises(InputError, match=message):
            guards.check_gradient(model, wrong)


def test_fingerprints_know_content_only():
    x, _ = batch()
    assert (
        seeds.fingerprint(x[1])
        == seeds.fingerprint(x.clone()[1])
        == seeds.fingerprint(x.transpose(2, 3).transpose(2, 3)[1])
    )
    assert seeds.fingerprint(x[1]) != seeds.fingerprint(x[2])
