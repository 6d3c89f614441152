"""Golden cells: a few tiny cells of every experiment, whose tables are committed.

A change of the code that moves a number shows here. ``python tests/golden/make.py`` makes the tables anew.
"""

import functools
import hashlib
import itertools
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from experiments import params
from experiments.backdoor_fedgan import drawing
from experiments.catalogue import DESIGNS, EXPERIMENTS
from experiments.data_and_threats import cells as cohort_eval
from experiments.gia_defense import clients as inversion_clients
from experiments.threat_matrix import cells as matrix_eval
from medsec import data
from medsec.core import paths
from medsec.evidence import check, tables
from medsec.evidence.cells import Cell, resolved

FOLDER = Path(__file__).parent
TABLES = {"runs": FOLDER / "runs.csv.gz", "summary": FOLDER / "summary.csv.gz"}
HASHES = FOLDER / "hashes.json"
TIMES = ("server_ms",)  # measured in milliseconds: never the same again
SEED = 0
RETRAINED = {"retrained": True}


@dataclass(frozen=True)
class Golden:
    """One golden cell: ``run(cohort, params)`` gives a runs table of an experiment, or a summary.

    ``cells`` are the record's cells that it consists of, if any.
    """

    experiment: str
    cohort: str
    run: Callable[[str, params.Params], pd.DataFrame]
    cells: tuple[Cell, ...] = ()


def cohort_tables(cohort: str, p: params.Params) -> pd.DataFrame:
    """Notebook 00: counts, partitions, and the shift between two hospitals."""
    loaded = data.load(cohort, p.cohorts)
    rows = cohort_eval.count_rows(loaded) + cohort_eval.partition_rows(loaded, p)
    for site in (0, 1):
        rows += cohort_eval.shift_rows(cohort, p, SEED, site)
    return pd.DataFrame(rows)


def recorded(experiment: str, cohort: str, *cells: Cell) -> Golden:
    """Cells of a record, one after the other."""

    def run(cohort: str, p: params.Params) -> pd.DataFrame:
        design, parts = DESIGNS[experiment], []
        for cell in cells:
            rows, _ = EXPERIMENTS[experiment].run(cohort, resolved(p, cell), cell)
            parts.append(design.keep(rows, cell))
        return pd.concat(parts, ignore_index=True)

    return Golden(experiment, cohort, run, cells)


def gan(cohort: str, *arms: str, **options) -> Golden:
    return recorded("01_backdoor_fedgan", cohort, *(Cell(arm, SEED, **options) for arm in arms))


def feddetect(cohort: str, *cells: Cell) -> Golden:
    return recorded("02_feddetect", cohort, *cells)


def scenario(name: str, *variants: str, **keys) -> Cell:
    return Cell(name, SEED, keys=keys, variants=variants)


def inversion(
    cohort: str, arm: str, *variants: str, change: dict | None = None, given: dict | None = None, **keys
) -> Golden:
    each = (Cell(arm, SEED, change or {}, keys, variants=(variant,), given=given or {}) for variant in variants)
    return recorded("03_gia_defense", cohort, *each)


def evasion(cohort: str, arm: str, *variants: str, **keys) -> Golden:
    each = (Cell(arm, SEED, keys=keys, variants=(variant,), given=RETRAINED) for variant in variants)
    return recorded("04_adversarial_pruning_defense", cohort, *each)


def rising(cohort: str) -> Golden:
    """What section ``at_ramp`` trains: the arm, and its control without an attack."""
    attacked = Cell("ramp", SEED, variants=("at_ramp",), given=RETRAINED)
    return recorded("04_adversarial_pruning_defense", cohort, attacked, Cell("costs", SEED, variants=("longer",)))


def transferred(cohort: str, *variants: str) -> Golden:
    own = {"networks": 2, "other_width": 4, "steps": 3, "decay": 1.0, "diverse": 0.5, "smallest": 0.8}
    cell = Cell("transfer", SEED, variants=variants, given={"transfer": own, "others": [1, 2]})
    return recorded("04_adversarial_pruning_defense", cohort, cell)


def matrix(cohort: str, *rows: str) -> Golden:
    return Golden("05_threat_matrix", cohort, lambda cohort, p: matrix_eval.rows_of(cohort, p, rows, SEED))


def summary(experiment: str, *names: str) -> Golden:
    """The summary of committed tables, with a second seed that is made up, so that there are intervals."""

    def run(cohort: str, p: params.Params) -> pd.DataFrame:
        runs = pd.concat([stored()[name] for name in names], ignore_index=True).fillna("")
        runs = pd.concat([runs, runs.assign(seed=SEED + 1, value=0.9 * runs["value"])], ignore_index=True)
        if experiment in DESIGNS:
            return DESIGNS[experiment].summarise(runs, p)
        return matrix_eval.summarise(runs)

    return Golden(experiment, "phantom", run)


