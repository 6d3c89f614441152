"""Cohorts: images in named, disjoint splits, and their division over hospitals.

``load`` returns the phantom (stored in ``data/phantom``, or rendered at another size), any single-label 2-D MedMNIST
flavour, or a file in MedMNIST's key layout. ``partition`` deals a split to clients. ``python -m medsec.data`` writes
the phantom cohort, ``python -m medsec.data describe --cohort NAME`` prints a cohort's data card.
"""

import argparse
import difflib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsec import params, paths, phantom
from medsec.errors import InputError

SPLITS = ("client", "public", "reference", "val", "test")
OFFICIAL = ("train", "val", "test")  # the splits of a MedMNIST-like file
GENERATION = 1  # of the phantom's recipe; raise it whenever phantom.py draws other images
STALL = 30.0  # seconds without an answer after which a download is given up

_STORED = ("images", "labels", "site", "lesion", "lung", "split")
_REGENERATE = "run: python -m medsec.data --force"
_RESTORE = "get it with `dvc pull` (or `make data`), or make it: python -m medsec.data"
_NO_PATIENTS = "no patient ids: client, public and reference are divided image-wise, one patient may be in several"
_KNOWN_FLAWS = {
    "phantom": ("drawn, not acquired: nobody's patient, and no evidence about clinical images",),
    "pneumoniamnist": (
        "no patient ids at all: the official train and val splits are image-wise as well",
        "paediatric patients (one to five years) of one hospital: says nothing about adults",
        "train-to-test shift: classifiers lose accuracy from val to test; val is the optimistic one",
    ),
}
_IMAGES_FROM = {"pneumoniamnist": " Images: Kermany et al., Cell 172, 2018."}
# sha256 of the canonical content of published files, by flavour and size
_PUBLISHED = {("pneumoniamnist", 28): "a6d121a8dd1befcd5ccfcd5a103820bb35d487e9269e6f38ca07ee85f1601389"}


@dataclass(frozen=True)
class Split:
    """Images of one split, in canonical order.

    ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64; ``site`` (N,) int64, the index of the hospital; ``lesion``
    and ``lung`` (N, H, W) bool. The last three are None where the cohort has none.
    """

    images: np.ndarray
    labels: np.ndarray
    site: np.ndarray | None = None
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index) -> "Split":
        """The images at ``index`` (integers or a boolean mask), in that order, with all that belongs to them."""
        parts = (self.images, self.labels, self.site, self.lesion, self.lung)
        return Split(*(None if part is None else part[index] for part in parts))

    def float(self) -> np.ndarray:
        """Images as float32 in [0, 1], (N, C, H, W)."""
        return self.images.astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class Cohort:
    """Named, disjoint splits, and where they come from.

    ``fingerprint`` is the sha256 of the content in canonical order, before duplicates are removed; ``removed`` counts
    the exact duplicates taken out of each original split; ``flaws`` are known weaknesses, one sentence each.
    """

    name: str
    splits: dict[str, Split]
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    fingerprint: str
    source: str
    licence: str
    flaws: tuple[str, ...]
    removed: dict[str, int]

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise InputError(f"cohort {self.name} has no split {split!r}: choose one of {', '.join(self.splits)}")
        return self.splits[split]

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self["client"].images.shape[1]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self["client"].images.shape[2]


def load(name: str, cohorts: params.Cohorts, *, size: int | None = None) -> Cohort:
    """The cohort ``name``: "phantom", a 2-D MedMNIST flavour, or "npz" (a file by path).

    ``size`` (pixels a side) replaces the parameters' size; a phantom of another size is rendered, not read.

    Raises:
        InputError: the cohort is unknown, its file missing, damaged or of another layout, or a split lacks a class.
    """
    if name == "phantom":
        return _phantom(cohorts.phantom, size)
    if name == "npz":
        return _npz(cohorts.npz, size)
    return _medmnist(name, cohorts.medmnist, size)


# ------------------------------------------------------------------------------------------------- canonical content


def canonical(split: Split) -> Split:
    """The same images sorted by (label, image bytes): the order in which a file lists them plays no part."""
    rows = np.ascontiguousarray(split.images).reshape(len(split), -1)
    order = np.argsort(rows.view(f"V{rows.shape[1]}").ravel(), kind="stable")
    return split.take(order[np.argsort(split.labels[order], kind="stable")])


