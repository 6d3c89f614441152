"""All experiments and the designs of their records, by the name of the notebook."""

from experiments.adversarial_pruning_defense import record as evasion
from experiments.backdoor_fedgan import record as backdoor
from experiments.data_and_threats import cells as cohort
from experiments.feddetect import record as feddetect
from experiments.gia_defense import record as inversion
from experiments.threat_matrix import cells as matrix
from medsec.evidence.cells import Experiment
from medsec.evidence.record import Design

DESIGNS: dict[str, Design] = {
    design.experiment.name: design for design in (backdoor.DESIGN, feddetect.DESIGN, inversion.DESIGN, evasion.DESIGN)
}
EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (cohort.EXPERIMENT, *(design.experiment for design in DESIGNS.values()), matrix.EXPERIMENT)
}
