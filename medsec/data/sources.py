"""Cohorts: images in named, disjoint splits, and their division over hospitals.

``load`` returns the phantom (stored in ``data/phantom``, or rendered at another size), the fundus phantom (always
rendered), any single-label 2-D MedMNIST flavour, a file in MedMNIST's key layout, or a folder of one's own images.
``partition`` deals a split to clients.
``python -m medsec.data`` writes the phantom cohort, ``python -m medsec.data describe --cohort NAME`` prints a cohort's
data card.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from medphantom import chest as phantom
from medphantom import fundus
from medsec.core import params, paths, settings
from medsec.core.errors import InputError, command
from medsec.data import folder
from medsec.data import medmnist as medmnist_files
from medsec.data.cohort import SPLITS, Cohort, Split, canonical, check_classes, fingerprint

GENERATION = 1  # of the phantom's recipe; raise it whenever medphantom/chest.py draws other images

_STORED = ("images", "labels", "site", "lesion", "lung", "split")
_REGENERATE = "run: python -m medsec.data --force"
_RESTORE = "get it with `dvc pull` (or `make data`), or make it: python -m medsec.data"
_FLAWS = ("drawn, not acquired: nobody's patient, and no evidence about clinical images",)


def load(name: str, cohorts: settings.Cohorts, *, size: int | None = None) -> Cohort:
    """The cohort ``name``: "phantom", "fundus", a 2-D MedMNIST flavour, "npz" (a file by path) or "folder" (own images).

    ``size`` (pixels a side) replaces the parameters' size; a phantom of another size is rendered, not read.

    Raises:
        InputError: the cohort is unknown, its file missing, damaged or of another layout, or a split lacks a class.
    """
    if name == "phantom":
        return _phantom(cohorts.phantom, size)
    if name == "fundus":
        return _fundus(cohorts.fundus, size)
    if name == "npz":
        return medmnist_files.own(cohorts.npz, size)
    if name == "folder":
        return folder.load(cohorts.folder, size)
    return medmnist_files.flavour(name, cohorts.medmnist, size)


# -------------------------------------------------------------------------------------------------------------- phantoms
def _phantom(cohort: settings.PhantomCohort, size: int | None) -> Cohort:
    _check_size("phantom", size)
    stored = size in (None, cohort.size)
    arrays = _stored(paths.DATA / "phantom", cohort) if stored else _render(cohort, size)
    source = f"medsec.phantom: procedural chest radiographs (seed {cohort.seed}), one image per synthetic patient"
    images = {"images": arrays["images"][:, None]}
    return _drawn("phantom", arrays | images, phantom.CLASSES, tuple(phantom.STYLES), source)


def _fundus(cohort: settings.FundusCohort, size: int | None) -> Cohort:
    _check_size("fundus", size)
    return _drawn_fundus(cohort, size or cohort.size)


@functools.lru_cache(maxsize=1)  # a process loads the same cohort several times; drawing it takes seconds
def _drawn_fundus(cohort: settings.FundusCohort, size: int) -> Cohort:
    grades = [0, len(fundus.GRADES) - 1] if cohort.grades == 2 else range(len(fundus.GRADES))
    roles = _roles(cohort, len(grades), len(fundus.STYLES))
    letters = np.array(list(fundus.STYLES))[roles["site"]]
    patients = np.arange(len(letters))
    drawn = fundus.render(patients, np.array(grades)[roles["labels"]], seed=cohort.seed, size=size, style=letters)
    arrays = roles | {"images": np.moveaxis(drawn.images, 3, 1), "lesion": drawn.lesion}
    source = f"medsec.fundus: procedural colour photographs of the retina (seed {cohort.seed}), one image per synthetic patient"
    return _drawn("fundus", arrays, tuple(fundus.GRADES[grade] for grade in grades), tuple(fundus.STYLES), source)


def _check_size(name: str, size: int | None) -> None:
    if size is not None and (size % 4 or not 28 <= size <= 224):
        raise InputError(f"size {size} of cohort {name} must be 28 to 224 and a multiple of 4")


def _drawn(
    name: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...], sites: tuple[str, ...], source: str
) -> Cohort:
    """A cohort of our own drawing; ``arrays`` (N, …): images, labels, site, split, and the masks that there are."""
    splits = {}
    for i, split in enumerate(SPLITS):
        part = {key: value[arrays["split"] == i] for key, value in arrays.items() if key != "split"}
        splits[split] = canonical(Split(**part | {key: part[key].astype(np.int64) for key in ("labels", "site")}))
    check_classes(splits, classes, f"cohorts.{name}.images")
    return Cohort(name, splits, classes, sites, fingerprint(splits), source, "MIT", _FLAWS, {})


def _roles(cohort: settings.PhantomCohort, classes: int, styles: int) -> dict[str, np.ndarray]:
    """Label, site (index of a style) and split of every synthetic patient, (N,) uint8.

    Patients are numbered through all splits; within a split labels take turns and the styles cycle within each label.
    """
    counts = [getattr(cohort.images, name) for name in SPLITS]
    within = np.concatenate([np.arange(n) for n in counts])
    found = {"labels": within % classes, "site": within // classes % styles}
    found["split"] = np.repeat(np.arange(len(SPLITS)), counts)
    return {key: value.astype(np.uint8) for key, value in found.items()}


def _render(cohort: settings.PhantomCohort, size: int) -> dict[str, np.ndarray]:
    """All phantom patients: images (N, H, W) uint8, labels, site and split (N,) uint8, lesion and lung (N, H, W) bool."""
    roles = _roles(cohort, 2, len(phantom.STYLES))
    letters = np.array(list(phantom.STYLES))[roles["site"]]
    patients = np.arange(len(letters))
    drawn = phantom.render(patients, roles["labels"], seed=cohort.seed, size=size, style=letters)
    return {"images": drawn.images, "lesion": drawn.lesion, "lung": drawn.lung} | roles


def generate(cohort: settings.PhantomCohort, out: Path | None = None, *, force: bool = False) -> str:
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


def _meta(cohort: settings.PhantomCohort) -> dict:
    images = {name: getattr(cohort.images, name) for name in SPLITS}
    return {"generation": GENERATION, "size": cohort.size, "seed": cohort.seed, "images": images}


def _stored(folder: Path, cohort: settings.PhantomCohort) -> dict[str, np.ndarray]:
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


# --------------------------------------------------------------------------------------------------- data card, commands
def describe(cohort: Cohort) -> str:
    """The cohort's data card, Markdown."""
    header = ["split", "images", *cohort.classes, *(f"site {site}" for site in cohort.sites)]
    lines = [f"# Cohort {cohort.name}", "", f"- Source: {cohort.source}", f"- Licence: {cohort.licence}"]
    lines += [f"- Images: {cohort.size} × {cohort.size} px, {cohort.channels} channel(s), uint8"]
    lines += [f"- Sites: {', '.join(cohort.sites) or 'not recorded'}"]
    masks = " and ".join(name for name in ("lesion", "lung") if getattr(cohort["client"], name) is not None) or "none"
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


@command
def main(argv: list[str] | None = None) -> int:
    """``python -m medsec.data``; returns the exit status, 2 after an `InputError`."""
    parser = argparse.ArgumentParser(prog="python -m medsec.data", description="Write the phantom; describe a cohort.")
    parser.add_argument("command", nargs="?", choices=("generate", "describe"), default="generate")
    parser.add_argument("--profile", default="quick", help="parameters to use (default: params.yaml as it is)")
    parser.add_argument("--out", type=Path, help="generate: folder to write (default: data/phantom)")
    parser.add_argument("--force", action="store_true", help="generate: replace a cohort that differs")
    parser.add_argument(
        "--cohort", default="phantom", help="describe: phantom, fundus, npz, folder or a MedMNIST flavour"
    )
    parser.add_argument("--size", type=int, help="describe: pixels a side (default: the parameters')")
    args = parser.parse_args(argv)
    tree, name = params.read(args.profile)
    cohorts = params.validated(settings.Cohorts, tree.get("cohorts"), f"{name}, section cohorts")
    if args.command == "describe":
        print(describe(load(args.cohort, cohorts, size=args.size)), end="")
    else:
        print(generate(cohorts.phantom, args.out, force=args.force))
    return 0
