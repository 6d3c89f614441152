"""The record of notebook 01: which cells it has, what it keeps of them, and what they cost."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from experiments import record_plans
from experiments.backdoor_fedgan import cells, drawing
from experiments.params import Params
from medsec import data
from medsec.core import files, paths
from medsec.evidence import tables
from medsec.evidence.cells import Cell, identity, place, read
from medsec.evidence.record import Design

# The published trigger, a grid in colour: it needs 57 pixels a side.
COLOUR_GRID = ({"fedgan": {"trigger": {"kind": "grid"}}}, {"trigger": "grid", "size": 64}, 64)

SHEET_NAME = "01_backdoor_fedgan_drawn.png"
SHEET = {
    "drawn_real": "real",
    "drawn_headline": "GAN above",
    "drawn_clean": "GAN that draws",
    "drawn_boost_class": "attacked",
}


def plan(cohort: str, p: Params) -> list[Cell]:
    """The headline on every evaluation seed, then one factor at a time on the first few of them.

    A new trigger has a new detector and a new federation a new course: both need their own clean run as a control.
    Other changes of the attack share the headline's.
    """
    found = [Cell(arm, seed) for seed in p.seeds.evaluation for arm in ("attack", "clean", "controls")]
    sweep = p.record.fedgan
    few = p.seeds.evaluation[: sweep.seeds]
    if cohort == "fundus":  # can be drawn at another size
        return found + [Cell(arm, seed, *COLOUR_GRID) for seed in few for arm in ("attack", "clean", "controls")]
    if record_plans.headline_only(cohort):
        return found
    if cohort == "phantom":  # can be drawn at another size
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
    dealt = record_plans.allowed(cohort, p, sweep.partition)
    factors += [({"partition": scheme}, {"partition": scheme}, ("attack", "clean")) for scheme in dealt]
    for seed in few:  # seed by seed: a record that is cut short has every factor, on fewer seeds
        found += [Cell(arm, seed, {"fedgan": change}, keys) for change, keys, arms in factors for arm in arms]
    return found + [Cell(arm, seed) for seed in few for arm in drawing.ARMS]


def _area(size: int, cohort: str, p: Params) -> str:
    return f"{(size / data.load(cohort, p.cohorts).size) ** 2:.4f}"


def keep(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Single clients' rounds are a mechanism that the quick tables show; here they would be most of the file."""
    seats = rows["client"].isin(["", "attacker", "others", "server"])
    return rows[seats & ((rows["round"] == "") | (not cell.keys))]


def summarise(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    drawn = runs["variant"].str.startswith("drawn_")
    parts = [
        tables.summarise(part, cells.KEYS, paired_with=base)
        for part, base in ((runs[~drawn], "clean"), (runs[drawn], "drawn_clean"))
        if len(part)
    ]
    return pd.concat(parts, ignore_index=True)


def multiple(p: Params, cell: Cell) -> float:
    drawn, more = p.drawing.rounds / p.fedgan.rounds, 2 - p.drawing.boost_after
    return {
        "attack": 2 - p.fedgan.poison.boost_after,
        "clean": 1,
        "controls": 0.1,
        "drawing_clean": drawn,
        "drawing_attack": drawn * more,
        "drawing_class": drawn * more,
        "drawing_controls": 1,
    }[cell.arm]


def sheet(cohort: data.Cohort, p: Params, folder: Path) -> None:
    """Write the contact sheet of the first seed, a row each: real, the headline's GAN, the one that draws, and it attacked.

    Nothing is written where those cells do not lie in ``.cells``: a record is resumed without them.
    """
    found = {}
    for arm in ("drawing_controls", "drawing_clean", "drawing_class"):
        cell = Cell(arm, p.seeds.evaluation[0])
        name = identity(drawing.EXPERIMENT, cohort.fingerprint, p, cell)
        if (stored := read(place(drawing.EXPERIMENT, cohort.name, cell, name))) is None:
            return
        found |= stored[0][1]
    lines = [np.concatenate(list(found[variant][::3].transpose(0, 2, 3, 1)), axis=1) for variant in SHEET]
    pixels = np.rint(255 * np.concatenate(lines)).astype(np.uint8)
    drawn = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(drawn, "PNG", optimize=True)
    files.write(folder / SHEET_NAME, drawn.getvalue())


def sheet_rows(cohort: str) -> dict[str, np.ndarray]:
    """The rows of the contact sheet (n, C, S, S), uint8; empty where there is none."""
    file = paths.records(cohort) / SHEET_NAME
    if not file.exists():
        return {}
    pixels = np.atleast_3d(np.asarray(Image.open(file)))
    size = len(pixels) // len(SHEET)
    tiles = pixels.reshape(len(SHEET), size, -1, size, pixels.shape[-1]).transpose(0, 2, 4, 1, 3)
    return dict(zip(SHEET.values(), tiles, strict=True))


DESIGN = Design(drawing.EXPERIMENT, plan, keep, summarise, record_plans.cost(multiple), sheet)
