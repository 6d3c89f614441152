"""Cohorts: load and describe them, and deal a split to clients."""

from medsec.data.cohort import SPLITS, Cohort, Split, canonical, fingerprint, tensors
from medsec.data.medmnist import OFFICIAL
from medsec.data.partitions import partition
from medsec.data.sources import SOURCES, describe, generate, load

__all__ = [
    "OFFICIAL",
    "SOURCES",
    "SPLITS",
    "Cohort",
    "Split",
    "canonical",
    "describe",
    "fingerprint",
    "generate",
    "load",
    "partition",
    "tensors",
]
