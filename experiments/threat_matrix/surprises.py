"""Surprising cells of notebook 05's matrix, and our readings of some of them (``claims/matrix-readings.yaml``).

A cell is surprising if a defence has an effect that it was not made for, or lacks the effect that it was made for.
"""

from typing import Literal

import pandas as pd

from experiments.threat_matrix import arms
from experiments.threat_matrix.cells import COLUMNS
from experiments.threat_matrix.tables import ALIKE, BETTER, WORSE
from medsec.core import files, paths
from medsec.core.errors import InputError
from medsec.core.params import Section, validated
from medsec.evidence import tables

MADE_FOR = {"server": {"boost_liar", "backdoor"}, "images": {"adaptive"}, "network": {"pgd20"}}  # place -> scenarios
EFFECTS = {  # (made for it, difference to no defence) -> effect
    (False, BETTER): "helps",
    (False, WORSE): "harms",
    (True, ALIKE): "fails",
    (True, WORSE): "fails",
}


def made_for(variant: str) -> set[str]:
    """The scenarios that the parts of a row are made for; none for a control."""
    row = arms.row(variant)
    if "control" in row.title:
        return set()
    network = row.trained_against or row.prune != "no" or row.cbam
    parts = {"server": row.server != "mean", "images": {row.images, row.gradient} != {"none"}, "network": network}
    return set().union(*(MADE_FOR[part] for part, there in parts.items() if there))


def side_effects(cells: pd.DataFrame) -> pd.DataFrame:
    """The surprising cells of `tables.grid`, with a column ``effect``, see `EFFECTS`."""
    cells = cells[cells["value"].notna() & cells["tested"] & (cells["variant"] != "none")]
    effects = [
        EFFECTS.get((COLUMNS[place].scenario in made_for(variant), judged), "")
        for variant, place, judged in zip(cells["variant"], cells["column"], cells["judged"], strict=True)
    ]
    return cells.assign(effect=effects).query("effect != ''")


def table(summary: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """One line a column of the matrix and effect: the rows that have it, each with its paired difference to ``none``."""
    lines = []
    for (place, effect), part in effects.groupby(["column", "effect"]):
        column = COLUMNS[place]
        where = {"scenario": column.scenario, "metric": f"{column.metric}_minus_none"}
        rows = [f"`{variant}` {tables.cell(summary, 2, variant=variant, **where)}" for variant in part["variant"]]
        lines.append({"column": column.label, "effect": effect, "rows, minus none": "; ".join(rows)})
    return pd.DataFrame(lines, columns=["column", "effect", "rows, minus none"])


class Reading(Section):
    rows: list[str]
    scenario: str
    metric: str
    effect: Literal["helps", "harms", "fails"]
    text: str


class Readings(Section):
    readings: list[Reading]


def ledger() -> list[dict]:
    """Our readings: ``rows``, ``scenario`` and ``metric`` of the cells that each is about, their ``effect``, and ``text``."""
    file = paths.CLAIMS / "matrix-readings.yaml"
    found = files.read_yaml(file)
    validated(Readings, {"readings": found}, file.name)
    known = {(column.scenario, column.metric) for column in COLUMNS}
    if strange := [each for each in found if (each["scenario"], each["metric"]) not in known]:
        raise InputError(f"{file.name}: no column of the matrix has {strange[0]['scenario']}, {strange[0]['metric']}")
    return found


def readings(effects: pd.DataFrame) -> str:
    """Markdown: each reading that fits cells of `side_effects`, after the names of their rows; the others are left out."""
    paragraphs = []
    for each in ledger():
        place, column = next(
            (i, c) for i, c in enumerate(COLUMNS) if (c.scenario, c.metric) == (each["scenario"], each["metric"])
        )
        fits = effects[(effects["column"] == place) & (effects["effect"] == each["effect"])]
        if named := [f"`{variant}`" for variant in fits["variant"] if variant in each["rows"]]:
            paragraphs.append(f"**{column.label}, {each['effect']}: {', '.join(named)}.** {each['text']}")
    return "\n\n".join(paragraphs)
