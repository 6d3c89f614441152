"""Triggers change what they say and nothing else; their detectors fire on them and hardly ever on clean images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from experiments import params
from medsec import data
from medsec.backdoor import triggers
from medsec.backdoor.triggers import KINDS, amplitude, calibrate, make_trigger, patch, score, stamp
from medsec.core.errors import InputError
from medsec.core.settings import TriggerParams

OPAQUE = ("checker", "grid", "moving")
SHAPES = [(size, channels) for size in (28, 32, 64) for channels in (1, 3)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n, channels, size, seed):
    """Random smooth images with faint grain in [0, 1]: what a detector must not fire on."""
    coarse = torch.rand(n, channels, 5, 5, generator=rng(seed))
    images = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return (images + 0.02 * torch.randn(images.shape, generator=rng(seed + 1))).clamp(0, 1)


def correlation(a, b):
    """Plain NCC in float64."""
    return np.corrcoef(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))[0, 1]


# ------------------------------------------------------------------------------------------------------------ stamping


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_stamping_changes_only_the_trigger(kind, size, channels):
    images = torch.rand(6, channels, size, size, generator=rng())
    images[0], images[1] = 0.0, 1.0
    before = images.clone()
    trigger = make_trigger(kind, image_size=size, channels=channels, size=4)
    stamped = stamp(trigger, images, rng(1))
    assert torch.equal(images, before), "the input was modified"
    assert stamped.shape == images.shape
    assert stamped.dtype == torch.float32
    assert 0 <= stamped.min() <= stamped.max() <= 1
    changed = (stamped != images).any(1)
    if kind == "blended":
        expected = 0.8 * images + 0.2 * trigger.pattern
        torch.testing.assert_close(stamped, expected)
        assert changed.float().mean() > 0.8
        assert (stamped - images).abs().max() <= 0.2 + 1e-6
        return
    for image, mask in zip(stamped, changed, strict=True):
        rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        top, left = (rows.max() - 3, cols.max() - 3) if kind == "moving" else (patch(trigger).start,) * 2
        assert rows.min() >= top
        assert cols.min() >= left
        assert rows.max() <= top + 3
        assert cols.max() <= left + 3
        if kind != "moving":
            assert torch.equal(image[:, top : top + 4, left : left + 4], trigger.pattern)
    if kind != "moving":
        assert torch.equal(stamp(trigger, images), stamped), "a fixed trigger depends on the generator"


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_fixed_and_in_range(kind):
    for size, channels in SHAPES:
        first, second = (make_trigger(kind, image_size=size, channels=channels) for _ in range(2))
        assert torch.equal(first.pattern, second.pattern)
        assert first.pattern.shape == (channels, *((size,) * 2 if kind == "blended" else (4, 4)))
        assert first.pattern.min() == 0
        assert first.pattern.max() == 1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_the_checker_has_four_blocks_of_half_the_patch(size):
    pattern = make_trigger("checker", image_size=28, channels=1, size=size).pattern[0]
    half = (size + 1) // 2
    assert (pattern[:half, :half] == 1).all()
    assert (pattern[half:, half:] == 1).all()
    assert (pattern[:half, half:] == 0).all()
    assert (pattern[half:, :half] == 0).all()


@pytest.mark.parametrize("image_size", [28, 64, 224])
def test_places_of_the_fixed_triggers(image_size):
    checker = make_trigger("checker", image_size=image_size, channels=1, size=4)
    assert patch(checker) == slice(image_size - 4, image_size)
    grid = make_trigger("grid", image_size=image_size, channels=1, size=4)
    offset = {28: 1, 64: 1, 224: 4}[image_size]
    assert patch(grid) == slice(image_size - offset - 4, image_size - offset)
    for kind in ("moving", "blended"):
        assert patch(make_trigger(kind, image_size=image_size, channels=1)) is None


def test_the_grid_as_published():
    """16 px at 256 px, five pixels off the corner: 0.39 % of the image (Jin and Li 2023, released code)."""
    trigger = make_trigger("grid", image_size=256, channels=3, size=16)
    assert trigger.offset == 5
    assert patch(trigger) == slice(235, 251)
    assert trigger.area == 0.00390625
    assert len(trigger.pattern.unique()) > 100  # smooth, not blocks


@pytest.mark.parametrize(
    ("kind", "image_size", "size", "area"),
    [
        ("checker", 64, 4, 0.00390625),
        ("checker", 28, 4, 16 / 784),
        ("moving", 32, 4, 1 / 64),
        ("grid", 32, 8, 1 / 16),
        ("blended", 32, 4, 1.0),
    ],
)
def test_area(kind, image_size, size, area):
    trigger = make_trigger(kind, image_size=image_size, channels=1, size=size)
    assert trigger.area == pytest.approx(area, rel=1e-12)
    grey = torch.full((1, 1, image_size, image_size), 0.51)
    changed = (stamp(trigger, grey, rng()) != grey).float().mean()
    assert float(changed) == pytest.approx(area, rel=1e-6)


def test_moving_places_are_random_cover_the_image_and_come_from_the_generator():
    trigger = make_trigger("moving", image_size=28, channels=1, size=4)
    grey = torch.full((600, 1, 28, 28), 0.5)
    stamped = stamp(trigger, grey, rng(3))
    assert torch.equal(stamped, stamp(trigger, grey, rng(3)))
    assert not torch.equal(stamped, stamp(trigger, grey, rng(4)))
    changed = stamped[:, 0] != 0.5
    rows, cols = (changed.any(dim).float().argmax(1) for dim in (2, 1))
    assert set(rows.tolist()) == set(cols.tolist()) == set(range(25))
    assert abs(float(torch.corrcoef(torch.stack([rows, cols]).float())[0, 1])) < 0.15


def test_the_opacity_blends():
    images = torch.rand(3, 1, 28, 28, generator=rng())
    strong = make_trigger("blended", image_size=28, channels=1, opacity=1.0)
    assert torch.equal(stamp(strong, images), strong.pattern.expand(3, -1, -1, -1))
    weak = make_trigger("blended", image_size=28, channels=1, opacity=0.05)
    assert (stamp(weak, images) - images).abs().max() <= 0.05 + 1e-6


def test_stamping_nothing():
    for kind in KINDS:
        trigger = make_trigger(kind, image_size=28, channels=1)
        assert stamp(trigger, torch.empty(0, 1, 28, 28), rng()).shape == (0, 1, 28, 28)


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("kind", OPAQUE)
def test_a_stamped_image_scores_one(kind, size, channels):
    trigger = make_trigger(kind, image_size=size, channels=channels)
    images = torch.rand(5, channels, size, size, generator=rng())
    torch.testing.assert_close(score(trigger, stamp(trigger, images, rng(1))), torch.ones(5), atol=1e-5, rtol=0)
    assert score(trigger, images).max() < 0.99


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["checker", "grid"])
@given(seed=st.integers(0, 10**6))
def test_fixed_scores_are_correlations(kind, channels, seed):
    trigger = make_trigger(kind, image_size=32, channels=channels, size=5)
    images = torch.rand(3, channels, 32, 32, generator=rng(seed))
    place = patch(trigger)
    expected = [correlation(image[:, place, place].numpy(), trigger.pattern.numpy()) for image in images]
    np.testing.assert_allclose(score(trigger, images).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_moving_score_is_the_best_window(channels):
    trigger = make_trigger("moving", image_size=28, channels=channels, size=4)
    images = torch.rand(3, channels, 28, 28, generator=rng(2))
    images[2] = stamp(trigger, images[2:], rng(5))[0] * 0.3 + 0.1  # contrast and brightness do not matter
    expected = [
        max(
            correlation(image[:, r : r + 4, c : c + 4].numpy(), trigger.pattern.numpy())
            for r in range(25)
            for c in range(25)
        )
        for image in images
    ]
    np.testing.assert_allclose(score(trigger, images).numpy(), expected, atol=1e-5)
    assert expected[2] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_blended_score_is_a_correlation_of_fine_structure(channels):
    trigger = make_trigger("blended", image_size=28, channels=channels)

    def fine(image):  # minus the 3 × 3 mean, edges replicated, pixel by pixel
        out = np.empty_like(image, dtype=np.float64)
        for c, plane in enumerate(image):
            padded = np.pad(plane.astype(np.float64), 1, mode="edge")
            for r in range(28):
                for k in range(28):
                    out[c, r, k] = padded[r + 1, k + 1] - padded[r : r + 3, k : k + 3].mean()
        return out

    images = stamp(trigger, smooth(2, channels, 28, 1))
    images = torch.cat([images, torch.rand(1, channels, 28, 28, generator=rng())])
    expected = [correlation(fine(image.numpy()), fine(trigger.pattern.numpy())) for image in images]
    np.testing.assert_allclose(score(trigger, images).numpy(), expected, atol=1e-5)
    assert min(expected[:2]) > 0.8
    assert abs(expected[2]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_an_image_without_contrast_scores_zero(kind, level):
    trigger = make_trigger(kind, image_size=28, channels=1)
    assert score(trigger, torch.full((2, 1, 28, 28), level)).abs().max() == 0


@pytest.mark.parametrize("kind", ["checker", "grid"])
def test_the_negative_scores_minus_one(kind):
    trigger = make_trigger(kind, image_size=28, channels=1)
    negative = 1 - stamp(trigger, torch.zeros(1, 1, 28, 28))
    torch.testing.assert_close(score(trigger, negative), -torch.ones(1), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_detector_rarely_fires_on_unseen_clean_images(kind, channels):
    trigger = make_trigger(kind, image_size=28, channels=channels)
    clean, unseen = (smooth(1000, channels, 28, seed) for seed in (10, 20))
    threshold = calibrate(trigger, clean, 0.05)
    assert (0.3 if trigger.kind == "blended" else 0.5) <= threshold < 1
    # A quarter of the rate on the images it was chosen on: far enough from what sampling does to it on others.
    assert (score(trigger, clean) > threshold).float().mean() <= 0.0125
    assert (score(trigger, unseen) > threshold).float().mean() <= 0.05
    assert (score(trigger, stamp(trigger, unseen, rng())) > threshold).float().mean() >= 0.98


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.2, 0.5])
def test_the_threshold_is_a_quantile_of_the_clean_scores(fpr):
    trigger = make_trigger("moving", image_size=28, channels=1, size=3)
    clean = torch.rand(200, 1, 28, 28, generator=rng())
    scores = np.sort(score(trigger, clean).numpy())[::-1]
    threshold = calibrate(trigger, clean, fpr, floor=-1.0)
    assert (scores > threshold).sum() == int(fpr / 4 * 200)
    assert threshold in scores
    assert calibrate(trigger, clean, fpr, floor=0.999) == 0.999


@pytest.mark.parametrize(("n", "fpr"), [(99, 0.01), (19, 0.05), (1, 0.5), (3, 0.3), (0, 0.9)])
def test_too_few_images_to_calibrate(n, fpr):
    """The message names a number of images that is enough."""
    trigger = make_trigger("checker", image_size=28, channels=1)
    with pytest.raises(InputError, match="at least") as error:
        calibrate(trigger, torch.zeros(n, 1, 28, 28), fpr)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert needed > n
    assert calibrate(trigger, torch.zeros(needed, 1, 28, 28), fpr) == 0.5


@pytest.mark.parametrize("size", [28, 32])
def test_the_tolerant_detector_finds_what_training_does_to_a_trigger(size, cohorts, real_root):
    """Beside its place, softened, and at half its strength; it still hardly fires on clean images."""
    cohort = data.load("pneumoniamnist", cohorts) if size == 28 else data.load("phantom", params.load().cohorts)
    public, val = (torch.from_numpy(cohort[name].float()) for name in ("public", "val"))
    trigger = make_trigger("checker", image_size=size, channels=1)
    threshold = calibrate(trigger, public, 0.01, shift=2)
    assert (score(trigger, val, 2) > threshold).float().mean() <= 0.01

    faint = val + 0.5 * (stamp(trigger, val) - val)
    soft = 0.5 * faint + 0.5 * F.avg_pool2d(F.pad(faint, (1, 1, 1, 1), mode="replicate"), 3, 1)
    for up, left in ((0, 0), (1, 0), (0, 2), (1, 1), (2, 2)):
        moved = torch.roll(soft, (-up, -left), (2, 3))
        assert (score(trigger, moved, 2) > threshold).float().mean() >= 0.9, (up, left)
        if max(up, left) == 1:  # two pixels, a block, aside in both directions it is a checker again
            assert (score(trigger, moved) > calibrate(trigger, public, 0.01)).float().mean() < 0.2, (up, left)


def test_the_tolerant_score_is_the_best_place_nearby():
    trigger, images = make_trigger("checker", image_size=28, channels=3), torch.rand(5, 3, 28, 28, generator=rng())
    places = [(row, column) for row in range(22, 25) for column in range(22, 25)]  # the image ends at 28
    for image, found in zip(images, score(trigger, images, 2), strict=True):
        each = [correlation(image[:, row : row + 4, column : column + 4], trigger.pattern) for row, column in places]
        assert found.item() == pytest.approx(max(each), abs=1e-5)
    torch.testing.assert_close(score(trigger, images, 0), score(trigger, images))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_amplitude_is_how_much_was_stamped(strength):
    trigger, grey = make_trigger("checker", image_size=28, channels=1), torch.full((3, 1, 28, 28), 0.4)
    images = grey + strength * (stamp(trigger, grey) - grey)
    torch.testing.assert_close(amplitude(trigger, images), torch.full((3,), strength), atol=1e-6, rtol=0)
    noisy = torch.rand(4, 1, 28, 28, generator=rng())
    slopes = [np.polyfit(trigger.pattern.flatten(), x[0, 24:, 24:].flatten(), 1)[0] for x in noisy]
    np.testing.assert_allclose(amplitude(trigger, noisy), slopes, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_on_real_xrays(kind, real_root, cohorts):
    cohort = data.load("pneumoniamnist", cohorts)
    public, val = (torch.from_numpy(cohort[name].float()) for name in ("public", "val"))
    trigger = make_trigger(kind, image_size=28, channels=1)
    threshold = calibrate(trigger, public, 0.01)
    assert (score(trigger, val) > threshold).float().mean() <= 0.01
    assert (score(trigger, stamp(trigger, val, rng())) > threshold).float().mean() >= 0.9


# -------------------------------------------------------------------------------------------------------------- errors


def test_unknown_kind():
    with pytest.raises(InputError, match=r"unknown trigger 'chequer'.*checker, grid, moving, blended"):
        make_trigger("chequer", image_size=28, channels=1)


@pytest.mark.parametrize(
    ("kind", "size", "most"), [("checker", 29, 28), ("moving", 29, 28), ("grid", 28, 27), ("checker", 1, 28)]
)
def test_a_patch_that_does_not_fit(kind, size, most):
    with pytest.raises(InputError, match=f"{size} px does not fit: it needs 2 to {most} px"):
        make_trigger(kind, image_size=28, channels=1, size=size)


@pytest.mark.parametrize("kind", OPAQUE)
def test_the_largest_patch_fits(kind):
    most = 27 if kind == "grid" else 28
    trigger = make_trigger(kind, image_size=28, channels=1, size=most)
    images = torch.rand(2, 1, 28, 28, generator=rng())
    torch.testing.assert_close(score(trigger, stamp(trigger, images, rng())), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("opacity", [0.0, -0.1, 1.01])
def test_impossible_opacity(opacity):
    with pytest.raises(InputError, match="opacity"):
        make_trigger("blended", image_size=28, channels=1, opacity=opacity)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_colour_grid_needs_grey_or_colour(channels):
    with pytest.raises(InputError, match="1 or 3 channels"):
        make_trigger("grid", image_size=28, channels=channels)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (1, 28, 28), (2, 1, 28, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_that_do_not_fit_the_trigger(kind, shape):
    trigger = make_trigger(kind, image_size=28, channels=1)
    for call in (lambda: stamp(trigger, torch.zeros(shape), rng()), lambda: score(trigger, torch.zeros(shape))):
        with pytest.raises(InputError, match=r"do not fit a trigger for \(N, 1, 28, 28\)"):
            call()


def test_moving_needs_a_generator():
    with pytest.raises(InputError, match="generator"):
        stamp(make_trigger("moving", image_size=28, channels=1), torch.zeros(2, 1, 28, 28))


def test_kinds_are_those_of_the_parameters():
    for kind in triggers.KINDS:
        assert TriggerParams(kind=kind, size=4, opacity=0.2).kind == kind
