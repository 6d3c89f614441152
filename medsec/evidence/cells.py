"""Cells: what an experiment consists of, run in parallel, kept on disk, and found again by what they mean.

A cell is one seed of one arm. Its *identity* is a hash of the experiment's ``generation``, the parameters that decide its
numbers, and the cohort's fingerprint: not of source code, so that a comment or a moved module costs nothing. Who changes what
an experiment measures raises its ``generation``; the golden cells of the tests notice who forgets.

Notebooks, records and golden cells all go through `run`. A finished cell is one file below ``.cells/`` (never in git), written
whole or not at all; an interrupted run goes on where it was. ``MEDSEC_FRESH=1`` runs everything anew.
"""

import hashlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from medsec import data
from medsec.core import files, parallel, params, paths
from medsec.core.errors import InputError
from medsec.core.params import Section
from medsec.evidence import tables

__all__ = ["Cell", "Experiment", "run", "table"]

NOTE = ("cell", "identity", "seconds", "peak_mb")  # columns of a record beside the rows' own
TIMES = ("ms",)  # units of times, which belong to records only


@dataclass(frozen=True)
class Cell:
    """One seed of one arm (of notebook 02: a scenario) under one change of the parameters.

    Attributes:
        arm, seed: which part of the experiment, and the seed of the run.
        change: of the parameters, nested as in ``params.yaml``.
        keys: the key columns that address its rows (empty for the headline).
        size: another image size.
        variants: the methods that are compared where a cell runs several.
        group: names them in the file's name.
        given: what the cell is given besides parameters.
    """

    arm: str
    seed: int
    change: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    size: int | None = None
    variants: tuple[str, ...] = ()
    group: str = ""
    given: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the cell in files and tables, such as ``attack-ratio=0.25-seed0``."""
        keys = [f"{key}={value}" for key, value in self.keys.items()]
        return "-".join([self.arm, *filter(None, [self.group]), *keys, f"seed{self.seed}"])


Finished = tuple[pd.DataFrame, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Experiment:
    """What a notebook runs.

    Attributes:
        name: of the notebook.
        generation: raised by hand when numbers are meant to move; cells of another generation are not used.
        sections: of the parameters that decide a cell's numbers.
        run: ``run(cohort, params, cell) -> (rows, pictures)``, the parameters with the cell's change; defined in a module.
        own: sections that hold a mapping method -> its own parameters; of these a cell depends on its own methods only, so that
            a new method leaves every finished cell valid.
        shared: methods whose parameters in ``own`` others use as well.
        lacks: ``lacks(cohort, params, cell)``, what a loaded cohort is too small for, a line each with what mends it.
        more: sections besides, by the arm whose cells alone depend on them: a new arm leaves every finished cell valid.
        family: cells with the same, also of another experiment, run one after the other in one process, and find in `SHARED`
            what they left one another; "" for a cell of its own.
    """

    name: str
    generation: int
    sections: tuple[str, ...]
    run: Callable[[str, Section, Cell], Finished]
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    lacks: Callable[[data.Cohort, Section, Cell], list[str]] | None = None
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    family: Callable[[Cell], str] = lambda cell: ""


def resolved(p: Section, cell: Cell) -> Section:
    """The parameters with the change of a cell.

    Raises:
        InputError: they are not valid.
    """
    if not cell.change:
        return p
    return params.validated(type(p), params.merge(p.model_dump(), cell.change), f"cell {cell.name}")


def identity(experiment: Experiment, fingerprint: str, p: Section, cell: Cell) -> str:
    """Hash of all that decides a cell's numbers: 16 hexadecimal digits.

    Args:
        experiment: the cell's.
        fingerprint: of the cohort's content.
        p: the parameters without the cell's change.
        cell: which one.
    """
    tree = resolved(p, cell).model_dump()
    decides = {name: tree[name] for name in (*experiment.sections, *experiment.more.get(cell.arm, ()))}
    for path in experiment.own:
        *outer, last = path.split(".")
        place = decides
        for part in outer:
            place[part] = dict(place[part])
            place = place[part]
        kept = {*cell.variants, *experiment.shared}
        place[last] = {method: own for method, own in place[last].items() if method in kept}
    what = {
        "experiment": experiment.name,
        "generation": experiment.generation,
        "cohort": fingerprint,
        "device": tree["device"],
        "tuning": tree["seeds"]["tuning"],
        "parameters": decides,
        "cell": [cell.arm, cell.seed, cell.keys, cell.size, list(cell.variants), cell.given],
    }
    return digest(what)


def digest(what: dict) -> str:
    """16 hexadecimal digits that stand for nested dictionaries, lists, strings and numbers."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def place(experiment: Experiment, cohort: str, cell: Cell, name: str) -> Path:
    """The file of a finished cell with the identity ``name``."""
    return paths.cells(cohort) / experiment.name / f"{cell.name}.{name}.npz"


def write(file: Path, finished: Finished, note: dict) -> None:
    """Write a finished cell: its rows as CSV with all digits, its pictures, and a note; complete or not at all."""
    rows, pictures = finished
    texts = {"rows": rows.to_csv(index=False, na_rep="nan", lineterminator="\n"), "note": json.dumps(note)}
    packed = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **packed, **{f"picture {name}": array for name, array in pictures.items()})
    files.write(file, buffer.getvalue())


