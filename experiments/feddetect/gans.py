"""Notebook 02, record only: the same rules on other GANs.

*Harm.* The headline's GAN poisons every class, so that no class can be taken for another. Here the federation is the one of
notebook 01 that draws (`experiments.backdoor_fedgan.drawing`), and the attacker stamps its trigger on one class only. It scales
its update and lies about its loss as ``boost_liar`` does, from the end of the warm-up on: earlier than in notebook 01. What
counts is what a classifier becomes that learns from the images: how often it calls real images of the other class the poisoned
one once they carry the trigger.

*Regularised.* The release has a second defence, "local training regularisation": every client, the attacker too, trains a WGAN-GP
(`medsec.backdoor.recipes`). It is run alone and together with FedDetect, as the authors recommend.
"""

import dataclasses
from typing import NamedTuple

import pandas as pd
import torch

from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan import drawing
from experiments.backdoor_fedgan.cells import GANSetup
from experiments.feddetect import cells as plain
from experiments.feddetect import hospitals
from experiments.feddetect.cells import KEYS
from experiments.params import Params
from medsec import data
from medsec.backdoor.gan import FederatedGAN
from medsec.core.settings import FedGANParams
from medsec.evidence import cells, tables


class Arm(NamedTuple):
    """What the cells of an arm run.

    Attributes:
        gan: ``drawing`` or ``regularised``, also the section of the parameters.
        behaves: how its attacker does (`medsec.backdoor.attackers.SCENARIOS`).
        variants: the rules.
    """

    gan: str
    behaves: str
    variants: tuple[str, ...]


WITH_FEDDETECT = ("none", "feddetect_released")
# Arm, which is also the scenario of its rows -> what it is. Of each GAN the first one is the control.
ARMS = {
    "harm_clean": Arm("drawing", "no_attack", ("none", "feddetect_released", "feddetect_hardened")),
    "harm": Arm("drawing", "boost_liar", ("none", "multi_krum", "feddetect_released", "feddetect_hardened")),
    "regularised_clean": Arm("regularised", "no_attack", WITH_FEDDETECT),
    "regularised_honest": Arm("regularised", "honest", WITH_FEDDETECT),
    "regularised_boost_liar": Arm("regularised", "boost_liar", WITH_FEDDETECT),
}
CLEAN = {"drawing": "harm_clean", "regularised": "regularised_clean"}
KEPT = {"blocked_tpr", "false_exclusion", "frechet", "label_accuracy", "downstream_auc", "trigger_rate"}
HARM = ("attack_success", "attack_success_unstamped")


def federation(p: Params, gan: str) -> FedGANParams:
    """Section ``fedgan`` with what differs in the federation of that name."""
    if gan == "drawing":
        return drawing.federation(p, p.drawing.label)
    return p.fedgan.model_copy(update={"gan": p.regularised})


def run(cohort: str, params: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: every rule of an arm from the same warm-up; rows as of `experiments.feddetect.cells.run_cell`, without rounds."""
    if cell.arm not in ARMS:
        return hospitals.run(cohort, params, cell)
    torch.set_num_threads(1)
    arm = ARMS[cell.arm]
    setup = fedgan_eval.with_federation(cohort, params, federation(params, arm.gan))
    start, watcher = plain.warm_up(setup, cell.seed, arm.behaves)
    parts = []
    for variant in arm.variants:
        fed, log = plain.run_variant(setup, start, watcher, arm.behaves, variant)
        rows = tables.Rows(KEYS, cell.seed, variant, cell.arm)
        plain.detection_rows(rows, log, setup.params)
        _image_rows(rows, setup, fed, arm.gan)
        parts.append(rows.table())
    table = pd.concat(parts, ignore_index=True)
    whole = (table["round"] == "") & (table["client"] == "")
    return table[whole & table["metric"].isin({*KEPT, *HARM})].reset_index(drop=True), {}


def _image_rows(rows: tables.Rows, setup: GANSetup, fed: FederatedGAN, gan: str) -> None:
    if gan == "drawing":
        drawing.federation_rows(rows, setup, fed)
    else:
        fedgan_eval.generator_rows(rows, setup, fed)


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    if cell.arm not in ARMS:
        return hospitals.lacks(cohort, p, cell)
    return fedgan_eval.lacks(cohort, p.model_copy(update={"fedgan": federation(p, ARMS[cell.arm].gan)}), cell)


def minus_clean(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows ``<metric>_minus_clean``: the difference to the same GAN's undefended federation without an attack, seed by seed."""
    compared = runs["metric"].isin(["frechet", "downstream_auc", "attack_success"])
    parts = []
    for gan, control in CLEAN.items():
        rows = runs[compared & runs["scenario"].isin([name for name, arm in ARMS.items() if arm.gan == gan])]
        clean = (rows["scenario"] == control) & (rows["variant"] == "none")
        parts.append(tables.minus(rows[~clean], rows[clean], [], "clean"))
    return pd.concat(parts, ignore_index=True)


# What the record runs: the notebook's cells, those of hospitals that differ, and these.
EXPERIMENT = dataclasses.replace(
    hospitals.EXPERIMENT,
    run=run,
    lacks=lacks,
    more={**hospitals.EXPERIMENT.more, **{name: (arm.gan,) for name, arm in ARMS.items()}},
)
