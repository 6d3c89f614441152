"""The imprint layer against a second implementation, image by image, and a client's checks against both attackers."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import params
from experiments.gia_defense import cells as ev
from experiments.gia_defense import imprint as imprints
from medsec.core.errors import InputError
from medsec.inversion import defences, imprint
from medsec.inversion import scores as reconstruction
from medsec.nets import convnet

SHAPE, BINS = (1, 12, 12), 48


def drawn(n, seed):
    """Smooth images whose brightness varies, and labels."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 12, 12, generator=rng) * (0.2 + 0.8 * torch.rand(n, 1, 1, 1, generator=rng))
    return x, torch.randint(0, 2, (n,), generator=rng)


@pytest.fixture(scope="module")
def agreed():
    return convnet.new(12, 1, 2, width=4, seed=0)


@pytest.fixture(scope="module")
def sent(agreed):
    return imprint.in_front(agreed, *imprint.brightness(drawn(300, 1)[0], BINS), 1 / BINS)


def recovered(model, x, y, defend=defences.none):
    gradient = defend(model, x, y, 0)
    parts, shares = imprint.bins(*gradient[:2])
    top = imprint.strongest(parts, len(x))
    return imprint.images(parts[top], shares[top], SHAPE), parts, top


def alone(model, x):
    """Which images are alone between two levels, by counting: no gradient."""
    layer = model.body[0]
    levels = (-layer.bias.detach()).tolist()
    places = [sum(image.mean().item() > level for level in levels) for image in x]
    return torch.tensor([place > 0 and places.count(place) == 1 for place in places])


def test_images_alone_in_their_bins_come_back_and_others_do_not(sent):
    x, y = drawn(16, 2)
    found, _, _ = recovered(sent, x, y)
    # The nearest of all: which one a matching gives to whom depends on the noise in empty bins, and that on the processor.
    error = (found[:, None] - x[None]).square().mean((2, 3, 4)).amin(0)
    psnr = -10 * error.clamp_min(1e-10).log10()
    single = alone(sent, x)
    assert 8 <= single.sum() <= 15, "both kinds are tested"
    assert (psnr[single] > 50).all()
    assert (psnr[~single] < 50).all()  # (of two in a bin the one with the larger error may come back at 30 dB)


