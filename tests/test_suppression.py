"""Suppression against loops and brute force, what an attacker can tell at most, and purifiers against closed forms."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from medphantom import chest as phantom
from medsec.core.errors import InputError
from medsec.core.settings import PurifierParams
from medsec.inversion import defences as gd
from medsec.inversion import purifier
from medsec.inversion import scores as reconstruction
from medsec.inversion import substitution as suppression
from medsec.nets import autoencoder as ae
from medsec.nets import convnet

SIZE = 28


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def public():
    y = np.arange(200) % 2
    return torch.from_numpy(phantom.render(np.arange(200), y, seed=1, size=SIZE).images).float()[:, None] / 255


@pytest.fixture(scope="module")
def autoencoder(public):
    return ae.train_autoencoder(public, latent=8, epochs=10, lr=8e-3, batch=16, seed=0)


# --------------------------------------------------------------------------------------------------------------- groups


def naive_groups(z, y, k):
    """As documented, in plain Python: a list of groups, each a list of indices."""
    found = []
    for label in sorted(set(y)):
        left = [i for i in range(len(z)) if y[i] == label]
        while len(left) >= 2 * k:
            centre = [sum(z[i][d] for i in left) / len(left) for d in range(len(z[0]))]
            first = max(left, key=lambda i: math.dist(z[i], centre))
            near = sorted(left, key=lambda i: math.dist(z[i], z[first]))[:k]
            found.append(near)
            left = [i for i in left if i not in near]
        found.append(left)
    return found


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_groups_are_a_loop(k):
    z, y = torch.randn(41, 3, generator=rng(k)), torch.arange(41) % 3
    found = suppression.groups(z, y, k=k, grouping="similar", seed=0)
    have = [sorted((found == g).nonzero().flatten().tolist()) for g in range(int(found.max()) + 1)]
    assert sorted(have) == sorted(sorted(g) for g in naive_groups(z.double().tolist(), y.tolist(), k))


@pytest.mark.parametrize("grouping", suppression.GROUPINGS)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_every_group_hides_its_members(grouping, k):
    z = torch.randn(60, 4, generator=rng())
    y = torch.tensor([0] * 30 + [1] * 23 + [5] * 7)
    before = torch.get_rng_state()
    found = suppression.groups(z, y, k=k, grouping=grouping, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for g in found.unique():
        member = found == g
        assert len(y[member].unique()) == 1, "a group of two classes"
        short = int(y[member][0]) == 5 and k == 10  # fewer than k: one group of all
        assert int(member.sum()) == 7 if short else k <= int(member.sum()) < max(2, 2 * k)
    again, other = (suppression.groups(z, y, k=k, grouping=grouping, seed=s) for s in (3, 4))
    assert torch.equal(found, again)
    assert torch.equal(found, other) == (grouping == "similar")


def test_similar_groups_are_tighter_than_random_ones():
    z, y = torch.randn(120, 4, generator=rng()), torch.zeros(120, dtype=torch.int64)

    def spread(grouping):
        found = suppression.groups(z, y, k=4, grouping=grouping, seed=0)
        return sum(float((z[found == g] - z[found == g].mean(0)).square().sum()) for g in found.unique())

    assert spread("similar") < 0.5 * spread("random")


def test_groups_name_what_cannot_be_hidden():
    z, y = torch.randn(7, 2, generator=rng()), torch.tensor([0, 0, 0, 0, 1, 2, 2])
    with pytest.raises(InputError, match="class 1 has a single image; leave it out, or use k = 1"):
        suppression.groups(z, y, k=2, grouping="similar", seed=0)
    assert len(suppression.groups(z, y, k=1, grouping="similar", seed=0).unique()) == 7
    for k, grouping in [(0, "similar"), (2, "nearest")]:
        with pytest.raises(InputError, match="groups: k"):
            suppression.groups(z, y, k=k, grouping=grouping, seed=0)


# ------------------------------------------------------------------------------------------------------------ drawings


@pytest.mark.parametrize("grouping", suppression.GROUPINGS)
def test_drawings_are_decoded_means(grouping, autoencoder, public):
    x, y = public[:21], torch.arange(21) % 2
    found = suppression.drawings(autoencoder, x, y, k=4, grouping=grouping, seed=0)
    group = suppression.groups(autoencoder.encode(x), y, k=4, grouping=grouping, seed=0)
    for i in range(21):
        others = [j for j in range(21) if group[j] == group[i]]
        mean = torch.stack([autoencoder.encode(x[j : j + 1])[0] for j in others]).mean(0)
        torch.testing.assert_close(found[i], autoencoder.decode(mean[None])[0], rtol=1e-4, atol=1e-5)
    assert len(found.unique(dim=0)) == len(group.unique())
    plain = suppression.drawings(autoencoder, x, y, k=1, grouping=grouping, seed=0)
    torch.testing.assert_close(plain, autoencoder(x))
    assert 0 <= plain.min() <= plain.max() <= 1


# ----------------------------------------------------------------------------------------------------------- stand-ins


def place_of(image, bank):
    return int((bank == image).flatten(1).all(1).nonzero()[0, 0])


def test_stand_ins_are_the_cheapest_assignment(autoencoder, public):
    """Brute force over all assignments of four images, with the definition written out."""
    x, y = public[:4], torch.zeros(4, dtype=torch.int64)
    bank, classes = public[100:106], torch.zeros(6, dtype=torch.int64)
    found = suppression.stand_ins(autoencoder, x, y, bank, classes, k=2, grouping="similar", seed=0)
    scale = autoencoder.encode(bank).std(0)
    z, candidates = autoencoder.encode(x) / scale, autoencoder.encode(bank) / scale
    group = suppression.groups(z, y, k=2, grouping="similar", seed=0)
    means = torch.stack([z[group == g].mean(0) for g in group])

    def cost(places):
        return float(sum((means[i] - candidates[j]).square().sum() for i, j in enumerate(places)))

    chosen = [place_of(image, bank) for image in found]
    assert cost(chosen) == pytest.approx(min(map(cost, itertools.permutations(range(6), 4))), rel=1e-5)


@pytest.mark.parametrize("grouping", suppression.GROUPINGS)
def test_stand_ins_are_public_images_of_the_class_each_used_evenly(grouping, autoencoder, public):
    y = torch.tensor([0] * 30 + [1] * 10)
    bank, classes = public[100:124], torch.tensor([0] * 12 + [1] * 12)
    before = torch.get_rng_state()
    found = suppression.stand_ins(autoencoder, public[:40], y, bank, classes, k=4, grouping=grouping, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    chosen = torch.tensor([place_of(image, bank) for image in found])
    assert torch.equal(classes[chosen], y)
    times = torch.bincount(chosen, minlength=24)
    assert times[:12].max() <= 3, "30 images on 12: at most 3 times each"
    assert times[12:].max() == 1
    again = suppression.stand_ins(autoencoder, public[:40], y, bank, classes, k=4, grouping=grouping, seed=0)
    assert torch.equal(found, again)


def test_stand_ins_of_similar_groups_are_more_like_the_images(autoencoder, public):
    y = torch.arange(100) % 2

    def distance(grouping, k):
        found = suppression.stand_ins(autoencoder, public[:100], y, public[100:], y, k=k, grouping=grouping, seed=0)
        return float((autoencoder.encode(found) - autoencoder.encode(public[:100])).square().sum())

    assert distance("similar", 1) < distance("similar", 4) < 0.9 * distance("random", 4)


def test_within_a_group_the_assignment_is_blind(autoencoder, public):
    """Over many seeds the public image nearest to a member is not its own more often than another member's."""
    x, y = public[:4], torch.zeros(4, dtype=torch.int64)
    bank, classes = public[100:104], torch.zeros(4, dtype=torch.int64)
    chosen = []
    for seed in range(60):
        found = suppression.stand_ins(autoencoder, x, y, bank, classes, k=4, grouping="similar", seed=seed)
        chosen.append([place_of(image, bank) for image in found])
    share = np.array([[np.mean(np.array(chosen)[:, i] == j) for j in range(4)] for i in range(4)])
    assert share.min() > 0.08
    assert share.max() < 0.45, "1/4 each, 60 draws"


