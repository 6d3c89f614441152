"""The record of notebook 05: the whole matrix on more seeds and test images."""

from experiments import record_plans
from experiments.params import Params
from experiments.threat_matrix import cells
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design


def plan(cohort: str, p: Params) -> list[Cell]:
    """The notebook's own cells, seed by seed: a record that is cut short has the whole matrix, on fewer seeds."""
    return sorted(cells.quick(p), key=lambda cell: p.seeds.evaluation.index(cell.seed))


def multiple(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured on two cores."""
    return 0.4 * sum(cells.cost(name) for name in cell.variants)


DESIGN = Design(
    cells.EXPERIMENT, plan, lambda rows, cell: rows, lambda runs, p: cells.summarise(runs), record_plans.cost(multiple)
)
