"""What a cohort is: images in named, disjoint splits, in canonical order, without exact duplicates."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medsec.core.errors import InputError

__all__ = ["SPLITS", "Cohort", "Split", "canonical", "fingerprint", "tensors"]

SPLITS = ("client", "public", "reference", "val", "test")


@dataclass(frozen=True)
class Split:
    """Images of one split, in canonical order.

    ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64; ``site`` (N,) int64, the index of the hospital; ``lesion``
    and ``lung`` (N, H, W) bool. The last three are None where the cohort has none.

    >>> split = Split(np.full((3, 1, 28, 28), 51, np.uint8), labels=np.array([0, 1, 0]))
    >>> len(split), split.take(split.labels == 0).labels
    (3, array([0, 0]))
    >>> split.float().max()
    np.float32(0.2)
    """

    images: np.ndarray
    labels: np.ndarray
    site: np.ndarray | None = None
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index) -> "Split":
        """The images at ``index`` (integers or a boolean mask), in that order, with all that belongs to them."""
        parts = (self.images, self.labels, self.site, self.lesion, self.lung)
        return Split(*(None if part is None else part[index] for part in parts))

    def float(self) -> np.ndarray:
        """Images as float32 in [0, 1], (N, C, H, W)."""
        return self.images.astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class Cohort:
    """Named, disjoint splits, and where they come from.

    ``fingerprint`` is the sha256 of the content in canonical order, before duplicates are removed; ``removed`` counts
    the exact duplicates taken out of each original split; ``flaws`` are known weaknesses, one sentence each.
    """

    name: str
    splits: dict[str, Split]
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    fingerprint: str
    source: str
    licence: str
    flaws: tuple[str, ...]
    removed: dict[str, int]

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise InputError(f"cohort {self.name} has no split {split!r}: choose one of {', '.join(self.splits)}")
        return self.splits[split]

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self["client"].images.shape[1]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self["client"].images.shape[2]


def canonical(split: Split) -> Split:
    """The same images sorted by (label, image bytes): the order in which a file lists them plays no part."""
    rows = np.ascontiguousarray(split.images).reshape(len(split), -1)
    order = np.argsort(rows.view(f"V{rows.shape[1]}").ravel(), kind="stable")
    return split.take(order[np.argsort(split.labels[order], kind="stable")])


def fingerprint(splits: Mapping[str, Split]) -> str:
    """sha256 over name, shape, labels and images of every split; give splits in canonical order."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name} {split.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(split.labels, "<i8"))
        digest.update(np.ascontiguousarray(split.images))
    return digest.hexdigest()


def deduplicate(splits: dict[str, Split]) -> tuple[dict[str, Split], dict[str, int]]:
    """Splits without exact duplicates, and how many images each one lost.

    Of equal images the one in the latest split stays (train < val < test), within a split the first. An image that one
    split lists under two labels is removed altogether.
    """
    kept, removed, later = {}, {}, set()
    for name in reversed(splits):
        split = splits[name]
        keys = [hashlib.sha256(image).digest() for image in np.ascontiguousarray(split.images)]
        labels, first = {}, {}
        for i, (key, label) in enumerate(zip(keys, split.labels.tolist(), strict=True)):
            first.setdefault(key, i)
            labels.setdefault(key, set()).add(label)
        keep = [i for key, i in first.items() if key not in later and len(labels[key]) == 1]
        kept[name], removed[name] = split.take(np.array(keep, np.int64)), len(split) - len(keep)
        later.update(keys)
    return {name: kept[name] for name in splits}, {name: removed[name] for name in splits}


def check_classes(splits: Mapping[str, Split], classes: tuple[str, ...], where: str) -> None:
    """`InputError`, which begins with ``where`` and names all gaps, unless every split has images of every class."""
    lacking = [f"split {name} is empty; every split needs images" for name, split in splits.items() if not len(split)]
    for name, split in splits.items():
        missing = [text for k, text in enumerate(classes) if len(split) and not (split.labels == k).any()]
        lacking += [f"class {text} is missing from split {name} ({len(split)} images)" for text in missing]
    if lacking:
        raise InputError(f"{where}: {'; '.join(lacking)}; add some")


def setting(cohort: Cohort, split: str) -> str:
    """The parameter that says how many images a split has."""
    section = cohort.name if cohort.name in ("phantom", "fundus", "npz", "folder") else "medmnist"
    return f"cohorts.{section}.{'images' if section in ('phantom', 'fundus') else 'shares'}.{split}"


def check_size(cohort: str, size: int) -> int:
    """``size`` (pixels a side), or an `InputError`: the networks halve an image twice."""
    if size % 4 or not 28 <= size <= 224:
        raise InputError(f"size {size} of cohort {cohort} must be 28 to 224 and a multiple of 4")
    return size


def tensors(cohort: Cohort, device=None) -> dict:
    """Every split as tensors: name -> (images (N, C, H, W) float32 in [0, 1], labels (N,) int64), on ``device``."""
    from torch import from_numpy  # here: describing a cohort needs no torch

    pairs = {name: (split.float(), split.labels) for name, split in cohort.splits.items()}
    return {name: (from_numpy(x).to(device), from_numpy(y).to(device)) for name, (x, y) in pairs.items()}