def test_nobody_finds_more_than_one_of_k(autoencoder, public):
    """The guarantee: members of a group share a drawing, so at most one of them is the nearest to it."""
    y = torch.arange(80) % 2
    gallery = autoencoder(public[:80]).numpy()
    for k in (2, 4):
        found = suppression.drawings(autoencoder, public[:80], y, k=k, grouping="similar", seed=0).numpy()
        assert reconstruction.retrieval(found, gallery, np.arange(80)).mean() <= 1 / k
    alone = suppression.drawings(autoencoder, public[:80], y, k=1, grouping="similar", seed=0).numpy()
    assert reconstruction.retrieval(alone, gallery, np.arange(80)).mean() == 1


def test_stand_ins_hide_a_member_among_its_group(autoencoder, public):
    """The design's guarantee, in expectation over the blind assignment: whoever guesses, is right one time in k at most."""
    y, k = torch.zeros(48, dtype=torch.int64), 4
    x, bank = public[:48], public[100:]
    latents, candidates = autoencoder.encode(x), autoencoder.encode(bank)
    scale = candidates.std(0)
    right = []
    for seed in range(20):
        found = suppression.stand_ins(
            autoencoder, x, y, bank, torch.zeros(100, dtype=torch.int64), k=k, grouping="similar", seed=seed
        )
        distance = torch.cdist(autoencoder.encode(found) / scale, latents / scale)
        right.append(float((distance.argmin(1) == torch.arange(48)).float().mean()))
    assert np.mean(right) <= 1 / k
    alone = suppression.stand_ins(
        autoencoder, x, y, bank, torch.zeros(100, dtype=torch.int64), k=1, grouping="similar", seed=0
    )
    nearest = torch.cdist(autoencoder.encode(alone) / scale, latents / scale).argmin(1)
    assert float((nearest == torch.arange(48)).float().mean()) > 1 / k, "without groups more are found"


