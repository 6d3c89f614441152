"""Cohorts from files in MedMNIST's key layout: a file of one's own, or a MedMNIST flavour, found or downloaded."""

import hashlib
import math
import os
import shutil
import socket
import sys
import tempfile
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.settings import Cohorts, MedMNISTCohort, NpzCohort, SplitShares
from medsec.data.cohort import Cohort, Split, canonical, check_classes, deduplicate, fingerprint
from medsec.data.images import DARK

__all__: list[str] = []  # for the other modules of the package

# 2-D, one label an image; written down because medmnist.INFO, which knows them, imports torch
FLAVOURS = ("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist")
FLAVOURS += ("tissuemnist", "organamnist", "organcmnist", "organsmnist")
OFFICIAL = ("train", "val", "test")  # the splits of a MedMNIST-like file
BYTES = 2**32  # of all arrays of a file together, unpacked: as many images as fit four times over into a large memory
STALL = 30.0  # seconds without an answer after which a download is given up

_NO_PATIENTS = "no patient ids: client, public and reference are divided image-wise, one patient may be in several"
_KNOWN_FLAWS = {
    "pneumoniamnist": (
        "no patient ids at all: the official train and val splits are image-wise as well",
        "paediatric patients (one to five years) of one hospital: says nothing about adults",
        "train-to-test shift: classifiers lose accuracy from val to test; val is the optimistic one",
    ),
}
_IMAGES_FROM = {"pneumoniamnist": " Images: Kermany et al., Cell 172, 2018."}
# sha256 of the canonical content of published files, by flavour and size
_PUBLISHED = {("pneumoniamnist", 28): "a6d121a8dd1befcd5ccfcd5a103820bb35d487e9269e6f38ca07ee85f1601389"}


def own(cohorts: Cohorts, size: int | None = None) -> Cohort:
    """The cohort "npz": a file by path. ``size`` may only repeat the file's own.

    Raises:
        InputError: no path is set, or the file is missing, damaged or of another layout.
    """
    cohort = cohorts.npz
    if not cohort.path:
        raise InputError("cohorts.npz.path is not set; write the file's path, from the repository's root, into it")
    file, there, plain = paths.given(cohort.path, Path.is_file)
    if not plain:  # a pipe or a device would be waited for
        why = "is no file" if there else "does not exist"
        raise InputError(f"cohorts.npz.path = {cohort.path!r} {why}; correct the path")
    official = _read_npz(file)
    side = official["train"].images.shape[2]
    if side < 28 or side % 4:
        raise InputError(f"{file.name}: images are {side} px a side; resize them to a multiple of 4, at least 28")
    if size not in (None, side):
        raise InputError(f"{file.name}: images are {side} px a side, not {size}; leave size out or give another file")
    highest = _highest(official)
    if highest == 0:
        raise InputError(f"{file.name}: every label is 0; a cohort needs two classes or more")
    classes = tuple(str(label) for label in range(highest + 1))
    facts = {"source": f"{file.name}, a file of your own", "licence": "not stated: the file's owner knows"}
    dark = (DARK,) * all(split.images.max() <= 1 for split in official.values())
    return _from_official("npz", official, classes, cohort, file.name, flaws=(*dark, _NO_PATIENTS), **facts)


def flavour(name: str, cohorts: Cohorts, size: int | None = None) -> Cohort:
    """The MedMNIST flavour ``name``, one of `FLAVOURS`, at ``size`` (default: the parameters') pixels a side.

    Raises:
        InputError: its file cannot be had, is damaged or of another flavour.
    """
    from medmnist import INFO  # slow: imports torch

    info, cohort = INFO[name], cohorts.medmnist
    size = size or cohort.size
    if size not in (28, 64, 128, 224):
        raise InputError(f"size {size} of cohort {name} must be 28, 64, 128 or 224")
    file = _find(name, size)
    official = _read_npz(file)
    shape, wanted = official["train"].images.shape[1:], (info["n_channels"], size, size)
    if shape != wanted:
        raise InputError(f"{file.name}: images are {shape} (channels, height, width), not {wanted}; replace the file")
    classes = tuple(str(info["label"][key]) for key in sorted(info["label"], key=int))
    highest = _highest(official)
    if highest >= len(classes):
        raise InputError(f"{file.name}: label {highest}, but {name} has {len(classes)} classes; replace the file")
    flaws = (*_KNOWN_FLAWS.get(name, ()), _NO_PATIENTS)
    if published := _PUBLISHED.get((name, size)):
        if fingerprint(official) != published:
            flaws += (f"altered: fingerprint differs from the published content ({published[:12]}…)",)
    elif (
        hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != info[f"MD5_{size}" if size > 28 else "MD5"]
    ):
        flaws += ("the file's MD5 is not the published one: reordered, or altered",)
    about = info["description"].split(". ")[0].rstrip(".")
    source = f"MedMNIST v2, {info['python_class']} (Yang et al., Scientific Data 10, 41, 2023). {about}."
    facts = {"source": source + _IMAGES_FROM.get(name, ""), "licence": info["license"]}
    return _from_official(name, official, classes, cohort, file.name, flaws=flaws, **facts)


