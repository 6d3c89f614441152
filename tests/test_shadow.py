"""The shadow defence against naive replays of its steps, its controls, and bad input."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medphantom import chest as phantom
from medsec.core import seeds
from medsec.core.errors import InputError
from medsec.core.settings import ShadowParams
from medsec.inversion import defences as gd
from medsec.inversion import perturbation, shadow
from medsec.nets import autoencoder as ae
from medsec.nets import convnet
from medsec.nets.gradcam import grad_cam

SIZE = 28
SETTINGS = ShadowParams(
    steps=2, lr=1e-2, freeze=0.4, momentum=0.1, ema=0.5, layer="body", top=0.3, alpha=[0.1, 0.5], scale=0.19
)
CONTROLS = [perturbation.shuffled, perturbation.inverted, perturbation.offset, perturbation.gaussian]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(channels=1, norm=False, size=SIZE, seed=3):
    """An untrained network, most of whose last maps have something above 0 to show."""
    model = convnet.new(size, channels, 3, width=8, seed=seed, norm=norm)
    with torch.no_grad():
        model.body[9 if norm else 6].bias.add_(0.1 * torch.randn(8, generator=rng(seed)))
    return model


def smooth(n=3, channels=1, size=SIZE, seed=0):
    coarse = torch.rand(n, channels, 6, 6, generator=rng(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def labels(n=3):
    return torch.arange(n) % 3


@pytest.fixture(scope="module")
def public():
    y = np.arange(200) % 2
    return torch.from_numpy(phantom.render(np.arange(200), y, seed=1, size=SIZE).images).float()[:, None] / 255


@pytest.fixture(scope="module")
def autoencoder(public):
    return ae.train_autoencoder(public, latent=8, epochs=30, lr=8e-3, batch=16, seed=0)


def make(kind, autoencoder, rounds=5, channels=1, seed=0, **changes):
    settings = SETTINGS.model_copy(update=changes)
    if kind == "released":
        return shadow.shadow_released(SIZE, channels, settings, latent=8, rounds=rounds, seed=seed)
    if channels == 3:
        autoencoder = ae.new_autoencoder(SIZE, 3, latent=8, seed=1)
    return shadow.shadow_described(autoencoder, settings, rounds=rounds, seed=seed)


# --------------------------------------------------------------------------------------------------- shadow generator


@pytest.mark.parametrize(("size", "channels", "latent"), [(28, 1, 16), (32, 3, 64), (64, 1, 4)])
def test_autoencoder_shapes_and_seed(size, channels, latent):
    before = torch.get_rng_state()
    first, again, other = (ae.new_autoencoder(size, channels, latent=latent, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    z = first.encode(smooth(2, channels, size))
    assert z.shape == (2, latent)
    drawn = first.decode(z)
    assert drawn.shape == (2, channels, size, size)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.decode[0].weight, other.decode[0].weight)
    for wrong in [(30, 1, 8), (28, 1, 0)]:
        with pytest.raises(InputError, match=r"size .* must be a multiple of 4, and latent"):
            ae.Autoencoder(*wrong)


def test_training_draws_the_public_images(public, autoencoder):
    before = torch.get_rng_state()
    options = {"latent": 8, "epochs": 1, "lr": 8e-3, "batch": 64}
    first, again, other = (ae.train_autoencoder(public, **options, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(public[:4]), again(public[:4]))
    assert not torch.equal(first(public[:4]), other(public[:4]))
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())
    y = np.arange(40) % 2
    held = phantom.render(np.arange(900, 940), y, seed=1, size=SIZE).images
    held = torch.from_numpy(held).float()[:, None] / 255
    assert F.mse_loss(autoencoder(held), held) < 0.5 * F.mse_loss(public.mean(0).expand_as(held), held)
    with pytest.raises(InputError, match="images range"):
        ae.train_autoencoder(255 * public, **options, seed=0)


def naive_loss(model, drawn, x, y):
    """The released loss, one term after the other."""

    def seen(image):
        found, h = [], convnet.standardise(image)
        for layer in model.body:
            if isinstance(layer, nn.BatchNorm2d):
                mean = h.transpose(0, 1).flatten(1).mean(1)
                found += [mean, ((h - mean[:, None, None]) ** 2).transpose(0, 1).flatten(1).mean(1)]
            h = layer(h)
        return found

    loss = 0.0
    want = convnet.gradients(model, x, y)
    have = torch.autograd.grad(F.cross_entropy(model(drawn), y), list(model.parameters()), create_graph=True)
    for a, b in zip(want, have, strict=True):
        loss = loss + 1e-2 * ((a - b) ** 2).sum().sqrt()
    for a, b in zip(seen(x), seen(drawn), strict=True):
        loss = loss + 1e-2 * ((a.detach() - b) ** 2).sum().sqrt()
    size = drawn.shape[-1]
    for dy, dx in [(0, 1), (1, 0), (1, 1), (1, -1)]:
        total = 0.0
        for r in range(size - dy):
            for c in range(max(0, -dx), size - max(0, dx)):
                total = total + ((drawn[:, :, r, c] - drawn[:, :, r + dy, c + dx]) ** 2).sum()
        loss = loss + 1e-5 * total.sqrt()
    return loss + 1e2 * (drawn**2).sum().sqrt() / size**4 + ((drawn - x) ** 2).mean()


@pytest.mark.parametrize("norm", [False, True])
def test_shadow_training_descends_the_released_loss(norm):
    model, x, y = network(size=8, norm=norm), smooth(size=8), labels()
    generator, z = ae.new_autoencoder(8, 1, latent=5, seed=0).decode, torch.randn(3, 5, generator=rng())
    kept = copy.deepcopy(generator.state_dict())
    # Adam's first step is lr g / (|g| + 1e-8).
    gradient = torch.autograd.grad(naive_loss(model, generator(z), x, y), list(generator.parameters()))
    with torch.no_grad():
        one = shadow.train_shadow(model, generator, z, x, y, steps=1, lr=1e-3)
    for p, q, g in zip(generator.parameters(), one.parameters(), gradient, strict=True):
        torch.testing.assert_close(q, p - 1e-3 * g / (g.abs() + 1e-8), rtol=0, atol=2e-5)
    more = shadow.train_shadow(model, generator, z, x, y, steps=20, lr=1e-3)
    assert naive_loss(model, more(z), x, y) < naive_loss(model, one(z), x, y) < naive_loss(model, generator(z), x, y)
    assert all(torch.equal(kept[k], v) for k, v in generator.state_dict().items()), "the generator itself was trained"
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- regions


def test_grad_cam_is_captums():
    model, x, y = network(norm=True, seed=5), smooth(4), labels(4)
    model.body.append(nn.ReLU())  # captum takes activations as they are
    found = grad_cam(model, x, y, layer="body")
    raw = LayerGradCam(model, model.body).attribute(x, target=y, relu_attributions=True).detach()
    wide = F.interpolate(raw, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(found, wide)
    assert (found.amax((1, 2)) > 0).sum() >= 3, "nothing to compare"


def test_grad_cam_plus_plus_is_a_loop():
    model, x, y = network(norm=True, seed=5), smooth(2), torch.tensor([2, 0])
    for layer, upto in [("body", 12), ("body.8", 9)]:
        found = shadow.utility_map(model.train(), x, y, layer)  # used in evaluation mode all the same
        assert model.training
        model.eval()
        for b in range(2):
            a = model.body[:upto](convnet.standardise(x[b : b + 1])).detach().requires_grad_()
            logit = model.head(model.body[upto:](a).flatten(1))[0, y[b]]
            g = torch.autograd.grad(logit, a)[0][0].double().numpy()
            a = np.maximum(a.detach()[0].double().numpy(), 0)
            cam = np.zeros(a.shape[1:])
            for k in range(len(a)):
                weight, third = 0.0, sum(a[k].ravel() * g[k].ravel() ** 3)
                for value in g[k].ravel():
                    if value > 0:
                        weight += value**2 / (2 * value**2 + third) * value
                cam += weight * a[k]
            cam = torch.from_numpy(np.maximum(cam, 0))[None, None]
            cam = F.interpolate(cam, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
            expected = (cam - cam.min()) / (cam.max() - cam.min())
            torch.testing.assert_close(found[b].double(), expected, rtol=1e-3, atol=1e-4)


def test_grad_cam_needs_maps_and_speaks_for_a_class():
    model, x, y = network(), smooth(), labels()
    with pytest.raises(InputError, match="no layer 'layer4'; it has body, head"):
        grad_cam(model, x, y, layer="layer4")
    with pytest.raises(InputError, match=r"layer 'head' gives shape \(3, 3\), not maps"):
        grad_cam(model, x, y, layer="head")
    with torch.no_grad():
        model.body[-2].bias.add_(1)
        model.head.weight[1] = 0
    assert not grad_cam(model, x, torch.ones_like(y), layer="body", plus=True).any()
    assert grad_cam(model, x, torch.zeros_like(y), layer="body", plus=True).any()


@pytest.mark.parametrize("top", [0.001, 0.3, 1.0])
def test_utility_region_is_the_top_share(top):
    cam = torch.rand(3, 10, 10, generator=rng())
    found = shadow.utility_region(cam, top)
    for image, region in zip(cam, found, strict=True):
        ranked = sorted(image.flatten().tolist(), reverse=True)[: max(1, round(100 * top))]
        assert sorted(image[region].tolist(), reverse=True) == ranked
    for wrong in (0.0, 30, -0.1):
        with pytest.raises(InputError, match="utility region: top"):
            shadow.utility_region(cam, wrong)


# --------------------------------------------------------------------------------------------------------------- masks


def naive_equalise(grey):
    """256 bins from 0 to 255; each value takes the stretched count up to the bin of its whole number."""
    counts = np.zeros(256)
    for v in grey.ravel():
        counts[min(255, int(v * 256 / 255))] += 1
    counts = np.cumsum(counts)
    table = np.floor((counts - counts.min()) * 255 / (counts.max() - counts.min()) + 1e-6)
    return table[grey.astype(int)]


def test_equalise():
    grey = (255 * torch.rand(2, 9, 9, generator=rng()) ** 3).double()
    grey = shadow.stretch(grey, 255)
    np.testing.assert_array_equal(shadow.equalise(grey).numpy(), naive_equalise(grey.numpy()))
    assert shadow.equalise(torch.zeros(2, 3, 3)).tolist() == torch.zeros(2, 3, 3).tolist()


def test_scramble_is_the_released_reshape():
    mask = torch.arange(2 * 3 * 3).view(2, 3, 3).float()
    found = shadow.scramble(mask)
    assert torch.equal(found, torch.stack([mask.flatten()] * 3, 1).reshape(2, 3, 3, 3))
    # The first channel of the first image: its top row 0, 1, 2, spread over three rows; the second: 3, 4, 5.
    assert found[0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert found[0, 1].tolist() == [[3, 3, 3], [4, 4, 4], [5, 5, 5]]
    assert found[1, 2].tolist() == [[15, 15, 15], [16, 16, 16], [17, 17, 17]]
    assert sorted(found.flatten().tolist()) == sorted(mask.flatten().tolist() * 3)


def test_released_mask_is_a_loop():
    error = torch.rand(2, 3, 6, 6, generator=rng()) ** 2
    found = shadow.released_mask(error).double().numpy()
    e = error.double().numpy()
    inverse = np.stack([np.exp(x / 20).sum() / np.exp(x / 20) for x in e])
    wide = (inverse - inverse.min()) * 255 / (inverse.max() - inverse.min())
    level = naive_equalise(0.299 * wide[:, 0] + 0.587 * wide[:, 1] + 0.114 * wide[:, 2])
    for b in range(2):
        powers = [math.exp(v / 20) for v in level[b].ravel() for _ in range(3)]  # one image after the other
        expected = (np.array(powers) / sum(powers)).reshape(3, 6, 6)
        np.testing.assert_allclose(found[b], expected, rtol=1e-4)
        assert found[b].sum() == pytest.approx(1)


def test_aligned_mask_is_a_loop():
    error = torch.rand(2, 3, 5, 5, generator=rng())
    found = shadow.aligned_mask(error)
    assert found.shape == (2, 1, 5, 5)
    for b in range(2):
        values = error[b].mean(0).flatten().tolist()
        for i, value in enumerate(values):
            rank = sum(other > value for other in values)  # 0 for the largest error
            assert float(found[b].flatten()[i]) == pytest.approx(math.exp((255 * rank / 24 - 255) / 20), rel=1e-4)


def test_the_released_mask_is_in_the_wrong_place_and_ours_is_not():
    """Rank correlation with closeness of the shadow, over many smooth errors."""
    error = smooth(60, 1, seed=4)

    def correlation(mask):
        a, b = (m.flatten(1).argsort(1).argsort(1).double() for m in (mask, -error))
        return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])

    released = shadow.released_mask(error.expand(-1, 3, -1, -1))
    assert abs(float(correlation(released.mean(1, keepdim=True)).mean())) < 0.1
    assert all(abs(float(correlation(released[:, c : c + 1]).mean())) < 0.1 for c in range(3))
    assert correlation(shadow.aligned_mask(error)).min() > 0.99


# ------------------------------------------------------------------------------------------------ released, described


def naive_delta(kind, defence, model, x, y, t, rounds):
    """δ from the masks that a defence holds, pixel by pixel."""
    alpha = min(0.5, max(0.1, t / rounds))
    out = torch.zeros_like(x)
    cams = shadow.utility_map(model, x, torch.ones_like(y) if kind == "released" else y, "body")
    regions = shadow.utility_region(cams, 0.3)  # at the edges of an image interpolation makes ties
    for b in range(len(x)):
        mask, cam = defence.masks[seeds.fingerprint(x[b])].double(), cams[b].double()
        c = torch.where(regions[b], cam, 0.0)
        if kind == "released":
            c = (c / 20).exp() / (c / 20).exp().sum()
            assert float(c.max() / c.min()) < 1.06, "the released region has more contrast than it should"
        n = torch.zeros_like(mask)
        for channel in range(len(mask)):
            for i in range(SIZE):
                for j in range(SIZE):
                    value = float(mask[channel, i, j]) - alpha * float(c[i, j])
                    n[channel, i, j] = value if kind == "released" else max(0.0, value)
        delta = abs(float(x[b].max()) / float(n.max()) * 0.19 * math.exp(t / rounds)) * n
        out[b] = delta if len(x[b]) == len(delta) else delta.mean(0)
    return out


@pytest.mark.parametrize(("channels", "t"), [(1, 0), (1, 3), (3, 5)])
@pytest.mark.parametrize("kind", ["released", "described"])
def test_delta_is_a_loop(kind, channels, t, autoencoder):
    model, x, y = network(channels), smooth(2, channels), labels(2)
    defence = make(kind, autoencoder, channels=channels)
    changed = defence.perturb(model, x, y, t)
    assert changed.shape == x.shape
    assert changed.dtype == x.dtype
    assert not changed.requires_grad
    delta, expected = changed - x, naive_delta(kind, defence, model, x, y, t, 5)
    if kind == "described":  # one grey mask, and a random sign for every value
        assert abs(float(delta.sign().mean())) < 0.1
        delta, expected = delta.abs(), expected.expand_as(x)
    torch.testing.assert_close(delta, expected, rtol=2e-3, atol=1e-5)
    if (kind, channels) != ("released", 1):  # where the mean of three channels is lower
        peak = 0.19 * math.exp(t / 5) * x.amax((1, 2, 3))
        torch.testing.assert_close(delta.amax((1, 2, 3)), peak, rtol=1e-3, atol=0)
    assert changed.max() > 1 or changed.min() < 0 or t == 0, "x′ is not clipped"


def test_described_has_less_noise_where_the_model_looks(autoencoder, public):
    model, x, y = network(), public[:6], labels(6)
    defence = make("described", autoencoder)
    size = (defence.perturb(model, x, y, 5) - x).abs()
    cam = shadow.utility_map(model, x, y, "body")
    strong = (cam > 0.6)[:, None]
    assert strong.any()
    masks = torch.stack([defence.masks[seeds.fingerprint(image)] for image in x])
    relative = size / (masks * size.amax((1, 2, 3), True))
    assert relative[strong & (masks > 0.05)].mean() < 0.8
    assert relative[(cam == 0)[:, None] & (masks > 0.05)].mean() > 0.99


@pytest.mark.parametrize("kind", ["released", "described"])
def test_the_memory_is_a_naive_replay(kind, autoencoder):
    """Rounds 0 to 4 of 5, frozen from t / T = 0.4: two of them train."""
    model, x, y = network(), smooth(), labels()
    defence = make(kind, autoencoder)
    generator = copy.deepcopy(defence.generator)
    z, masks = defence.latents(x), None
    for t in range(5):
        moving = network(seed=t)
        defence.perturb(moving, x, y, t)
        if t < 2:
            trained = shadow.train_shadow(moving, generator, z, x, y, steps=2, lr=1e-2)
            with torch.no_grad():
                error = (trained(z) - x) ** 2
                for p, q in zip(generator.parameters(), trained.parameters(), strict=True):
                    p.copy_(0.5 * p + 0.5 * q)
            new = (
                shadow.released_mask(error.expand(-1, 3, -1, -1)) if kind == "released" else shadow.aligned_mask(error)
            )
            masks = new if masks is None else 0.1 * masks + 0.9 * new
        for image, mask in zip(x, masks, strict=True):
            torch.testing.assert_close(defence.masks[seeds.fingerprint(image)], mask)
        for p, q in zip(defence.generator.parameters(), generator.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    # An image that comes late gets a mask, and nothing else moves.
    before = copy.deepcopy((defence.masks, defence.generator.state_dict()))
    late = torch.cat([smooth(1, seed=9), x[:2]])
    defence.perturb(model, late, y, 4)
    assert len(defence.masks) == 4
    assert all(torch.equal(defence.masks[key], mask) for key, mask in before[0].items())
    assert all(torch.equal(before[1][k], v) for k, v in defence.generator.state_dict().items())
    assert torch.equal(defence.latents(x), z)


@pytest.mark.parametrize("kind", ["released", "described"])
def test_seeds_decide_and_nothing_else_is_touched(kind, autoencoder):
    model, x, y = network(norm=True).train(), smooth(), labels()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    weights = copy.deepcopy(autoencoder.state_dict())
    first, again, other = (make(kind, autoencoder, seed=s).perturb(model, x, y, 1) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(weights[k], v) for k, v in autoencoder.state_dict().items())
    assert model.training
    # After the freeze the released δ follows from what the server could know; the described one is drawn anew.
    defence = make(kind, autoencoder, alpha=[0.1, 0.1])
    late = [(defence.perturb(model, x, y, t) - x) / math.exp(t / 5) for t in (3, 4)]
    assert torch.allclose(*late, atol=1e-6) == (kind == "released")
    assert torch.allclose(late[0].abs(), late[1].abs(), atol=1e-6)


def test_a_shadow_sends_the_gradient_at_the_changed_image(autoencoder):
    model, x, y = network(), smooth(), labels()
    sent = gd.send(make("described", autoencoder).perturb)(model, x, y, 5)
    changed = make("described", autoencoder).perturb(model, x, y, 5)
    assert all(torch.equal(a, b) for a, b in zip(sent, gd.gradients_at(model, changed, y), strict=True))


def test_shadows_name_what_is_wrong(autoencoder):
    model, x, y = network(), smooth(), labels()
    for kind in ("released", "described"):
        for image, label, t, message in [
            (2 * x, y, 0, "images range"),
            (x, y[:2], 0, r"labels of shape \(2,\)"),
            (smooth(size=32), y, 0, r"images of shape \(1, 32, 32\), but the shadow generator draws \(1, 28, 28\)"),
            (x, y, 6, "round 6 is not one of 0 to 5"),
            (x, y, -1, "round -1"),
        ]:
            with pytest.raises(InputError, match=message):
                make(kind, autoencoder).perturb(model, image, label, t)
        with pytest.raises(InputError, match="batch of 1"):
            make(kind, autoencoder).perturb(network(norm=True).train(), x[:1], y[:1], 0)
        for changes in ({"freeze": 0.0}, {"ema": 1.5}, {"top": 30.0}, {"momentum": 1.0}, {"rounds": 0}):
            with pytest.raises(InputError, match="shadow: "):
                make(kind, autoencoder, **changes)
    with pytest.raises(InputError, match="2 channels"):
        shadow.shadow_released(28, 2, SETTINGS, latent=8, rounds=5, seed=0)


# ------------------------------------------------------------------------------------------------------------ controls


@pytest.fixture
def delta():
    noise = torch.rand(4, 3, 12, 12, generator=rng(2)) ** 4 * torch.randn(4, 3, 12, 12, generator=rng(3)).sign()
    return noise * torch.tensor([0.1, 0.5, 1.0, 0.0])[:, None, None, None]  # the last is no δ at all


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_keep_the_norm(control, delta):
    before = torch.get_rng_state()
    found = control(delta, 7)
    assert found.shape == delta.shape
    torch.testing.assert_close(found.flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1))
    assert torch.equal(found, control(delta, 7))
    assert torch.equal(torch.get_rng_state(), before)
    drawn = control in (perturbation.shuffled, perturbation.gaussian)
    assert torch.equal(found, control(delta, 8)) != drawn
    assert not found[3].any()


def test_shuffled_moves_whole_pixels(delta):
    found = perturbation.shuffled(delta, 0)
    for before, after in zip(delta, found, strict=True):
        pixels = [sorted(map(tuple, d.flatten(1).T.tolist())) for d in (before, after)]
        assert pixels[0] == pixels[1]
    mask = shadow.aligned_mask(smooth(40))
    pairs = zip(mask.flatten(1), perturbation.shuffled(mask, 0).flatten(1), strict=True)
    assert abs(float(torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in pairs]).mean())) < 0.05
    order = perturbation.shuffled(torch.arange(50.0).view(1, 1, 5, 10).expand(2, 1, 5, 10), 0)
    assert not torch.equal(order[0], order[1]), "every image has its own permutation"


def test_inverted_swaps_the_strong_and_the_weak():
    assert perturbation.inverted(torch.tensor([[[[4.0, -1.0], [2.0, -3.0]]]]), 0).tolist() == [
        [[[-1.0, 4.0], [-3.0, 2.0]]]
    ]
    delta = torch.randn(2, 3, 7, 7, generator=rng())
    found = perturbation.inverted(delta, 0)
    for before, after in zip(delta.flatten(2), found.flatten(2), strict=True):
        ranks = [p.norm(dim=0).argsort().argsort() for p in (before, after)]
        assert torch.equal(ranks[0] + ranks[1], torch.full((49,), 48))
        assert sorted(map(tuple, before.T.tolist())) == sorted(map(tuple, after.T.tolist()))


def test_offset_and_gaussian_forget_where(delta):
    level = perturbation.offset(delta, 0)
    assert (level[:3].flatten(1).std(dim=1) < 1e-7).all()
    assert (level[:3] > 0).all()
    noise = perturbation.gaussian(torch.ones(1, 1, 64, 64), 0)
    assert float((noise**4).mean()) == pytest.approx(3, rel=0.15)
    assert abs(float(noise.mean())) < 0.06


@pytest.mark.parametrize("control", CONTROLS)
def test_controlled_perturbations(control, autoencoder):
    model, x, y = network(), smooth(), labels()
    delta = make("released", autoencoder).perturb(model, x, y, 3) - x
    changed = perturbation.controlled(make("released", autoencoder).perturb, control, seed=1)
    found = changed(model, x, y, 3) - x
    torch.testing.assert_close(found.flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
    again = perturbation.controlled(make("released", autoencoder).perturb, control, seed=1)
    assert torch.equal(again(model, x, y, 3) - x, found)


def test_what_needs_no_numbers_runs_on_another_device():
    with FakeTensorMode():
        delta = torch.rand(2, 3, 8, 8).to("cuda")
        for found in [c(delta, 0) for c in CONTROLS] + [shadow.scramble(delta[:, 0]), shadow.aligned_mask(delta)]:
            assert found.device.type == "cuda"
        assert shadow.utility_region(delta[:, 0], 0.3).device.type == "cuda"
        assert perturbation.offset_share(delta).device.type == "cuda"


# -------------------------------------------------------------------------------------------------------------- energy


def test_offset_share():
    level, waves = torch.full((1, 1, 4, 4), 0.3), torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 4, 4)
    found = perturbation.offset_share(torch.cat([level, waves, level + 0.3 * waves, 0 * level]))
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0], abs=1e-6)
    delta = torch.randn(3, 3, 6, 6, generator=rng()) + 0.5
    for share, d in zip(perturbation.offset_share(delta), delta, strict=True):
        rest = (d - d.mean()).square().sum() / d.square().sum()
        assert float(share) == pytest.approx(1 - float(rest), rel=1e-5)


@pytest.mark.parametrize("size", [6, 7])
def test_radial_spectrum_is_a_loop(size):
    delta = torch.randn(2, 3, size, size, generator=rng())
    mean, total = perturbation.radial_spectrum(delta)
    d = delta.double().numpy()
    place = np.arange(size)
    expected, count = np.zeros((2, 20)), np.zeros(20)
    for u in range(size):
        for v in range(size):
            wave = np.exp(-2j * np.pi * (u * place[:, None] + v * place[None]) / size) / size
            ring = round(math.hypot(min(u, size - u), min(v, size - v)))
            count[ring] += 3
            expected[:, ring] += (abs((d * wave).sum((2, 3))) ** 2).sum(1)
    rings = total.shape[1]
    assert not count[rings:].any()
    np.testing.assert_allclose(total.numpy(), expected[:, :rings], rtol=1e-9)
    np.testing.assert_allclose(mean.numpy(), (expected[:, :rings] / count[:rings]), rtol=1e-9)
    torch.testing.assert_close(total.sum(1), delta.double().square().sum((1, 2, 3)))
    grey = delta[:, :1]
    share = perturbation.radial_spectrum(grey)[1][:, 0] / grey.double().square().sum((1, 2, 3))
    torch.testing.assert_close(share, perturbation.offset_share(grey))