def test_public_only_draws_any_image_of_the_class(public):
    model, bank, classes = convnet.new(SIZE, 1, 2, width=4, seed=0), public[100:110], torch.arange(10) % 2
    draw = suppression.public_only(bank, classes, seed=0)
    x, y = public[:6], torch.tensor([0, 1, 1, 0, 1, 0])
    found = draw(model, x, y, 0)
    assert [place_of(image, bank) % 2 for image in found] == y.tolist()
    assert torch.equal(found, draw(model, x, y, 0)), "the same batch in the same round"
    seen = {place_of(image, bank) for round in range(20) for image in draw(model, x, y, round)}
    assert seen == set(range(10)), "other images in other rounds"
    with pytest.raises(InputError, match="no public image of class 1"):
        suppression.public_only(bank, torch.zeros(10, dtype=torch.int64), seed=0)(model, x, y, 0)


# --------------------------------------------------------------------------------------------------------- the memory


def test_a_substitution_sends_the_substitutes(public):
    model, y = convnet.new(SIZE, 1, 2, width=4, seed=0), torch.arange(12) % 2
    x = torch.cat([public[:11], public[:1]])  # the first image comes twice, once with each label
    y[11] = 1
    used = public[50:62]
    defence = suppression.substituted(x, y, used)
    rows = [4, 0, 11]
    found = defence(model, x[rows], y[rows], 0)
    assert torch.equal(found, used[rows])
    assert torch.equal(found, defence(model, x[rows].clone(), y[rows], 9))
    sent = gd.send(defence)(model, x[rows], y[rows], 0)
    assert all(torch.equal(a, b) for a, b in zip(sent, convnet.gradients(model, found, y[rows]), strict=True))