def _highest(splits: dict[str, Split]) -> int:
    return max(int(split.labels.max()) for split in splits.values())


def _from_official(name, official, classes, cohort: NpzCohort | MedMNISTCohort, where: str, **facts) -> Cohort:
    """A cohort from official train, val and test splits in canonical order; ``facts`` go to `Cohort` as they are."""
    check_classes(official, classes, where)
    clean, removed = deduplicate(official)
    check_classes(clean, classes, f"{where} without duplicates")
    splits = _divide(clean["train"], cohort.shares, cohort.seed) | {"val": clean["val"], "test": clean["test"]}
    check_classes(splits, classes, f"{where}, train divided by shares")
    return Cohort(name, splits, classes, (), fingerprint(official), removed=removed, **facts)


def _divide(train: Split, shares: SplitShares, seed: int) -> dict[str, Split]:
    """client, public and reference from an official training set: class by class, by a seeded permutation."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {"client": [], "public": [], "reference": []}
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        cuts = np.round(np.cumsum([shares.client, shares.public]) * len(members)).astype(int)
        for name, part in zip(chosen, np.split(members, cuts), strict=True):
            chosen[name].append(part)
    return {name: train.take(np.sort(np.concatenate(parts))) for name, parts in chosen.items()}


def _find(name: str, size: int) -> Path:
    """The flavour's file: in ``$MEDMNIST_ROOT``, in the medmnist package's own folder, or downloaded to the latter."""
    from medmnist.info import DEFAULT_ROOT

    file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    folders = [Path(DEFAULT_ROOT)] if DEFAULT_ROOT else []
    if root := os.environ.get("MEDMNIST_ROOT"):
        place, _, is_folder = paths.given(root, Path.is_dir)
        folders.insert(0, place)
        if not is_folder:
            raise InputError(f"MEDMNIST_ROOT={root} is no folder; set it to the folder that holds {file}, or unset it")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    if not folders:
        raise InputError(f"there is no folder to download {file} to; set MEDMNIST_ROOT to one")
    return _download(name, size, folders[-1], file)


def _download(name: str, size: int, folder: Path, file: str) -> Path:
    """Fetch ``file`` with the medmnist package, which compares its MD5; only a whole file reaches ``folder``."""
    import medmnist

    print(f"{file} is not on this machine: downloading it", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, _stall_limit(STALL):
            fetch = getattr(medmnist, medmnist.INFO[name]["python_class"])
            fetch(split="val", download=True, root=scratch, size=size)
            return Path(shutil.move(Path(scratch) / file, folder / file))
    except (RuntimeError, OSError, ValueError):
        ways = f"set MEDMNIST_ROOT to a folder that holds {file}, choose cohort phantom or fundus, or cohort npz with its path"
        raise InputError(f"{file} is not in MEDMNIST_ROOT or ~/.medmnist and cannot be downloaded; {ways}") from None


@contextmanager
def _stall_limit(seconds: float):
    """Give up on a connection that stays silent for so long: urllib itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_npz(file: Path) -> dict[str, Split]:
    """train, val and test of a file in MedMNIST's key layout, checked and in canonical order."""
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for key in (f"{name}_{what}" for name in OFFICIAL for what in ("images", "labels")):
                room = BYTES - sum(array.nbytes for array in arrays.values())
                arrays[key] = _member(archive, key, file.name, room)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise InputError(f"{file.name} is damaged or no npz file ({error}); delete it and get it again") from None
    pixels = _eight_bits({name: arrays.pop(f"{name}_images") for name in OFFICIAL}, file.name)
    splits = {name: canonical(_split(pixels.pop(name), arrays[f"{name}_labels"], name, file.name)) for name in OFFICIAL}
    shapes = {name: split.images.shape[1:] for name, split in splits.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{file.name}: splits differ in image shape (channels, height, width): {shapes}")
    return splits


def _member(archive: zipfile.ZipFile, key: str, where: str, room: int) -> np.ndarray:
    """An array of an npz file, read to its end so that the zip's checksum is compared; never unpickled.

    Its header is read first: what would take more than ``room`` bytes is refused before memory is asked for.
    """
    try:
        stream = archive.open(f"{key}.npy")
    except KeyError:
        raise InputError(f"{where}: key {key} is missing; needed: {{train,val,test}}_{{images,labels}}") from None
    with stream:
        try:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](stream)
            size = math.prod(shape) * dtype.itemsize
            if 0 <= size <= room:
                stream.seek(0)
                array = np.lib.format.read_array(stream, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python: damage there raises almost anything
            if "Object arrays" in str(error):
                raise InputError(f"{where}: {key} holds pickled objects, never opened; save plain arrays") from None
            raise InputError(f"{where}: {key} is damaged or too large ({type(error).__name__}); get it again") from None
        if not 0 <= size <= room:
            what = f"{key} is {shape} of {dtype}: with it the file has more than {BYTES >> 30} GiB unpacked"
            raise InputError(f"{where}: {what}; take fewer or smaller images")
        if stream.read(1):
            raise InputError(f"{where}: {key} is damaged (bytes after its end); get it again")
    return array


def _eight_bits(images: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The images of every split as uint8, 0 to 255, or an `InputError`.

    Floats are taken for shares of white if all of them lie in [0, 1], and refused otherwise. Whole numbers of no more than 1
    are taken as they are, with a warning: they are masks, or images that were divided by 255 and cast.
    """
    kinds = {name: str(each.dtype) for name, each in images.items()}
    names = ", ".join(f"{name}_images is {kind}" for name, kind in kinds.items())
    if any(each.dtype != np.uint8 and each.dtype.kind != "f" for each in images.values()):
        raise InputError(f"{where}: {names}; they must be uint8, 0 to 255, or floats from 0 to 1")
    if len({each.dtype.kind for each in images.values()}) > 1:
        raise InputError(f"{where}: {names}; all must be of one kind: uint8, 0 to 255, or floats from 0 to 1")
    ranges = {name: (float(each.min()), float(each.max())) for name, each in images.items() if each.size}
    shown = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items())
    if kinds["train"] != "uint8":
        if not all(low >= 0 and high <= 1 for low, high in ranges.values()):  # NaN, too
            raise InputError(f"{where}: images are floats ({shown}); they must lie in 0 to 1, or be uint8, 0 to 255")
        return {name: np.rint(each * 255.0).astype(np.uint8) for name, each in images.items()}
    dark = [name for name, (_, high) in ranges.items() if high <= 1]
    if 0 < len(dark) < len(ranges):
        raise InputError(f"{where}: images have other ranges from split to split ({shown}); scale them alike")
    if dark:
        warnings.warn(f"{where}: {DARK}", stacklevel=2)
    return images


def _split(images: np.ndarray, labels: np.ndarray, name: str, where: str) -> Split:
    """A `Split` from (N, H, W) or (N, H, W, C) uint8 images and (N,) or (N, 1) integer labels, or an `InputError`."""
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where}: {name}_labels is {labels.dtype}; it must be an integer type")
    shape = images.shape
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise InputError(f"{where}: {name}_images is {shape}; it must be square, (N,H,W) or (N,H,W,1 or 3)")
    if labels.shape not in ((len(images),), (len(images), 1)):
        wanted = f"({len(images)},) or ({len(images)}, 1)"
        raise InputError(f"{where}: {name}_labels is {labels.shape}; it must be {wanted}, one label an image")
    if not len(images):
        raise InputError(f"{where}: split {name} is empty; every split needs images")
    if labels.min() < 0 or labels.max() > 10_000:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{where}: {name}_labels contains {wrong}; labels count from 0")
    return Split(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.reshape(-1).astype(np.int64))
