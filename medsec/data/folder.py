"""A cohort of one's own images: PNG, JPEG or DICOM files in one folder per class, divided by patient.

``root/<class>/…/<file>``; whose image it is, is read from the file's name or from a table (CSV), which may also give
classes, splits and hospitals. Nothing is left out silently: what was skipped, converted or removed, and why, is in the
cohort's ``flaws`` and ``removed``, and so on its data card. See docs/bring-your-own-images.md.
"""

import csv
import functools
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from medsec.core import paths, settings
from medsec.core.errors import InputError
from medsec.data import images as image_files
from medsec.data.cohort import SPLITS, Cohort, Split, canonical, deduplicate, fingerprint
from medsec.data.images import Picture

LEAST = 8  # images that every split needs: no measure on fewer means anything

_COLUMNS = ("file", "patient", "label", "split", "site")
_LIKE_SPLITS = {"train", "training", "valid", "validation", "testing", *SPLITS}
_SHARES = "add patients or images, or change cohorts.folder.shares or seed"


@dataclass(frozen=True)
class Listing:
    """Whose and what the images are: one entry a file in each list; ``split`` and ``site`` only where a table says."""

    files: list[str]  # POSIX paths below the root, sorted
    labels: list[str]
    patients: list[str]
    split: list[str] | None = None
    site: list[str] | None = None


def load(cohort: settings.FolderCohort, size: int | None = None) -> Cohort:
    """The cohort "folder" at ``size`` (default: the parameters') pixels a side.

    Raises:
        InputError: the path or the table is missing or wrong, a file cannot be read or lacks a patient, a patient is in
            two splits, a split lacks a class or has fewer than `LEAST` images, or grey and colour files are mixed.
    """
    size = cohort.size if size is None else size
    if size % 4 or not 28 <= size <= 224:
        raise InputError(f"size {size} of cohort folder must be 28 to 224 and a multiple of 4")
    root = _existing(cohort.path, "path", "your folder of images", Path.is_dir)
    found, report = find(root)
    listing = _from_table(cohort, root, found, report) if cohort.table else _from_names(cohort, root, found, report)
    classes = tuple(sorted(set(listing.labels)))
    if len(classes) < 2:
        what = f"one class only ({classes[0]})" if classes else "no class folder with an image"
        seen = f"; {'; '.join(report)}" if report else ""
        raise InputError(
            f"{root.name} has {what}; lay images out as {root.name}/<class>/<file>, two classes or more{seen}"
        )
    labels = np.array([classes.index(label) for label in listing.labels])
    number = _assign(listing, labels, cohort)
    origin = f"{root.name}, {'table' if listing.split else 'patients divided by shares'}"
    _check(number, labels, classes, listing, origin)  # before the files are read: that takes long
    stamps = [(root / file).stat() for file in listing.files]
    known = tuple((file, stamp.st_mtime_ns, stamp.st_size) for file, stamp in zip(listing.files, stamps, strict=True))
    pictures = _read(root, known, size)
    images = _alike(pictures, listing.files, cohort.channels, report)
    sites = tuple(sorted(set(listing.site))) if listing.site else ()
    site = np.array([sites.index(s) for s in listing.site]) if listing.site else None
    whole = Split(images, labels, site)
    splits = {name: canonical(whole.take(number == i)) for i, name in enumerate(SPLITS)}
    clean, removed = deduplicate(splits)
    _check_counts(clean, classes, origin)
    report += _remarks(pictures, images, listing, number, size)
    by = "the table" if cohort.table else f"file names ({cohort.patient_pattern})"
    how = "as the table says" if listing.split else f"divided by patient (seed {cohort.seed})"
    source = f"your folder: {len(images)} images of {len(set(listing.patients))} patients by {by}; splits {how}"
    licence = "unknown: yours to know"
    return Cohort("folder", clean, classes, sites, fingerprint(splits), source, licence, tuple(report), removed)


