"""All experiments, what their notebooks run of them, and the designs of their records, by the name of the notebook."""

from collections.abc import Callable

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells as evasion_cells
from experiments.adversarial_pruning_defense import record as evasion
from experiments.backdoor_fedgan import cells as backdoor_cells
from experiments.backdoor_fedgan import record as backdoor
from experiments.data_and_threats import cells as cohort
from experiments.feddetect import cells as feddetect_cells
from experiments.feddetect import record as feddetect
from experiments.gia_defense import cells as inversion_cells
from experiments.gia_defense import record as inversion
from experiments.params import Params
from experiments.threat_matrix import cells as matrix_cells
from experiments.threat_matrix import record as matrix
from medsec import data
from medsec.evidence.cells import Cell, Experiment
from medsec.evidence.record import Design

DESIGNS: dict[str, Design] = {
    design.experiment.name: design
    for design in (backdoor.DESIGN, feddetect.DESIGN, inversion.DESIGN, evasion.DESIGN, matrix.DESIGN)
}
EXPERIMENTS: dict[str, Experiment] = {
    each.name: each for each in (cohort.EXPERIMENT, *(design.experiment for design in DESIGNS.values()))
}
# What the notebooks run, those with the longest cells first.
QUICK: dict[str, Callable[[Params, data.Cohort], list[Cell]]] = {
    matrix.DESIGN.experiment.name: lambda p, cohort: matrix_cells.quick(p),
    feddetect.DESIGN.experiment.name: lambda p, cohort: feddetect_cells.quick(p),
    backdoor.DESIGN.experiment.name: lambda p, cohort: backdoor_cells.quick(p),
    inversion.DESIGN.experiment.name: lambda p, cohort: inversion_cells.quick(p),
    evasion.DESIGN.experiment.name: lambda p, cohort: evasion_cells.quick(p, evasion_arms.QUICK),
    cohort.EXPERIMENT.name: cohort.quick,
}
