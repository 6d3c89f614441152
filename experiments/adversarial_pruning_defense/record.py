"""The record of notebook 04: which cells it has, what it keeps of them, and what they cost."""

import pandas as pd

from experiments import record_plans
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells, transfer
from experiments.params import Params, merge
from medsec.evidence import tables
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design

COSTS = ("base", "at_ramp", "longer")  # `longer`, a control of costs, is in no other cell
ATTACKED = tuple(variant for variant in evasion_arms.VARIANTS if variant != "longer")


def plan(cohort: str, p: Params) -> list[Cell]:
    """Every arm under every attack, seed by seed; then other shares of pruning; then examples made for other networks."""
    sweep = p.record.evasion
    pruned = [variant for variant, arm in evasion_arms.ARMS.items() if arm.prune == "yes"]
    record_plans.check_names(sweep.variants, pruned, "record.evasion.variants")
    for name in ("transfer", "transfer_dear"):
        record_plans.check_names(getattr(sweep, name), evasion_arms.VARIANTS, f"record.evasion.{name}")
    for name, chosen in (
        ("evasion", p.record.other_modality.evasion),
        ("near.arms", p.record.other_modality.near.arms),
    ):
        record_plans.check_names(chosen, ATTACKED, f"record.other_modality.{name}")
    if record_plans.headline_only(cohort):
        return _elsewhere(p)
    found = [cells.arm_of(variant, seed, retrained=True) for seed in p.seeds.evaluation for variant in ATTACKED]
    found += [Cell("costs", seed, variants=COSTS[-1:]) for seed in p.seeds.evaluation]
    found += [Cell("costs", seed, variants=COSTS) for seed in sweep.cost_seeds if seed not in p.seeds.evaluation]
    found += [
        Cell("prune", seed, keys={"prune": ratio}, group=variant, variants=(variant,))
        for seed in p.seeds.evaluation[: sweep.seeds]
        for variant in sweep.variants
        for ratio in sweep.prune
    ]
    return found + transfer.plan(p, sweep.transfer, sweep.transfer_dear)


def _elsewhere(p: Params) -> list[Cell]:
    """The headline's cells on another modality; some arms are attacked at other eps besides."""
    own = p.record.other_modality
    usual = record_plans.other_modality(p, "evasion")
    more = [eps for eps in own.near.autoattack_more if eps != p.evasion.eps]  # the headline's is run anyway
    near = {"sweep": own.near.sweep, "attacks": {"autoattack_more": more}}
    changes = {v: merge(usual, {"evasion": near}) if v in own.near.arms else usual for v in own.evasion}
    found = [cells.arm_of(v, seed, changes[v], retrained=True) for seed in p.seeds.evaluation for v in own.evasion]
    if "at_ramp" in own.evasion:
        found += [Cell("costs", seed, usual, variants=COSTS[-1:]) for seed in p.seeds.evaluation]
    return found


# What a method adds is the difference to the same training without it, not to a network trained for less. ``plain``: trained
# against the attack by the recipe of `hardened`, nothing else (`at_ramp` is another recipe: eps, its rise, epochs). ``finetune``:
# trained as long, without pruning, or without an attack.
CONTROLS = {
    "plain": {"hardened": "hardened_plain", "at_ramp": "hardened_plain"},
    "finetune": {"prune": "finetune", "prune_cbam": "finetune", "at_ramp": "longer"},
}


def summarise(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    """With paired differences on the same seed, clean, under PGD and AutoAttack: ``<metric>_minus_<control>`` (`CONTROLS`)."""
    runs = transfer.keyed(runs)
    rates = runs[(runs["metric"] == "dr_whitebox") & (runs["f0"] == "")]
    both = pd.concat([cells.compared(runs, p), rates]).drop_duplicates()
    both = both[both["scenario"].isin(["clean", "pgd20", "autoattack"]) & (both["prune"] == "")]
    paired = [
        tables.minus(both[both["variant"] == arm], both[both["variant"] == control], ["scenario", "eps", "norm"], name)
        for name, arms in CONTROLS.items()
        for arm, control in arms.items()
    ]
    return cells.summarise(pd.concat([runs, *paired], ignore_index=True), p)


def multiple(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured on two cores."""
    if cell.arm in ("prune", "transfer"):
        return 1.0 if cell.arm == "prune" else 5.0
    if cell.arm == "costs":
        return 2.0 * len(cell.variants)
    return 8.0 if cell.variants[0].startswith(("hardened", "at_ramp")) else 6.0


DESIGN = Design(cells.EXPERIMENT, plan, lambda rows, cell: rows, summarise, record_plans.cost(multiple))
