"""A cohort of one's own images: PNG, JPEG or DICOM files in one folder per class, divided by patient.

``root/<class>/…/<file>``; whose image it is, is read from the file's name or from a table (CSV), which may also give
classes, splits and hospitals. Nothing is left out silently: what was skipped, converted or removed, and why, is in the
cohort's ``flaws`` and ``removed``, and so on its data card. See docs/bring-your-own-images.md.
"""

import csv
import functools
import os
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.settings import Cohorts, FolderCohort, FolderShares
from medsec.data import images as image_files
from medsec.data.cohort import SPLITS, Cohort, Split, canonical, check_classes, check_size, deduplicate, fingerprint
from medsec.data.images import DARK, Picture

__all__: list[str] = []  # for the other modules of the package

LEAST = 8  # images that every split needs: no measure on fewer means anything

_COLUMNS = ("file", "patient", "label", "split", "site")
_LIKE_SPLITS = {"train", "training", "valid", "validation", "testing", *SPLITS}
_SHARES = "add patients or images, or change cohorts.folder.shares or seed"


def load(cohorts: Cohorts, size: int | None = None) -> Cohort:
    """The cohort "folder" at ``size`` (default: the parameters') pixels a side.

    Raises:
        InputError: the path or the table is missing or wrong, a file cannot be read or lacks a patient, a patient is in
            two splits, a split lacks a class or has fewer than `LEAST` images, or grey and colour files are mixed.
    """
    cohort, size = cohorts.folder, check_size("folder", size or cohorts.folder.size)
    root = _existing(cohort.path, "path", "your folder of images", Path.is_dir)
    files, report = find(root)
    listing = (_from_table if cohort.table else _from_names)(cohort, root, files, report)
    classes = tuple(sorted(set(listing["label"])))
    if len(classes) < 2:
        what = f"one class only ({classes[0]})" if classes else "no class folder with an image"
        ask = f"lay images out as {root.name}/<class>/<file>, two classes or more"
        raise InputError("; ".join([f"{root.name} has {what}; {ask}", *report]))
    if odd := [name for name in (*classes, *listing.get("site", ())) if set(name) & set("$|")]:
        raise InputError(
            f"{root.name}: class or site {odd[0]!r} has a $ or |, which tables and figures read as signs; rename it"
        )
    labels = np.array([classes.index(label) for label in listing["label"]])
    origin = f"{root.name}, {'table' if 'split' in listing else 'patients divided by shares'}"
    number = _assign(listing, labels, cohort)
    _check_patients(number, labels, classes, listing, origin)  # before the files are read: that takes long
    stamps = [(root / file).stat() for file in listing["file"]]
    known = tuple((file, at.st_mtime_ns, at.st_size) for file, at in zip(listing["file"], stamps, strict=True))
    pictures = _read(root, known, size)
    images = _alike(pictures, list(listing["file"]), cohort.channels, report)
    sites = tuple(sorted(set(listing.get("site", ()))))
    whole = Split(images, labels, np.array([sites.index(site) for site in listing["site"]]) if sites else None)
    splits = {name: canonical(whole.take(number == i)) for i, name in enumerate(SPLITS)}
    clean, removed = deduplicate(splits)
    check_classes(clean, classes, f"{origin} without duplicates")
    if min(map(len, clean.values())) < LEAST:
        counts = ", ".join(f"{name} {len(part)}" for name, part in clean.items())
        raise InputError(f"{origin}: too few images ({counts}), every split needs {LEAST}; {_SHARES}")
    report += _remarks(pictures, images, listing["patient"], number, size)
    by = "the table" if cohort.table else f"file names ({cohort.patient_pattern})"
    how = "as the table says" if "split" in listing else f"divided by patient (seed {cohort.seed})"
    source = f"your folder: {len(images)} images of {listing['patient'].nunique()} patients by {by}; splits {how}"
    licence = "unknown: yours to know"
    return Cohort("folder", clean, classes, sites, fingerprint(splits), source, licence, tuple(report), removed)


def _existing(given: str | None, key: str, what: str, kind) -> Path:
    if not given:
        raise InputError(f"cohorts.folder.{key} is not set; write the path of {what} into it")
    place, there, right = paths.given(given, kind)
    if not right:
        why = "is not of that kind" if there else "does not exist"
        raise InputError(f"cohorts.folder.{key} = {given!r} {why}; it must be {what}, seen from the repository's root")
    return place


# -------------------------------------------------------------------------------------------------- what is in the folder


