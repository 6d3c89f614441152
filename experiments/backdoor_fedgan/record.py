"""The record of notebook 01: which cells it has, what it keeps of them, and what they cost."""

import pandas as pd

from experiments import record_plans
from experiments.backdoor_fedgan import cells
from experiments.params import Params
from medsec import data
from medsec.evidence import tables
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design

# The published trigger, a grid in colour: it needs 57 pixels a side.
COLOUR_GRID = ({"fedgan": {"trigger": {"kind": "grid"}}}, {"trigger": "grid", "size": 64}, 64)


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
    return found


def _area(size: int, cohort: str, p: Params) -> str:
    return f"{(size / data.load(cohort, p.cohorts).size) ** 2:.4f}"


def keep(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Single clients' rounds are a mechanism that the quick tables show; here they would be most of the file."""
    seats = rows["client"].isin(["", "attacker", "others", "server"])
    return rows[seats & ((rows["round"] == "") | (not cell.keys))]


def summarise(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    return tables.summarise(runs, cells.KEYS, paired_with="clean")


def multiple(p: Params, cell: Cell) -> float:
    return {"attack": 2 - p.fedgan.poison.boost_after, "clean": 1, "controls": 0.1}[cell.arm]


DESIGN = Design(cells.EXPERIMENT, plan, keep, summarise, record_plans.cost(multiple))