def _existing(given: str | None, key: str, what: str, kind) -> Path:
    if not given:
        raise InputError(f"cohorts.folder.{key} is not set; write the path of {what} into it")
    place = paths.ROOT / Path(given).expanduser()
    if not kind(place):
        why = "is not of that kind" if place.exists() else "does not exist"
        raise InputError(f"cohorts.folder.{key} = {given!r} {why}; it must be {what}, seen from the repository's root")
    return place


# -------------------------------------------------------------------------------------------------- what is in the folder


def find(root: Path) -> tuple[list[str], list[str]]:
    """Image files below ``root`` (POSIX paths, sorted), and a line for each reason why anything was skipped."""
    images, skipped = [], defaultdict(list)

    def unreadable(error: OSError):
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}); correct its permissions") from None

    for place, folders, names in os.walk(root, onerror=unreadable):
        here = Path(place)
        shown = {name: (here / name).relative_to(root).as_posix() for name in [*folders, *names]}
        if here != root and not folders and not names:
            skipped["empty folder"].append(here.relative_to(root).as_posix())
        for name in list(folders):
            if name.startswith(".") or (here / name).is_symlink():
                skipped["hidden" if name.startswith(".") else "link to a folder"].append(shown[name] + "/")
                folders.remove(name)
        for name in names:
            file = here / name
            if name.startswith("."):
                skipped["hidden"].append(shown[name])
            elif not file.is_file():
                skipped["broken link or no plain file"].append(shown[name])
            elif name.upper() == "DICOMDIR":
                skipped["directory of a DICOM medium, no image"].append(shown[name])
            elif image_files.is_image(file):
                images.append(shown[name])
            else:
                skipped["neither PNG, JPEG nor DICOM"].append(shown[name])
    return sorted(images), [_line(why, names) for why, names in sorted(skipped.items())]


def _line(why: str, names: list[str]) -> str:
    names = sorted(names)
    return f"skipped, {why}: {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _from_names(cohort: settings.FolderCohort, root: Path, found: list[str], report: list[str]) -> Listing:
    """Classes from the folders and patients from the files' names."""
    files = [file for file in found if "/" in file]
    if outside := sorted(set(found) - set(files)):
        report.append(_line("in no class folder", outside))
    labels = [file.split("/")[0] for file in files]
    if labels and {label.lower() for label in labels} <= _LIKE_SPLITS:
        known = ", ".join(sorted(set(labels)))
        raise InputError(f"{root.name}: the folders {known} look like splits; sort by class, give splits in a table")
    patients = []
    for file in files:
        name = PurePosixPath(file).name
        match = re.search(cohort.patient_pattern, name)
        if not match or not match[1]:
            hint = "correct cohorts.folder.patient_pattern ('^(.+)$': a patient an image), or give a table"
            raise InputError(f"no patient in {root.name}/{file}: {cohort.patient_pattern!r} does not match; {hint}")
        patients.append(match[1])
    return Listing(files, labels, patients)


def _from_table(cohort: settings.FolderCohort, root: Path, found: list[str], report: list[str]) -> Listing:
    """Patients, and what else it gives, from the table; classes from the folders unless it has the column label."""
    table = _existing(cohort.table, "table", "a CSV file", Path.is_file)
    rows, usable = _rows(table, report), set(found)
    for file, row in rows.items():
        if file not in usable:
            why = "is none of the images that can be used" if (root / file).exists() else "does not exist"
            raise InputError(f"{table.name} line {row['line']}: {file} {why}; paths begin below {root.name}")
    first = next(iter(rows.values()), {})
    files = found if "label" in first else [file for file in found if "/" in file]
    if outside := sorted(set(found) - set(files)):
        report.append(_line("in no class folder", outside))
    if missing := [file for file in files if file not in rows]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{table.name} has no line for {missing[0]}{more}; add it, or take the file out of {root.name}"
        )
    used = [rows[file] for file in files]
    labels = [row["label"] for row in used] if "label" in first else [file.split("/")[0] for file in files]
    more = {key: [row[key] for row in used] for key in ("split", "site") if key in first}
    if wrong := [row for row in used if row.get("split", "val") not in SPLITS]:
        what = f"{table.name} line {wrong[0]['line']}: unknown split {wrong[0]['split']!r}"
        raise InputError(f"{what}; choose one of {', '.join(SPLITS)}")
    return Listing(files, labels, [row["patient"] for row in used], **more)


