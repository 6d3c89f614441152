"""Where cohorts come from, by name, and what their data cards say.

``load`` returns the phantom (stored in ``data/phantom``, or rendered at another size), the fundus phantom (always
rendered), any single-label 2-D MedMNIST flavour, a file in MedMNIST's key layout, or a folder of one's own images.
``python -m medsec.data`` writes the phantom cohort, ``python -m medsec.data describe --cohort NAME`` prints a cohort's
data card.
"""

import argparse
import difflib
import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import medphantom.chest
import medphantom.fundus
from medsec.core import params, paths
from medsec.core.errors import InputError, command
from medsec.core.settings import Cohorts, FundusCohort, PhantomCohort
from medsec.data import folder, medmnist
from medsec.data.cohort import SPLITS, Cohort, Split, canonical, check_classes, check_size, fingerprint

__all__ = ["SOURCES", "describe", "generate", "load"]

GENERATION = 1  # of the phantom's recipe; raise it whenever medphantom/chest.py draws other images

_STORED = ("images", "labels", "site", "lesion", "lung", "split")
_REGENERATE = "run: python -m medsec.data --force"
_RESTORE = "get it with `dvc pull` (or `make data`), or make it: python -m medsec.data"
_FLAWS = ("drawn, not acquired: nobody's patient, and no evidence about clinical images",)


def load(name: str, cohorts: Cohorts, *, size: int | None = None) -> Cohort:
    """The cohort ``name``, one of `SOURCES`.

    ``size`` (pixels a side) replaces the parameters' size; a phantom of another size is rendered, not read.

    Raises:
        InputError: the cohort is unknown, its file missing, damaged or of another layout, or a split lacks a class.
    """
    if name in SOURCES:
        return SOURCES[name](cohorts, size)
    known = ", ".join(SOURCES)
    for ending, why in (("mnist3d", "is three-dimensional"), ("chestmnist", "has several labels an image")):
        if name.endswith(ending):
            raise InputError(f"cohort {name} {why}; choose one of {known}")
    close = difflib.get_close_matches(name, SOURCES, n=1)
    raise InputError(f"unknown cohort {name!r}; {f'did you mean {close[0]}? ' if close else ''}known: {known}")


# ------------------------------------------------------------------------------------------------------- drawn cohorts


def phantom(cohorts: Cohorts, size: int | None = None) -> Cohort:
    """Drawn chest radiographs, with masks of lungs and lesions: the stored ones, or drawn anew at another size."""
    cohort, size = cohorts.phantom, check_size("phantom", size or cohorts.phantom.size)
    arrays = _stored(paths.DATA / "phantom", cohort) if size == cohort.size else _render(cohort, size)
    source = f"medsec.phantom: procedural chest radiographs (seed {cohort.seed}), one image per synthetic patient"
    arrays |= {"images": arrays["images"][:, None]}
    return _drawn("phantom", arrays, medphantom.chest.CLASSES, tuple(medphantom.chest.STYLES), source)


def fundus(cohorts: Cohorts, size: int | None = None) -> Cohort:
    """Drawn colour photographs of the retina, in two or three grades, with masks of lesions."""
    return _fundus(cohorts.fundus, check_size("fundus", size or cohorts.fundus.size))


@functools.lru_cache(maxsize=1)  # a process loads the same cohort several times; drawing it takes seconds
def _fundus(cohort: FundusCohort, size: int) -> Cohort:
    grades, styles = medphantom.fundus.GRADES, tuple(medphantom.fundus.STYLES)
    chosen = [0, len(grades) - 1] if cohort.grades == 2 else range(len(grades))
    roles, letters = _roles(cohort, len(chosen), styles)
    labels = np.array(chosen)[roles["labels"]]
    drawn = medphantom.fundus.render(np.arange(len(labels)), labels, seed=cohort.seed, size=size, style=letters)
    arrays = roles | {"images": np.moveaxis(drawn.images, 3, 1), "lesion": drawn.lesion}
    source = f"medsec.fundus: procedural colour photographs of the retina (seed {cohort.seed}), one image per synthetic patient"
    return _drawn("fundus", arrays, tuple(grades[grade] for grade in chosen), styles, source)


