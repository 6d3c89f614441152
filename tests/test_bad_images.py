"""Whatever lies in a reader's folder or npz: it becomes the right picture, or one line that names the file."""

import functools
import io
import os
import socket
import zipfile

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_folder import flat, noise, pointed, refused, rows_of, shown, tree, write_dicom, write_table  # noqa: F401

from medsec import data
from medsec.core.errors import InputError
from medsec.data import images as image_files

fuzzed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(read, name: str):
    """What ``read`` gives, or the text of its `InputError`, which is one line and names the file; nothing else is raised."""
    try:
        return read()
    except InputError as error:
        message = str(error)
    assert name in message
    assert message.isprintable()
    return message


# ---------------------------------------------------------------------------------------------------------------------- npz

N = 20
RECORD = [("a", "u1"), ("b", "u1")]
KINDS = {  # of the images of all splits: from noise in uint8, and whether they may be read
    "uint8": (lambda x: x, True),
    "Fortran order": (np.asfortranarray, True),
    "shares of white": (lambda x: x / 255, True),
    "big-endian": (lambda x: (x / 255).astype(">f4"), True),
    "half": (lambda x: (x / 255).astype(np.float16), True),
    "int16": (lambda x: x.astype(np.int16), False),
    "big-endian whole": (lambda x: x.astype(">u2"), False),
    "floats to 255": (lambda x: x.astype(np.float32), False),
    "from -1 to 1": (lambda x: x / 127.5 - 1, False),
    "not a number": (lambda x: np.where(x == x.max(), np.nan, x / 255), False),
    "infinite": (lambda x: np.where(x == x.max(), np.inf, x / 255), False),
    "bool": (lambda x: x > 99, False),
    "complex": (lambda x: x / 255 + 0j, False),
    "text": (lambda x: x.astype(str), False),
    "objects": (lambda x: x.astype(object), False),
    "records": (lambda x: np.zeros(x.shape, RECORD), False),
    "times": (lambda x: x.astype("m8[s]"), False),
}
SHAPES = {"flat": ((N, 28, 28), True), "grey": ((N, 28, 28, 1), True), "colour": ((N, 28, 28, 3), True)}
SHAPES |= {"two channels": ((N, 28, 28, 2), False), "oblong": ((N, 28, 32), False), "odd": ((N, 30, 30), False)}
SHAPES |= {"one image": ((28, 28), False), "none": ((0, 28, 28), False), "five axes": ((N, 28, 28, 1, 1), False)}
LABELS = {
    "plain": (lambda y: y, True),
    "column": (lambda y: y[:, None].astype(">i4"), True),
    "below 0": (lambda y: y.astype(int) - 1, False),
    "huge": (lambda y: y.astype(np.uint64) * 2**63, False),
    "shares": (lambda y: y / 1.0, False),
    "too few": (lambda y: y[:-1], False),
    "objects": (lambda y: y.astype(object), False),
    "records": (lambda y: np.zeros(N, RECORD), False),
}


@pytest.mark.fuzz
@fuzzed
@given(
    st.sampled_from(["uint8"] * 4 + list(KINDS)),
    st.sampled_from(["flat"] * 4 + list(SHAPES)),
    st.sampled_from(["plain"] * 4 + list(LABELS)),
    st.sampled_from([None] * 4 + ["train_images", "val_labels"]),
    st.integers(0, 2**31 - 1),
)
def test_an_npz_is_the_right_pictures_or_refused(tmp_path, npz_cohorts, kind, shape, label, lacking, seed):
    rng, content, wanted = np.random.default_rng(seed), {}, set()
    (change, readable), (size, fits), (relabel, labelled) = KINDS[kind], SHAPES[shape], LABELS[label]
    for split in data.OFFICIAL:
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        content |= {f"{split}_images": change(pixels) if pixels.size else pixels}
        content |= {f"{split}_labels": relabel((np.arange(N) % 2).astype(np.uint8))}
        wanted |= {image.tobytes() for image in pixels}
    file = tmp_path / "mine.npz"
    np.savez(file, **{key: value for key, value in content.items() if key != lacking})
    found = one_line(lambda: data.load("npz", npz_cohorts(file)), "mine.npz")
    assert isinstance(found, str) != (readable and fits and labelled and lacking is None)
    if not isinstance(found, str):
        splits = found.splits.values()
        assert {np.moveaxis(image, 0, -1).tobytes() for split in splits for image in split.images} == wanted


