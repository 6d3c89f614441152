"""Records: the evidence behind a notebook, with more seeds and more cases than its quick run.

``python -m medsec.record 01_backdoor_fedgan --cohort phantom --profile full`` runs the same cells of the same code as
the notebook: the headline design on every evaluation seed, then sweeps that change one factor at a time. Each finished
cell is written at once below ``records/<cohort>/<notebook>/``, so a record can be interrupted, resumed and committed in
part; the tables do not depend on how often that happened. ``--plan`` prints the cells and their cost, and runs nothing.
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import pandas as pd
import torch
from tqdm import tqdm

from medsec import (
    classifier,
    data,
    federated,
    fedgan,
    fedgan_eval,
    metrics,
    models,
    parallel,
    params,
    partition,
    paths,
    tables,
    triggers,
)
from medsec.errors import InputError
from medsec.execute import locked
from medsec.params import Params

MODULES = (
    classifier,
    federated,
    fedgan,
    fedgan_eval,
    metrics,
    models,
    partition,
    triggers,
)  # what decides a cell's numbers


@dataclass(frozen=True)
class Cell:
    """One seed of one arm under one change of the parameters.

    ``keys`` are the key columns that address its rows (empty for the headline), ``size`` another image size.
    """

    arm: str
    seed: int
    change: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    size: int | None = None

    @property
    def name(self) -> str:
        """File name of the cell, such as ``attack-ratio=0.25-seed0``."""
        return "-".join([self.arm, *(f"{key}={value}" for key, value in self.keys.items()), f"seed{self.seed}"])


def cells_01(cohort: str, p: Params) -> list[Cell]:
    """The headline on every evaluation seed, then one factor at a time on the first few of them.

    A new trigger has a new detector and a new federation a new course: both need their own clean run as a control.
    Other changes of the attack share the headline's.
    """
    found = [Cell(arm, seed) for seed in p.seeds.evaluation for arm in ("attack", "clean", "controls")]
    sweep = p.record.fedgan
    few = p.seeds.evaluation[: sweep.seeds]
    if cohort == "phantom":  # the only cohort that can be drawn at another size
        arms = ("attack", "clean", "controls")
        found += [
            Cell(arm, seed, {}, {"size": size}, size) for size in sweep.image_size for seed in few for arm in arms
        ]
    factors = [({"trigger": {"kind": kind}}, {"trigger": kind}, ("attack", "clean")) for kind in sweep.trigger]
    factors += [
        ({"trigger": {"size": k}}, {"area": _area(k, cohort, p)}, ("attack", "clean")) for k in sweep.trigger_size
    ]
    factors += [({"poison": {"ratio": ratio}}, {"ratio": ratio}, ("attack",)) for ratio in sweep.ratio]
    factors += [({"malicious": list(range(n))}, {"attackers": n}, ("attack",)) for n in sweep.attackers]
    factors += [({"n_clients": m}, {"m": m}, ("attack", "clean")) for m in sweep.n_clients]
    dealt = [scheme for scheme in sweep.partition if scheme != "style" or data.load(cohort, p.cohorts).sites]
    factors += [({"partition": scheme}, {"partition": scheme}, ("attack", "clean")) for scheme in dealt]
    for seed in few:  # seed by seed: a record that is cut short has every factor, on fewer seeds
        found += [Cell(arm, seed, change, keys) for change, keys, arms in factors for arm in arms]
    return found


def _area(size: int, cohort: str, p: Params) -> str:
    return f"{(size / data.load(cohort, p.cohorts).size) ** 2:.4f}"


DESIGNS = {"01_backdoor_fedgan": (cells_01, fedgan_eval.KEYS)}


def code_hash() -> str:
    """Hash of the modules whose code decides a cell's numbers."""
    source = "".join(inspect.getsource(module) for module in MODULES)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def place(cohort: str, p: Params) -> Path:
    """Where the records of a cohort lie; those made on a GPU, whose bits differ, in a folder of their own."""
    return paths.records(cohort if p.device == "cpu" else f"{cohort}-gpu")


def identity(cohort: data.Cohort, p: Params, cell: Cell) -> str:
    """Hash of all that a cell's numbers depend on: its parameters, the images, the code, the version of PyTorch."""
    section = p.device + p.fedgan.model_dump_json() + p.classifier.model_dump_json() + json.dumps(p.seeds.tuning)
    own = json.dumps([cell.change, cell.size, cell.arm, cell.seed])
    return hashlib.sha256((section + own + cohort.fingerprint + code_hash() + torch.__version__).encode()).hexdigest()[
        :16
    ]