def find(root: Path) -> tuple[list[str], list[str]]:
    """Image files below ``root`` (POSIX paths, sorted), and a line for each reason why anything was skipped."""

    def unreadable(error: OSError):
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}); correct its permissions") from None

    images, skipped = [], defaultdict(list)
    for place, folders, names in os.walk(root, onerror=unreadable):
        try:
            reasons = {name: _why_skipped(Path(place, name)) for name in [*folders, *names]}
        except OSError as error:
            unreadable(error)
        if not reasons and Path(place) != root:
            reasons = {"": "empty folder"}
        for name, why in reasons.items():
            shown = Path(place, name).relative_to(root).as_posix()
            if why:
                skipped[why].append(shown + "/" * (name in folders))
            elif name not in folders:
                images.append(shown)
        folders[:] = [name for name in folders if not reasons[name]]
    if odd := [name for name in images if not name.isprintable()]:
        raise InputError(f"{odd[0]!a} has characters that cannot be printed; rename it ({len(odd)} such files)")
    away = [name for name in images if not (root / name).resolve().is_relative_to(root.resolve())]
    lines = [_line("links to files outside the folder, read all the same", away)] if away else []
    return sorted(images), lines + [_line(f"skipped, {why}", names) for why, names in sorted(skipped.items())]


def _why_skipped(path: Path) -> str:
    """Why a file or folder is left out; empty if it is not."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "link to a folder" if path.is_symlink() else ""
    if not path.is_file():
        return "broken link or no plain file"
    if path.name.upper() == "DICOMDIR":
        return "directory of a DICOM medium, no image"
    return "" if image_files.is_image(path) else "neither PNG, JPEG nor DICOM"


def _line(why: str, names: list[str]) -> str:
    names = sorted(name if name.isprintable() else ascii(name) for name in names)
    return f"{why}: {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _in_class_folders(files: list[str], report: list[str]) -> list[str]:
    if outside := [file for file in files if "/" not in file]:
        report.append(_line("skipped, in no class folder", outside))
    return [file for file in files if "/" in file]


def _from_names(cohort: FolderCohort, root: Path, files: list[str], report: list[str]) -> pd.DataFrame:
    """Columns ``file, label, patient``: classes from the folders, patients from the files' names."""
    files = _in_class_folders(files, report)
    labels = [file.split("/")[0] for file in files]
    if labels and {label.lower() for label in labels} <= _LIKE_SPLITS:
        known = ", ".join(sorted(set(labels)))
        raise InputError(f"{root.name}: the folders {known} look like splits; sort by class, give splits in a table")
    patients = []
    for file in files:
        match = re.search(cohort.patient_pattern, PurePosixPath(file).name)
        if not match or not match[1]:
            hint = "correct cohorts.folder.patient_pattern ('^(.+)$': a patient an image), or give a table"
            raise InputError(f"no patient in {root.name}/{file}: {cohort.patient_pattern!r} does not match; {hint}")
        patients.append(match[1])
    return pd.DataFrame({"file": files, "label": labels, "patient": patients})


def _from_table(cohort: FolderCohort, root: Path, files: list[str], report: list[str]) -> pd.DataFrame:
    """Columns ``file, label, patient``, and ``split`` and ``site`` if the table has them; classes else from the folders."""
    place = _existing(cohort.table, "table", "a CSV file", Path.is_file)
    rows, usable = _rows(place, report), set(files)
    for file, row in rows.items():
        if file not in usable:
            there = paths.given(str(root / file), Path.exists)[1]
            why = "is none of the images that can be used" if there else "does not exist"
            raise InputError(f"{place.name} line {row['line']}: {file} {why}; paths begin below {root.name}")
        if row.get("split", "val") not in SPLITS:
            what = f"{place.name} line {row['line']}: unknown split {row['split']!r}"
            raise InputError(f"{what}; choose one of {', '.join(SPLITS)}")
    first = next(iter(rows.values()), {})
    files = files if "label" in first else _in_class_folders(files, report)
    if missing := [file for file in files if file not in rows]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{place.name} has no line for {missing[0]}{more}; add it, or take the file out of {root.name}"
        )
    columns = [key for key in _COLUMNS if key in first or key in ("file", "patient", "label")]
    return pd.DataFrame([{"label": file.split("/")[0]} | rows[file] for file in files], columns=columns)


def _rows(table: Path, report: list[str]) -> dict[str, dict]:
    """Lines of the table by file: its columns of `_COLUMNS`, and "line", the line's number."""
    rows = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            if missing := [column for column in ("file", "patient") if column not in columns]:
                first = ", ".join(columns)[:120]
                raise InputError(f"{table.name} has no column {missing[0]}; its first line is: {first}")
            if others := [column for column in columns if column not in _COLUMNS]:
                report.append(f"columns of the table that are not used: {', '.join(others)}")
            for row in reader:
                where = f"{table.name} line {reader.line_num}"
                if None in row:
                    raise InputError(f"{where} has more fields than the first line; quote those that hold a comma")
                row = {key: (row[key] or "").strip() for key in columns if key in _COLUMNS}
                if empty := [key for key, value in row.items() if not value]:
                    raise InputError(f"{where}: {empty[0]} is empty; fill it in, or leave the column out")
                if odd := [key for key, value in row.items() if not value.isprintable()]:
                    raise InputError(f"{where}: {odd[0]} has characters that cannot be printed; correct it")
                row["file"] = PurePosixPath(row["file"].replace("\\", "/")).as_posix()
                if row["file"] in rows:
                    raise InputError(f"{where}: {row['file']} is there a second time; leave one line")
                rows[row["file"]] = row | {"line": reader.line_num}
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{table.name} is no CSV file in UTF-8 ({error}); save it as one") from None
    return rows


