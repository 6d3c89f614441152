"""Records: the evidence behind a notebook, with more seeds and more cases than its quick run.

``python -m medsec.record 01_backdoor_fedgan --cohort phantom --profile full`` runs the same cells of the same code as
the notebook: the headline design on every evaluation seed, then sweeps that change one factor at a time. Each finished
cell is written at once below ``records/<cohort>/<notebook>/``, so a record can be interrupted, resumed and committed in
part; the tables do not depend on how often that happened. ``--plan`` prints the cells and their cost, and runs nothing.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import pandas as pd
import torch
from tqdm import tqdm

from medsec import data, fedgan, parallel, params, paths, tables
from medsec.errors import InputError, command
from medsec.params import Params


@dataclass(frozen=True)
class Cell:
    """One seed of one arm (of notebook 02: a scenario) under one change of the parameters.

    ``keys`` are the key columns that address its rows (empty for the headline), ``size`` another image size,
    ``variants`` the methods that are compared where a cell runs several; ``group`` names them in the file's name.
    """

    arm: str
    seed: int
    change: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    size: int | None = None
    variants: tuple[str, ...] = ()
    group: str = ""

    @property
    def name(self) -> str:
        """File name of the cell, such as ``attack-ratio=0.25-seed0``."""
        keys = [f"{key}={value}" for key, value in self.keys.items()]
        return "-".join([self.arm, *filter(None, [self.group]), *keys, f"seed{self.seed}"])


@dataclass(frozen=True)
class Design:
    """How the record of one notebook is made.

    Attributes:
        cells: the plan, ``cells(cohort, params)``.
        run: the runs table of one cell, ``run(cohort, params, cell)``.
        summarise: the record's table, ``summarise(runs, params)``.
        modules: names of those whose code decides a cell's numbers.
        sections: of the parameters that decide them.
        rounds: how many rounds a cell trains, as a multiple of the parameters' number; for the estimate.
    """

    cells: Callable[[str, Params], list[Cell]]
    run: Callable[[str, Params, Cell], pd.DataFrame]
    summarise: Callable[[pd.DataFrame, Params], pd.DataFrame]
    modules: tuple[str, ...]
    sections: tuple[str, ...]
    rounds: Callable[[Params, Cell], float]


NOTEBOOKS = ("01_backdoor_fedgan", "02_feddetect", "03_gia_defense", "04_adversarial_pruning_defense")


def design(notebook: str) -> Design:
    """How the record of a notebook is made."""
    # By name: who only reads a record shall not depend on all the modules that make records.
    return importlib.import_module("medsec.record_designs").DESIGNS[notebook]


def code_hash(modules: Sequence[str]) -> str:
    """Hash of the source of some modules of the package."""
    source = "".join((paths.PACKAGE / f"{name}.py").read_text(encoding="utf-8") for name in modules)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def place(cohort: str, p: Params) -> Path:
    """Where the records of a cohort lie; those made on a GPU, whose bits differ, in a folder of their own."""
    return paths.records(cohort if p.device == "cpu" else f"{cohort}-gpu")


def identities(notebook: str, cohort: data.Cohort, p: Params, cells: Sequence[Cell]) -> dict[str, str]:
    """By a cell's name, the hash of all that its numbers depend on: parameters, images, code, the version of PyTorch."""
    sections = "".join(getattr(p, name).model_dump_json() for name in design(notebook).sections)
    before = p.device + sections + json.dumps(p.seeds.tuning)
    after = cohort.fingerprint + code_hash(design(notebook).modules) + torch.__version__
    found = {}
    for cell in cells:
        # A scenario's keys are part of what it runs; in notebook 01 they only name the change.
        own = [cell.change, cell.size, cell.arm, cell.seed, *([cell.keys, *cell.variants] * bool(cell.variants))]
        found[cell.name] = hashlib.sha256((before + json.dumps(own) + after).encode()).hexdigest()[:16]
    return found