def fingerprint(splits: Mapping[str, Split]) -> str:
    """sha256 over name, shape, labels and images of every split; give splits in canonical order."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name} {split.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(split.labels, "<i8"))
        digest.update(np.ascontiguousarray(split.images))
    return digest.hexdigest()


def _deduplicate(splits: dict[str, Split]) -> tuple[dict[str, Split], dict[str, int]]:
    """Splits without exact duplicates, and how many images each one lost.

    Of equal images the one in the latest split stays (train < val < test), within a split the first. An image that one
    split lists under two labels is removed altogether.
    """
    kept, removed, later = {}, {}, set()
    for name in reversed(splits):
        split = splits[name]
        keys = [hashlib.sha256(image).digest() for image in np.ascontiguousarray(split.images)]
        label_of, first, ambiguous = {}, {}, set()
        for i, (key, label) in enumerate(zip(keys, split.labels.tolist(), strict=True)):
            first.setdefault(key, i)
            if label_of.setdefault(key, label) != label:
                ambiguous.add(key)
        keep = [i for key, i in first.items() if key not in later and key not in ambiguous]
        kept[name], removed[name] = split.take(np.array(keep, np.int64)), len(split) - len(keep)
        later.update(keys)
    return {name: kept[name] for name in splits}, {name: removed[name] for name in splits}


def _divide(train: Split, shares: params.SplitShares, seed: int) -> dict[str, Split]:
    """client, public and reference from an official training set: class by class, by a seeded permutation."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {"client": [], "public": [], "reference": []}
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        cuts = np.round(np.cumsum([shares.client, shares.public]) * len(members)).astype(int)
        for name, part in zip(chosen, np.split(members, cuts), strict=True):
            chosen[name].append(part)
    return {name: train.take(np.sort(np.concatenate(parts))) for name, parts in chosen.items()}


def _check_classes(splits: Mapping[str, Split], classes: tuple[str, ...], where: str) -> None:
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"{where}: split {name} is empty; every split needs images")
        counts = np.bincount(split.labels, minlength=len(classes))
        if (counts == 0).any():
            empty = int(np.argmin(counts))
            raise InputError(f"{where}: empty class {empty} in split {name} ({len(split)} images); add images of it")


# ----------------------------------------------------------------------------------------------------------- phantom


def _phantom(cohort: params.PhantomCohort, size: int | None) -> Cohort:
    if size is not None and (size % 4 or not 28 <= size <= 224):
        raise InputError(f"size {size} of cohort phantom must be 28 to 224 and a multiple of 4")
    stored = size in (None, cohort.size)
    arrays = _stored(paths.DATA / "phantom", cohort) if stored else _render(cohort, size)
    splits = {}
    for i, name in enumerate(SPLITS):
        rows = arrays["split"] == i
        part = {key: arrays[key][rows] for key in ("images", "labels", "site", "lesion", "lung")}
        part["images"] = part["images"][:, None]
        splits[name] = canonical(Split(**part | {key: part[key].astype(np.int64) for key in ("labels", "site")}))
    classes = ("normal", "pneumonia")
    _check_classes(splits, classes, "cohorts.phantom.images")
    source = f"medsec.phantom: procedural chest radiographs (seed {cohort.seed}), one image per synthetic patient"
    flaws = _KNOWN_FLAWS["phantom"]
    return Cohort("phantom", splits, classes, tuple(phantom.STYLES), fingerprint(splits), source, "MIT", flaws, {})


def _render(cohort: params.PhantomCohort, size: int) -> dict[str, np.ndarray]:
    """All phantom patients: images (N, H, W) uint8, labels, site and split (N,) uint8, lesion and lung (N, H, W) bool.

    Patients are numbered through all splits; within a split labels alternate and the styles cycle within each label.
    """
    counts = [getattr(cohort.images, name) for name in SPLITS]
    within = np.concatenate([np.arange(n) for n in counts])
    labels, site = within % 2, within // 2 % len(phantom.STYLES)
    letters = np.array(list(phantom.STYLES))[site]
    drawn = phantom.render(np.arange(len(within)), labels, seed=cohort.seed, size=size, style=letters)
    split = np.repeat(np.arange(len(SPLITS)), counts)
    small = {"labels": labels, "site": site, "split": split}
    masks = {"images": drawn.images, "lesion": drawn.lesion, "lung": drawn.lung}
    return masks | {key: value.astype(np.uint8) for key, value in small.items()}


