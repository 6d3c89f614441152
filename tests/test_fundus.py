"""The fundus phantom: the same bits everywhere, lesions where the mask says, nothing else changed by the grade."""

import hashlib
import itertools

import numpy as np
import pytest

from medphantom import exact, fundus
from medphantom.fundus import SIZES, STYLES, render

MIXED = [letter for _, letter in zip(range(16), itertools.cycle(STYLES), strict=False)]
# Recorded once; a change of any pixel of any mask or image changes it, on purpose or not.
RECORDED = "233b7e73a09576143d31b5f5b327b705b74dff864430a717b4f71c56289b3cb0"


def fingerprint() -> str:
    """SHA-256 over images and masks of 16 eyes of all styles at several sizes, and over float colours: see test_phantom."""
    digest = hashlib.sha256()
    for size in (28, 32, 45, 64):
        out = render(np.arange(16), np.arange(16) // 4 % 3, seed=11, size=size, style=MIXED)
        for array in (out.images, out.lesion):
            digest.update(np.ascontiguousarray(array).tobytes())
    draws = exact.Draws(11, np.arange(8, dtype=np.uint64), MIXED[:8], STYLES)
    colours, _ = fundus._render_block(draws, np.arange(8), np.arange(8) % 2 * 2, 64)
    for colour in colours:
        digest.update(np.ascontiguousarray(colour).astype("<f4").tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def pairs():
    """120 eyes of all styles at 64 pixels: normal, and with referable and with mild retinopathy."""
    patients = np.arange(120)
    styles = [MIXED[i % 4] for i in patients]
    return tuple(render(patients, np.full(120, grade), seed=3, size=64, style=styles) for grade in (0, 2, 1))


def test_fingerprint_is_the_recorded_one():
    assert fingerprint() == RECORDED


def test_fingerprint_without_simd(without_simd):
    assert without_simd("test_fundus") == fingerprint()


def test_pixels_stay_in_single_precision():
    draws = exact.Draws(0, np.arange(4, dtype=np.uint64), list("ABCD"), STYLES)
    colours, _ = fundus._render_block(draws, np.arange(4), np.array([2, 0, 1, 2]), 64)
    assert {colour.dtype for colour in colours} == {np.dtype(np.float32)}


def test_an_image_does_not_depend_on_its_batch():
    whole = render(np.arange(16), np.arange(16) % 2, seed=5, size=64, style=MIXED)
    for i in (0, 3, 15):
        alone = render([i], [i % 2], seed=5, size=64, style=MIXED[i])
        assert np.array_equal(whole.images[i], alone.images[0])
        assert np.array_equal(whole.lesion[i], alone.lesion[0])


def test_seeds_patients_and_styles_differ():
    base = render([0, 1], [0, 0], seed=0, size=64).images
    assert not np.array_equal(base[0], base[1])
    assert not np.array_equal(base, render([0, 1], [0, 0], seed=1, size=64).images)
    assert not np.array_equal(base, render([0, 1], [0, 0], seed=0, size=64, style="B").images)


def test_the_grade_changes_the_lesion_and_little_beside_it(pairs):
    normal, ill, _ = pairs
    assert not normal.lesion.any()
    assert ill.lesion.any((1, 2)).mean() > 0.98
    area = ill.lesion.mean((1, 2))
    assert 0.003 < np.median(area) < 0.05
    change = np.abs(ill.images.astype(int) - normal.images).max(3)
    wide = ill.lesion.copy()
    for _ in range(2):  # blur carries a lesion beyond its mask
        padded = np.pad(wide, ((0, 0), (1, 1), (1, 1)))
        wide = wide | padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
    assert change[ill.lesion].mean() > 10 * change[~wide].mean()
    assert (change[~wide] > 20).mean() < 0.002


def test_a_mild_retinopathy_is_a_few_dots(pairs):
    normal, ill, mild = pairs
    area = {name: eyes.lesion.mean((1, 2)) for name, eyes in (("mild", mild), ("ill", ill))}
    assert (area["mild"] < area["ill"]).mean() > 0.97
    assert 0 < np.median(area["mild"]) < np.median(area["ill"]) / 2
    # Blood only: nothing becomes brighter, as it does under an exudate or a cotton-wool spot.
    brighter = [(eyes.images.astype(int) - normal.images)[..., 1].max((1, 2)) > 40 for eyes in (mild, ill)]
    assert brighter[0].mean() < 0.02
    assert brighter[1].mean() > 0.5


def test_it_looks_like_a_fundus(pairs):
    """Red before green before blue, black corners where the circle is whole, a bright disc, a dark fovea."""
    images = pairs[0].images.astype(float)
    red, green, blue = images.mean((0, 1, 2))
    assert red > 1.3 * green > 1.3 * blue
    whole = images[[i for i in range(len(images)) if MIXED[i % 4] != "B"]]
    assert whole[:, :4, :4].max() < 30
    bright = np.quantile(images[..., 1], 0.995, axis=(1, 2))
    assert (bright > 1.25 * np.median(images[..., 1], axis=(1, 2))).mean() > 0.9


@pytest.mark.parametrize("size", [28, 32, 45, 55, 56, 64, 128, 224])
def test_shapes_and_dtypes(size):
    out = render([5, 0, 9], [1, 0, 1], seed=0, size=size, style="C")
    assert out.images.shape == (3, size, size, 3)
    assert out.images.dtype == np.uint8
    assert out.lesion.shape == (3, size, size)
    assert out.lesion.dtype == bool
    assert out.images.std() > 20


def test_no_patients_is_no_error():
    assert render([], [], seed=0).images.shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": SIZES[0] - 1}, "size must be"),
        ({"size": SIZES[1] + 1}, "size must be"),
        ({"style": "E"}, "unknown style 'E': the styles are A, B, C, D"),
        ({"style": ["A"]}, "1 styles for 2 patients"),
        ({"labels": [0, 3]}, r"labels must be 0 \(normal\), 1 \(mild\), 2 \(referable\)"),
        ({"labels": [0]}, "of one length"),
        ({"patients": [0, -1]}, "patients must be integers >= 0"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        render(**({"patients": [0, 1], "labels": [0, 1], "seed": 0} | arguments))
    assert "\n" not in str(error.value)