@pytest.mark.fuzz
@fuzzed
@given(st.data())
def test_a_damaged_npz_is_refused_or_the_same(tmp_path, write_npz, npz_cohorts, draw):
    file = write_npz(tmp_path, per_class=5)
    whole, before = file.read_bytes(), data.load("npz", npz_cohorts(file)).fingerprint
    cut = draw.draw(st.integers(0, len(whole)))
    junk = draw.draw(st.binary(max_size=40))
    file.write_bytes(whole[:cut] + junk + whole[cut + draw.draw(st.integers(0, 40)) :])
    found = one_line(lambda: data.load("npz", npz_cohorts(file)), "tiny.npz")
    assert isinstance(found, str) or found.fingerprint == before


@pytest.mark.parametrize("shape", [(10**7, 28, 28), (2**31, 2**31), (2**62, 4)])
def test_a_header_is_believed_by_nobody(tiny_npz, npz_cohorts, shape):
    """Kilobytes that say that they are gigabytes: memory is not asked for."""
    file, stream = tiny_npz(train_images=None), io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(stream, header)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", stream.getvalue() + bytes(10**6))
    with pytest.raises(
        InputError, match=r"tiny\.npz: train_images is .*more than 4 GiB unpacked; take fewer or smaller"
    ):
        data.load("npz", npz_cohorts(file))


@pytest.mark.parametrize("white", [1, 0])
def test_a_file_of_zeros_and_ones_is_read_with_a_warning(tiny_npz, npz_cohorts, white):
    rng = np.random.default_rng(0)
    masks = {f"{split}_images": rng.integers(0, 2, (20, 28, 28), dtype=np.uint8) for split in data.OFFICIAL}
    file = tiny_npz(**masks if white else {key: value.astype(np.float32) for key, value in masks.items()})
    if not white:  # as shares of white they are black and white
        assert data.load("npz", npz_cohorts(file))["test"].images.max() == 255
        return
    with pytest.warns(UserWarning, match=r"tiny\.npz: all pixels are 0 or 1 of 255, nearly black: masks, or"):
        cohort = data.load("npz", npz_cohorts(file))
    assert image_files.DARK in cohort.flaws