GRID = {"change": {"fedgan": {"trigger": {"kind": "grid"}}}, "size": 32}
MOVING = {
    "change": {"fedgan": {"trigger": {"kind": "moving"}, "partition": "style", "n_clients": 8}},
    "keys": {"m": 8},
}
BLENDED = {
    "fedgan": {
        "trigger": {"kind": "blended"},
        "partition": "dirichlet",
        "average": "both",
        "malicious": [0, 1],
        "poison": {"ratio": 0.5, "label": 1},
    }
}
FEWER = {"inversion": {"attacks": ["ig"], "adaptive": ["unmasked"]}}
LONG = {"inversion": {"attack": {"iterations": 8}}}
WEAKER = {"inversion": {"defences": {"gradient_noise": {"ratio": 1.0}}}}
FEDDETECT = ("feddetect_released", "feddetect_described", "feddetect_hardened")
RULES = ("median", "trimmed_mean", "krum", "multi_krum", "norm_clip", "oracle")
HARDENED = ("none", "feddetect_hardened")
GRADIENTS = ("none", "gradient_noise", "dp_sgd", "topk", "soteria")  # listed: a new defence changes no golden cell
SUBSTITUTES = ("shadow_hardened", "random_grouping", "shadow_suppressed", "autoencoder_only", "public_only")
TRAINED = (*GRADIENTS, "image_noise", "shadow_released", "shadow_described", *SUBSTITUTES)
FINGERPRINTED = ("gradient_noise", "topk", "soteria", "shadow_released", "shadow_hardened", "public_only")
COMPARED = {"victims": 4, "batches": [1, 2], "gallery": None, "copies": 2}
SHADOW = ("shadow_released", "shadow_described", "shadow_hardened")

CELLS = {
    "00-phantom": Golden("00_data_and_threats", "phantom", cohort_tables),
    "00-fundus": Golden("00_data_and_threats", "fundus", cohort_tables),
    "01-headline": gan("phantom", "clean", "attack", "controls"),
    "01-blended": gan("phantom", "clean", "attack", change=BLENDED),
    "01-moving": gan("fundus", "attack", **MOVING),
    "01-drawing": gan("phantom", *drawing.ARMS),
    "01-grid": gan("fundus", "attack", "controls", **GRID),
    "02-false_alarms": feddetect(
        "phantom",
        scenario("no_attack", "none", *FEDDETECT),
        scenario("no_attack", "feddetect_hardened", m=8),
        scenario("null", m=4),
    ),
    "02-aggregators": feddetect("phantom", scenario("boost", "none", *RULES)),
    "02-honest": feddetect("phantom", scenario("honest", "none", *FEDDETECT)),
    "02-liars": feddetect("phantom", scenario("liar", *FEDDETECT), scenario("framer", *FEDDETECT)),
    "02-boost_liar": feddetect("phantom", scenario("boost_liar", "none", *FEDDETECT, "oracle")),
    "02-colluders": feddetect("phantom", scenario("colluders", *HARDENED, "trimmed_mean", "multi_krum")),
    "02-patient": feddetect("phantom", scenario("stealth", *HARDENED), scenario("waitout", *HARDENED)),
    "02-triggers": feddetect(
        "phantom", *(scenario(f"{kind}_trigger", *HARDENED) for kind in ("moving", "blended", "stripes"))
    ),
    "02-aware": feddetect("phantom", scenario("aware", *HARDENED), scenario("aware_late", *HARDENED, evade=1.5)),
    "02-downstream": feddetect("phantom", scenario("downstream")),
    "02-fundus": feddetect("fundus", scenario("boost_liar", *HARDENED, "krum", partition="style", trigger="grid")),
    "03-gradients": inversion("phantom", "attack", *GRADIENTS),
    "03-noise": inversion("phantom", "attack", "image_noise", "shadow_released", "shadow_described"),
    "03-controls": inversion("phantom", "attack", *inversion_clients.CONTROLS, change=FEWER),
    "03-substitutes": inversion("phantom", "attack", *inversion_clients.STAND_INS, *inversion_clients.DRAWINGS),
    "03-public_only": inversion("phantom", "attack", "public_only"),
    "03-fundus": inversion("fundus", "attack", "none", "soteria"),
    "03-federation": inversion("phantom", "federation", *TRAINED),
    "03-batch": inversion("phantom", "attack", "none", "shadow_hardened", batch=2, labels="inferred"),
    "03-steps": inversion("fundus", "attack", "none", steps=2),
    "03-rounds": inversion("phantom", "rounds", "none", "shadow_hardened", given={"shares": [0.5, 1.0]}),
    "03-longer": inversion("phantom", "longer", "none", change=LONG, batch=2),
    "03-strength": inversion("phantom", "strength", "gradient_noise", change=WEAKER, strength=1.0),
    "03-fingerprint": inversion("phantom", "fingerprint", *FINGERPRINTED, given=COMPARED),
    "03-fingerprint_later": inversion("phantom", "fingerprint_later", "none", given=COMPARED | {"shares": [1.0]}),
    "04-hardened": evasion("phantom", "arm", "base", "hardened", "hardened_plain"),
    "04-clean": evasion("fundus", "arm", "finetune", "prune", "retrain", "cbam", "prune_cbam"),
    "04-robust": evasion("fundus", "arm", "at", "at_prune", "at_cbam"),
    "04-ramp": rising("fundus"),
    "04-prune": evasion("fundus", "prune", "at_prune", prune=0.5),
    "04-transfer": transferred("phantom", "base", "prune_cbam"),
    "05-none": matrix("phantom", "none", "none_again"),
    "05-server": matrix(
        "phantom", "feddetect_released", "feddetect_described", "feddetect_hardened", "norm_clip", "multi_krum"
    ),
    "05-images": matrix("phantom", *SHADOW, "public_only"),
    "05-network": matrix("phantom", "prune", "prune_random", "cbam", "prune_cbam"),
    "05-trained_against": matrix("fundus", "at", "hardened"),
    "05-stacks": matrix("phantom", "feddetect+shadow", "shadow+at", "feddetect+shadow+at", "multi_krum+public+at"),
    "01-summary": summary("01_backdoor_fedgan", "01-headline"),
    "02-summary": summary("02_feddetect", "02-false_alarms", "02-aggregators", "02-honest", "02-boost_liar"),
    "03-summary": summary("03_gia_defense", "03-gradients", "03-noise", "03-controls", "03-federation"),
    "04-summary": summary("04_adversarial_pruning_defense", "04-hardened", "04-transfer"),
    "05-summary": summary("05_threat_matrix", "05-none", "05-server", "05-images", "05-network", "05-stacks"),
}


