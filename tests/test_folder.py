"""medsec.data.folder and medsec.data.images: one's own images, divided by patient, and every wrong folder."""

import csv
import math
import os
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from experiments import params
from experiments.backdoor_fedgan import cells as fedgan_eval
from medsec import data
from medsec.backdoor import gan as fedgan
from medsec.core import settings
from medsec.core.errors import InputError
from medsec.data import folder, sources
from medsec.data import images as image_files
from medsec.data.cohort import SPLITS


def noise(seed, shape=(28, 28)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_tree(root, classes=("cold", "warm"), patients=20, each=3, shape=(28, 28), suffix="png"):
    """``root/<class>/<patient>_<n>.<suffix>``: distinct images of patients who belong to one class each."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for p in range(patients):
            for n in range(each):
                image = noise(10_000 * c + 100 * p + n, shape)
                Image.fromarray(image).save(root / name / f"{name[0]}{p:02d}_{n}.{suffix}")
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "mine")


@pytest.fixture
def pointed(cohorts):
    """Function: cohort parameters whose folder section has these values."""

    def point(root, **change) -> settings.Cohorts:
        section = settings.FolderCohort.model_validate(cohorts.folder.model_dump() | {"path": str(root)} | change)
        return cohorts.model_copy(update={"folder": section})

    return point


def refused(cohorts) -> str:
    with pytest.raises(InputError) as caught:
        data.load("folder", cohorts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_table(file, rows, columns=("file", "patient")):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return str(file)


def rows_of(root):
    """(file, patient) of every image of a tree."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return [(file, file.split("/")[1].split("_")[0]) for file in files]


def shown(file, size=28):
    """What a file becomes: (C, S, S) uint8."""
    return image_files.read(file, size, file.name).pixels


# ------------------------------------------------------------------------------------------------------------ whole cohorts


def test_a_grey_folder(tree, pointed):
    cohort = data.load("folder", pointed(tree))
    assert tuple(cohort.splits) == data.SPLITS
    assert (cohort.name, cohort.classes, cohort.sites) == ("folder", ("cold", "warm"), ())
    assert (cohort.n_classes, cohort.channels, cohort.size) == (2, 1, 28)
    assert sum(len(split) for split in cohort.splits.values()) == 120
    for name, share in pointed(tree).folder.shares.model_dump().items():
        counts = np.bincount(cohort[name].labels)
        assert np.abs(counts - 60 * share).max() <= 3, name  # a patient has three images
        assert (cohort[name].images.dtype, cohort[name].labels.dtype) == (np.uint8, np.int64)
    assert cohort.licence == "unknown: yours to know"
    assert cohort.source.startswith("your folder: 120 images of 40 patients by file names")
    assert str(tree) not in data.describe(cohort)
    stored = {noise(10_000 * c + 100 * p + n).tobytes() for c in range(2) for p in range(20) for n in range(3)}
    assert {image.tobytes() for split in cohort.splits.values() for image in split.images} == stored  # 28 px stay


def test_a_colour_folder_of_three_classes(tmp_path, pointed):
    root = write_tree(tmp_path / "mine", ("a", "b", "c"), patients=10, each=2, shape=(60, 41, 3), suffix="JPG")
    cohort = data.load("folder", pointed(root), size=32)
    assert (cohort.n_classes, cohort.channels, cohort.size) == (3, 3, 32)
    assert cohort["client"].images.shape[1:] == (3, 32, 32)
    assert any("60 images: not square" in flaw for flaw in cohort.flaws)
    assert any("from 41 to 41 px" in flaw for flaw in cohort.flaws)
    assert data.load("folder", pointed(root, channels=1)).channels == 1


def test_the_order_of_the_file_system_plays_no_part(tree, pointed, tmp_path, monkeypatch):
    first = data.load("folder", pointed(tree))
    folder._read.cache_clear()
    other = tmp_path / "elsewhere" / "copy"
    files = sorted(tree.rglob("*.png"), key=lambda path: hash(path.name[::-1]))
    for file in files[::-1]:
        (other / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, other / file.parent.name)
    walk = os.walk

    def shuffled(*args, **kwargs):
        for place, folders, names in walk(*args, **kwargs):
            folders.reverse()
            yield place, folders, sorted(names, reverse=True)

    monkeypatch.setattr(folder.os, "walk", shuffled)
    again = data.load("folder", pointed(other))
    assert again.fingerprint == first.fingerprint
    for name in SPLITS:
        assert np.array_equal(again[name].images, first[name].images)
    assert data.load("folder", pointed(tree, seed=8)).fingerprint != first.fingerprint
    victim = next(other.rglob("*.png"))
    Image.fromarray(np.asarray(Image.open(victim)) ^ 1).save(victim)
    assert data.load("folder", pointed(other)).fingerprint != first.fingerprint


def test_a_changed_file_is_read_again(tree, pointed):
    first = data.load("folder", pointed(tree)).fingerprint
    assert data.load("folder", pointed(tree)).fingerprint == first
    Image.fromarray(noise(99_999)).save(tree / "cold" / "c00_0.png")
    assert data.load("folder", pointed(tree)).fingerprint != first


def test_what_is_skipped_is_reported(tree, pointed, capsys, monkeypatch):
    (tree / "cold" / "notes.txt").write_text("x")
    (tree / "cold" / "Thumbs.db").write_text("x")
    (tree / "cold" / ".DS_Store").write_text("x")
    (tree / ".git").mkdir()
    (tree / ".git" / "c01_1.png").write_text("x")
    (tree / "lukewarm").mkdir()
    (tree / "DICOMDIR").write_text("x")
    (tree / "link").symlink_to(tree / "warm", target_is_directory=True)
    (tree / "cold" / "c07_9.png").symlink_to("nowhere.png")
    Image.fromarray(noise(1)).save(tree / "c08_0.png")
    shutil.copy(tree / "cold" / "c00_0.png", tree / "cold" / "c00_9.png")  # the same patient
    shutil.copy(tree / "cold" / "c00_1.png", tree / "cold" / "c01_9.png")  # another one
    (tree / "warm" / "deeper").mkdir()
    (tree / "warm" / "w00_0.png").rename(tree / "warm" / "deeper" / "w00_0.png")  # no flaw: any depth
    cohort = data.load("folder", pointed(tree))
    assert sum(cohort.removed.values()) == 2
    assert sum(len(split) for split in cohort.splits.values()) == 120
    for line in (
        "skipped, neither PNG, JPEG nor DICOM: 2 (cold/Thumbs.db, cold/notes.txt)",
        "skipped, hidden: 2 (.git/, cold/.DS_Store)",
        "skipped, empty folder: 1 (lukewarm)",
        "skipped, directory of a DICOM medium, no image: 1 (DICOMDIR)",
        "skipped, link to a folder: 1 (link/)",
        "skipped, broken link or no plain file: 1 (cold/c07_9.png)",
        "skipped, in no class folder: 1 (c08_0.png)",
        "1 images occur under several patients (copies are removed): are these the same person?",
    ):
        assert line in cohort.flaws

    monkeypatch.setattr(sources.params, "validated", lambda *_: pointed(tree))
    assert sources.main(["describe", "--cohort", "folder"]) == 0
    card = capsys.readouterr().out
    assert all(f"- {flaw}\n" in card for flaw in cohort.flaws)
    assert "Exact duplicates removed: " in card
    assert "removed: none" not in card
    monkeypatch.setattr(sources.params, "validated", lambda *_: pointed(tree / "nowhere"))
    assert sources.main(["describe", "--cohort", "folder"]) == 2
    assert capsys.readouterr().err.startswith("error: cohorts.folder.path = ")


# ---------------------------------------------------------------------------------------------------------------- patients

people = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=30, max_size=60
)  # each patient's number of images, and main class


