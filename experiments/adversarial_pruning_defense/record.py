"""The record of notebook 04: which cells it has, what it keeps of them, and what they cost."""

import pandas as pd

from experiments import record_plans
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells
from experiments.params import Params
from medsec.evidence import tables
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design


def plan(cohort: str, p: Params) -> list[Cell]:
    """Every arm under every attack, seed by seed; then other shares of pruning."""
    sweep = p.record.evasion
    pruned = [variant for variant, arm in evasion_arms.ARMS.items() if arm.prune == "yes"]
    record_plans.check_names(sweep.variants, pruned, "record.evasion.variants")
    record_plans.check_names(p.record.other_modality.evasion, evasion_arms.VARIANTS, "record.other_modality.evasion")
    arms = p.record.other_modality.evasion if record_plans.headline_only(cohort) else evasion_arms.VARIANTS
    change = record_plans.other_modality(p, "evasion") if record_plans.headline_only(cohort) else {}
    found = [
        Cell("arm", seed, change, group=variant, variants=(variant,), given={"retrained": True})
        for seed in p.seeds.evaluation
        for variant in arms
    ]
    if record_plans.headline_only(cohort):
        return found
    found += [
        Cell("prune", seed, keys={"prune": ratio}, group=variant, variants=(variant,))
        for seed in p.seeds.evaluation[: sweep.seeds]
        for variant in sweep.variants
        for ratio in sweep.prune
    ]
    return found


def summarise(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    """With ``dr_whitebox_minus_plain``: `hardened` less the same recipe without pruning and attention, on the same seed."""
    rates = runs[(runs["metric"] == "dr_whitebox") & (runs["prune"] == "")]
    own, plain = (rates[rates["variant"] == variant] for variant in ("hardened", "hardened_plain"))
    paired = tables.minus(own, plain, ["scenario", "eps", "norm"], "plain")
    return cells.summarise(pd.concat([runs, paired], ignore_index=True), p)


def multiple(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured on two cores."""
    if cell.arm == "prune":
        return 1.0
    return 8.0 if cell.variants[0].startswith("hardened") else 6.0


DESIGN = Design(cells.EXPERIMENT, plan, lambda rows, cell: rows, summarise, record_plans.cost(multiple))
