"""Gradient inversion against a plain loop, its bookkeeping, and what it says of odd input; the measures by hand."""

import copy
import doctest
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.core.settings import InversionSettings
from medsec.inversion import attacks, defences, fingerprint
from medsec.inversion import scores as reconstruction
from medsec.inversion.attacks import (
    ATTACKS,
    View,
    client_update,
    distance,
    infer_labels,
    invert,
    total_variation,
)
from medsec.nets import convnet

SIZE = 12
SHAPE = (1, SIZE, SIZE)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n, seed=0, channels=1):
    """(n, C, S, S) smooth images in [0, 1]."""
    coarse = torch.rand(n, channels, 4, 4, generator=rng(seed))
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True).clamp(0, 1)


def settings(**change):
    base = {"iterations": 60, "lr": 0.1, "lr_latent": 0.1, "tv": 1.0e-3, "statistics": 0.1, "restarts": 1}
    return InversionSettings(**(base | {"together": 4, "done": 0.0} | change))


def network(norm=False, seed=0, n_classes=2):
    model = convnet.new(SIZE, 1, n_classes, width=8, seed=seed, norm=norm)
    if norm:  # running statistics that are those of images
        model.train()
        with torch.no_grad():
            for i in range(20):
                model(smooth(8, 100 + i))
    return model.eval()


def seen(model, x, y, **more):
    """The view of victims (V, B, C, S, S)."""
    sent = [client_update(model, a, b, more.get("steps", 1), more.get("lr", 0.0)) for a, b in zip(x, y, strict=True)]
    return View(model, [torch.stack(t) for t in zip(*sent, strict=True)], **more)


def victims(v=3, b=1, seed=0):
    return smooth(v * b, seed).view(v, b, *SHAPE), torch.arange(v * b).view(v, b) % 2


class Decoder(nn.Module):
    """Images from eight latent numbers."""

    latent = 8

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", torch.randn(8, 16, generator=rng(3)))

    def forward(self, z):
        coarse = torch.sigmoid(z @ self.basis).view(-1, 1, 4, 4)
        return F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=True)


# --------------------------------------------------------------------------------------------------- what a client sends


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 3), (4, 2)])
def test_the_update_is_that_of_plain_sgd(steps, batch):
    model, (x, y) = network(), victims(1, batch)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(trained(x[0]), y[0]).backward()
        optimizer.step()
    for sent, before, after in zip(
        client_update(model, x[0], y[0], steps, 0.05), model.parameters(), trained.parameters(), strict=True
    ):
        torch.testing.assert_close(sent, (before - after).detach() / 0.05, rtol=1e-3, atol=1e-5)


