"""Cohorts: load and describe them, and deal a split to clients."""

from medsec.data.cohort import SPLITS, Cohort, Split, canonical, fingerprint
from medsec.data.medmnist import OFFICIAL
from medsec.data.partitions import partition
from medsec.data.sources import describe, generate, load

__all__ = [
    "OFFICIAL",
    "SPLITS",
    "Cohort",
    "Split",
    "canonical",
    "describe",
    "fingerprint",
    "generate",
    "load",
    "partition",
]