# ------------------------------------------------------------------------------------------------------------- patients


def draw_splits(patients: list[str], labels: np.ndarray, shares: FolderShares, seed: int) -> np.ndarray:
    """(N,) index into ``SPLITS`` of every image; a patient's images all get the same one.

    Patients are placed class by class, the rarest first, those with many images first and otherwise in a random order,
    each into the split that still needs most images of the class (Sechidis et al. 2011, ECML PKDD, for patients instead
    of multi-label examples). When as many patients of a class are left as splits without it, these come first: five
    patients of a class are enough for a class of patients who have no other. (scikit-learn's StratifiedGroupKFold makes
    folds of equal size and may leave a rare class out of one.)
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


def _assign(listing: pd.DataFrame, labels: np.ndarray, cohort: FolderCohort) -> np.ndarray:
    """(N,) index into ``SPLITS`` of every image."""
    if "split" not in listing:
        return draw_splits(list(listing["patient"]), labels, cohort.shares, cohort.seed)
    seen: dict[str, str] = {}
    for row in listing.itertuples():
        if (known := seen.setdefault(row.patient, row.split)) != row.split:
            raise InputError(
                f"patient {row.patient} is in two splits, {known} and {row.split} ({row.file}); choose one"
            )
    return np.array([SPLITS.index(split) for split in listing["split"]])


def _check_patients(number, labels: np.ndarray, classes: tuple[str, ...], listing: pd.DataFrame, origin: str) -> None:
    """Every class has a patient in every split, or an `InputError` that names all gaps and counts patients."""
    found = []
    for c, name in enumerate(classes):
        if missing := [split for s, split in enumerate(SPLITS) if not ((number == s) & (labels == c)).any()]:
            patients = sorted(set(listing["patient"][labels == c]))
            shown = ", ".join(patients[:3]) + (", …" if len(patients) > 3 else "")
            few = f"all {int((labels == c).sum())} images of it are of {len(patients)} patient(s): {shown}"
            found.append(f"class {name} is missing from split {', '.join(missing)} ({few})")
    if found:
        hint = "correct its column split, or add images" if "split" in listing else _SHARES
        raise InputError(f"{origin}: {'; '.join(found)}; {hint}")


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
        how = "colours made grey (luma)" if channels == 1 else "grey made three channels"
        report.append(f"{converted} images: {how}")
    tops = [picture.top for picture in pictures if picture.top is not None]
    bits = next((bits for bits in (8, 10, 12, 14) if max(tops, default=0) < 2**bits), 16)
    if tops:
        report.append(f"{len(tops)} images: 16-bit PNG whose values use {bits} bits: white is {2**bits - 1}")
    images = []
    for picture in pictures:
        eight = picture.pixels if picture.top is None else image_files.to_uint8(picture.pixels, 2.0**bits - 1)
        images.append(image_files.with_channels(eight, channels))
    return np.stack(images)


def _remarks(pictures: list[Picture], images: np.ndarray, patients, number: np.ndarray, size: int) -> list[str]:
    """What was done to the images, and signs of patients in two splits, a line each."""
    sides = [min(picture.shape) for picture in pictures]
    lines = [f"resampled to {size} px by area averages, from {min(sides)} to {max(sides)} px a side"]
    notes = Counter(note for picture in pictures for note in picture.notes)
    lines += [f"{count} images: {note}" for note, count in sorted(notes.items())]
    if dark := int((images.max((1, 2, 3)) <= 1).sum()):
        lines.append(f"{dark} images: {DARK}")
        warnings.warn(f"{lines[-1]}", stacklevel=2)
    owners, headers = defaultdict(set), defaultdict(set)
    for picture, image, patient, split in zip(pictures, images, patients, number.tolist(), strict=True):
        owners[image.tobytes()].add(patient)
        headers[picture.patient].add(split)
    if twice := sum(len(held) > 1 for held in owners.values()):
        lines.append(f"{twice} images occur under several patients (copies are removed): are these the same person?")
    headers.pop("", None)
    if across := sum(len(splits) > 1 for splits in headers.values()):
        lines.append(f"{across} PatientIDs of DICOM headers are in several splits: is the patient found correctly?")
    return lines
