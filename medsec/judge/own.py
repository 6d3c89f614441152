"""Notebooks on images of one's own: a smaller notebook 04, how long it takes, and the claims that its table can judge."""

import time
from collections import Counter

import pandas as pd
import torch

from medsec.core.errors import InputError
from medsec.core.settings import Recipe
from medsec.data import Cohort
from medsec.evasion import training
from medsec.evidence import claims, tables
from medsec.evidence.claims import FAILS, HOLDS, NOT_HERE, NOT_YET, OPEN, UNTESTED
from medsec.judge import COLUMNS, Report, row

__all__: list[str] = []  # for the command

TRAINS = "04_adversarial_pruning_defense"  # the notebook that trains many networks, where none lies ready
TRAINED_ON = ("client", "public", "reference")
AT_EASE = 500  # training images of 32 pixels a side for which the usual epochs take about two minutes of a processor
FEWER = {  # of notebook 04: images that are attacked, and those of the checks
    "test_images": 80,
    "checks": {"images": 24, "more_steps": 60, "planted": 8},
}
EPOCHS = {"clean": (8, 3), "hardened": (30, 6), "at_ramp": (40, 8)}  # recipe -> the usual epochs, and the least
# Of a seed's networks over the images, forth and back, at the usual epochs.
PASSES = {"clean": 46, "hardened": 99, "at_ramp": 120}
ATTACKED = 150.0  # and what all attacks of a seed cost, in passes over 500 images


def smaller(notebook: str, cohort: Cohort) -> dict:
    """What of the parameters is smaller for a cohort without trained networks; {} for every other notebook.

    Many images are seen in fewer epochs: a network then takes about as many steps as on `AT_EASE` images.
    """
    if notebook != TRAINS:
        return {}
    fewer = min(1.0, AT_EASE / _load(cohort))
    recipes = {name: {"epochs": max(least, round(usual * fewer))} for name, (usual, least) in EPOCHS.items()}
    return {"at_ramp": recipes.pop("at_ramp"), "evasion": FEWER | recipes}


def epochs(change: dict) -> dict[str, int]:
    """How many passes over the images each recipe has, by its name, of parameters that hold what `smaller` gives."""
    recipes = change["evasion"] | {"at_ramp": change["at_ramp"]}
    return {name: recipes[name]["epochs"] for name in EPOCHS}


def _load(cohort: Cohort) -> float:
    """Training images, each counted by its pixels, in units of one of 32 a side."""
    return sum(len(cohort[split]) for split in TRAINED_ON) * (cohort.size / 32) ** 2


def seconds(cohort: Cohort, change: dict, recipe: Recipe, seeds: int) -> float:
    """About how long notebook 04 keeps one processor busy here, by the time of one pass over a few images like these.

    Args:
        change: see `smaller`.
        recipe: of plain training, section ``evasion.clean``.
        seeds: how many there are.
    """
    n = 256
    x = torch.rand(n, cohort.channels, cohort.size, cohort.size, generator=torch.Generator().manual_seed(0))
    y, model = torch.arange(n) % cohort.n_classes, training.new(cohort.channels, cohort.n_classes, seed=0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training.fit(model, x, y, recipe, seed=0, epochs=1, lr=recipe.lr)  # the first is slower
        begin = time.process_time()
        training.fit(model, x, y, recipe, seed=0, epochs=1, lr=recipe.lr)
        one = (time.process_time() - begin) / n
    finally:
        torch.set_num_threads(before)
    images = sum(len(cohort[split]) for split in TRAINED_ON)
    passes = sum(PASSES[name] * found / EPOCHS[name][0] for name, found in epochs(change).items())
    return seeds * one * (passes * images + ATTACKED * AT_EASE)


WORDS = {HOLDS: "holds", FAILS: "does not hold", OPEN: "undecided", UNTESTED: "untested"}
MANY = {"holds": "hold", "does not hold": "do not hold"}


def summary(notebook: str, table: pd.DataFrame, cohort: str) -> Report | None:
    """The claims of a notebook on its table (`medsec.evidence.tables.read`); None if no claim is made of that notebook.

    A claim whose row the table lacks is counted by the reason, and not listed.
    """
    ledgers = [name for name in claims.names() if claims.load(name)["table"] == notebook]
    rows, lacking = [], Counter()
    for claim in (each for name in ledgers for each in claims.load(name)["claims"]):
        try:
            found = claims.verdict(claim, table, cohort)
        except InputError:  # the row is not there, and no reason is known
            found = {"verdict": NOT_HERE, "measured": "nothing was measured on these images"}
        if found["verdict"] in (NOT_HERE, NOT_YET):
            lacking[found["measured"]] += 1
            continue
        at = tables.row(table, **claim["where"])
        side = f"> {claim['above']:g}" if "above" in claim else f"< {claim['below']:g}"
        note = f"bound: {side}; {'ours' if claim['by'] == 'medsec' else 'of the paper'}"
        numbers = at["value"], at["low"], at["high"], int(at["n"])
        rows.append(row(WORDS[found["verdict"]], claim["text"], *numbers, note=note))
    if not rows and not lacking:
        return None
    rows.sort(key=lambda each: list(WORDS.values()).index(each["part"]))
    counts = Counter(each["part"] for each in rows)
    told = ", ".join(f"{counts[w]} {MANY.get(w, w) if counts[w] > 1 else w}" for w in WORDS.values() if counts[w])
    verdict = f"Of {len(rows) + sum(lacking.values())} claims {len(rows)} can be judged on these images: {told}."
    return Report(
        f"Verdicts of {notebook} on cohort {cohort}",
        verdict
        if rows
        else f"None of the {sum(lacking.values())} claims of this notebook can be judged on these images.",
        pd.DataFrame(rows, columns=COLUMNS),
        REMARKS,
        [f"{n} claim{'s' * (n > 1)} cannot be judged here: {why}." for why, n in lacking.most_common()]
        + list(NOT_SAID),
    )


REMARKS = (
    "“holds”: the whole interval over the runs lies beyond the bound. “does not hold”: on its other side. Else, and with fewer "
    "than three runs, it is undecided. “untested”: another claim that it rests on does not hold here. n: runs.",
    "With few runs and few images much stays undecided: look at the interval, not at the word alone.",
)
NOT_SAID = (
    "The claims are what the papers say of their images, and what we say of ours. That one does not hold here is no mistake.",
    "That a defence holds here does not make a clinical system safe.",
)