@functools.cache
def parameters() -> params.Params:
    return params.load(str(FOLDER / "params.yaml"))


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder with the tiny phantom, for one process."""
    folder = tempfile.TemporaryDirectory()
    data.generate(parameters().cohorts.phantom, Path(folder.name) / "phantom")
    return folder


@functools.cache
def made(name: str) -> pd.DataFrame:
    """The table of one golden cell, run now, once a process; nothing is read from or written to the repository's data."""
    torch.set_num_threads(1)
    golden, p, folder = CELLS[name], parameters(), scratch().name
    places = mock.patch.object(paths, "DATA", Path(folder)), mock.patch.object(paths, "ROOT", Path(folder))
    with places[0], places[1]:
        table = golden.run(golden.cohort, p)
    return table[~table["metric"].isin(TIMES)].reset_index(drop=True)


# Comparing -----------------------------------------------------------------------------------------------------------


def processor() -> str:
    """What decides the bits: instruction set, libraries, machine, maker of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        maker = ""
    instructions = torch.backends.cpu.get_cpu_capability()
    return " ".join([platform.machine(), maker, instructions, f"torch {torch.__version__}", f"numpy {np.__version__}"])


def kind(table: pd.DataFrame) -> str:
    """Which of the two files of `TABLES` a table belongs to."""
    return "summary" if "low" in table else "runs"


@functools.cache
def stored() -> dict[str, pd.DataFrame]:
    """The committed tables by the name of their cell."""
    found = {}
    for file in TABLES.values():
        found |= dict(iter(tables.read(file).groupby("cell", sort=False))) if file.is_file() else {}
    return {name: table.drop(columns="cell").reset_index(drop=True) for name, table in found.items()}


def notes() -> dict[str, dict[str, str]]:
    """Of every stored table the hash of its values, and which processor they are from."""
    return json.loads(HASHES.read_text(encoding="utf-8")) if HASHES.is_file() else {}


def digest(table: pd.DataFrame) -> str:
    """Hash of the raw values, and of the intervals where there are some."""
    columns = [column for column in ("value", "low", "high") if column in table]
    return hashlib.sha256(table[columns].to_numpy(np.float64).tobytes()).hexdigest()


def trimmed(table: pd.DataFrame) -> pd.DataFrame:
    """A table without key columns that are empty in all rows: all experiments share a file."""
    return table[sorted(column for column in table if (table[column] != "").any())]


def differences(fresh: pd.DataFrame, committed: pd.DataFrame, note: dict[str, str]) -> list[str]:
    """What differs, one line a row: any bit on the kind of processor that ``note`` names, else what is beyond tolerance."""
    if note["processor"] != processor():
        return check.compare(trimmed(spread(fresh)), trimmed(spread(committed)))
    now, was = (text(trimmed(table)).splitlines() for table in (fresh, committed))
    lines = [f"{new} instead of {old}" for new, old in itertools.zip_longest(now, was) if new != old]
    if not lines and digest(fresh) != note["sha256"]:
        lines = ["equal to six digits, but not bit for bit"]
    return lines


def text(table: pd.DataFrame) -> str:
    """A table as `tables.write` writes it."""
    return written(table).read_text(encoding="utf-8")


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """A table to the six digits that are stored."""
    return tables.read(written(table))


def written(table: pd.DataFrame) -> Path:
    """A file with the table, overwritten by the next one."""
    file = Path(scratch().name) / "table.csv"
    tables.write(table, file)
    return file


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """A table as `check.compare` takes it; of a single run, the deviation and half the interval are what one of its items counts.

    A check is one item, yes or no, on however many images it was made.
    """
    if kind(table) == "summary":
        return table
    item = 1 / table["n_items"].clip(lower=1).where(table["unit"] != "passes", 1)
    return table.drop(columns="seed").assign(low=table["value"] - item, high=table["value"] + item, sd=item, n=1)
