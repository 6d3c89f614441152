"""The chest phantom: same bits everywhere, one patient one anatomy, lesions where they belong, styles that differ."""

import hashlib
import itertools

import numpy as np
import pytest

from medphantom import chest as phantom
from medphantom import exact
from medphantom.chest import KINDS, SIZES, STYLES, render

MIXED = [letter for _, letter in zip(range(24), itertools.cycle(STYLES), strict=False)]
# Recorded once; a change of any pixel of any mask or image changes it, on purpose or not.
RECORDED = "37ab651e50a3530cb13551548c3e9e569616e924a24b9dcd804332942f4e00c5"
SIZES_HASHED = (28, 32, 45, 64, 99)


def fingerprint() -> str:
    """SHA-256 over the images, masks and kinds of 24 patients of all four styles at several sizes.

    The float grey levels of eight of them are in it too: rounding to uint8 hides most differences in a last bit.
    """
    digest = hashlib.sha256()
    for size in SIZES_HASHED:
        out = render(np.arange(24), np.arange(24) // 4 % 2, seed=11, size=size, style=MIXED)
        for array in (out.images, out.lesion, out.lung, out.kind.astype("<i8")):
            digest.update(np.ascontiguousarray(array).tobytes())
    draws = exact.Draws(11, np.arange(8, dtype=np.uint64), MIXED[:8], phantom.STYLES)
    grey, *_ = phantom._render_block(draws, np.arange(8) % 2 == 1, 64)
    digest.update(np.ascontiguousarray(grey).astype("<f4").tobytes())
    return digest.hexdigest()


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """(N, H, W) masks dilated by a diamond."""
    for _ in range(pixels):
        wide = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = wide[:, 1:-1, 1:-1] | wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
    return mask


def masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of each image's values under its mask, (N,)."""
    return (values * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)


@pytest.fixture(scope="module")
def pairs():
    """400 patients of all styles, healthy and ill, at 32 pixels."""
    patients = np.arange(400)
    styles = [MIXED[i % 4] for i in patients]
    healthy = render(patients, np.zeros(400, int), seed=3, style=styles)
    ill = render(patients, np.ones(400, int), seed=3, style=styles)
    return healthy, ill


# ----------------------------------------------------------------------------------------------- bit reproducibility


def test_fingerprint_is_the_recorded_one():
    assert fingerprint() == RECORDED


def test_fingerprint_without_simd(without_simd):
    assert without_simd("test_phantom") == fingerprint()


def test_pixels_stay_in_single_precision():
    draws = exact.Draws(0, np.arange(4, dtype=np.uint64), list("ABCD"), phantom.STYLES)
    grey, *_ = phantom._render_block(draws, np.array([True, False, True, True]), 64)
    assert grey.dtype == np.float32


def test_own_exp_and_log_agree_with_numpy():
    x = np.linspace(-14, 0, 20001, dtype=np.float32)
    np.testing.assert_allclose(exact.exp(x), np.exp(x.astype(float)), rtol=3e-6)
    y = np.exp(np.linspace(-20, 2, 20001)).astype(np.float32)
    np.testing.assert_allclose(exact.log(y), np.log(y.astype(float)), atol=2e-5)


# ------------------------------------------------------------------------------------------------ shapes and errors


@pytest.mark.parametrize("size", [28, 32, 45, 55, 56, 64, 99, 128, 224])
def test_shapes_and_dtypes(size):
    out = render([5, 0, 9], [1, 0, 1], seed=0, size=size, style="C")
    for array, dtype in ((out.images, np.uint8), (out.lesion, bool), (out.lung, bool)):
        assert array.shape == (3, size, size)
        assert array.dtype == dtype
    assert out.kind.shape == (3,)
    assert out.kind.dtype == np.int64
    assert out.images.std() > 20


def test_no_patients_is_no_error():
    out = render([], [], seed=0)
    assert out.images.shape == out.lesion.shape == out.lung.shape == (0, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": SIZES[0] - 1}, "size must be"),
        ({"size": SIZES[1] + 1}, "size must be"),
        ({"size": 32.5}, "size must be"),
        ({"style": "E"}, "unknown style 'E': the styles are A, B, C, D"),
        ({"style": ["A", "Z"]}, "unknown style 'Z'"),
        ({"style": ["A"]}, "1 styles for 2 patients"),
        ({"labels": [0, 2]}, "labels must be 0"),
        ({"labels": [0]}, "of one length"),
        ({"patients": [0, -1]}, "patients must be integers >= 0"),
        ({"patients": [0.0, 1.5]}, "patients must be integers >= 0"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        render(**({"patients": [0, 1], "labels": [0, 1], "seed": 0} | arguments))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- what an image depends on


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_does_not_depend_on_its_batch(size):
    patients, labels = np.arange(24), np.arange(24) % 2
    batch = render(patients, labels, seed=7, size=size, style=MIXED)
    order = np.random.default_rng(0).permutation(24)[:9]
    shuffled = render(patients[order], labels[order], seed=7, size=size, style=[MIXED[i] for i in order])
    alone = [render([i], [labels[i]], seed=7, size=size, style=MIXED[i]) for i in order]
    for field in ("images", "lesion", "lung", "kind"):
        expected = getattr(batch, field)[order]
        np.testing.assert_array_equal(getattr(shuffled, field), expected)
        np.testing.assert_array_equal(np.concatenate([getattr(one, field) for one in alone]), expected)


def test_seed_and_patient_make_different_people():
    images = [render(np.arange(500), np.zeros(500, int), seed=seed).images for seed in (0, 1)]
    assert len({image.tobytes() for image in np.concatenate(images)}) == 1000


def test_size_samples_the_same_patient():
    large = render(np.arange(12), np.ones(12, int), seed=2, size=128)
    small = render(np.arange(12), np.ones(12, int), seed=2, size=64)
    np.testing.assert_array_equal(large.kind, small.kind)
    averaged = large.images.reshape(12, 64, 2, 64, 2).mean((2, 4))
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(averaged, small.images, strict=True)]
    other = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(averaged, small.images[::-1], strict=True)]
    assert min(same) > 0.98 > max(other)


# ------------------------------------------------------------------------------------------------------ lesions


def test_the_label_adds_a_lesion_and_leaves_the_anatomy(pairs):
    healthy, ill = pairs
    np.testing.assert_array_equal(healthy.lung, ill.lung)
    np.testing.assert_array_equal(healthy.kind, ill.kind)
    change = ill.images.astype(float) - healthy.images
    inside = masked_mean(change, ill.lesion)
    assert inside.min() > 3  # fluid attenuates: every lesion brightens its place
    assert np.median(inside) > 25
    # Lungs apart, only scattered light and its noise may change.
    assert masked_mean(np.abs(change), ~grown(ill.lung, 2)).max() < 6
    away = masked_mean(np.abs(change), ~grown(ill.lesion, 3))
    assert (away < 0.25 * inside).mean() > 0.95


def test_lesions_lie_in_the_lungs(pairs):
    healthy, ill = pairs
    assert not healthy.lesion.any()
    area = ill.lesion.sum((1, 2))
    assert area.min() >= 1
    assert (masked_mean(grown(ill.lung, 1), ill.lesion) > 0.9).all()
    assert (area < ill.lung.sum((1, 2))).all()
    assert 0.15 < ill.lung.mean((1, 2)).min() < ill.lung.mean((1, 2)).max() < 0.75


def test_every_kind_occurs_and_looks_its_kind(pairs):
    _, ill = pairs
    assert set(ill.kind) == set(range(len(KINDS)))
    area = {name: np.median(ill.lesion[ill.kind == k].mean((1, 2))) for k, name in enumerate(KINDS)}
    assert area["round"] < area["lobar"] < area["diffuse"]
    columns = ill.lesion.any(1)
    both_sides = columns[:, :14].any(1) & columns[:, 18:].any(1)
    assert both_sides[ill.kind == KINDS.index("diffuse")].mean() > 0.9
    assert both_sides[ill.kind == KINDS.index("round")].mean() < 0.1


# ------------------------------------------------------------------------------------------------------- styles


def test_grey_levels_are_those_of_a_radiograph(pairs):
    for out in pairs:
        for offset, letter in enumerate(STYLES):
            images = out.images[offset::4].astype(float)
            assert 100 < images.mean() < 180, letter
            assert 25 < images.std() < 75, letter
    # Lungs are darker than what surrounds them, on average and in nearly every image.
    healthy = pairs[0]
    contrast = masked_mean(healthy.images, ~healthy.lung) - masked_mean(healthy.images, healthy.lung)
    assert np.median(contrast) > 20


def test_styles_differ_and_leave_patients_alone(monkeypatch):
    patients, labels = np.arange(40), np.ones(40, int)
    as_built = {s: render(patients, labels, seed=5, style=s) for s in STYLES}
    for one, other in itertools.combinations(STYLES, 2):
        apart = np.abs(as_built[one].images.astype(float) - as_built[other].images).mean()
        assert apart > 12, (one, other)
        np.testing.assert_array_equal(as_built[one].kind, as_built[other].kind)
    # Only the field of view moves the masks: with one field of view for all, they are the same masks.
    for letter in STYLES:
        view = {key: STYLES["A"][key] for key in ("half_field", "shift_y")}
        monkeypatch.setitem(STYLES, letter, STYLES[letter] | view)
    same_view = {s: render(patients, labels, seed=5, style=s) for s in STYLES}
    for letter in "BCD":
        np.testing.assert_array_equal(same_view[letter].lung, same_view["A"].lung)
        np.testing.assert_array_equal(same_view[letter].lesion, same_view["A"].lesion)
        assert (same_view[letter].images != same_view["A"].images).any((1, 2)).all()


def test_low_dose_is_grainier():
    """Style C at a hundred times the dose loses most of its pixel-to-pixel roughness."""

    def roughness(images):
        middle = images[:, 16:48, 16:48].astype(float)
        return np.abs(middle[:, 1:, 1:] - middle[:, 1:, :-1] - middle[:, :-1, 1:] + middle[:, :-1, :-1]).mean()

    noisy = roughness(render(np.arange(16), np.zeros(16, int), seed=0, size=64, style="C").images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLES, "C", STYLES["C"] | {"dose": (1e4, 2.5e4)})
        clean = roughness(render(np.arange(16), np.zeros(16, int), seed=0, size=64, style="C").images)
    assert noisy > 1.5 * clean