def run_cell(notebook: str, cohort: str, p: Params, cell: Cell, name: str) -> str:
    """Run one cell and write its rows and, beside them, what it cost. Returns its name."""
    start = time.perf_counter()
    changed = params.validate(params.merge(p.model_dump(), {"fedgan": cell.change}), f"record cell {cell.name}")
    table, _ = fedgan_eval.run_cell(cohort, changed, cell.seed, cell.arm, size=cell.size)
    table = table.assign(**{key: str(value) for key, value in cell.keys.items()})
    # Single clients' rounds are a mechanism that the quick tables show; here they would be most of the file.
    seats = table["client"].isin(["", "attacker", "others", "server"])
    kept = table[seats & ((table["round"] == "") | (not cell.keys))]
    cells = place(cohort, p) / notebook
    cost = {
        "identity": name,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    tables.write(kept, cells / f"{cell.name}.csv")
    (cells / f"{cell.name}.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")
    return cell.name


def finished(cells: Path, cell: Cell) -> dict | None:
    """What a finished cell in the folder ``cells`` says of itself, or None."""
    note = cells / f"{cell.name}.json"
    if not (note.is_file() and (cells / f"{cell.name}.csv").is_file()):
        return None
    return json.loads(note.read_text(encoding="utf-8"))


def estimate(p: Params, cell: Cell, cohort: data.Cohort, second_per_pixel: float) -> float:
    """CPU seconds of a cell, from the pixels that its training sees."""
    size = cell.size or cohort.size
    images = min(p.fedgan.images_per_client * p.fedgan.n_clients, len(cohort["client"]))
    rounds = p.fedgan.rounds * {"attack": 2 - p.fedgan.poison.boost_after, "clean": 1, "controls": 0.1}[cell.arm]
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
    records, keys = place(cohort.name, p), DESIGNS[notebook][1]
    notes = {cell.name: finished(records / notebook, cell) for cell in cells}
    # Cells of other code or parameters are still there while a restarted record is under way: they do not count.
    done = [cell for cell in cells if (notes[cell.name] or {}).get("identity") == identity(cohort, p, cell)]
    runs = pd.concat([tables.read(records / notebook / f"{cell.name}.csv") for cell in done], ignore_index=True)
    summary = metrics.summarise(runs, keys, paired_with="clean")
    target = records / f"{notebook}.csv"
    tables.write(summary, target)
    costs = {cell.name: notes[cell.name] for cell in done}
    about = {
        "profile": profile,
        "cells_planned": len(cells),
        "cells_finished": len(done),
        "cpu_seconds": round(sum(cost["seconds"] for cost in costs.values())),
        "peak_mb_of_a_process": max(cost["peak_mb"] for cost in costs.values()),
        "code": code_hash(),
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
    target.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return target


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_stale(notebook: str, cohort: str) -> bool:
    """Whether the code that decides the numbers has changed since the record was made.

    Raises:
        InputError: there is no such record.
    """
    about = paths.records(cohort) / f"{notebook}.json"
    if not about.is_file():
        raise InputError(f"no record of {notebook} for {cohort}; make it with: python -m medsec.record {notebook}")
    return json.loads(about.read_text(encoding="utf-8"))["code"] != code_hash()


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medsec.record", description="Make or resume a record.")
    parser.add_argument("notebook", choices=sorted(DESIGNS))
    parser.add_argument("--cohort", default="phantom")
    parser.add_argument("--profile", default="full")
    parser.add_argument("--plan", action="store_true", help="print the cells and their cost, run nothing")
    parser.add_argument("--restart", action="store_true", help="run again what other code or parameters have made")
    parser.add_argument("--processes", type=int, default=joblib.cpu_count())
    args = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        # Ended from outside, take the worker processes along: they would go on writing cells.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Plan, run what is missing, write the tables.

    Raises:
        InputError: wrong parameters or cohort, or cells of other code without ``--restart``.
    """
    torch.set_num_threads(1)
    p = params.load(args.profile)
    parallel.device(p.device)  # a missing GPU is named before anything is planned
    cohort = data.load(args.cohort, p.cohorts)
    cells = DESIGNS[args.notebook][0](args.cohort, p)
    names = {cell.name: identity(cohort, p, cell) for cell in cells}
    folder = place(args.cohort, p) / args.notebook
    notes = {cell.name: finished(folder, cell) for cell in cells}
    stale = [name for name, note in notes.items() if note and note["identity"] != names[name]]
    if stale and not (args.restart or args.plan):
        raise InputError(
            f"{len(stale)} cells, such as {stale[0]}, were made by other code or parameters; add --restart"
        )
    todo = [cell for cell in cells if notes[cell.name] is None or cell.name in stale]
    rate = calibrate(p)
    cost = {cell.name: estimate(p, cell, cohort, rate) for cell in cells}
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
    with locked(lock), joblib.parallel_config("loky", inner_max_num_threads=1):
        calls = (joblib.delayed(run_cell)(args.notebook, args.cohort, p, cell, names[cell.name]) for cell in todo)
        results = joblib.Parallel(n_jobs=args.processes, return_as="generator_unordered")(calls)
        for _ in _progress(results, todo, cost):
            build(args.notebook, cohort, p, cells, args.profile)  # at once: a record cut short is a record in part
    print(build(args.notebook, cohort, p, cells, args.profile).relative_to(paths.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
