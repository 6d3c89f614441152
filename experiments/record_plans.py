"""What the records of several notebooks have in common."""

from collections.abc import Callable, Iterable

from experiments.data_and_threats import cells as cohort_cells
from experiments.params import Params
from medsec import data
from medsec.core.errors import InputError
from medsec.core.params import registered
from medsec.evidence.cells import Cell

SWEPT = ("phantom", "pneumoniamnist")
GUESS = 25.0  # seconds of a federation of GANs; what a cell costs that was never run is guessed as a multiple


def headline_only(cohort: str) -> bool:
    """Whether a record has the headline on every evaluation seed and no sweeps, in notebooks 03 and 04 with fewer attacks.

    So it is for all images but the chest radiographs that the companion is about: a second modality, and the reader's own.
    """
    return cohort not in SWEPT


def allowed(cohort: str, p: Params, schemes: list[str]) -> list[str]:
    """Those schemes of dividing images over clients that the cohort allows."""
    known = cohort_cells.schemes(data.load(cohort, p.cohorts))
    return [scheme for scheme in schemes if scheme in known]


def check_names(names: list[str], known: Iterable[str], where: str) -> None:
    """Raises InputError unless all ``names``, which stand at ``where`` in the parameters, are known: before anything is run."""
    try:
        registered(names, list(known), "such name")
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def other_modality(p: Params, section: str) -> dict:
    """What a cell of another modality changes in one section of the parameters."""
    return {section: p.record.other_modality.change[section]}


def cost(multiple: Callable[[Params, Cell], float]) -> Callable[[Params, Cell], float]:
    """Seconds of a cell from how many federations of GANs it is worth."""
    return lambda p, cell: GUESS * multiple(p, cell)