def generate(cohort: params.PhantomCohort, out: Path | None = None, *, force: bool = False) -> str:
    """Write the phantom cohort to the folder ``out`` (default ``data/phantom``), the same bytes every time.

    Returns a line that says whether anything was written.

    Raises:
        InputError: the folder cannot be written, holds another cohort (unless ``force``), or anything else.
    """
    out = (out or paths.DATA / "phantom").resolve()
    arrays = _render(cohort, cohort.size)
    packed = {k: np.packbits(v, axis=None) if v.dtype == bool else v for k, v in arrays.items()}
    scratch = out.parent / f".medsec-tmp-{os.getpid()}"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        for name in _STORED:
            np.save(scratch / f"{name}.npy", packed[name], allow_pickle=False)
        hashes = {f"{name}.npy": _sha256(scratch / f"{name}.npy") for name in _STORED}
        text = json.dumps(_meta(cohort) | {"sha256": hashes}, indent=1, sort_keys=True) + "\n"
        (scratch / "meta.json").write_bytes(text.encode())
        return _publish(scratch, out, force)
    except OSError as error:
        raise InputError(f"cannot write {out.name} in {out.parent}: {error.strerror}; choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, out: Path, force: bool) -> str:
    """Rename the folder ``scratch`` to ``out``, unless that holds something else."""
    size = sum(file.stat().st_size for file in scratch.iterdir())
    line = f"{_show(out)}: {size / 1e6:.1f} MB"
    files = sorted(file.name for file in scratch.iterdir())
    if out.exists():
        found = sorted(file.name for file in out.iterdir())
        if found == files and all((out / f).read_bytes() == (scratch / f).read_bytes() for f in files):
            return f"{line}, unchanged"
        if not set(found) <= set(files):
            raise InputError(f"{_show(out)} holds files that are no phantom cohort; choose another --out")
        if found and not force:
            raise InputError(f"{_show(out)} holds another cohort; to replace it {_REGENERATE}")
        shutil.rmtree(out)
    scratch.rename(out)
    return f"{line}, written"


def _meta(cohort: params.PhantomCohort) -> dict:
    images = {name: getattr(cohort.images, name) for name in SPLITS}
    return {"generation": GENERATION, "size": cohort.size, "seed": cohort.seed, "images": images}


def _stored(folder: Path, cohort: params.PhantomCohort) -> dict[str, np.ndarray]:
    """The arrays of `_render` from ``folder``, after a check that they are what the parameters ask for."""
    meta = _read_meta(folder)
    for key, wanted in _meta(cohort).items():
        if meta.get(key) != wanted:
            found = f"{key} {meta.get(key)}, the parameters ask for {wanted}"
            raise InputError(f"the stored phantom cohort has {found}; {_REGENERATE}")
    for name in _STORED:
        file = folder / f"{name}.npy"
        if not file.is_file():
            raise InputError(f"{_show(file)} is missing; delete {_show(folder)}, then {_RESTORE}")
        if _sha256(file) != meta["sha256"].get(file.name):
            raise InputError(f"{_show(file)} is damaged or altered; delete {_show(folder)}, then {_RESTORE}")
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _STORED}
    shape = arrays["images"].shape
    for name in ("lesion", "lung"):
        arrays[name] = np.unpackbits(arrays[name], count=int(np.prod(shape))).reshape(shape).astype(bool)
    return arrays


def _read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        raise InputError(f"the phantom cohort is missing ({_show(folder / 'meta.json')}); {_RESTORE}") from None
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not isinstance(meta.get("sha256"), dict):
        raise InputError(f"{_show(folder / 'meta.json')} is damaged; delete {_show(folder)}, then {_RESTORE}")
    return meta


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _show(file: Path) -> str:
    """A path as messages print it: below the repository's root where possible."""
    return str(file.relative_to(paths.ROOT)) if file.is_relative_to(paths.ROOT) else str(file)


# ------------------------------------------------------------------------------------------- files in MedMNIST's layout


def _npz(cohort: params.NpzCohort, size: int | None) -> Cohort:
    if not cohort.path:
        raise InputError("cohorts.npz.path is not set; write the file's path, from the repository's root, into it")
    file = paths.ROOT / Path(cohort.path).expanduser()
    official = _read_npz(file)
    side = official["train"].images.shape[2]
    if side < 28 or side % 4:
        raise InputError(f"{file.name}: images are {side} px a side; resize them to a multiple of 4, at least 28")
    if size not in (None, side):
        raise InputError(f"{file.name}: images are {side} px a side, not {size}; leave size out or give another file")
    highest = max(int(split.labels.max()) for split in official.values())
    if highest == 0:
        raise InputError(f"{file.name}: every label is 0; a cohort needs two classes or more")
    classes = tuple(str(label) for label in range(highest + 1))
    facts = {"source": f"{file.name}, a file of your own", "licence": "not stated: the file's owner knows"}
    return _from_official("npz", official, classes, cohort, file.name, flaws=(_NO_PATIENTS,), **facts)


