"""The record of notebook 02: which cells it has, what it keeps of them, and what they cost."""

import pandas as pd

from experiments import record_plans
from experiments.feddetect import cells, gans, hospitals, tables
from experiments.params import Params
from medsec.backdoor.attackers import SCENARIOS
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design

CONTENDERS = ("feddetect_released", "feddetect_hardened")
BASELINES = ("feddetect_described", "median", "trimmed_mean", "krum", "multi_krum", "norm_clip")
COST = {name: 15 if name == "harm" else 5 for name in gans.ARMS}  # federations that a cell is worth
ADDED = tuple(v for v in cells.VARIANTS if v not in ("none", *CONTENDERS, *BASELINES))  # each with cells of its own


def plan(cohort: str, p: Params) -> list[Cell]:
    """FedDetect, released and hardened, against every attacker; the other defences and what differs on fewer seeds.

    Seed by seed: a record that is cut short has every scenario, on fewer seeds.
    """
    sweep = p.record.feddetect
    few = p.seeds.evaluation[: sweep.seeds]
    record_plans.check_names(sweep.variants, [*cells.VARIANTS, cells.ORACLE], "record.feddetect.variants")
    others = p.record.other_modality.feddetect
    record_plans.check_names(others, SCENARIOS, "record.other_modality.feddetect")
    if record_plans.headline_only(cohort):
        return [Cell(s, seed, variants=("none", *CONTENDERS)) for seed in p.seeds.evaluation for s in others]
    colluders_control = {"m": p.feddetect.scenario.colluders[1]}
    federations = [{"m": m} for m in sweep.n_clients]
    federations += [{"partition": scheme} for scheme in record_plans.allowed(cohort, p, sweep.partition)]
    found = []
    for seed in p.seeds.evaluation:
        for scenario in SCENARIOS:
            variants = CONTENDERS if scenario in tables.SAME_BUT_FOR_LOSSES else ("none", *CONTENDERS)
            if scenario == "boost_liar":  # a run that is the same for every attacker of this warm-up
                variants = (*variants, cells.ORACLE)
            found.append(Cell(scenario, seed, variants=variants))
        found.append(Cell("no_attack", seed, keys=colluders_control, variants=tuple(sweep.variants)))
        found += [Cell("null", seed, keys={"m": m}) for m in p.feddetect.null_test.clients]
        if seed in few:
            found.append(Cell("downstream", seed))
            found += [
                Cell("aware", seed, keys={"evade": e}, variants=("none", "feddetect_hardened")) for e in sweep.evade
            ]
        if seed in p.seeds.evaluation[: sweep.baseline_seeds]:
            found += [Cell(s, seed, variants=_baselines(s, p), group="baselines") for s in SCENARIOS]
            distinct = [s for s in SCENARIOS if s not in tables.SAME_BUT_FOR_LOSSES]
            found += [Cell(s, seed, variants=(added,), group=added) for added in ADDED for s in distinct]
    found += [
        Cell("no_attack", seed, variants=CONTENDERS)
        for seed in sweep.false_alarm_seeds
        if seed not in p.seeds.evaluation
    ]
    for seed in few:
        found += [
            Cell(scenario, seed, keys=keys, variants=tuple(sweep.variants))
            for keys in federations
            for scenario in sweep.scenarios
            if not (scenario == "no_attack" and keys == colluders_control)
        ]
        found += [
            Cell(scenario, seed, keys={"trigger": kind}, variants=tuple(sweep.variants))
            for kind in sweep.trigger
            for scenario in ("honest", "boost_liar")
        ]
    found += [Cell(name, seed, variants=arm.variants) for seed in few for name, arm in gans.ARMS.items()]
    return found + _where_hospitals_differ(cohort, p)


def _where_hospitals_differ(cohort: str, p: Params) -> list[Cell]:
    """Seed by seed, in the federations of the sweep; what that runs there is not run again."""
    sweep = p.record.feddetect
    return [
        Cell(arm, seed, keys={"partition": scheme}, variants=variants, group=group)
        for seed in p.seeds.evaluation[: sweep.seeds]
        for scheme in record_plans.allowed(cohort, p, sweep.partition)
        for arm in hospitals.ARMS
        for group, variants in hospitals.plan(arm).items()
    ]


def _baselines(scenario: str, p: Params) -> tuple[str, ...]:
    """Those that `experiments.feddetect.tables.complete` cannot copy from another."""
    copied = set()
    if tables.has_twin(p) and not SCENARIOS[scenario].colluders:
        copied.add(tables.TWIN[0])
    if scenario in tables.SAME_BUT_FOR_LOSSES:
        copied |= set(BASELINES) - set(cells.READS_LOSSES)
    return tuple(variant for variant in BASELINES if variant not in copied)


def keep(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """No single client's rows; of a sweep no single round's."""
    if cell.arm in ("null", "downstream"):
        return rows
    return rows[(rows["client"] == "") & ((rows["round"] == "") | (not cell.keys))]  # those of `gans` have neither


def multiple(p: Params, cell: Cell) -> float:
    """An aware attacker's optimisation makes a rule's rounds three times as dear."""
    each = (1 - p.feddetect.warm_up) * (3 if "aware" in cell.arm else 1)
    return {"null": 0.05, "downstream": 3, **COST}.get(cell.arm, p.feddetect.warm_up + len(cell.variants) * each)


DESIGN = Design(gans.EXPERIMENT, plan, keep, tables.summarise, record_plans.cost(multiple))