def test_bad_input_is_named(autoencoder, public):
    model, x, y = convnet.new(SIZE, 1, 2, width=4, seed=0), public[:8], torch.arange(8) % 2
    defence = suppression.substituted(x, y, public[8:16])
    for image, label, message in [
        (x[:2].flip(3), y[:2], "is not in the set that was given at the start"),
        (x[:1], 1 - y[:1], "with label 1 is not in the set"),
        (x[:2], y[:1], "labels of shape"),
        (x[:1] - 1, y[:1], "images range"),
        (torch.rand(1, 1, 32, 32), y[:1], r"images of shape \(1, 32, 32\), but the shadow generator"),
    ]:
        with pytest.raises(InputError, match=message):
            defence(model, image, label, 0)
    with pytest.raises(InputError, match=r"substitutes of shape \(3, 1, 28, 28\) for images of shape \(8, 1, 28, 28\)"):
        suppression.substituted(x, y, public[:3])
    options = {"k": 2, "grouping": "similar", "seed": 0}
    for image, label, message in [
        (x, y[:5], r"labels of shape \(5,\), torch.int64: need \(8,\)"),
        (x, y.float(), "torch.float32"),
        (2 * x, y, "images range"),
        (torch.rand(8, 3, 28, 28), y, r"images of shape \(3, 28, 28\), but the autoencoder draws \(1, 28, 28\)"),
    ]:
        with pytest.raises(InputError, match=message):
            suppression.drawings(autoencoder, image, label, **options)
        with pytest.raises(InputError, match=message):
            suppression.stand_ins(autoencoder, image, label, public[100:], torch.arange(100) % 2, **options)
    with pytest.raises(InputError, match="no public image of class 1"):
        suppression.stand_ins(autoencoder, x, y, public[100:], torch.zeros(100, dtype=torch.int64), **options)
    broken = copy.deepcopy(autoencoder)
    with torch.no_grad():
        broken.encode[0].weight[0] = math.nan
    with pytest.raises(InputError, match="NaN or infinite latents"):
        suppression.drawings(broken, x, y, **options)


# ---------------------------------------------------------------------------------------------------- what noise leaves


def pairs(n=200, noise=0.1):
    """Smooth images and the same with noise."""
    coarse = torch.rand(n, 1, 3, 3, generator=rng(1))
    clean = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    return clean + noise * torch.randn(clean.shape, generator=rng(2)), clean


def test_the_wiener_filter_is_ridge_regression():
    changed, clean = pairs()
    a, b = changed.flatten(1).double().numpy(), clean.flatten(1).double().numpy()
    strength = 0.01 * ((a - a.mean(0)) ** 2).sum(0).mean()
    expected = Ridge(alpha=strength).fit(a, b).predict(a).clip(0, 1)
    np.testing.assert_allclose(purifier.wiener(changed, clean, 0.01)(changed).flatten(1), expected, atol=1e-5)


def test_a_purifier_removes_what_can_be_removed():
    """An offset goes entirely; noise goes in part; of an image that says nothing the mean is left."""
    params = PurifierParams(images=64, width=8, epochs=20, batch=32, lr=3.0e-3)
    changed, clean = pairs()
    for made, bound in ((clean + 0.3, 1e-4), (changed, 0.3 * 0.1**2)):
        purify, name = purifier.fit(made[:150], clean[:150], params, 0)
        assert name in ("wiener", "network")
        assert F.mse_loss(purify(made[150:]), clean[150:]) < bound
    blind, _ = purifier.fit(torch.zeros_like(clean[:150]), clean[:150], params, 0)
    assert F.mse_loss(blind(torch.zeros_like(clean[150:])), clean[150:]) < 1.1 * F.mse_loss(
        clean.mean(0).expand(50, -1, -1, -1), clean[150:]
    )
    same, name = purifier.fit(clean[:150], clean[:150], params, 0)
    assert F.mse_loss(same(clean[150:]), clean[150:]) < 1e-6
    state = torch.get_rng_state()
    again, _ = purifier.fit(changed[:150], clean[:150], params, 0)
    assert torch.equal(again(changed), purifier.fit(changed[:150], clean[:150], params, 0)[0](changed))
    assert torch.equal(state, torch.get_rng_state())


def test_purifiers_need_pairs():
    changed, clean = pairs()
    for a, b in ((changed[:10], clean[:9]), (changed[:4], clean[:4]), (changed[:, 0], clean[:, 0])):
        with pytest.raises(InputError, match="must be the same"):
            purifier.fit(a, b, PurifierParams(images=64, width=2, epochs=1, batch=4, lr=1e-3), 0)