def test_splits_of_other_kinds_or_ranges(tiny_npz, npz_cohorts):
    images = noise(0, (20, 28, 28))
    for other, why in ((images // 128, "val 0 to 1, test 0 to 255); scale them alike"), (images / 255, "of one kind")):
        with pytest.raises(InputError) as caught:
            data.load("npz", npz_cohorts(tiny_npz(val_images=other)))
        assert why in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.fuzz
@fuzzed
@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_a_smaller_picture_is_the_mean_over_areas(side, size, seed):
    side = max(side, size)
    values = noise(seed, (side, side))
    fine = values.repeat(size, 0).repeat(size, 1).astype(float)  # every area is now a block of whole pixels
    expected = fine.reshape(size, side, size, side).mean((1, 3))
    assert np.abs(image_files._square(values, size)[0] - expected).max() < 1e-9


# --------------------------------------------------------------------------------------------------------------- PNG, JPEG


def saved(mode: str, pixels: np.ndarray) -> tuple[bytes, np.ndarray | None]:
    """A PNG (CMYK: JPEG) of a mode from (28, 28, 4) noise, and what it shows, (C, 28, 28) in 0 to 255; None: not exact."""
    grey, colour, alpha, stream = pixels[..., 0], pixels[..., :3], pixels[..., 3:] / 255, io.BytesIO()
    image = Image.fromarray(colour)
    expected = colour.astype(float)
    options = {}
    if mode in ("L", "1", "LA", "L key"):
        image, expected = Image.fromarray(grey), grey[..., None].astype(float)
    if mode == "1":
        image = Image.fromarray(grey > 99)
        expected = 255.0 * (grey > 99)[..., None]
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(pixels[..., 3]))
        expected = expected * alpha
    if mode == "L key":
        options["transparency"] = int(grey[0, 0])
        expected = np.where(expected == grey[0, 0], 0, expected)
    if mode == "RGB key":
        options["transparency"] = tuple(map(int, colour[0, 0]))
        expected = np.where((colour == colour[0, 0]).all(2, keepdims=True), 0, expected)
    if mode == "P":
        image = image.quantize(64)
        expected = np.asarray(image.convert("RGB")).astype(float)
    if mode == "CMYK":
        image.convert("CMYK").save(stream, "JPEG")
        return stream.getvalue(), None
    image.save(stream, "PNG", **options)
    return stream.getvalue(), np.moveaxis(expected, 2, 0)


MODES = ("L", "1", "LA", "L key", "RGB", "RGBA", "RGB key", "P", "CMYK")


@pytest.mark.fuzz
@fuzzed
@given(st.sampled_from(MODES), st.sampled_from([".png", ".jpg", ".JPEG"]), st.integers(0, 2**31 - 1))
def test_every_mode_shows_what_it_holds_whatever_its_suffix(tmp_path, mode, suffix, seed):
    content, expected = saved(mode, noise(seed, (28, 28, 4)))
    (tmp_path / f"a{suffix}").write_bytes(content)
    found = shown(tmp_path / f"a{suffix}")
    assert found.dtype == np.uint8
    if expected is not None:
        assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.fuzz
@fuzzed
@given(st.sampled_from(MODES), st.data())
def test_a_damaged_picture_is_refused_or_read(tmp_path, mode, draw):
    content, _ = saved(mode, noise(3, (28, 28, 4)))
    cut = draw.draw(st.integers(0, len(content)))
    junk, gone = draw.draw(st.binary(max_size=20)), draw.draw(st.integers(0, 20))
    (tmp_path / "a.png").write_bytes(content[:cut] + junk + content[cut + gone :])
    found = one_line(lambda: shown(tmp_path / "a.png"), "a.png")
    assert isinstance(found, str) or found.shape[1:] == (28, 28)


def test_bounds_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    write_dicom(tmp_path / "a.dcm", np.zeros((100, 200), np.uint8))
    monkeypatch.setattr(image_files, "PIXELS", 2**14)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)
    monkeypatch.setattr(Image.Image, "load", None)
    for name in ("a.png", "a.dcm"):
        assert f"{name} has 200 × 100 pixels" in one_line(functools.partial(shown, tmp_path / name), name)
    monkeypatch.setattr(image_files, "BYTES", 10)
    assert "a.png is larger than" in one_line(lambda: shown(tmp_path / "a.png"), "a.png")


# ------------------------------------------------------------------------------------------------------------------- DICOM

WRONG_TAGS = [  # what is changed in a good 12-bit grey file, and a part of the answer
    ({"HighBit": 15}, "HighBit 15 with BitsStored 12"),
    ({"HighBit": 10}, "HighBit 10"),
    ({"BitsStored": 17, "HighBit": 16}, "BitsStored 17 of BitsAllocated 16"),
    ({"BitsStored": 0, "HighBit": 0}, "BitsStored 0"),
    ({"BitsAllocated": 12}, "BitsStored 12 of BitsAllocated 12"),
    ({"SamplesPerPixel": 3, "PlanarConfiguration": 0, "Columns": 28}, "SamplesPerPixel 3 with Photometric"),
    ({"PhotometricInterpretation": "RGB"}, "SamplesPerPixel 1 with PhotometricInterpretation RGB"),
    ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "pixels of the kind YBR_PARTIAL_420"),
    ({"PhotometricInterpretation": "CMYK"}, "pixels of the kind CMYK"),
    ({"PhotometricInterpretation": "\0\x1bMONO"}, "pixels of the kind"),
    ({"PhotometricInterpretation": ""}, "pixels of the kind"),
    ({"PixelRepresentation": 2}, "PixelRepresentation 2"),
    ({"PresentationLUTShape": "INVERSE"}, "PresentationLUTShape INVERSE"),
    ({"RescaleSlope": 2}, "a rescaling without a slope"),
    ({"RescaleSlope": 0, "RescaleIntercept": 5}, "or with one of 0"),
    ({"NumberOfFrames": 3}, "has 3 frames"),
    ({"Rows": 60}, "cannot be read"),
    ({"Rows": None}, ""),
    ({"Rows": 65535, "Columns": 65535}, "has 65535 × 65535 pixels"),
    ({"WindowCenter": 5, "WindowWidth": -1}, "impossible window"),
    ({"PixelData": b""}, ""),
]