def twins(name: str, cohorts: Cohorts) -> tuple[np.ndarray, np.ndarray] | None:
    """Every patient of a drawn cohort's split ``test`` twice, healthy and with the last class's lesions: nothing else differs.

    Returns:
        Two arrays (N, C, S, S) uint8, in the order of the drawing; None for images that were not drawn.
    """
    if name not in ("phantom", "fundus"):
        return None
    cohort, chest = getattr(cohorts, name), name == "phantom"
    drawing = medphantom.chest if chest else medphantom.fundus
    ill = (len(medphantom.chest.CLASSES) if chest else len(medphantom.fundus.GRADES)) - 1
    roles, letters = _roles(cohort, 2 if chest else cohort.grades, tuple(drawing.STYLES))
    of_test = np.flatnonzero(roles["split"] == SPLITS.index("test"))
    where = {"seed": cohort.seed, "size": cohort.size, "style": letters[of_test]}
    pair = (drawing.render(of_test, np.full(len(of_test), label), **where).images for label in (0, ill))
    return tuple(images[:, None] if chest else np.moveaxis(images, 3, 1) for images in pair)


def _drawn(name: str, arrays: dict[str, np.ndarray], classes, sites, source: str) -> Cohort:
    """A cohort of our own drawing; ``arrays`` (N, …): images, labels, site, split, and the masks that there are."""
    splits = {}
    for i, split in enumerate(SPLITS):
        part = {key: value[arrays["split"] == i] for key, value in arrays.items() if key != "split"}
        splits[split] = canonical(Split(**part | {key: part[key].astype(np.int64) for key in ("labels", "site")}))
    check_classes(splits, classes, f"cohorts.{name}.images")
    return Cohort(name, splits, classes, sites, fingerprint(splits), source, "MIT", _FLAWS, {})


