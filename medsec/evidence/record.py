"""Records: the evidence behind a notebook, with more seeds and more cases than its quick run.

``python -m experiments record 01_backdoor_fedgan --cohort phantom --profile full`` runs the same cells of the same code as
the notebook: the headline design on every evaluation seed, then sweeps that change one factor at a time. Each finished
cell is written at once (`medsec.evidence.cells`), so a record can be interrupted and resumed. The record itself is three files in
``records/<cohort>/``: ``NN_…_runs.csv.gz``, the rows of every cell with its identity and cost; ``NN_….csv``, the summary;
``NN_….json``, how it was made. ``--plan`` prints the cells and their cost, and runs nothing.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medsec import data
from medsec.core import files, parallel, paths
from medsec.core.errors import InputError
from medsec.core.params import Section, validated
from medsec.evidence import cells as store
from medsec.evidence import tables
from medsec.evidence.cells import NOTE, Cell, Experiment

__all__ = ["Design", "about", "is_finished", "is_stale", "load", "made_by", "run"]


@dataclass(frozen=True)
class Design:
    """How the record of one notebook is made.

    Attributes:
        experiment: what runs its cells.
        cells: the plan, ``cells(cohort, params)``.
        keep: those rows of a cell that a record keeps, ``keep(rows, cell)``.
        summarise: the record's table, ``summarise(runs, params)``.
        cost: seconds of a cell, ``cost(params, cell)``; a guess for what was never run.
        pictures: ``pictures(cohort, params, folder)`` writes a picture of cells that lie in ``.cells`` beside the three files.
    """

    experiment: Experiment
    cells: Callable[[str, Section], list[Cell]]
    keep: Callable[[pd.DataFrame, Cell], pd.DataFrame]
    summarise: Callable[[pd.DataFrame, Section], pd.DataFrame]
    cost: Callable[[Section, Cell], float]
    pictures: Callable[[data.Cohort, Section, Path], None] | None = None


def place(cohort: str, p: Section) -> Path:
    """Where the records of a cohort lie; those made on a GPU, whose bits differ, in a folder of their own."""
    return paths.records(cohort if p.device == "cpu" else f"{cohort}-gpu")


# What is finished -----------------------------------------------------------------------------------------------------


def runs_file(records: Path, notebook: str) -> Path:
    """The table with the rows of every finished cell of a record."""
    return records / f"{notebook}_runs.csv.gz"


def committed(records: Path, notebook: str) -> pd.DataFrame:
    """The rows of every cell of a record, with the columns `NOTE`; an empty table where there is no record.

    Raises:
        InputError: the file is damaged; nothing is run or written, so that nothing is lost.
    """
    file = runs_file(records, notebook)
    if not file.exists():
        return pd.DataFrame(columns=NOTE)
    rows = tables.read(file)
    if missing := {*NOTE, *tables.FIXED} - set(rows.columns):
        raise InputError(f"{file.name} is no table: no column {min(missing)}; {files.restore(file)}")
    return rows


def gathered(
    design: Design, cohort: str, p: Section, plan: Sequence[Cell], names: dict[str, str]
) -> dict[str, pd.DataFrame]:
    """By a cell's name the rows of those that are finished, from the record or from ``.cells``."""
    records, experiment = place(cohort, p), design.experiment
    old = committed(records, experiment.name)
    mine = old[old["cell"].map(names) == old["identity"]]
    found = {name: rows.reset_index(drop=True) for name, rows in mine.groupby("cell", sort=False)}
    for cell in plan:
        if cell.name in found:
            continue
        stored = store.read(store.place(experiment, cohort, cell, names[cell.name]))
        if stored is not None:
            (rows, _), note = stored
            found[cell.name] = design.keep(rows, cell).assign(**{key: note[key] for key in NOTE})
    return found


def build(
    how: Design, cohort: data.Cohort, p: Section, profile: str, plan: Sequence[Cell], found: dict[str, pd.DataFrame]
) -> Path:
    """Write the three files of a record from the cells that are finished (`gathered`), in the order of the plan."""
    import torch  # slow to import, and who only reads a record needs none

    notebook, records = how.experiment.name, place(cohort.name, p)
    done = [found[cell.name] for cell in plan if cell.name in found]
    rows = pd.concat(done, ignore_index=True)
    tables.write(rows[[*NOTE, *(column for column in rows if column not in NOTE)]], runs_file(records, notebook))
    runs = tables.read(runs_file(records, notebook))  # with six digits, as everybody else reads them
    target = records / f"{notebook}.csv"
    tables.write(how.summarise(runs.drop(columns=list(NOTE)), p), target)
    costs = runs.groupby("cell", sort=False)[["seconds", "peak_mb"]].first()
    made = {
        "profile": profile,
        "generation": how.experiment.generation,
        "cells_planned": len(plan),
        "cells_finished": len(done),
        "cpu_seconds": round(costs["seconds"].sum()),
        "peak_mb_of_a_process": int(costs["peak_mb"].max()),
        "cohort_fingerprint": cohort.fingerprint,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pandas": pd.__version__},
        "hardware": {
            "processor": processor(),
            "gpu": torch.cuda.get_device_name() if p.device == "cuda" else None,
            "system": platform.system(),
            "cores": os.cpu_count(),
            "threads": 1,
        },
        "params": p.model_dump(),
    }
    files.write(target.with_suffix(".json"), json.dumps(made, indent=1) + "\n")
    return target


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Reading records ------------------------------------------------------------------------------------------------------