def _rows(table: Path, report: list[str]) -> dict[str, dict]:
    """Lines of the table by file: its columns of `_COLUMNS`, and "line", the line's number."""
    rows = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            if missing := [column for column in ("file", "patient") if column not in columns]:
                raise InputError(
                    f"{table.name} has no column {missing[0]}; its first line is: {', '.join(columns)[:120]}"
                )
            if others := [column for column in columns if column not in _COLUMNS]:
                report.append(f"columns of the table that are not used: {', '.join(others)}")
            for row in reader:
                where = f"{table.name} line {reader.line_num}"
                if None in row:
                    raise InputError(f"{where} has more fields than the first line; quote those that hold a comma")
                row = {key: (row[key] or "").strip() for key in columns if key in _COLUMNS}
                if empty := [key for key, value in row.items() if not value]:
                    raise InputError(f"{where}: {empty[0]} is empty; fill it in, or leave the column out")
                file = PurePosixPath(row["file"].replace("\\", "/")).as_posix()
                if file in rows:
                    raise InputError(f"{where}: {file} is there a second time; leave one line")
                rows[file] = row | {"line": reader.line_num}
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{table.name} is no CSV file in UTF-8 ({error}); save it as one") from None
    return rows


# ------------------------------------------------------------------------------------------------------------- patients


def draw_splits(patients: list[str], labels: np.ndarray, shares: settings.FolderShares, seed: int) -> np.ndarray:
    """(N,) index into ``SPLITS`` of every image; a patient's images all get the same one.

    Patients are placed class by class, the rarest first, those with many images first and otherwise in a random order,
    each into the split that still needs most images of the class (Sechidis et al. 2011, ECML PKDD, for patients instead
    of multi-label examples). When as many patients of a class are left as splits without it, these come first: five
    patients of a class are enough for a class of patients who have no other.
    """
    names, who = np.unique(patients, return_inverse=True)
    held = np.zeros((len(names), int(labels.max()) + 1), int)
    np.add.at(held, (who, labels), 1)
    order = np.random.default_rng(seed).permutation(len(names))
    share = np.array([getattr(shares, name) for name in SPLITS])
    need = share[:, None] * held.sum(0)
    lacking = np.ones(need.shape, bool)
    waiting = (held > 0).sum(0)  # patients of each class who have no split yet
    split = np.full(len(names), -1)
    for label in np.argsort(waiting, kind="stable"):
        members = [p for p in order if held[p, label] and split[p] < 0]
        for p in sorted(members, key=lambda p: -held[p].sum()):
            allowed = np.ones(len(SPLITS), bool)
            has = np.flatnonzero(held[p])
            for c in [label, *has]:
                if waiting[c] <= lacking[:, c].sum() and (allowed & lacking[:, c]).any():
                    allowed &= lacking[:, c]
            options = np.flatnonzero(allowed)
            chosen = max(options, key=lambda s: (need[s, label], need[s].sum()))
            split[p] = chosen
            need[chosen] -= held[p]
            lacking[chosen, has] = False
            waiting[has] -= 1
    return split[who]


def _assign(listing: Listing, labels: np.ndarray, cohort: settings.FolderCohort) -> np.ndarray:
    if listing.split is None:
        return draw_splits(listing.patients, labels, cohort.shares, cohort.seed)
    seen: dict[str, str] = {}
    for patient, split, file in zip(listing.patients, listing.split, listing.files, strict=True):
        if seen.setdefault(patient, split) != split:
            raise InputError(f"patient {patient} is in two splits, {seen[patient]} and {split} ({file}); choose one")
    return np.array([SPLITS.index(split) for split in listing.split])