def _medmnist(name: str, cohort: params.MedMNISTCohort, size: int | None) -> Cohort:
    info = _flavour(name)
    size = cohort.size if size is None else size
    if size not in (28, 64, 128, 224):
        raise InputError(f"size {size} of cohort {name} must be 28, 64, 128 or 224")
    file = _find(name, size)
    official = _read_npz(file)
    shape, wanted = official["train"].images.shape[1:], (info["n_channels"], size, size)
    if shape != wanted:
        raise InputError(f"{file.name}: images are {shape} (channels, height, width), not {wanted}; replace the file")
    classes = tuple(str(info["label"][key]) for key in sorted(info["label"], key=int))
    highest = max(int(split.labels.max()) for split in official.values())
    if highest >= len(classes):
        raise InputError(f"{file.name}: label {highest}, but {name} has {len(classes)} classes; replace the file")
    flaws = (*_KNOWN_FLAWS.get(name, ()), _NO_PATIENTS)
    found = fingerprint(official)
    if (name, size) in _PUBLISHED:
        if found != _PUBLISHED[name, size]:
            flaws += (f"altered: fingerprint differs from the published content ({_PUBLISHED[name, size][:12]}…)",)
    elif _md5(file) != info["MD5" if size == 28 else f"MD5_{size}"]:
        flaws += ("the file's MD5 is not the published one: reordered, or altered",)
    about = info["description"].split(". ")[0].rstrip(".")
    source = f"MedMNIST v2, {info['python_class']} (Yang et al., Scientific Data 10, 41, 2023). {about}."
    source += _IMAGES_FROM.get(name, "")
    facts = {"source": source, "licence": info["license"]}
    return _from_official(name, official, classes, cohort, file.name, flaws=flaws, **facts)


def _from_official(name, official, classes, cohort, where, **facts) -> Cohort:
    """A cohort from official train, val and test splits in canonical order; ``facts`` go to `Cohort` as they are."""
    _check_classes(official, classes, where)
    clean, removed = _deduplicate(official)
    _check_classes(clean, classes, f"{where} without duplicates")
    splits = _divide(clean["train"], cohort.shares, cohort.seed) | {"val": clean["val"], "test": clean["test"]}
    _check_classes(splits, classes, f"{where}, train divided by shares")
    return Cohort(name, splits, classes, (), fingerprint(official), removed=removed, **facts)