def run_cell(notebook: str, cohort: str, p: Params, cell: Cell, name: str) -> str:
    """Run one cell and write its rows and, beside them, what it cost. Returns its name."""
    start = time.perf_counter()
    kept = design(notebook).run(cohort, p, cell)
    cells = place(cohort, p) / notebook
    cost = {
        "identity": name,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    tables.write(kept, cells / f"{cell.name}.csv.gz")
    (cells / f"{cell.name}.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")
    return cell.name


def finished(cells: Path, cell: Cell) -> dict | None:
    """What a finished cell in the folder ``cells`` says of itself, or None."""
    note = cells / f"{cell.name}.json"
    if not (note.is_file() and (cells / f"{cell.name}.csv.gz").is_file()):
        return None
    return json.loads(note.read_text(encoding="utf-8"))


def estimate(notebook: str, p: Params, cell: Cell, cohort: data.Cohort, second_per_pixel: float) -> float:
    """CPU seconds of a cell, from the pixels that its training sees."""
    size = cell.size or cohort.size
    images = min(p.fedgan.images_per_client * p.fedgan.n_clients, len(cohort["client"]))
    rounds = p.fedgan.rounds * design(notebook).rounds(p, cell)
    return 5 + rounds * images * size**2 * second_per_pixel


def calibrate(p: Params, size: int = 32) -> float:
    """Seconds that one pixel of one image costs in one epoch here, from a short training run on noise."""
    device = parallel.device(p.device)
    images = [torch.rand(128, 1, size, size).to(device)]
    labels = [(torch.arange(128) % 2).to(device)]
    probe = params.validate(
        params.merge(p.model_dump(), {"fedgan": {"n_clients": 1, "malicious": [], "rounds": 2}})
    ).fedgan
    federation = fedgan.run(fedgan.new_federation(images, labels, 2, probe, 0), 1)
    start = time.perf_counter()
    fedgan.run(federation, 2)
    return 1.3 * (time.perf_counter() - start) / (128 * size**2)  # measuring after each round costs about 30 %


def build(notebook: str, cohort: data.Cohort, p: Params, cells: list[Cell], profile: str) -> Path:
    """Write the record's tables from the cells that are finished, in the order of the plan."""
    records = place(cohort.name, p)
    notes = {cell.name: finished(records / notebook, cell) for cell in cells}
    names = identities(notebook, cohort, p, cells)
    # Cells of other code or parameters are still there while a restarted record is under way: they do not count.
    done = [cell for cell in cells if (notes[cell.name] or {}).get("identity") == names[cell.name]]
    runs = pd.concat([tables.read(records / notebook / f"{cell.name}.csv.gz") for cell in done], ignore_index=True)
    summary = design(notebook).summarise(runs, p)
    target = records / f"{notebook}.csv"
    tables.write(summary, target)
    costs = {cell.name: notes[cell.name] for cell in done}
    made = {
        "profile": profile,
        "cells_planned": len(cells),
        "cells_finished": len(done),
        "cpu_seconds": round(sum(cost["seconds"] for cost in costs.values())),
        "peak_mb_of_a_process": max(cost["peak_mb"] for cost in costs.values()),
        "code": code_hash(design(notebook).modules),
        "modules": {name: code_hash([name]) for name in design(notebook).modules},
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
    target.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return target


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def about(notebook: str, cohort: str) -> dict | None:
    """How a record was made: cells, cost, code, versions, hardware, parameters; None where there is none."""
    file = paths.records(cohort) / f"{notebook}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_finished(notebook: str, cohort: str) -> bool:
    """Whether the record has all cells of its plan (False where there is none)."""
    found = about(notebook, cohort)
    return found is not None and found["cells_finished"] == found["cells_planned"]


def is_stale(notebook: str, cohort: str) -> bool:
    """Whether the code that decides the numbers has changed since the record was made.

    Raises:
        InputError: there is no such record.
    """
    found = about(notebook, cohort)
    if found is None:
        raise InputError(f"no record of {notebook} for {cohort}; make it with: python -m medsec.record {notebook}")
    made_by = found["modules"]
    return any(code_hash([name]) != found for name, found in made_by.items())


def load(notebook: str, cohort: str) -> pd.DataFrame | None:
    """The committed summary of a record, or None where there is none."""
    file = paths.records(cohort) / f"{notebook}.csv"
    return tables.read(file) if file.is_file() else None


def _progress(results: Iterator[str], todo: list[Cell], cost: dict[str, float]) -> Iterator[str]:
    with tqdm(total=round(sum(cost[cell.name] for cell in todo)), unit="CPU-s", mininterval=5) as bar:
        for name in results:
            bar.set_postfix_str(name)
            bar.update(round(cost[name]))
            yield name


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medsec.record", description="Make or resume a record.")
    parser.add_argument("notebook", choices=NOTEBOOKS)
    parser.add_argument("--cohort", default="phantom")
    parser.add_argument("--profile", default="full")
    parser.add_argument("--plan", action="store_true", help="print the cells and their cost, run nothing")
    parser.add_argument("--restart", action="store_true", help="run again what other code or parameters have made")
    parser.add_argument("--processes", type=int, default=joblib.cpu_count())
    args = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        # Ended from outside, take the worker processes along: they would go on writing cells.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Plan, run what is missing, write the tables.

    Raises:
        InputError: wrong parameters or cohort, or cells of other code without ``--restart``.
    """
    torch.set_num_threads(1)
    p = params.load(args.profile)
    parallel.device(p.device)  # a missing GPU is named before anything is planned
    cohort = data.load(args.cohort, p.cohorts)
    cells = design(args.notebook).cells(args.cohort, p)
    names = identities(args.notebook, cohort, p, cells)
    folder = place(args.cohort, p) / args.notebook
    notes = {cell.name: finished(folder, cell) for cell in cells}
    stale = [name for name, note in notes.items() if note and note["identity"] != names[name]]
    if stale and not (args.restart or args.plan):
        raise InputError(
            f"{len(stale)} cells, such as {stale[0]}, were made by other code or parameters; add --restart"
        )
    todo = [cell for cell in cells if notes[cell.name] is None or cell.name in stale]
    rate = calibrate(p)
    cost = {cell.name: estimate(args.notebook, p, cell, cohort, rate) for cell in cells}
    left = sum(cost[cell.name] for cell in todo)
    if args.plan:
        for cell in cells:
            state = "to do" if cell in todo else f"done in {notes[cell.name]['seconds']:.0f} s"
            print(f"{cell.name:42s} {cost[cell.name]:6.0f} CPU-s  {state}")
    print(
        f"{len(cells)} cells, {len(todo)} to do: about {left / 60:.0f} CPU-minutes, {left / 60 / args.processes:.0f} minutes"
    )
    if args.plan:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    lock = paths.ROOT / f".medsec-tmp-{args.cohort}" / f"record-{args.notebook}-{p.device}.lock"
    from medsec.execute import locked  # here: a notebook that only reads records need not load papermill

    with locked(lock), parallel.workers():
        calls = (joblib.delayed(run_cell)(args.notebook, args.cohort, p, cell, names[cell.name]) for cell in todo)
        results = joblib.Parallel(n_jobs=args.processes, return_as="generator_unordered")(calls)
        try:
            for _ in _progress(results, todo, cost):
                pass
        finally:  # also where it is ended from outside: a record cut short is a record in part
            if any(finished(folder, cell) for cell in cells):
                print(build(args.notebook, cohort, p, cells, args.profile).relative_to(paths.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