def test_statistics_are_what_batchnorm_sees():
    model, x = network(norm=True), smooth(5)
    inputs = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    _, found = convnet.logits_and_statistics(model, x)
    model(x)
    half = len(inputs) // 2
    assert len(found) == half == 4
    for (mean, var), h in zip(found, inputs[half:], strict=True):
        np.testing.assert_allclose(mean.detach(), h.detach().numpy().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(var.detach(), h.detach().numpy().var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert convnet.logits_and_statistics(network(), x)[1] == []


@pytest.mark.parametrize(
    ("n_classes", "labels"), [(2, [0]), (2, [1]), (2, [0, 1]), (2, [1, 1]), (5, [3]), (5, [0, 2, 2, 4])]
)
def test_labels_are_read_off_the_last_bias(n_classes, labels):
    model, x = network(n_classes=n_classes), smooth(len(labels), 5)
    public = model(smooth(20, 9)).softmax(1).mean(0).detach()
    sent = client_update(model, x, torch.tensor(labels))
    assert infer_labels(sent, len(labels), public).tolist() == labels


def test_labels_of_a_batch_larger_than_the_classes():
    model = network()
    sent = client_update(model, smooth(3), torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match="batch of 3 with 2 classes"):
        infer_labels(sent, 3, torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match="is no bias of 3 classes"):
        infer_labels(sent, 1, torch.ones(3) / 3)


# ------------------------------------------------------------------------------------------------------------- the search


def naive(model, sent, y, attack, options, seed, victim, statistics=(), generator=None):
    """One victim: autograd instead of functorch, PyTorch's Adam instead of ours, one image after the other."""
    size = (Decoder.latent,) if attack == "prior" else SHAPE
    start = torch.Generator().manual_seed(derive_seed(seed, "inversion", victim, 0))
    draw = torch.randn if attack == "prior" else torch.rand
    z = draw((len(y), *size), generator=start).requires_grad_()
    rate = options.lr_latent if attack == "prior" else options.lr
    adam = torch.optim.Adam([z], lr=rate)
    drops = [math.ceil(options.iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, drops, 0.1)
    for _ in range(options.iterations):
        x = generator(z) if attack == "prior" else z
        mine = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)
        a, b = convnet.flat(mine), convnet.flat(sent)
        loss = ((a - b) ** 2).sum() if attack == "dlg" else 1 - F.cosine_similarity(a, b, dim=0, eps=1e-12)
        if attack in ("ig", "bn"):
            steps = [(x[:, :, 1:] - x[:, :, :-1]).abs().mean(), (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()]
            loss = loss + options.tv * sum(steps)
        if attack == "bn":
            _, own = convnet.logits_and_statistics(model, x)
            gaps = [((m - s) ** 2).mean() for m, s in zip(own, statistics, strict=True)]
            loss = loss + options.statistics * sum(gaps)
        (z.grad,) = torch.autograd.grad(loss, [z])
        if attack != "prior":
            z.grad = z.grad.sign()
        adam.step()
        schedule.step()
        if attack != "prior":
            z.data.clamp_(0, 1)
    return (generator(z) if attack == "prior" else z).detach()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_search_is_a_plain_loop(attack):
    """Few iterations: signs of gradients amplify rounding until two correct searches part."""
    model, (x, y), options = network(norm=attack == "bn"), victims(3), settings(iterations=8)
    generator = Decoder() if attack == "prior" else None
    each = [convnet.logits_and_statistics(model, a)[1] for a in x]
    statistics = [torch.stack(s).detach() for s in zip(*each, strict=True)]
    view = seen(model, x, y, statistics=statistics)
    found = invert([view], y, SHAPE, attack=attack, settings=options, seed=5, generator=generator)
    for v in range(3):
        sent, own = [g[v] for g in view.gradients], [s[v] for s in statistics]
        expected = naive(model, sent, y[v], attack, options, 5, v, own, generator)
        # A pixel whose gradient is nearly zero may go the other way.
        assert (found.images[v] - expected).abs().quantile(0.97) < 1e-3
        assert (found.images[v] - x[v]).abs().mean() > 0.01, "it was found already: nothing was compared"


@pytest.mark.parametrize("attack", ["dlg", "ig"])
def test_an_undefended_gradient_gives_the_image_away(attack):
    model, (x, y) = network(), victims(4)
    found = invert([seen(model, x, y)], y, SHAPE, attack=attack, settings=settings(iterations=100), seed=0)
    assert not found.failed.any()
    assert (reconstruction.psnr(found.images[:, 0].numpy(), x[:, 0].numpy()) > 25).all()
    # Of another gradient it is another image: the search does not return what is likely anyway.
    elsewhere = invert(
        [seen(model, x.flip(0), y.flip(0))], y.flip(0), SHAPE, attack=attack, settings=settings(), seed=0
    )
    assert (reconstruction.psnr(elsewhere.images[:, 0].numpy(), x[:, 0].numpy()) < 20).all()


def test_the_latent_search_finds_what_the_generator_can_draw():
    generator, model = Decoder(), network()
    x = generator(torch.randn(2, 8, generator=rng(8)))[:, None]
    y = torch.tensor([[0], [1]])
    options = settings(iterations=150, lr_latent=0.1)
    found = invert([seen(model, x, y)], y, SHAPE, attack="prior", settings=options, seed=0, generator=generator)
    assert (reconstruction.psnr(found.images[:, 0].numpy(), x[:, 0].numpy()) > 25).all()


def test_several_local_steps_are_inverted():
    model, (x, y) = network(), victims(2)
    view = seen(model, x, y, steps=3, lr=0.1)
    options = settings(iterations=100)
    found = invert([view], y, SHAPE, attack="ig", settings=options, seed=0)
    assert (reconstruction.psnr(found.images[:, 0].numpy(), x[:, 0].numpy()) > 25).all()


def test_who_is_searched_together_does_not_matter():
    model, (x, y) = network(), victims(5)
    view = seen(model, x, y)
    runs = [
        invert([view], y, SHAPE, attack="ig", settings=settings(iterations=5, together=n), seed=1) for n in (1, 2, 5)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other.images, runs[0].images, rtol=0, atol=2e-3)
    again = invert([view], y, SHAPE, attack="ig", settings=settings(iterations=5, together=5), seed=1)
    assert torch.equal(again.images, runs[2].images)
    other = invert([view], y, SHAPE, attack="ig", settings=settings(iterations=5, together=5), seed=2)
    assert not torch.equal(other.images, runs[2].images)


def test_who_is_found_leaves_the_batch():
    model, (x, y) = network(), victims(4)
    view = seen(model, x, y)
    full = invert([view], y, SHAPE, attack="ig", settings=settings(), seed=1)
    early = invert([view], y, SHAPE, attack="ig", settings=settings(done=1.0e-3), seed=1)
    assert (full.iterations == 60).all()
    assert (early.iterations < 60).all()
    assert len(set(early.iterations.tolist())) > 1, "all stop together: nobody leaves a group that goes on"
    assert (early.distance <= 1.0e-3).all()
    assert (full.distance < early.distance).all()


def test_of_several_restarts_the_one_that_fits_best_is_kept():
    model, (x, y) = network(), victims(2)
    view = seen(model, x, y)
    single = [invert([view], y, SHAPE, attack="ig", settings=settings(iterations=12), seed=1)]
    many = invert([view], y, SHAPE, attack="ig", settings=settings(iterations=12, restarts=4), seed=1)
    assert (many.distance <= single[0].distance + 1e-6).all()
    assert (many.iterations == 48).all()
    rest = distance("ig", [g[0] for g in view.gradients], client_update(model, many.images[0], y[0]))
    assert float(rest) == pytest.approx(float(many.distance[0]), abs=1e-4)


def test_a_search_that_diverges_is_reported_and_spoils_nobody_else():
    model, (x, y) = network(), victims(4)

    def through(z):
        """Breaks for images that are bright at one place, as the first of the first victim's is at once."""
        return torch.where(z.mean() > 0.52, torch.nan, 1.0) * z

    plain = seen(model, x, y)
    view = View(model, plain.gradients, through=through)
    found = invert([view], y, SHAPE, attack="ig", settings=settings(iterations=10), seed=1)
    assert 0 < int(found.failed.sum()) < 4
    assert torch.isnan(found.distance[found.failed]).all()
    assert torch.isfinite(found.images).all()
    fine = invert([plain], y, SHAPE, attack="ig", settings=settings(iterations=10), seed=1)
    np.testing.assert_allclose(found.images[~found.failed], fine.images[~found.failed], atol=2e-3)


def test_what_is_known_to_be_missing_is_left_out():
    """The gradient of the head is replaced by noise; who leaves it out of the comparison finds the image, who does not, not."""
    model, (x, y) = network(), victims(3)
    view = seen(model, x, y)
    broken = [g.clone() for g in view.gradients]
    broken[-2] = 3 * torch.randn(broken[-2].shape, generator=rng(1)) * broken[-2].std()
    weights = [torch.ones_like(g) for g in broken]
    weights[-2].zero_()
    scores = []
    for known in ([], weights):
        found = invert(
            [View(model, broken, weights=known)], y, SHAPE, attack="ig", settings=settings(iterations=100), seed=0
        )
        scores.append(reconstruction.psnr(found.images[:, 0].numpy(), x[:, 0].numpy()).mean())
    assert scores[1] > scores[0] + 5


def test_two_rounds_together_beat_one_where_each_is_noisy():
    (x, y), single = victims(3), []
    for round in range(3):
        view = seen(network(seed=round), x, y)
        noise = [0.15 * g.flatten(1).norm(dim=1).mean() / math.sqrt(g[0].numel()) for g in view.gradients]
        noisy = [g + n * torch.randn(g.shape, generator=rng(round)) for g, n in zip(view.gradients, noise, strict=True)]
        single.append(View(view.model, noisy))
    scores = []
    for views in (single[:1], single):
        found = invert(views, y, SHAPE, attack="ig", settings=settings(iterations=100), seed=0)
        scores.append(reconstruction.psnr(found.images[:, 0].numpy(), x[:, 0].numpy()).mean())
    assert scores[1] > scores[0] + 1


def test_a_batch_is_found_in_some_order():
    model, (x, y) = network(), victims(2, 2)
    options = settings(iterations=150, restarts=2)
    found = invert([seen(model, x, y)], y, SHAPE, attack="ig", settings=options, seed=0)
    scores = [
        reconstruction.psnr(reconstruction.match(f, t), t).mean()
        for f, t in zip(found.images.numpy(), x.numpy(), strict=True)
    ]
    assert max(scores) > 20


def test_the_model_is_left_as_it_was():
    model, (x, y) = network(), victims(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    invert([seen(model, x, y)], y, SHAPE, attack="ig", settings=settings(iterations=2), seed=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------------------- odd input


def test_what_cannot_be_inverted():
    model, (x, y) = network(), victims(2)
    view = seen(model, x, y)

    def attempt(gradients=view.gradients, attack="ig", network=model, **more):
        invert([View(network, gradients)], y, SHAPE, attack=attack, settings=settings(iterations=1), seed=0, **more)

    with pytest.raises(InputError, match="9 gradients for a model of 10 parameters"):
        attempt(view.gradients[:-1])
    with pytest.raises(InputError, match=r"body\.0\.weight has shape \(2, 8, 1, 3\), expected \(2, 8, 1, 3, 3\)"):
        attempt([view.gradients[0][..., 0], *view.gradients[1:]])
    with pytest.raises(InputError, match=r"body\.0\.bias holds NaN"):
        attempt([view.gradients[0], torch.full_like(view.gradients[1], math.nan), *view.gradients[2:]])
    with pytest.raises(InputError, match="choose one of dlg, ig, bn, prior"):
        attempt(attack="lbfgs")
    with pytest.raises(InputError, match="none were sent"):
        attempt(attack="bn")
    with pytest.raises(InputError, match="give one that was trained on public images"):
        attempt(attack="prior")
    normed = network_in_training()
    many = [torch.zeros(2, *p.shape) for p in normed.parameters()]
    with pytest.raises(InputError, match="batch of 1"):
        attempt(many, network=normed)
    with pytest.raises(InputError, match=r"range from 0 to 255; scale them to \[0, 1\]"):
        client_update(model, torch.tensor([0.0, 255.0]).repeat(72).view(1, *SHAPE), y[0])
    with pytest.raises(InputError, match="batch of 1"):
        client_update(normed, x[0], y[0])


def network_in_training():
    return network(norm=True).train()


# --------------------------------------------------------------------------------------------------------------- measures


def test_psnr_by_hand():
    truth = np.zeros((3, 1, 2, 2))
    found = truth + np.array([0.1, 1.0, 0.0])[:, None, None, None]
    np.testing.assert_allclose(reconstruction.psnr(found, truth), [20, 0, 100])
    mask = np.zeros((3, 2, 2), dtype=bool)
    mask[:2, 0, 0] = True
    found[0, 0, 1:] = 9.0  # outside
    np.testing.assert_allclose(reconstruction.region_psnr(found, truth, mask), [20, 0, np.nan])


def test_st_lpips_grows_with_the_noise():
    truth = np.random.default_rng(0).random((2, 1, 28, 28)).astype(np.float32).repeat(3, axis=1)
    noise = np.random.default_rng(1).standard_normal(truth.shape).astype(np.float32)
    assert reconstruction.st_lpips(truth, truth).tolist() == [0, 0]
    little, much = (reconstruction.st_lpips(np.clip(truth + s * noise, 0, 1), truth) for s in (0.05, 0.3))
    assert (little > 0).all()
    assert (little < much).all()
    grey = reconstruction.st_lpips(truth[:, :1] * 0.9, truth[:, :1])
    np.testing.assert_allclose(grey, reconstruction.st_lpips(truth * 0.9, truth), rtol=1e-5)
    with pytest.raises(InputError, match="images of 2 channels"):
        reconstruction.st_lpips(truth[:, :2], truth[:, :2])


def test_st_lpips_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    reconstruction._st_lpips.cache_clear()
    with pytest.raises(InputError, match=r"pip install -e '\.\[privacy\]'"):
        reconstruction.st_lpips(np.zeros((1, 1, 28, 28)), np.zeros((1, 1, 28, 28)))


def test_ssim_against_its_formula_for_constant_images():
    """Two constant images: only the luminance term is left, (2 a b + c) / (a² + b² + c)."""
    first, second = np.full((1, 1, 16, 16), 0.2), np.full((1, 1, 16, 16), 0.6)
    c = 0.01**2
    assert reconstruction.ssim(first, second)[0] == pytest.approx((2 * 0.12 + c) / (0.04 + 0.36 + c))
    image = smooth(2, channels=3).numpy()
    np.testing.assert_allclose(reconstruction.ssim(image, image), 1)


def test_matching_undoes_a_permutation():
    truth = smooth(6).numpy()
    order = np.array([3, 0, 5, 1, 4, 2])
    noisy = truth + 0.01 * np.random.default_rng(0).normal(size=truth.shape)
    np.testing.assert_array_equal(reconstruction.match(noisy[order], truth), noisy)


def test_retrieval_ignores_brightness_and_contrast():
    gallery = smooth(20).numpy()
    found = 0.3 + 0.2 * gallery[[4, 7, 9]]
    assert reconstruction.retrieval(found, gallery, np.array([4, 7, 9])).all()
    assert not reconstruction.retrieval(found, gallery, np.array([5, 8, 10])).any()
    assert not reconstruction.retrieval(np.full((1, *SHAPE), 0.5), gallery, np.array([0])).any()


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]])
    assert float(total_variation(x)) == pytest.approx((0 + 0.5) / 2 + (1 + 0.5) / 2)


def test_images_of_different_shape():
    with pytest.raises(InputError, match="need the same"):
        reconstruction.psnr(np.zeros((1, 1, 2, 2)), np.zeros((2, 1, 2, 2)))


@pytest.mark.parametrize("module", [attacks, defences, reconstruction])
def test_examples_in_docstrings(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed


# Whose gradient is it, without a reconstruction -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidates():
    """(network, images, labels, gradients in one row each by a plain loop)."""
    model, x, y = network(), smooth(30, seed=5), torch.arange(30) % 2
    return model, x, y, torch.stack([plain(model, x[i : i + 1], y[i : i + 1]) for i in range(30)])


def plain(model, x, y):
    return convnet.flat(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def everybody(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def test_a_gallery_is_what_a_plain_loop_gives_and_a_match_the_cosine(candidates, monkeypatch):
    model, x, y, rows = candidates
    monkeypatch.setattr(fingerprint, "TOGETHER", 7)
    torch.testing.assert_close(fingerprint.each_gradient(model, x, y), rows, rtol=1e-4, atol=1e-6)
    noisy = rows[:4] + 0.01 * torch.randn(4, rows.shape[1], generator=rng(1))
    naive = torch.tensor([[float(torch.dot(r, g) / r.norm() / g.norm()) for g in rows] for r in noisy])
    torch.testing.assert_close(fingerprint.Gallery(rows).match(noisy), naive, rtol=1e-4, atol=1e-5)
    sent = noisy * (noisy.abs() > noisy.abs().quantile(0.9, dim=1, keepdim=True))
    naive = torch.stack([torch.cosine_similarity(r[None, r != 0], rows[:, r != 0]) for r in sent])
    torch.testing.assert_close(fingerprint.Gallery(rows).match(sent, sent_only=True), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entries", [None, 20], ids=["more entries than candidates", "fewer"])
def test_a_joint_fit_is_ridge_regression(candidates, entries):
    rows = candidates[3][:, :entries].double()
    seen = (rows[:4].mean(0) + 1e-3 * torch.randn(rows.shape[1], generator=rng(2)))[None]
    fit = torch.linalg.lstsq(rows.T, seen[0]).solution
    n, p = rows.shape
    noise = (seen[0] - rows.T @ fit).square().sum() / (p - n) if p > n else 0.0
    values = torch.linalg.eigvalsh(rows @ rows.T)
    penalty = max(float(noise) * 4 * n, fingerprint.FLOOR * float(values.max()))
    inner = rows.T @ rows + penalty * torch.eye(p, dtype=torch.float64)
    naive = rows @ torch.linalg.solve(inner, seen[0])
    found = fingerprint.Gallery(rows.float()).joint(seen.float(), 4)[0].double()
    torch.testing.assert_close(found, naive, rtol=0.02, atol=float(naive.abs().max()) * 2e-3)


def test_the_undefended_are_found_in_any_batch_and_nobody_in_noise(candidates):
    rows = candidates[3]
    gallery, n = fingerprint.Gallery(rows), len(rows)
    for batch in (1, 2, 5):
        members = torch.randperm(n, generator=rng(batch)).view(-1, batch)
        scores = gallery.joint(rows[members].mean(1), batch)
        assert fingerprint.identified(scores, members, everybody(scores), 1).mean() == 1
        area, rate = fingerprint.membership(scores, members, everybody(scores), 0.01)
        assert area.min() == rate.min() == 1
    members = torch.arange(n).repeat(40)[:, None]
    for scores in (gallery.match, lambda r: gallery.joint(r, 1)):
        noise = scores(torch.randn(len(members), rows.shape[1], generator=rng(3)))
        for most in (1, 10):
            by_luck = fingerprint.chance(everybody(noise), 1, most)
            assert by_luck == pytest.approx(most / n)
            found = fingerprint.identified(noise, members, everybody(noise), most).mean()
            assert found == pytest.approx(by_luck, abs=4 * (by_luck * (1 - by_luck) / len(members)) ** 0.5)
        area, rate = fingerprint.membership(noise, members, everybody(noise), 0.1)
        assert area.mean() == pytest.approx(0.5, abs=0.04)
        assert rate.mean() == pytest.approx(0.1, abs=0.04)


def test_who_is_first_by_hand():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    members, all_of_them = torch.tensor([[1], [0]]), torch.ones(2, 4, dtype=torch.bool)
    assert fingerprint.identified(scores, members, all_of_them, 1).tolist() == [0, 0.25]
    assert fingerprint.identified(scores, members, all_of_them, 2).tolist() == [0.5, 0.5]  # equal: in random order
    area, rate = fingerprint.membership(scores, members, all_of_them, 0.01)
    assert area.tolist() == [0.5, 0.5]  # 1 of 3 above, 1 as high
    assert rate.tolist() == [0, 0.25]
    without = all_of_them.clone()
    without[0, 0] = False  # not in question
    assert fingerprint.identified(scores, members, without, 1)[0] == 0.5
    both = torch.tensor([[0, 3]])  # a batch: the server names two
    assert fingerprint.identified(scores[:1], both, all_of_them[:1], 1).tolist() == [0.5]
    area, rate = fingerprint.membership(scores[:1], both, all_of_them[:1], 0.01)
    assert (area.tolist(), rate.tolist()) == ([0.5], [0.5])


def test_a_gradient_without_an_entry_matches_nobody(candidates):
    rows = candidates[3]
    gallery, nothing = fingerprint.Gallery(rows), torch.zeros(1, rows.shape[1])
    for scores in (
        gallery.match(nothing),
        gallery.match(nothing, sent_only=True),
        gallery.joint(nothing, 2),
        gallery.joint(nothing, 2, sent_only=True),
    ):
        found = fingerprint.identified(scores, torch.tensor([[0]]), everybody(scores), 1)
        assert found.item() == pytest.approx(1 / len(rows))


def test_what_does_not_fit_is_said_in_a_line(candidates):
    model, x, y, rows = candidates
    gradients = [torch.stack([p, p]) for p in model.parameters()]
    gallery = fingerprint.Gallery(rows)
    scores = gallery.match(rows[:2])
    broken = [g.clone() for g in gradients]
    broken[1].view(-1)[0] = math.nan
    for call, said in (
        (lambda: fingerprint.received(model, gradients[1:]), "parameters"),
        (lambda: fingerprint.received(model, [g[:, :1] for g in gradients]), "received gradient of"),
        (lambda: fingerprint.received(model, broken), "NaN"),
        (lambda: fingerprint.each_gradient(model, x[:0], y[:0]), "candidates of shape"),
        (lambda: fingerprint.each_gradient(model, x * math.nan, y), "NaN"),
        (lambda: gallery.match(rows[:, 1:]), "entries"),
        (lambda: gallery.joint(rows[:1], 31), "a batch of 31 images, but a gallery of 30"),
        (lambda: fingerprint.identified(scores, torch.tensor([[30], [0]]), everybody(scores), 1), "not in the gallery"),
        (
            lambda: fingerprint.identified(scores, torch.tensor([[0], [0]]), ~everybody(scores), 1),
            "not in the gallery",
        ),
        (lambda: fingerprint.identified(scores, torch.arange(62).view(2, 31), everybody(scores), 1), "a batch of 31"),
        (lambda: fingerprint.identified(scores * math.nan, torch.tensor([[0], [1]]), everybody(scores), 1), "NaN"),
        (
            lambda: fingerprint.membership(scores[:, :1], torch.tensor([[0], [0]]), everybody(scores[:, :1]), 1),
            "larger",
        ),
    ):
        with pytest.raises(InputError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