@pytest.mark.parametrize(("tags", "why"), WRONG_TAGS, ids=[str(tags) for tags, _ in WRONG_TAGS])
def test_a_header_that_contradicts_itself_is_refused_by_name(tmp_path, tags, why):
    file = write_dicom(tmp_path / "a.dcm", flat(0, 1000, 2000, 4095), bits=12)
    assert shown(file).max() == 255
    header = pydicom.dcmread(file)
    for tag, value in tags.items():
        setattr(header, tag, value)
    header.save_as(file)
    found = one_line(lambda: shown(file), "a.dcm")
    assert isinstance(found, str)
    assert why in found


def test_what_lies_above_the_stored_bits_is_no_part_of_the_picture(tmp_path):
    """Old files keep an overlay there."""
    stored = flat(0, 1000, 2000, 4095)
    plain = shown(write_dicom(tmp_path / "a.dcm", stored, bits=12))
    assert np.array_equal(shown(write_dicom(tmp_path / "a.dcm", stored | 0xA000, bits=12)), plain)


def test_a_deflated_dicom_is_not_inflated(tmp_path):
    header = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", flat(1, 2)))
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(tmp_path / "a.dcm")
    assert "a.dcm is deflated as a whole" in one_line(lambda: shown(tmp_path / "a.dcm"), "a.dcm")