@given(people, st.integers(0, 2**31 - 1), st.floats(0, 0.2))
def test_no_patient_is_in_two_splits_and_every_split_has_every_class(folk, seed, mixed):
    folk = [*folk, *[(2, c) for c in range(3) for _ in range(8)]]
    rng = np.random.default_rng(seed)
    patients = [f"p{i}" for i, (n, _) in enumerate(folk) for _ in range(n)]
    labels = np.array([c for n, c in folk for _ in range(n)])
    other = rng.random(len(labels)) < mixed  # images of a patient's second class
    labels = np.where(other & (np.array([n for n, _ in folk for _ in range(n)]) > 2), (labels + 1) % 3, labels)
    shares = {"client": 0.4, "public": 0.15, "reference": 0.2, "val": 0.1, "test": 0.15}
    shares = settings.FolderShares.model_validate(shares)
    split = folder.draw_splits(patients, labels, shares, seed)
    for patient in set(patients):
        assert len(set(split[np.array(patients) == patient])) == 1
    table = np.zeros((5, 3), int)
    np.add.at(table, (split, labels), 1)
    assert (table > 0).all()
    wanted = np.array([getattr(shares, name) for name in SPLITS])[:, None] * np.bincount(labels, minlength=3)
    assert np.abs(table - wanted).max() <= 2 * max(n for n, _ in folk)
    assert np.array_equal(split, folder.draw_splits(patients, labels, shares, seed))