def _check(number: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], listing: Listing, origin: str) -> None:
    """Every class has a patient in every split, or an `InputError` that counts patients."""
    for s, split in enumerate(SPLITS):
        for c, name in enumerate(classes):
            if not ((number == s) & (labels == c)).any():
                patients = sorted({p for p, label in zip(listing.patients, labels, strict=True) if label == c})
                shown = ", ".join(patients[:3]) + (", …" if len(patients) > 3 else "")
                hint = "correct its column split, or add images" if listing.split else _SHARES
                few = f"all {int((labels == c).sum())} images of it are of {len(patients)} patient(s): {shown}"
                raise InputError(f"{origin}: class {name} is missing from split {split} ({few}); {hint}")


def _check_counts(splits: dict[str, Split], classes: tuple[str, ...], origin: str) -> None:
    """Without duplicates, too, every split has every class and `LEAST` images, or an `InputError` that counts."""
    for split, part in splits.items():
        for c, name in enumerate(classes):
            if not (part.labels == c).any():
                raise InputError(f"{origin}: without duplicates class {name} is missing from split {split}; add images")
    if min(map(len, splits.values())) < LEAST:
        counts = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
        raise InputError(f"{origin}: too few images ({counts}), every split needs {LEAST}; {_SHARES}")


# --------------------------------------------------------------------------------------------------------------- pixels


@functools.lru_cache(maxsize=1)  # a process loads the same cohort several times; the times of change are in the key
def _read(root: Path, files: tuple[tuple[str, int, int], ...], size: int) -> list[Picture]:
    return [image_files.read(root / file, size, f"{root.name}/{file}") for file, *_ in files]


def _alike(pictures: list[Picture], files: list[str], channels: int | None, report: list[str]) -> np.ndarray:
    """(N, C, S, S) uint8 of all pictures, with the same number of channels and one scale for 16-bit PNGs."""
    kinds = [len(picture.pixels) for picture in pictures]
    if channels is None and len(set(kinds)) > 1:
        grey, colour = files[kinds.index(1)], files[kinds.index(3)]
        hint = "set cohorts.folder.channels to 1 (grey) or 3 (colour)"
        raise InputError(f"grey and colour files are mixed, like {grey} (grey) and {colour} (colour); {hint}")
    channels = channels or kinds[0]
    if converted := sum(kind != channels for kind in kinds):
        report.append(
            f"{converted} images: {'colours made grey (luma)' if channels == 1 else 'grey made three channels'}"
        )
    tops = [picture.top for picture in pictures if picture.top is not None]
    bits = next((bits for bits in (8, 10, 12, 14) if max(tops, default=0) < 2**bits), 16)
    if tops:
        report.append(f"{len(tops)} images: 16-bit PNG whose values use {bits} bits: white is {2**bits - 1}")
    images = []
    for picture in pictures:
        eight = picture.pixels if picture.top is None else image_files.to_uint8(picture.pixels / (2.0**bits - 1))
        images.append(image_files.with_channels(eight, channels))
    return np.stack(images)


def _remarks(pictures: list[Picture], images: np.ndarray, listing: Listing, number: np.ndarray, size: int) -> list[str]:
    """What was done to the images, and signs of patients in two splits, a line each."""
    sides = [min(picture.shape) for picture in pictures]
    lines = [f"resampled to {size} px by area averages, from {min(sides)} to {max(sides)} px a side"]
    notes = Counter(note for picture in pictures for note in picture.notes)
    lines += [f"{count} images: {note}" for note, count in sorted(notes.items())]
    owners, headers = defaultdict(set), defaultdict(set)
    for picture, image, patient, split in zip(pictures, images, listing.patients, number.tolist(), strict=True):
        owners[image.tobytes()].add(patient)
        headers[picture.patient].add(split)
    if twice := sum(len(held) > 1 for held in owners.values()):
        lines.append(f"{twice} images occur under several patients (copies are removed): are these the same person?")
    headers.pop("", None)
    if across := sum(len(found) > 1 for found in headers.values()):
        lines.append(f"{across} PatientIDs of DICOM headers are in several splits: is the patient found correctly?")
    return lines