def _roles(cohort: PhantomCohort, classes: int, styles: tuple[str, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Label, site (index of a style) and split of every synthetic patient, (N,) uint8; and the letters of the styles.

    Patients are numbered through all splits; within a split labels take turns and the styles cycle within each label.
    """
    counts = [getattr(cohort.images, name) for name in SPLITS]
    within = np.concatenate([np.arange(n) for n in counts])
    roles = {"labels": within % classes, "site": within // classes % len(styles)}
    roles["split"] = np.repeat(np.arange(len(SPLITS)), counts)
    return {key: value.astype(np.uint8) for key, value in roles.items()}, np.array(styles)[roles["site"]]


def _render(cohort: PhantomCohort, size: int) -> dict[str, np.ndarray]:
    """All phantom patients: images (N, H, W) uint8, labels, site and split (N,) uint8, lesion and lung (N, H, W) bool."""
    roles, letters = _roles(cohort, 2, tuple(medphantom.chest.STYLES))
    patients = np.arange(len(letters))
    drawn = medphantom.chest.render(patients, roles["labels"], seed=cohort.seed, size=size, style=letters)
    return {"images": drawn.images, "lesion": drawn.lesion, "lung": drawn.lung} | roles


# --------------------------------------------------------------------------------------------------- the stored phantom


def generate(cohort: PhantomCohort, out: Path | None = None, *, force: bool = False) -> str:
    """Write the phantom cohort to the folder ``out`` (default ``data/phantom``), the same bytes every time.

    Returns a line that says whether anything was written.

    Raises:
        InputError: the folder cannot be written, holds another cohort (unless ``force``), or anything else.
    """
    out = (out or paths.DATA / "phantom").resolve()
    files = _files(cohort)
    line = f"{_show(out)}: {sum(map(len, files.values())) / 1e6:.1f} MB"
    try:
        present = {file.name: file.read_bytes() for file in out.iterdir()} if out.exists() else {}
        if present == files:
            return f"{line}, unchanged"
        if not set(present) <= set(files):
            raise InputError(f"{_show(out)} holds files that are no phantom cohort; choose another --out")
        if present and not force:
            raise InputError(f"{_show(out)} holds another cohort; to replace it {_REGENERATE}")
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():  # the hashes come last: half a cohort is found out when it is read
            (out / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {out.name} in {out.parent}: {error.strerror}; choose another --out") from None
    return f"{line}, written"


def _files(cohort: PhantomCohort) -> dict[str, bytes]:
    """The stored cohort: an array a file, masks as bits, and ``meta.json`` with parameters and hashes."""
    arrays, files = _render(cohort, cohort.size), {}
    for name in _STORED:
        stream = io.BytesIO()
        mask = arrays[name].dtype == bool
        np.save(stream, np.packbits(arrays[name], axis=None) if mask else arrays[name], allow_pickle=False)
        files[f"{name}.npy"] = stream.getvalue()
    meta = _meta(cohort) | {"sha256": {name: _sha256(content) for name, content in files.items()}}
    return files | {"meta.json": (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode()}


def _meta(cohort: PhantomCohort) -> dict:
    images = {name: getattr(cohort.images, name) for name in SPLITS}
    return {"generation": GENERATION, "size": cohort.size, "seed": cohort.seed, "images": images}


def _stored(place: Path, cohort: PhantomCohort) -> dict[str, np.ndarray]:
    """The arrays of `_render` from the folder ``place``, after a check that they are what the parameters ask for."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        hashes = {name: meta["sha256"][f"{name}.npy"] for name in _STORED}
        content = {name: (place / f"{name}.npy").read_bytes() for name in _STORED}
    except FileNotFoundError as error:
        raise InputError(f"the phantom cohort is missing ({_show(Path(error.filename))}); {_RESTORE}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{_show(place / 'meta.json')} is damaged; delete {_show(place)}, then {_RESTORE}") from None
    for key, wanted in _meta(cohort).items():
        if meta.get(key) != wanted:
            differs = f"{key} {meta.get(key)}, the parameters ask for {wanted}"
            raise InputError(f"the stored phantom cohort has {differs}; {_REGENERATE}")
    for name in _STORED:
        if _sha256(content[name]) != hashes[name]:
            file = _show(place / f"{name}.npy")
            raise InputError(f"{file} is damaged or altered; delete {_show(place)}, then {_RESTORE}")
    arrays = {name: np.load(io.BytesIO(content[name]), allow_pickle=False) for name in _STORED}
    shape = arrays["images"].shape
    for name in ("lesion", "lung"):
        arrays[name] = np.unpackbits(arrays[name], count=int(np.prod(shape))).reshape(shape).astype(bool)
    return arrays


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _show(file: Path) -> str:
    """A path as messages print it: below the repository's root where possible."""
    return str(file.relative_to(paths.ROOT)) if file.is_relative_to(paths.ROOT) else str(file)


# --------------------------------------------------------------------------------------------------- data card, commands


def describe(cohort: Cohort) -> str:
    """The cohort's data card, Markdown."""
    header = ["split", "images", *cohort.classes, *(f"site {site}" for site in cohort.sites)]
    masks = " and ".join(name for name in ("lesion", "lung") if getattr(cohort["client"], name) is not None)
    removed = ", ".join(f"{n} from {name}" for name, n in cohort.removed.items() if n)
    lines = [
        f"# Cohort {cohort.name}",
        "",
        f"- Source: {cohort.source}",
        f"- Licence: {cohort.licence}",
        f"- Images: {cohort.size} × {cohort.size} px, {cohort.channels} channel(s), uint8",
        f"- Sites: {', '.join(cohort.sites) or 'not recorded'}",
        f"- Masks: {masks or 'none'}",
        f"- Exact duplicates removed: {removed or 'none'}",
        f"- Fingerprint (sha256 of the content): {cohort.fingerprint}",
        "",
        "| " + " | ".join(header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
    ]
    for name, split in cohort.splits.items():
        counts = [len(split), *np.bincount(split.labels, minlength=cohort.n_classes)]
        counts += [] if split.site is None else [*np.bincount(split.site, minlength=len(cohort.sites))]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join([*lines, "", "Known flaws:", "", *(f"- {flaw}" for flaw in cohort.flaws)]) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    """``python -m medsec.data``; returns the exit status, 2 after an `InputError`."""
    parser = argparse.ArgumentParser(prog="python -m medsec.data", description="Write the phantom; describe a cohort.")
    parser.add_argument("command", nargs="?", choices=("generate", "describe"), default="generate")
    parser.add_argument("--profile", default="quick", help="parameters to use (default: params.yaml as it is)")
    parser.add_argument("--out", type=Path, help="generate: folder to write (default: data/phantom)")
    parser.add_argument("--force", action="store_true", help="generate: replace a cohort that differs")
    parser.add_argument("--cohort", default="phantom", help=f"describe: {', '.join(SOURCES)}")
    parser.add_argument("--size", type=int, help="describe: pixels a side (default: the parameters')")
    args = parser.parse_args(argv)
    tree, name = params.read(args.profile)
    cohorts = params.validated(Cohorts, tree.get("cohorts"), f"{name}, section cohorts")
    if args.command == "describe":
        print(describe(load(args.cohort, cohorts, size=args.size)), end="")
    else:
        print(generate(cohorts.phantom, args.out, force=args.force))
    return 0


SOURCES: dict[str, Callable[..., Cohort]] = {  # name -> function of all cohorts' parameters, and perhaps a size
    "phantom": phantom,
    "fundus": fundus,
    "npz": medmnist.own,
    "folder": folder.load,
    **{name: functools.partial(medmnist.flavour, name) for name in medmnist.FLAVOURS},
}