UNEVEN = settings.FolderShares(client=0.8, public=0.05, reference=0.05, val=0.05, test=0.05)


def spread(groups):
    """Patients and labels from (number of patients, the labels of each one's images)."""
    held = [labels for n, labels in groups for _ in range(n)]
    return [f"p{i}" for i, labels in enumerate(held) for _ in labels], np.array([c for labels in held for c in labels])


@pytest.mark.parametrize(
    "groups",
    [
        [(5, [0]), (5, [1])],
        [(1, [c] * n) for c in range(2) for n in (1, 8, 15, 22, 29)],
        # Class 2 has no patient of its own: those it shares with 0 and 1 may not all go into the largest split.
        [(4, [0, 2]), (4, [0]), (5, [1, 2]), (4, [1])],
    ],
)
def test_five_patients_of_a_class_are_enough_even_for_uneven_shares(groups):
    patients, labels = spread(groups)
    for seed in range(30):
        split = folder.draw_splits(patients, labels, UNEVEN, seed)
        assert all(set(split[labels == c]) == set(range(5)) for c in set(labels))


def test_large_patients_do_not_spoil_the_shares(cohorts):
    patients, labels = spread([(1, [0] * 30), (100, [0]), (1, [1] * 30), (100, [1])])
    wanted = [130 * getattr(cohorts.folder.shares, name) for name in SPLITS]
    for seed in range(20):
        split = folder.draw_splits(patients, labels, cohorts.folder.shares, seed)
        for c in range(2):
            assert np.abs(np.bincount(split[labels == c], minlength=5) - wanted).max() <= 1