def read(file: Path) -> tuple[Finished, dict] | None:
    """A finished cell and its note; None where there is none.

    One that cannot be read is set aside as ``….damaged``, said on stderr, and counts as unfinished.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            found = dict(stored)  # all of it: what nobody opens, nobody checks
        rows, note = (found.pop(name).tobytes().decode() for name in ("rows", "note"))
        if strange := [name for name in found if not name.startswith("picture ")]:
            raise ValueError(f"it holds {strange[0]!r}")
        pictures = {name.removeprefix("picture "): picture for name, picture in found.items()}
        note = {key: json.loads(note)[key] for key in NOTE}
        if file.stem.rpartition(".")[2] != note["identity"]:
            raise ValueError("it is another cell's")
        return (tables.parse(io.StringIO(rows)), pictures), note
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        aside = file.with_name(f"{file.name}.damaged")
        file.replace(aside)
        print(f"{aside.name}: this cell cannot be read ({type(error).__name__}) and is run again", file=sys.stderr)
        return None


def _run_one(experiment: Experiment, cohort: str, p: Section, cell: Cell, name: str, file: Path) -> None:
    """Run one cell and write it, with what it cost, to ``file``: the caller's place, whatever this process's environment says."""
    start = time.perf_counter()
    finished = experiment.run(cohort, resolved(p, cell), cell)
    cost = {
        "cell": cell.name,
        "identity": name,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write(file, finished, cost)


# What cells of one family leave one another in this process, by a name of their own.
SHARED: dict[str, object] = {}


def _run_family(calls: Sequence[tuple]) -> None:
    try:
        for call in calls:
            _run_one(*call)
    finally:
        SHARED.clear()


def run(
    experiment: Experiment, cohort: str, p: Section, plan: Sequence[Cell], *, processes: int | None = None
) -> list[Finished]:
    """Rows and pictures of every cell of a plan, in its order; those that are finished are not run again.

    Args:
        experiment: what the cells belong to.
        cohort: name of the cohort.
        p: all parameters.
        plan: the cells; put the longest first.
        processes: see `medsec.core.parallel.run_cells`.

    Raises:
        InputError, OSError: see `finish`.
    """
    places = finish(cohort, p, [(experiment, plan)], processes=processes)
    found = [read(place) for place in places]
    if lost := [cell.name for cell, each in zip(plan, found, strict=True) if each is None]:
        raise InputError(f"{lost[0]}: its file vanished from {paths.cells(cohort)} while it was needed; run again")
    return [finished for finished, _ in found]


def finish(
    cohort: str, p: Section, plans: Sequence[tuple[Experiment, Sequence[Cell]]], *, processes: int | None = None
) -> list[Path]:
    """Run what is not finished of the plans of several experiments, in one go over all processes; the cells' files.

    Raises:
        InputError: a cohort that cannot be loaded or is too small, with all that it lacks; or parameters that a cell
            cannot run with. Before any cell runs.
        OSError: finished cells could not be written; nothing was run.
    """
    loaded, fresh = data.load(cohort, p.cohorts), paths.flag("MEDSEC_FRESH")
    places, calls, lacking = [], [], {}
    for experiment, plan in plans:
        names = names_of(experiment, loaded.fingerprint, p, plan)
        place_of = {cell.name: place(experiment, cohort, cell, names[cell.name]) for cell in plan}
        todo = [cell for cell in plan if fresh or read(place_of[cell.name]) is None]
        _tell(plan, todo, place_of, fresh)
        asked = todo if experiment.lacks else []
        lacking |= dict.fromkeys(why for cell in asked for why in experiment.lacks(loaded, resolved(p, cell), cell))
        places += [place_of[cell.name] for cell in plan]
        calls += [(experiment, cohort, p, cell, names[cell.name], place_of[cell.name]) for cell in todo]
    if lacking:
        raise InputError(f"cohort {cohort} is too small: {'; '.join(lacking)}")
    for folder in {file.parent for *_, file in calls}:
        files.check_writable(folder)
    if asked := os.environ.get("MEDSEC_PLAN"):  # who waits reads there how far it is
        files.write(Path(asked), json.dumps([str(file) for *_, file in calls]))
    families: dict[str, list[tuple]] = {}
    for number, call in enumerate(calls):
        experiment, *_, cell, _, _ = call
        families.setdefault(experiment.family(cell) or str(number), []).append(call)
    parallel.run_cells(_run_family, [(each,) for each in families.values()], processes=processes)
    return places


def _tell(plan: Sequence[Cell], todo: Sequence[Cell], place_of: dict[str, Path], fresh: bool) -> None:
    """Say on stderr what is not run again, and what is although something like it lies there."""
    if done := len(plan) - len(todo):
        print(f"{done} of {len(plan)} cells were finished before (MEDSEC_FRESH=1 runs them anew)", file=sys.stderr)
    if others := [
        cell.name for cell in todo if not fresh and any(place_of[cell.name].parent.glob(f"{cell.name}.*.npz"))
    ]:
        print(
            f"{len(others)} cells, such as {others[0]}, lie there with other parameters or of another generation: "
            "they stay as they are, and are run again beside",
            file=sys.stderr,
        )


def names_of(experiment: Experiment, fingerprint: str, p: Section, plan: Sequence[Cell]) -> dict[str, str]:
    """By a cell's name its `identity`."""
    return {cell.name: identity(experiment, fingerprint, p, cell) for cell in plan}


def table(finished: Sequence[Finished]) -> pd.DataFrame:
    """The rows of several cells, one after the other, without those that are times: they differ from run to run."""
    rows = pd.concat([rows for rows, _ in finished], ignore_index=True)
    return rows[~rows["unit"].isin(TIMES)].reset_index(drop=True)