def test_the_layers_gradient_is_that_of_a_loop_over_images_and_rows(agreed, sent):
    """The forward pass written out, the derivative by the brightness that the layer adds, and every row by itself."""
    x, y = drawn(5, 3)
    layer = sent.body[0]
    weight, bias = torch.zeros(BINS, 144, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for image, label in zip(x, y, strict=True):
        heights = [(image.mean() + b).item() for b in layer.bias.detach()]
        offset = torch.tensor(sum(h for h in heights if h > 0) / BINS, requires_grad=True)
        logits = agreed.head(agreed.body(4 * image[None] - 2 + offset).flatten(1))
        (delta,) = torch.autograd.grad(cross_entropy(logits, label[None]), offset)
        for k, h in enumerate(heights):
            if h > 0:
                weight[k] += (delta / BINS / len(x) * image.flatten()).double()
                bias[k] += (delta / BINS / len(x)).double()
    gradient = defences.none(sent, x, y, 0)
    torch.testing.assert_close(gradient[0].double(), weight, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(gradient[1].double(), bias, rtol=1e-3, atol=1e-8)
    parts, shares = imprint.bins(*gradient[:2])
    for k in range(BINS - 1):
        torch.testing.assert_close(parts[k], gradient[0][k].double() - gradient[0][k + 1].double())
    assert torch.equal(parts[-1], gradient[0][-1].double())
    assert shares[-1] == gradient[1][-1].double()


def test_the_sum_of_clients_gives_what_each_of_them_gives(sent):
    x, y = drawn(12, 4)
    each = [defences.none(sent, x[at], y[at], 0) for at in torch.arange(12).split(3)]
    parts, shares = imprint.bins(*(sum(g[i] for g in each) for i in (0, 1)))
    top = imprint.strongest(parts, 12)
    found = imprint.images(parts[top], shares[top], SHAPE).numpy()
    psnr = torch.from_numpy(reconstruction.psnr(reconstruction.match(found, x.numpy()), x.numpy()))
    single = alone(sent, x)
    assert single.sum() >= 6
    assert (psnr[single] > 50).all()


def test_the_agreed_network_works_on_and_is_left_alone(agreed, sent):
    x, _ = drawn(4, 5)
    before = [p.clone() for p in agreed.parameters()]
    none = imprint.in_front(agreed, torch.zeros(2, 144), torch.zeros(2), 1.0)
    torch.testing.assert_close(none(x), agreed(x))
    assert not torch.allclose(sent(x), agreed(x))
    assert all(torch.equal(a, b) for a, b in zip(before, agreed.parameters(), strict=True))


def test_every_defence_of_gradients_works_on_it(sent):
    """Soteria hides a layer that is not needed; noise and few entries spoil the quotient; a stand-in comes back itself."""
    x, y = drawn(4, 6)
    own = {"gradient_noise": {"ratio": 3.0}, "dp_sgd": {"clip": 1.0, "noise_multiplier": 0.5}}
    own |= {"topk": {"keep": 0.01}, "soteria": {"prune": 0.8}}
    plain, _, _ = recovered(sent, x, y)
    for name in defences.DEFENCES:
        defend = defences.configured(name, own.get(name, {}), 0)
        found, _, _ = recovered(sent, x, y, defend)
        same = torch.allclose(found, plain, atol=1e-4)
        assert same == (name in ("none", "soteria")), name
    stand_in = drawn(4, 7)[0]
    found, _, _ = recovered(sent, x, y, defences.send(lambda *_: stand_in))
    again, _, _ = recovered(sent, stand_in, y)
    assert torch.equal(found, again)


def test_who_is_named(sent):
    gallery, labels = drawn(40, 8)
    _, parts, top = recovered(sent, gallery[:6], labels[:6])
    assert set(imprint.named(parts[top], gallery).tolist()) >= set(torch.arange(6)[alone(sent, gallery[:6])].tolist())
    noisy = defences.configured("gradient_noise", {"ratio": 0.001}, 0)  # (the rest of the gradient is far longer)
    _, parts, _ = recovered(sent, gallery[:1], labels[:1], noisy)
    assert imprint.expected(parts, sent.body[0], gallery, 1).tolist() == [0]


# The client -----------------------------------------------------------------------------------------------------------


def test_correlations_are_those_of_a_loop_over_rows(sent):
    x, y = drawn(3, 9)
    gradient = defences.none(sent, x, y, 0)
    rows = [*gradient[0].double(), torch.zeros(144, dtype=torch.float64)]
    for image, found in zip(x, imprint.echoes(sent, gradient, x), strict=True):
        best = 0.0
        for i, a in enumerate(rows):
            for b in rows[i + 1 :]:
                if (a - b).norm() > 1e-5 * gradient[0].norm(dim=1).max():
                    pair = torch.stack([a - b, image.flatten().double()])
                    best = max(best, abs(torch.corrcoef(pair)[0, 1].item()))
        assert found.item() == pytest.approx(best, abs=1e-3)


def test_a_client_notices_both_attackers_and_not_an_honest_network(agreed, sent):
    x, y = drawn(8, 10)
    other = drawn(8, 11)[0]
    trap = imprint.in_front(agreed, *imprint.traps(drawn(300, 1)[0], BINS, 1 / 8, 0), 1 / BINS)
    assert imprint.oddities(agreed, agreed, 0.98) == []
    for network in (sent, trap):
        assert any("agreed was none" in why for why in imprint.oddities(network, agreed, 0.98))
        gradient = defences.none(network, x, y, 0)
        assert imprint.echoes(network, gradient, x).max() > 0.98
        assert imprint.echoes(network, gradient, other).max() < 0.9
    assert imprint.oddities(sent, sent, 0.98) == ["body.0.weight: its rows are parallel"], (
        "where its shape was agreed on"
    )
    assert imprint.oddities(trap, trap, 0.98) == [], "traps are not parallel: only the gradient shows them"
    assert imprint.parallel(sent)["body.0.weight"] == pytest.approx(1)
    assert imprint.echoes(agreed, defences.none(agreed, x, y, 0), x).max() == 0, (
        "no layer has rows of that many entries"
    )


def test_where_the_client_is_fooled(agreed):
    """The same layer behind a permutation of the pixels: the server undoes it, the client compares with images as they are."""
    weight, bias = imprint.brightness(drawn(300, 1)[0], BINS)
    sent = imprint.in_front(agreed, weight, bias, 1 / BINS)
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0))
    x, y = drawn(6, 12)
    gradient = defences.none(sent, x, y, 0)
    hidden = [gradient[0][:, order], *gradient[1:]]
    assert imprint.echoes(sent, gradient, x).max() > 0.98
    assert imprint.echoes(sent, hidden, x).max() < 0.9


