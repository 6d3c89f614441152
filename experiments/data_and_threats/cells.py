"""What notebook 00 counts and measures on a cohort: its splits, its division over clients, the shift between hospitals."""

import itertools

import numpy as np
import pandas as pd
import torch

from experiments.params import Params
from medsec import data
from medsec.core.seeds import derive_seed
from medsec.evidence import cells, tables
from medsec.nets import fit as classifier

KEYS = ("split", "label", "client", "train_site", "test_site")


def _row(variant: str, metric: str, value: float, n_items: int, seed: int = 0, **keys) -> dict:
    return tables.run_row(KEYS, seed, variant, "data", metric, value, n_items, **keys)


def count_rows(cohort: data.Cohort) -> list[dict]:
    """Images of every split and class, and exact duplicates removed from each original split."""
    rows = []
    for split, part in cohort.splits.items():
        for label, name in enumerate(cohort.classes):
            n = int((part.labels == label).sum())
            rows.append(_row("cohort", "images", n, n, split=split, label=name))
    for split, n in cohort.removed.items():
        rows.append(_row("cohort", "duplicates_removed", n, n, split=split))
    return rows


def schemes(cohort: data.Cohort) -> list[str]:
    """The partitions that a cohort allows; by hospital style only where hospitals are known."""
    return ["iid", "dirichlet"] + (["style"] if cohort.sites else [])


def partition_counts(cohort: data.Cohort, params: Params, scheme: str, seed: int) -> pd.DataFrame:
    """Images of each class (columns) that each client (rows) holds."""
    p, split = params.threats, cohort["client"]
    parts = data.partition(
        split.labels, p.n_clients, scheme, seed=derive_seed(seed, "partition"), site=split.site, alpha=p.dirichlet_alpha
    )
    counts = [np.bincount(split.labels[part], minlength=cohort.n_classes) for part in parts]
    return pd.DataFrame(counts, columns=list(cohort.classes))


def partition_rows(cohort: data.Cohort, params: Params) -> list[dict]:
    """Share of every class at every client, for each partition and evaluation seed."""
    rows = []
    for scheme, seed in itertools.product(schemes(cohort), params.seeds.evaluation):
        for client, held in enumerate(partition_counts(cohort, params, scheme, seed).to_numpy()):
            n = int(held.sum())
            for label, share in zip(cohort.classes, held / held.sum(), strict=True):
                rows.append(_row(scheme, "label_share", share, n, seed, client=client, label=label))
    return rows


def shift_rows(name: str, params: Params, seed: int, site: int) -> list[dict]:
    """Train a classifier on one hospital's clients' images, and test it on every hospital's ``reference`` images.

    Args:
        name: of a cohort with sites.
        params: sections ``threats`` and ``classifier``.
        seed: of the run.
        site: index of the hospital that trains.

    Returns:
        Rows ``style_shift``: balanced accuracy.
    """
    torch.set_num_threads(1)  # one and two threads give different bits
    p, cohort = params.threats, data.load(name, params.cohorts)
    own, own_seed = own_images(cohort, params, seed, site), derive_seed(seed, "shift", site)
    x, y = torch.from_numpy(own.float()), torch.from_numpy(own.labels)
    model = classifier.fit(x, y, cohort.n_classes, params.classifier, epochs=p.shift_epochs, seed=own_seed)
    rows = []
    for other, letter in enumerate(cohort.sites):
        held = cohort["reference"].take(cohort["reference"].site == other)
        predictions = classifier.predict(model, torch.from_numpy(held.float()))
        value = classifier.balanced_accuracy(predictions, torch.from_numpy(held.labels))
        keys = {"train_site": cohort.sites[site], "test_site": letter}
        rows.append(_row("classifier", "style_shift", value, len(held), seed, **keys))
    return rows


def own_images(cohort: data.Cohort, params: Params, seed: int, site: int) -> data.Split:
    """A random choice of a hospital's images in the split ``client``."""
    own = cohort["client"].take(cohort["client"].site == site)
    return own.take(
        np.random.default_rng(derive_seed(seed, "shift", site)).permutation(len(own))[: params.threats.shift_images]
    )


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: a classifier of one hospital, tested on all."""
    return pd.DataFrame(shift_rows(cohort, p, cell.seed, cell.keys["site"])), {}


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What a hospital lacks for one cell (`medsec.evidence.cells.Experiment`)."""
    site, labels = cell.keys["site"], own_images(cohort, p, cell.seed, cell.keys["site"]).labels
    missing = [name for k, name in enumerate(cohort.classes) if not (labels == k).any()]
    found = [f"hospital {cohort.sites[site]} has no image of class {name} in split client" for name in missing]
    if not (cohort["reference"].site == site).any():
        found.append(f"hospital {cohort.sites[site]} has no image in split reference")
    return [f"{line}; add images, or leave out the column site" for line in found]


EXPERIMENT = cells.Experiment("00_data_and_threats", 1, ("threats", "classifier"), run, lacks=lacks)


def quick(p: Params, cohort: data.Cohort) -> list[cells.Cell]:
    """What the notebook trains: nothing for a cohort without hospitals."""
    sites = range(len(cohort.sites))
    return [cells.Cell("shift", seed, keys={"site": site}) for seed in p.seeds.evaluation for site in sites]