class About(Section):
    """What `build` says of a record."""

    profile: str = ""
    generation: int | None = None
    cells_planned: int = 0
    cells_finished: int = 0
    cpu_seconds: int = 0
    peak_mb_of_a_process: int = 0
    cohort_fingerprint: str = ""
    versions: dict | None = None
    hardware: dict | None = None
    params: dict | None = None


def about(notebook: str, cohort: str) -> dict | None:
    """How a record was made: cells, cost, generation, versions, hardware, parameters; None where there is none.

    Raises:
        InputError: the file is there and damaged.
    """
    file = paths.records(cohort) / f"{notebook}.json"
    if not file.exists():
        return None
    found = files.read_json(file)
    validated(About, found, file.name)
    return found


def is_finished(notebook: str, cohort: str) -> bool:
    """Whether the record has all cells of its plan (False where there is none)."""
    found = about(notebook, cohort) or {}
    return "cells_planned" in found and found.get("cells_finished") == found["cells_planned"]


def is_stale(experiment: Experiment, cohort: str) -> bool:
    """Whether a record was made by another generation of the experiment, or does not say by which.

    Raises:
        InputError: there is no such record.
    """
    found = about(experiment.name, cohort)
    if found is None and load(experiment.name, cohort) is None:
        raise InputError(
            f"no record of {experiment.name} for {cohort}; make it with: python -m experiments record {experiment.name}"
        )
    return (found or {}).get("generation") != experiment.generation


def made_by(experiment: Experiment, cohort: str) -> str:
    """Which code made a record, in words; see `is_stale`."""
    return "another generation of the code than today's (stale)" if is_stale(experiment, cohort) else "today's code"


def load(notebook: str, cohort: str) -> pd.DataFrame | None:
    """The committed summary of a record, or None where there is none."""
    file = paths.records(cohort) / f"{notebook}.csv"
    return tables.read(file) if file.exists() else None


# Making one ----------------------------------------------------------------------------------------------------------


def costs(how: Design, p: Section, plan: Sequence[Cell], old: pd.DataFrame) -> dict[str, float]:
    """By a cell's name its CPU seconds: of itself in the committed record, of its arm there, else the design's guess."""
    known = old.groupby("cell")["seconds"].first() if len(old) else pd.Series(dtype=float)
    arms = {cell.name: (cell.arm, cell.group) for cell in plan}
    alike: dict[tuple[str, str], list[float]] = {}
    for name, seconds in known.items():
        if name in arms:
            alike.setdefault(arms[name], []).append(seconds)
    found = {}
    for cell in plan:
        near = [known[cell.name]] if cell.name in known else alike.get(arms[cell.name], [])
        found[cell.name] = float(np.median(near)) if near else how.cost(p, cell)
    return found


def run(
    how: Design,
    cohort: str,
    p: Section,
    profile: str,
    *,
    processes: int,
    restart: bool = False,
    only_plan: bool = False,
) -> int:
    """Plan, run what is missing, write the three files; returns the exit status.

    Args:
        how: the design of the record.
        cohort: name of the cohort.
        p: all parameters, of the profile with the name ``profile``.
        processes: how many cells run at a time.
        restart: run again what other parameters or another generation have made.
        only_plan: print the cells and their cost, run nothing.

    Raises:
        InputError: wrong parameters or cohort, or a record of other parameters or another generation without ``restart``.
    """
    parallel.device(p.device)  # a missing GPU is named before anything is planned
    name, plan = how.experiment.name, how.cells(cohort, p)
    loaded, old = data.load(cohort, p.cohorts), committed(place(cohort, p), name)
    names = store.names_of(how.experiment, loaded.fingerprint, p, plan)
    found = gathered(how, cohort, p, plan, names)
    planned = old[old["cell"].isin(names)]
    stale = list(dict.fromkeys(planned["cell"][planned["cell"].map(names) != planned["identity"]]))
    if stale and not (restart or only_plan):
        raise InputError(
            f"{len(stale)} cells, such as {stale[0]}, were made with other parameters or by another generation; "
            "they stay as they are; add --restart to run them again"
        )
    todo, cost = [cell for cell in plan if cell.name not in found], costs(how, p, plan, old)
    for cell in plan if only_plan else ():
        state = f"done in {found[cell.name]['seconds'].iloc[0]:.0f} s" if cell.name in found else "to do"
        print(f"{cell.name:42s} {cost[cell.name]:6.0f} CPU-s  {state}")
    left = sum(cost[cell.name] for cell in todo) / 60
    print(f"{len(plan)} cells, {len(todo)} to do: about {left:.0f} CPU-minutes, {left / processes:.0f} minutes")
    whole = not todo and set(old["cell"]) == set(names) and is_finished(name, place(cohort, p).name)
    if only_plan or (whole and load(name, place(cohort, p).name) is not None):  # else whoever looks at it would sign it
        return 0
    with parallel.locked(paths.ROOT / f".medsec-tmp-{cohort}" / f"record-{name}-{p.device}.lock"):
        try:
            store.run(how.experiment, cohort, p, todo, processes=processes)
        finally:  # also where it is ended from outside: a record cut short is a record in part
            if found := gathered(how, cohort, p, plan, names):
                print(build(how, loaded, p, profile, plan, found).relative_to(paths.ROOT))
                if how.pictures:
                    how.pictures(loaded, p, place(cohort, p))
    return 0