def test_bad_input(agreed, sent):
    x, y = drawn(4, 13)
    gradient = defences.none(sent, x, y, 0)
    parts, shares = imprint.bins(*gradient[:2])
    cases = [
        (lambda: imprint.brightness(x[:0], BINS), "no public images"),
        (lambda: imprint.traps(x[:0], BINS, 0.1, 0), "no public images"),
        (lambda: imprint.brightness(x * math.nan, BINS), "scale them"),
        (lambda: imprint.brightness(x, 1), "at least 2 bins"),
        (lambda: imprint.strongest(parts, 0), "a batch of 0 images"),
        (lambda: imprint.strongest(parts, BINS + 1), f"and {BINS} bins"),
        (lambda: imprint.bins(gradient[0] * math.nan, gradient[1]), "NaN"),
        (lambda: imprint.bins(gradient[0], gradient[1][:-1]), "those of the layer"),
        (lambda: imprint.bins(*defences.none(agreed, x, y, 0)[:2]), "those of the layer"),
        (lambda: imprint.images(parts, shares, (3, 12, 12)), "another model"),
        (lambda: imprint.in_front(torch.nn.Linear(2, 2), *imprint.brightness(x, 4), 1.0), r"convnet\.ConvNet"),
        (lambda: imprint.echoes(sent, gradient[1:], x), "parameters"),
        (lambda: imprint.echoes(sent, [g * math.nan for g in gradient], x), "NaN"),
    ]
    for call, text in cases:
        with pytest.raises(InputError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    broken = imprint.in_front(agreed, torch.full((4, 144), math.nan), torch.zeros(4), 1.0)
    assert "it holds NaN or infinite values" in imprint.oddities(broken, agreed, 0.98)
    assert (imprint.images(torch.zeros(1, 144), torch.zeros(1), SHAPE) == 0.5).all(), "an empty bin is grey"


# Cells ----------------------------------------------------------------------------------------------------------------

SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "inversion": {
        "federation": {"width": 4, "n_clients": 2, "images_per_client": 12, "rounds": 1, "batch": 6},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
        "defences": {"shadow_hardened": {"k": 2}},
    },
}
GIVEN = {"victims": 8, "batches": [1, 4], "gallery": 24, "bins": 64, "gain": 1.0, "bound": 0.98, "rounds": 1}


@pytest.fixture(scope="module")
def p(tmp_path_factory, write_npz):
    file = write_npz(tmp_path_factory.mktemp("cohort"), per_class=120)
    tree = params.merge(params.load().model_dump(), SMALL)
    yield params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))
    ev.instruments._prepare.cache_clear()


@pytest.mark.parametrize("variant", ["none", "gradient_noise", "shadow_hardened"])
def test_a_cell_has_the_rows_that_it_promises(p, variant):
    table, _ = ev.run("npz", p, imprints.plan(variant, 0, GIVEN))
    assert not table.duplicated(["scenario", "metric", *ev.KEYS]).any()
    rows = table.set_index(["scenario", "attack", "batch", "round", "metric"])["value"].sort_index()
    for scenario, batch in (("imprint", ""), ("imprint", "4"), ("secagg", "4")):
        found = rows[scenario, "", batch, ""]
        assert {"recovered", "psnr_median", "identified_top1", "candidates"} <= set(found.index)
        assert found["candidates"] == 24
    assert ("secagg", "fingerprint", "4", "", "identified_top1") in rows.index
    assert rows["imprint", "", "4", "", "alarm_false"] < 0.5
    others = set(table["attack"]) - {"", "fingerprint"}
    assert others == (set(imprints.OTHERS) if variant == "none" else set())
    if variant == "none":
        assert rows["imprint", "", "", "", "recovered"] == 1
        assert rows["imprint", "", "4", "", "alarm"] == 1
        assert rows["imprint", "agreed", "4", "", "recovered"] == 0
        assert rows["imprint", "agreed", "4", "1", "alarm"] == 0
        summary = ev.summarise(table, p)
        line = imprints.lines(summary, ev.instruments.VARIANTS).set_index("defence").loc["none"]
        assert line["recovered, batch of 1"] == "1.00"
        said = imprints.told(summary, ev.instruments.VARIANTS)
        assert "the batch size does not protect" in said
        assert "not so under `none`" in said
    else:
        assert rows["imprint", "", "4", "", "recovered"] == 0


def test_its_section_is_in_no_other_cells_identity(p):
    other = params.validate(params.merge(p.model_dump(), {"imprint": {"bins": 9}}))
    planned = {cell.name: cell for cell in ev.quick(p)}
    for cell in ev.quick(other):
        same = cell == planned[cell.name]
        assert same == (cell.arm != "imprint")
    with pytest.raises(InputError, match=r"lower imprint\.batches"):
        ev.run("npz", p, imprints.plan("none", 0, GIVEN | {"batches": [20]}))