def test_patients_are_drawn_by_the_seed(cohorts):
    patients, labels = [f"p{i}" for i in range(40)], np.arange(40) % 2
    draws = [tuple(folder.draw_splits(patients, labels, cohorts.folder.shares, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_loaded_patients_stay_together(tree, pointed):
    """A patient of both classes, too; found again by their pixels."""
    for n in range(3):
        (tree / "warm" / f"w00_{n}.png").rename(tree / "warm" / f"c00_{n}w.png")
    owner = {np.asarray(Image.open(f)).tobytes(): f.name.split("_")[0] for f in tree.rglob("*.png")}
    for seed in range(5):
        cohort = data.load("folder", pointed(tree, seed=seed))
        held = [{owner[image.tobytes()] for image in split.images} for split in cohort.splits.values()]
        assert sum(map(len, held)) == len(set.union(*held)) == 39


# ------------------------------------------------------------------------------------------------------------------- tables


def test_a_table_gives_patients_splits_and_hospitals(tree, pointed, tmp_path):
    rows, sites = rows_of(tree), ("north", "south")
    full = [(f, p, SPLITS[int(p[1:]) % 5], sites[int(p[1:]) // 10], 7) for f, p in rows]
    table = write_table(tmp_path / "t.csv", full, ("file", "patient", "split", "site", "age"))
    cohort = data.load("folder", pointed(tree, table=table))
    assert cohort.sites == sites
    assert "columns of the table that are not used: age" in cohort.flaws
    assert cohort.source.endswith("splits as the table says")
    image_of = {np.asarray(Image.open(tree / row[0])).tobytes(): row for row in full}
    for name, split in cohort.splits.items():
        for image, label, site in zip(split.images, split.labels, split.site, strict=True):
            file, _, wanted, hospital, _ = image_of[image.tobytes()]
            assert (name, cohort.classes[label], sites[site]) == (wanted, file.split("/")[0], hospital)
    parts = data.partition(cohort["client"].labels, 2, "style", seed=0, site=cohort["client"].site)
    assert [set(cohort["client"].site[part]) for part in parts] == [{0}, {1}]


def test_a_table_may_name_the_classes_of_a_flat_folder(tree, pointed, tmp_path):
    rows = [(f.split("/")[1], p, "hot" if p[0] == "w" else "icy") for f, p in rows_of(tree)]
    for file in list(tree.rglob("*.png")):
        file.rename(tree / file.name)
    table = write_table(tmp_path / "t.csv", rows, ("file", "patient", "label"))
    cohort = data.load("folder", pointed(tree, table=table))
    assert cohort.classes == ("hot", "icy")
    assert [len(split) for split in cohort.splits.values()] == [36, 18, 30, 18, 18]


def altered(rows, at, **change):
    rows = [list(row) for row in rows]
    for column, value in change.items():
        rows[at][("file", "patient", "split").index(column)] = value
    return rows


WITH_SPLIT = ("file", "patient", "split")
WRONG_TABLES = [
    (lambda rows: (rows[1:], WITH_SPLIT), "t.csv has no line for cold/c00_0.png; add it"),
    (lambda rows: (rows[2:], WITH_SPLIT), "t.csv has no line for cold/c00_0.png and 1 more"),
    (lambda rows: (altered(rows, 4, file="cold/x_1.png"), WITH_SPLIT), "t.csv line 6: cold/x_1.png does not exist"),
    (lambda rows: (altered(rows, 4, file="cold/a.txt"), WITH_SPLIT), "line 6: cold/a.txt is none of the images"),
    (lambda rows: (altered(rows, 4, file="cold/c00_0.png"), WITH_SPLIT), "line 6: cold/c00_0.png is there a second"),
    (lambda rows: (altered(rows, 1, patient=" "), WITH_SPLIT), "t.csv line 3: patient is empty"),
    (lambda rows: (altered(rows, 1, split="train"), WITH_SPLIT), "t.csv line 3: unknown split 'train'; choose one of"),
    (lambda rows: (altered(rows, 1, split="test"), WITH_SPLIT), "patient c00 is in two splits, client and test"),
    (lambda rows: ([(f, p, "val" if f[0] == "c" and s == "test" else s) for f, p, s in rows], WITH_SPLIT),
     "class cold is missing from split test"),
    (lambda rows: (rows, ("name", "patient", "split")), "t.csv has no column file"),
    (lambda rows: (rows, ("file", "patient")), "t.csv line 2 has more fields than the first line"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_TABLES, ids=[message for _, message in WRONG_TABLES])
def test_wrong_tables(tree, pointed, tmp_path, change, message):
    (tree / "cold" / "a.txt").write_text("x")
    rows = [(f, p, SPLITS[int(p[1:]) % 5]) for f, p in rows_of(tree)]
    table = write_table(tmp_path / "t.csv", *change(rows))
    assert message in refused(pointed(tree, table=table))


def test_no_table(tree, pointed, tmp_path):
    assert "cohorts.folder.table = 'none.csv' does not exist" in refused(pointed(tree, table="none.csv"))
    (tmp_path / "t.csv").write_bytes(b"file,patient\n\xff\xfe,1\n")
    assert "t.csv is no CSV file in UTF-8" in refused(pointed(tree, table=str(tmp_path / "t.csv")))
    (tmp_path / "t.csv").write_bytes(b"")
    assert "t.csv has no column file" in refused(pointed(tree, table=str(tmp_path / "t.csv")))


# ------------------------------------------------------------------------------------------------------------ wrong folders


def test_no_folder(cohorts, pointed, tree):
    assert refused(cohorts).startswith("cohorts.folder.path is not set; write the path")
    assert "cohorts.folder.path = 'nowhere' does not exist" in refused(pointed("nowhere"))
    assert "is not of that kind" in refused(pointed(tree / "cold" / "c00_0.png"))
    with pytest.raises(InputError, match="size 30 of cohort folder must be 28 to 224 and a multiple of 4"):
        data.load("folder", pointed(tree), size=30)


def test_too_few_classes(tree, pointed, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty has no class folder with an image" in refused(pointed(tmp_path / "empty"))
    for file in (tree / "warm").iterdir():
        file.rename(file.with_suffix(".tif"))
    message = refused(pointed(tree))
    assert "mine has one class only (cold)" in message
    assert "skipped, neither PNG, JPEG nor DICOM: 60 (warm/w00_0.tif, " in message


def test_folders_that_are_splits(tmp_path, pointed):
    root = write_tree(tmp_path / "mine", ("train", "val", "test"), patients=2)
    assert "the folders test, train, val look like splits" in refused(pointed(root))


def test_a_name_without_a_patient(tree, pointed):
    (tree / "warm" / "w00_0.png").rename(tree / "warm" / "w000.png")
    message = refused(pointed(tree))
    assert "no patient in mine/warm/w000.png: '^([^_]+)_' does not match" in message
    assert "cohorts.folder.patient_pattern" in message
    assert data.load("folder", pointed(tree, patient_pattern=r"^(\w\d\d)")).n_classes == 2


def test_too_few_patients(tmp_path, pointed):
    root = write_tree(tmp_path / "mine", patients=4, each=20)
    message = refused(pointed(root))
    assert "class warm is missing from split val" in message
    assert "all 80 images of it are of 4 patient(s): w00, w01, w02, …" in message
    assert "change cohorts.folder.shares or seed" in message


def test_too_few_images(tmp_path, pointed):
    root = write_tree(tmp_path / "mine", patients=10, each=1)
    message = refused(pointed(root))
    assert "too few images (client 6, public " in message
    assert f"every split needs {folder.LEAST}" in message


def test_a_class_that_consists_of_copies(tree, pointed):
    for file in sorted((tree / "warm").iterdir())[1:]:
        shutil.copy(tree / "warm" / "w00_0.png", file)
    assert "without duplicates: class warm is missing from split client" in refused(pointed(tree))


def test_grey_and_colour_mixed(tree, pointed):
    Image.fromarray(noise(5, (28, 28, 3))).save(tree / "warm" / "w05_0.png")
    message = refused(pointed(tree))
    assert "like cold/c00_0.png (grey) and warm/w05_0.png (colour); set cohorts.folder.channels to 1" in message
    assert "1 images: colours made grey (luma)" in data.load("folder", pointed(tree, channels=1)).flaws
    colour = data.load("folder", pointed(tree, channels=3))
    assert colour.channels == 3
    assert "119 images: grey made three channels" in colour.flaws


def test_unreadable_images(tree, pointed):
    file = tree / "warm" / "w05_0.png"
    whole = file.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:60] + b"\0" * 40 + whole[100:]):
        file.write_bytes(content)
        assert "mine/warm/w05_0.png cannot be read" in refused(pointed(tree))
    Image.fromarray(noise(1)).save(file, "BMP")
    assert "mine/warm/w05_0.png cannot be read" in refused(pointed(tree))
    frames = [Image.fromarray(noise(i)) for i in range(3)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    assert "mine/warm/w05_0.png has 3 frames; save the one" in refused(pointed(tree))
    (tree / "warm" / "w05_0.dcm").write_bytes(b"text")
    file.write_bytes(whole)
    assert "mine/warm/w05_0.dcm cannot be read" in refused(pointed(tree))


# --------------------------------------------------------------------------------------------------------------- PNG, JPEG


def test_the_central_square_is_averaged_by_area(tmp_path):
    values = noise(3, (56, 70))
    Image.fromarray(values).save(tmp_path / "a.png")
    square = values[:, 7:63].astype(float)
    expected = square.reshape(28, 2, 28, 2).mean(axis=(1, 3))
    assert np.abs(shown(tmp_path / "a.png")[0] - expected).max() <= 0.5
    picture = image_files.read(tmp_path / "a.png", 64, "a")
    assert picture.pixels.shape == (1, 64, 64)
    assert picture.notes == ("not square: only the central square is kept", "smaller than 64 px: enlarged")


def test_sixteen_bits(tmp_path, tree, pointed):
    """A scale for all 16-bit PNGs together: 12 bits of them are used."""
    for file in tree.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16) * 16).save(file)
    cohort = data.load("folder", pointed(tree))
    assert "120 images: 16-bit PNG whose values use 12 bits: white is 4095" in cohort.flaws
    expected = {
        np.rint(noise(10_000 * c + 100 * p + n) * np.float32(16) / np.float32(4095) * 255).astype(np.uint8).tobytes()
        for c in range(2)
        for p in range(20)
        for n in range(3)
    }
    assert {image.tobytes() for split in cohort.splits.values() for image in split.images} == expected
    picture = image_files.read(tree / "cold" / "c00_0.png", 28, "")
    assert (picture.top, picture.pixels.dtype) == (16 * int(noise(0).max()), np.float64)


def test_kinds_of_pixels(tmp_path):
    grey, rgb = Image.fromarray(noise(1)), Image.fromarray(noise(2, (28, 28, 3)))
    half = Image.fromarray(np.full((28, 28), 128, np.uint8))
    with_alpha, grey_alpha = rgb.copy(), grey.copy()
    with_alpha.putalpha(half)
    grey_alpha.putalpha(half)
    palette = rgb.quantize(256)
    grey_palette = grey.convert("P")
    cases = {
        "L": (grey, noise(1)[None], None),
        "1": (grey.convert("1"), np.asarray(grey.convert("1").convert("L"))[None], None),
        "RGB": (rgb, noise(2, (28, 28, 3)).transpose(2, 0, 1), None),
        "P": (palette, np.asarray(palette.convert("RGB")).transpose(2, 0, 1), "palette"),
        "grey P": (grey_palette, noise(1)[None], "palette"),
        "RGBA": (with_alpha, np.rint(noise(2, (28, 28, 3)).transpose(2, 0, 1) * (128 / 255)), "put on black"),
        "LA": (grey_alpha, np.rint(noise(1)[None] * (128 / 255)), "put on black"),
    }
    for name, (image, expected, note) in cases.items():
        image.save(tmp_path / "a.png")
        picture = image_files.read(tmp_path / "a.png", 28, "a")
        assert picture.pixels.dtype == np.uint8
        assert np.abs(picture.pixels - expected.astype(float)).max() <= (1 if note == "put on black" else 0), name
        assert (note in picture.notes[0]) if note else not picture.notes, name
    rgb.convert("CMYK").save(tmp_path / "a.jpg")
    picture = image_files.read(tmp_path / "a.jpg", 28, "a")
    assert picture.pixels.shape == (3, 28, 28)
    assert picture.notes == ("CMYK colours: converted",)


def test_exif_orientation(tmp_path):
    image = Image.fromarray(np.linspace(0, 255, 28 * 28).reshape(28, 28).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    image.save(tmp_path / "plain.jpg", quality=100)
    image.save(tmp_path / "turned.jpg", quality=100, exif=exif)
    plain, turned = shown(tmp_path / "plain.jpg"), image_files.read(tmp_path / "turned.jpg", 28, "")
    assert np.array_equal(turned.pixels[0], np.rot90(plain[0], -1))
    assert turned.notes == ("turned as their EXIF orientation says",)


# -------------------------------------------------------------------------------------------------------------------- DICOM


def write_dicom(file, stored, kind="MONOCHROME2", bits=None, **tags):
    """A DICOM file with these stored values, (H, W) or (H, W, 3), and any further tags."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[file.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.Rows, header.Columns = stored.shape[:2]
    header.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    if stored.ndim == 3:
        header.PlanarConfiguration = 0
    header.PhotometricInterpretation = kind
    header.BitsAllocated = 8 * stored.itemsize
    header.BitsStored = bits or header.BitsAllocated
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.PixelData = stored.tobytes()
    for tag, value in tags.items():
        setattr(header, tag, value)
    header.save_as(file, enforce_file_format=True)
    return file


def flat(*values, dtype=np.uint16):
    """(28, 28) stored values: as many vertical stripes as values, each a multiple of 28 / len wide."""
    return np.repeat(np.array(values, dtype), 28 // len(values))[None].repeat(28, 0)


def stripes(pixels, n):
    """The grey level of each stripe of `flat`."""
    return pixels[0, 0, :: 28 // n].tolist()


def test_a_window_by_hand(tmp_path):
    """Stored 0, 100, 500, 1000, 1100, 1200, 3000; rescaled 2 x - 1024; window centre 1000, width 401.

    Rescaled: -1024, -824, -24, 976, 1176, 1376, 4976. DICOM: y = (x - (c - 0.5)) / (w - 1) + 0.5, so that the window goes
    from 799.5 (black) to 1199.5 (white): 976 is (976 - 999.5) / 400 + 0.5 = 0.44125 → 112.5, 1176 is 0.94125 → 240.02.
    """
    stored = flat(0, 100, 500, 1000, 1100, 1200, 3000)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": [1000, 40], "WindowWidth": [401, 80]}
    found = stripes(shown(write_dicom(tmp_path / "a.dcm", stored, bits=12, **tags)), 7)
    assert found[:3] == [0, 0, 0]
    assert found[3] in (112, 113)
    assert found[4:] == [240, 255, 255]
    inverted = stripes(shown(write_dicom(tmp_path / "a.dcm", stored, "MONOCHROME1", bits=12, **tags)), 7)
    assert inverted == [255, 255, 255, 255 - found[3], 15, 0, 0]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(512, 300), (100.5, 1), (2000, 4096)])
def test_windows_are_those_of_the_standard(function, centre, width):
    """DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, whatever the header says of bits, signs and rescaling; the first window counts."""
    header, values = Dataset(), np.arange(-1000.0, 4096.0)[None]
    header.PixelRepresentation, header.BitsStored, header.RescaleSlope, header.RescaleIntercept = 1, 12, 2, -1024
    header.WindowCenter, header.WindowWidth, header.VOILUTFunction = [centre, 40], [width, 80], function
    c, w = (centre - 0.5, width - 1) if function == "LINEAR" else (centre, width)
    if function == "SIGMOID":
        expected = 0.5 + 0.5 * np.tanh(2 * (values - c) / w)
    else:
        expected = np.clip((values - c) / w + 0.5, 0, 1) if w else values > c
    assert np.abs(image_files._window(header, values) - expected).max() < 1e-9


def test_signed_values_without_a_window(tmp_path):
    """From the darkest to the brightest value, but for the padding around the picture."""
    stored = flat(-2000, -1000, 0, 1000, dtype=np.int16)
    picture = image_files.read(write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000), 28, "")
    assert stripes(picture.pixels, 4) == [0, 0, 128, 255]
    assert picture.notes == ("DICOM without a window: stretched from its darkest to its brightest value",)
    stored = flat(-2000, -1000, 0, 1000, dtype=np.int16)
    assert stripes(shown(write_dicom(tmp_path / "a.dcm", stored)), 4) == [0, 85, 170, 255]
    assert stripes(shown(write_dicom(tmp_path / "a.dcm", flat(7, 7, dtype=np.int16))), 2) == [0, 0]


def test_eight_bits_are_grey_levels(tmp_path):
    stored = flat(10, 200, dtype=np.uint8)
    assert stripes(shown(write_dicom(tmp_path / "a.dcm", stored)), 2) == [10, 200]
    assert stripes(shown(write_dicom(tmp_path / "a.dcm", stored, "MONOCHROME1")), 2) == [245, 55]


def test_colour_dicom(tmp_path):
    stored = noise(4, (28, 28, 3))
    assert np.array_equal(shown(write_dicom(tmp_path / "a.dcm", stored, "RGB")), stored.transpose(2, 0, 1))


def test_compressed_colour_dicom(tmp_path):
    """JPEG inside DICOM, stored as luma and chroma: RGB again."""
    Image.new("RGB", (28, 28), (200, 40, 90)).save(tmp_path / "a.jpg", quality=95)
    header = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", noise(4, (28, 28, 3)), "YBR_FULL_422"))
    header.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    header.PixelData = pydicom.encaps.encapsulate([(tmp_path / "a.jpg").read_bytes()])
    header["PixelData"].is_undefined_length = True
    header.save_as(tmp_path / "a.dcm")
    found = shown(tmp_path / "a.dcm").reshape(3, -1).astype(int)
    assert np.abs(found - [[200], [40], [90]]).max() <= 2


def test_palette_dicom(tmp_path):
    tables = {}
    for colour, values in (("Red", [0, 255]), ("Green", [10, 20]), ("Blue", [255, 0])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 8]
        tables[f"{colour}PaletteColorLookupTableData"] = bytes(values)
    file = write_dicom(tmp_path / "a.dcm", flat(0, 1, dtype=np.uint8), "PALETTE COLOR", **tables)
    picture = image_files.read(file, 28, "")
    assert picture.pixels[:, 0, ::14].tolist() == [[0, 255], [10, 20], [255, 0]]
    assert "colours of a palette: converted" in picture.notes


def test_a_voi_table(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 1, 8], [0, 50, 100, 255]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    file = write_dicom(tmp_path / "a.dcm", flat(0, 1, 2, 9), bits=12, VOILUTSequence=[table])
    assert stripes(shown(file), 4) == [0, 0, 50, 255]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 2, "Rows": 14}, "a.dcm has 2 frames; save the one that is meant"),
        (
            {"WindowCenter": 5, "WindowWidth": 0},
            "a.dcm has an impossible window (The (0028,1051) Window Width must be greater",
        ),
        ({"PixelData": b"\0" * 10}, "a.dcm cannot be read"),
        ({"kind": "HSV"}, "a.dcm has pixels of the kind HSV"),
    ],
)
def test_dicom_that_is_refused(tmp_path, tags, message):
    file = write_dicom(tmp_path / "a.dcm", flat(1, 2), **tags)
    with pytest.raises(InputError) as caught:
        image_files.read(file, 28, file.name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dicom_without_an_image_or_a_decoder(tmp_path):
    file = write_dicom(tmp_path / "a.dcm", flat(1, 2))
    header = pydicom.dcmread(file)
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"  # JPEG-LS
    header.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7"])
    header["PixelData"].is_undefined_length = True
    header.save_as(file)
    with pytest.raises(InputError, match=r"a\.dcm is compressed in a way that is not read here \(JPEG-LS Lossless"):
        image_files.read(file, 28, file.name)
    del header.PixelData
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.save_as(file)
    with pytest.raises(InputError, match=r"a\.dcm is DICOM without an image"):
        image_files.read(file, 28, file.name)


def test_a_folder_of_dicom_files_with_and_without_a_suffix(tmp_path, pointed):
    for c, name in enumerate(("cold", "warm")):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for p in range(30):
            for n in range(2):
                file = tmp_path / "mine" / name / (f"{name}{p}_{n}.dcm" if p % 2 else f"{name}{p}_1.2.840.{n}")
                stored = noise(1000 * c + 10 * p + n).astype(np.uint16) * 8
                write_dicom(file, stored, bits=12, WindowCenter=1024, WindowWidth=2048, PatientID=f"{name}{p // 2}")
    cohort = data.load("folder", pointed(tmp_path / "mine"))
    assert sum(len(split) for split in cohort.splits.values()) == 120
    assert not any("skipped" in flaw for flaw in cohort.flaws)
    assert any("PatientIDs of DICOM headers are in several splits" in flaw for flaw in cohort.flaws)


# -------------------------------------------------------------------------------------------------------------- end to end


def test_a_federated_gan_on_a_colour_folder(tmp_path, pointed, monkeypatch):
    """Notebook 01's cell, from files to rows: three classes, three channels."""
    root = write_tree(tmp_path / "mine", ("a", "b", "c"), patients=50, each=2, shape=(40, 36, 3))
    small = {
        "n_clients": 2, "malicious": [0], "images_per_client": 12, "rounds": 2,
        "gan": {"z_dim": 4, "width": 4, "batch": 8}, "poison": {"boost_after": 0.5},
        "measure": {"synthetic": 100, "threshold_fpr": 0.05, "extractor_epochs": 1, "downstream_epochs": 1, "probe": 16},
    }  # fmt: skip
    tree = params.merge(params.load().model_dump(), {"fedgan": small, "classifier": {"batch": 32}})
    tree["cohorts"]["folder"] = pointed(root).folder.model_dump()
    trained = []
    original = fedgan.train_client
    monkeypatch.setattr(fedgan, "train_client", lambda *a: trained.append(1) or original(*a))
    table, pictures = fedgan_eval.run_cell("folder", params.validate(tree), 0, "attack")
    fedgan_eval._prepare.cache_clear()
    # Two rounds of poison, and the boosted attacker's: the honest client's is the same.
    assert len(trained) == 2 * 2 + 1
    assert isinstance(table, pd.DataFrame)
    assert set(table["variant"]) == {"poison", "boost"}
    assert all(math.isfinite(value) for value in table["value"])
    assert pictures["poison"].shape[1:] == (3, 28, 28)