def _flavour(name: str) -> dict:
    """What the medmnist package knows about a flavour; `InputError` unless it is 2-D and has one label an image."""
    from medmnist import INFO  # slow: imports torch

    flat = [key for key, info in INFO.items() if not key.endswith("3d") and "multi-label" not in info["task"]]
    if name in flat:
        return INFO[name]
    known = ["phantom", "npz", *flat]
    if name in INFO:
        why = "is three-dimensional" if name.endswith("3d") else "has several labels an image"
        raise InputError(f"cohort {name} {why}; choose one of {', '.join(known)}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise InputError(f"unknown cohort {name!r}; {hint}known: {', '.join(known)}")


def _find(flavour: str, size: int) -> Path:
    """The flavour's file: in ``$MEDMNIST_ROOT``, in the medmnist package's own folder, or downloaded to the latter."""
    from medmnist.info import DEFAULT_ROOT

    file = f"{flavour}.npz" if size == 28 else f"{flavour}_{size}.npz"
    folders = [Path(DEFAULT_ROOT)] if DEFAULT_ROOT else []
    if root := os.environ.get("MEDMNIST_ROOT"):
        folders.insert(0, paths.ROOT / Path(root).expanduser())
        if not folders[0].is_dir():
            raise InputError(f"MEDMNIST_ROOT={root} is no folder; set it to the folder that holds {file}, or unset it")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    if not folders:
        raise InputError(f"there is no folder to download {file} to; set MEDMNIST_ROOT to one")
    return _download(flavour, size, folders[-1], file)


def _download(flavour: str, size: int, folder: Path, file: str) -> Path:
    """Fetch ``file`` with the medmnist package, which compares its MD5; only a whole file reaches ``folder``."""
    import medmnist

    print(f"{file} is not on this machine: downloading it", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch, _stall_limit(STALL):
            fetch = getattr(medmnist, medmnist.INFO[flavour]["python_class"])
            fetch(split="val", download=True, root=scratch, size=size)
            return Path(shutil.move(Path(scratch) / file, folder / file))
    except (RuntimeError, OSError, ValueError):
        ways = f"set MEDMNIST_ROOT to a folder that holds {file}, choose cohort phantom, or cohort npz with its path"
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


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_npz(file: Path) -> dict[str, Split]:
    """train, val and test of a file in MedMNIST's key layout, checked and in canonical order."""
    splits = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in OFFICIAL:
                images = _member(archive, f"{name}_images", file.name)
                labels = _member(archive, f"{name}_labels", file.name)
                splits[name] = canonical(_split(images, labels, name, file.name))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; correct the path") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise InputError(f"{file.name} is damaged or no npz file ({error}); delete it and get it again") from None
    shapes = {name: split.images.shape[1:] for name, split in splits.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{file.name}: splits differ in image shape (channels, height, width): {shapes}")
    return splits


def _member(archive: zipfile.ZipFile, key: str, where: str) -> np.ndarray:
    """An array of an npz file, read to its end so that the zip's checksum is compared; never unpickled."""
    try:
        stream = archive.open(f"{key}.npy")
    except KeyError:
        raise InputError(f"{where}: key {key} is missing; needed: {{train,val,test}}_{{images,labels}}") from None
    with stream:
        try:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python: damage there raises almost anything
            if "Object arrays" in str(error):
                raise InputError(f"{where}: {key} holds pickled objects, never opened; save plain arrays") from None
            raise InputError(f"{where}: {key} is damaged or too large ({type(error).__name__}); get it again") from None
        if stream.read(1):
            raise InputError(f"{where}: {key} is damaged (bytes after its end); get it again")
    return array


def _split(images: np.ndarray, labels: np.ndarray, name: str, where: str) -> Split:
    """A `Split` from (N, H, W) or (N, H, W, C) uint8 images and (N,) or (N, 1) integer labels, or an `InputError`."""
    for key, array in (("images", images), ("labels", labels)):
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InputError(f"{where}: {name}_{key} is {array.dtype} and contains NaN")
    if images.dtype != np.uint8:
        raise InputError(f"{where}: {name}_images is {images.dtype}; it must be uint8, 0 to 255")
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


# --------------------------------------------------------------------------------------------------------- federation


def partition(
    labels, n_clients: int, scheme: str, *, seed: int, site=None, alpha: float = 0.5, per_client: int | None = None
) -> list[np.ndarray]:
    """Disjoint, sorted, non-empty index arrays, one per client, of the images with ``labels`` (N,) and ``site`` (N,).

    - "iid": a random permutation, dealt evenly.
    - "dirichlet": label skew. Each class is shared out in proportions drawn from a symmetric Dirichlet distribution
      over the clients (Yurochkin et al. 2019, ICML); the smaller ``alpha``, the fewer clients hold most of a class. Hsu
      et al. (2019, arXiv:1909.06335) draw class proportions per client instead, with the same meaning of ``alpha``.
    - "style": hospitals are dealt in turn: client c holds hospital c modulo their number, and clients of one hospital
      divide its images evenly. With fewer clients than hospitals a client holds several hospitals.

    ``per_client`` caps each client's images by a random choice; surplus images are left out. The result depends on the
    arguments only.

    Raises:
        InputError: an argument is impossible, ``site`` is missing for "style", or a client would be empty.
    """
    labels = np.asarray(labels)
    _check_partition(labels, n_clients, scheme, seed, site, alpha, per_client)
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        clients = np.array_split(rng.permutation(len(labels)), n_clients)
    elif scheme == "dirichlet":
        clients = _by_dirichlet(labels, n_clients, alpha, rng)
    else:
        clients = _by_site(np.asarray(site), n_clients, rng)
    if per_client:
        clients = [rng.permutation(members)[:per_client] for members in clients]
    return [np.sort(members).astype(np.int64) for members in clients]


def _check_partition(labels, n_clients, scheme, seed, site, alpha, per_client) -> None:
    if scheme not in ("iid", "dirichlet", "style"):
        raise InputError(f"unknown partition {scheme!r}: choose iid, dirichlet or style")
    if labels.ndim != 1:
        raise InputError(f"labels to partition are {labels.shape}; they must be one-dimensional")
    for name, value, least in (("n_clients", n_clients, 1), ("seed", seed, 0), ("per_client", per_client, 1)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise InputError(f"{name} = {value!r} must be an integer, at least {least}")
    if scheme == "dirichlet" and not 0 < alpha < np.inf:
        raise InputError(f"alpha = {alpha} must be a positive number")
    if scheme == "style" and site is None:
        raise InputError("cohort has no sites; use iid or dirichlet")
    if scheme == "style" and np.shape(site) != labels.shape:
        raise InputError(f"site is {np.shape(site)}, labels are {labels.shape}; give one site an image")
    if len(labels) < n_clients:
        raise InputError(f"{len(labels)} images for {n_clients} clients; lower n_clients")


def _by_dirichlet(labels: np.ndarray, n_clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    draws = 100
    for _ in range(draws):
        parts: list[list[np.ndarray]] = [[] for _ in range(n_clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(n_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in zip(parts, np.split(members, cuts), strict=True):
                client.append(part)
        clients = [np.concatenate(part) for part in parts]
        if min(map(len, clients)):
            return clients
    what = f"{len(labels)} images, {n_clients} clients, alpha {alpha}"
    raise InputError(f"a client stayed empty in {draws} Dirichlet draws ({what}); raise alpha or lower n_clients")


def _by_site(site: np.ndarray, n_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    hospitals = np.unique(site)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_clients)]
    for h, hospital in enumerate(hospitals):
        members = rng.permutation(np.flatnonzero(site == hospital))
        sharing = range(h, n_clients, len(hospitals)) or [h % n_clients]
        if len(members) < len(sharing):
            raise InputError(f"site {hospital} has {len(members)} images for {len(sharing)} clients; lower n_clients")
        for client, part in zip(sharing, np.array_split(members, len(sharing)), strict=True):
            parts[client].append(part)
    return [np.concatenate(part) for part in parts]


# ------------------------------------------------------------------------------------------------ data card, commands


def describe(cohort: Cohort) -> str:
    """The cohort's data card, Markdown."""
    header = ["split", "images", *cohort.classes, *(f"site {site}" for site in cohort.sites)]
    lines = [f"# Cohort {cohort.name}", "", f"- Source: {cohort.source}", f"- Licence: {cohort.licence}"]
    lines += [f"- Images: {cohort.size} × {cohort.size} px, {cohort.channels} channel(s), uint8"]
    lines += [f"- Sites: {', '.join(cohort.sites) or 'not recorded'}"]
    masks = "lesion and lung" if cohort["client"].lesion is not None else "none"
    removed = ", ".join(f"{n} from {name}" for name, n in cohort.removed.items() if n)
    lines += [f"- Masks: {masks}", f"- Exact duplicates removed: {removed or 'none'}"]
    lines += [f"- Fingerprint (sha256 of the content): {cohort.fingerprint}", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for name, split in cohort.splits.items():
        counts = [len(split), *np.bincount(split.labels, minlength=cohort.n_classes)]
        if split.site is not None:
            counts += [*np.bincount(split.site, minlength=len(cohort.sites))]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "Known flaws:", "", *(f"- {flaw}" for flaw in cohort.flaws)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """``python -m medsec.data``; returns the exit status, 2 after an `InputError`."""
    parser = argparse.ArgumentParser(prog="python -m medsec.data", description="Write the phantom; describe a cohort.")
    parser.add_argument("command", nargs="?", choices=("generate", "describe"), default="generate")
    parser.add_argument("--profile", default="quick", help="parameters to use (default: params.yaml as it is)")
    parser.add_argument("--out", type=Path, help="generate: folder to write (default: data/phantom)")
    parser.add_argument("--force", action="store_true", help="generate: replace a cohort that differs")
    parser.add_argument("--cohort", default="phantom", help="describe: phantom, npz or a MedMNIST flavour")
    parser.add_argument("--size", type=int, help="describe: pixels a side (default: the parameters')")
    args = parser.parse_args(argv)
    try:
        cohorts = params.load(args.profile).cohorts
        if args.command == "describe":
            print(describe(load(args.cohort, cohorts, size=args.size)), end="")
        else:
            print(generate(cohorts.phantom, args.out, force=args.force))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