@pytest.mark.fuzz
@fuzzed
@given(
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    st.sampled_from([None, (1, -1024), (2.5, 10), (-1, 0)]),
    st.integers(0, 2**31 - 1),
)
def test_grey_dicom_is_stretched_from_its_darkest_to_its_brightest(tmp_path, bits, signed, kind, rescale, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    size = "1" if bits <= 8 else "2"
    stored = np.random.default_rng(seed).integers(low, high, (28, 28)).astype(("i" if signed else "u") + size)
    tags = dict(zip(("RescaleSlope", "RescaleIntercept"), rescale, strict=True)) if rescale else {}
    found = shown(write_dicom(tmp_path / "a.dcm", stored, kind, bits=bits, **tags))[0]
    values = stored.astype(float) * (rescale or (1, 0))[0] + (rescale or (1, 0))[1]
    black, white = (values.min(), values.max()) if signed or bits > 8 or rescale else (0, 2**bits - 1)
    share = (values - black) / max(white - black, 1e-12)
    assert np.abs(found - 255 * (1 - share if kind == "MONOCHROME1" else share)).max() <= 0.5 + 1e-6


@pytest.mark.fuzz
@fuzzed
@given(st.data())
def test_a_damaged_dicom_is_refused_or_read(tmp_path, draw):
    file = write_dicom(tmp_path / "a.dcm", flat(0, 1000, 2000, 4095), bits=12, WindowCenter=9, WindowWidth=9)
    content = file.read_bytes()
    cut = draw.draw(st.integers(0, 900))
    junk, gone = draw.draw(st.binary(max_size=12)), draw.draw(st.integers(0, 12))
    file.write_bytes(content[:cut] + junk + content[cut + gone :])
    found = one_line(lambda: shown(file), "a.dcm")
    assert isinstance(found, str) or found.shape == (1, 28, 28) or found.shape == (3, 28, 28)


# ------------------------------------------------------------------------------------------------------------------ folders


def test_nobody_waits_for_a_pipe_or_a_device(tree, pointed, npz_cohorts, tmp_path, monkeypatch):  # noqa: F811
    os.mkfifo(tree / "warm" / "w00_9.png")
    (tree / "warm" / "w01_9.png").symlink_to("/dev/zero")
    (tree / "warm" / "w02_9.png").symlink_to("w02_9.png")
    monkeypatch.chdir(tree / "warm")  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("w03_9.png")
        flaws = data.load("folder", pointed(tree)).flaws
    assert "skipped, broken link or no plain file: 4 (warm/w00_9.png, warm/w01_9.png, warm/w02_9.png, …)" in flaws
    os.mkfifo(tmp_path / "mine.npz")
    for name, why in (("mine.npz", "is no file"), ("x" * 5000, "does not exist"), ("~nobody/x", "does not exist")):
        with pytest.raises(InputError, match=why):
            data.load("npz", npz_cohorts(tmp_path / name if name == "mine.npz" else name))
    for name in ("x" * 5000, "a\0b", "~nobody/x"):
        assert "does not exist" in refused(pointed(name))


def test_links_out_of_the_folder_are_named(tree, pointed, tmp_path):  # noqa: F811
    (tree / "warm" / "w00_0.png").rename(tmp_path / "elsewhere.png")
    (tree / "warm" / "w00_0.png").symlink_to(tmp_path / "elsewhere.png")
    (tree / "warm" / "w01_9.png").symlink_to(tree / "warm" / "w01_0.png")  # within
    flaws = data.load("folder", pointed(tree)).flaws
    assert "links to files outside the folder, read all the same: 1 (warm/w00_0.png)" in flaws


@pytest.mark.parametrize("name", ["w00_\n.png", os.fsdecode(b"w00_\xff.png"), "w00_\u202e.png"])
def test_names_that_cannot_be_printed(tree, pointed, name):  # noqa: F811
    (tree / "warm" / "w00_0.png").rename(tree / "warm" / name)
    message = refused(pointed(tree))
    assert message.isprintable()
    assert "has characters that cannot be printed; rename it" in message


def test_names_that_figures_would_read_as_signs(tree, pointed):  # noqa: F811
    (tree / "warm").rename(tree / "$warm$")
    assert "class or site '$warm$' has a $ or |" in refused(pointed(tree))


def test_a_folder_of_masks_is_read_with_a_warning(tree, pointed):  # noqa: F811
    for file in tree.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 128).save(file)
    with pytest.warns(UserWarning, match="120 images: all pixels are 0 or 1 of 255"):
        cohort = data.load("folder", pointed(tree))
    assert any(image_files.DARK in flaw for flaw in cohort.flaws)


TABLES = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "Latin-1": lambda text: text.replace("c00", "c\xe9").encode("latin-1"),
    "a zero byte": lambda text: text.replace("c01_0", "c0\0_0").encode(),
    "a long name": lambda text: text.replace("c01_0", "c" * 5000).encode(),
    "a long field": lambda text: text.replace("c01_0", "c" * 200_000).encode(),
    "a line in a field": lambda text: text.replace("png,c02", 'png,"c\n02"').encode(),
    "an open quote": lambda text: text.replace("png,c02", 'png,"c02').encode(),
    "a way out": lambda text: text.replace("cold/c01_0", "../mine/cold/c01_0").encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "noise": lambda text: bytes(range(256)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_are_none(tree, pointed, tmp_path, kind):  # noqa: F811
    table = tmp_path / "t.csv"
    write_table(table, rows_of(tree))
    assert data.load("folder", pointed(tree, table=str(table))).n_classes == 2
    table.write_bytes(TABLES[kind](table.read_text(encoding="utf-8")))
    message = one_line(functools.partial(data.load, "folder", pointed(tree, table=str(table))), "t.csv")
    assert isinstance(message, str)
