"""Notebook 02, record only: is anybody harmed behind a defence?

The headline's GAN poisons every class, so that no class can be taken for another. Here the federation is the one of notebook 01
that draws (`experiments.backdoor_fedgan.drawing`), the attacker stamps its trigger on one class only, and scales its update and
lies about its loss as ``boost_liar`` does. What counts is what a classifier becomes that learns from the images: how often it
calls real images of the other class the poisoned one once they carry the trigger.
"""

import dataclasses

import pandas as pd
import torch

from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan import drawing
from experiments.feddetect import cells as plain
from experiments.feddetect import hospitals
from experiments.feddetect.cells import KEYS
from experiments.params import Params
from medsec import data
from medsec.evidence import cells, tables

# Arm -> how its attacker behaves (`medsec.backdoor.attackers.SCENARIOS`), and the rules. The first one is the control.
ARMS = {
    "harm_clean": ("no_attack", ("none",)),
    "harm": ("boost_liar", ("none", "multi_krum", "feddetect_released", "feddetect_hardened")),
}
DEFENCES = ("blocked_tpr", "false_exclusion")  # what is told of the rule itself
IMAGES = ("frechet", "label_accuracy", "tolerant_rate_class", "downstream_auc")
HARM = ("attack_success", "attack_success_unstamped", "attack_success_few")


def run(cohort: str, params: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: every rule of an arm from the same warm-up; rows of `DEFENCES`, `IMAGES` and `HARM`, no pictures."""
    if cell.arm not in ARMS:
        return hospitals.run(cohort, params, cell)
    torch.set_num_threads(1)
    behaves, variants = ARMS[cell.arm]
    setup = drawing.setup_of(cohort, params, params.drawing.label)
    start, watcher = plain.warm_up(setup, cell.seed, behaves)
    parts = []
    for variant in variants:
        federation, log = plain.run_variant(setup, start, watcher, behaves, variant)
        rows = tables.Rows(KEYS, cell.seed, variant, cell.arm)
        plain.detection_rows(rows, log, setup.params)
        drawing.federation_rows(rows, setup, federation)
        parts.append(rows.table())
    table = pd.concat(parts, ignore_index=True)
    whole = (table["round"] == "") & (table["client"] == "")
    return table[whole & table["metric"].isin([*DEFENCES, *IMAGES, *HARM])].reset_index(drop=True), {}


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    if cell.arm not in ARMS:
        return hospitals.lacks(cohort, p, cell)
    changed = p.model_copy(update={"fedgan": drawing.federation(p, p.drawing.label)})
    return fedgan_eval.lacks(cohort, changed, cell)


def minus_clean(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows ``<metric>_minus_clean``: the difference to the federation without an attack, on the same seed."""
    rows = runs[runs["scenario"].isin(ARMS) & runs["metric"].isin(["frechet", "downstream_auc", "attack_success"])]
    clean = rows["scenario"] == "harm_clean"
    return tables.minus(rows[~clean], rows[clean], [], "clean")[runs.columns]


# What the record runs: the notebook's cells, those of hospitals that differ, and these.
EXPERIMENT = dataclasses.replace(
    hospitals.EXPERIMENT,
    run=run,
    lacks=lacks,
    more={**hospitals.EXPERIMENT.more, **dict.fromkeys(ARMS, ("drawing",))},
)
