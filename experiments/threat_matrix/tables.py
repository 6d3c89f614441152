"""Views of notebook 05's summary table: the matrix and its answers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments.params.threat_matrix import MatrixParams
from experiments.threat_matrix.arms import FAMILIES, ROWS, families
from experiments.threat_matrix.arms import row as named_row
from experiments.threat_matrix.cells import COLUMNS, PARTS, Column, missing
from medsec.evidence import tables

BETTER, WORSE, ALIKE = "better", "worse", ""
NOTHING_RIGHT = "in a run that is missing, the network calls everything the target class: there is nothing to turn"


def judged(difference: pd.Series, least: float, *, high_is_bad: bool) -> str:
    """`BETTER` or `WORSE` if the whole interval of a paired difference lies beyond ``least``, otherwise `ALIKE`."""
    if difference["low"] > least:
        return WORSE if high_is_bad else BETTER
    if difference["high"] < -least:
        return BETTER if high_is_bad else WORSE
    return ALIKE


def works(summary: pd.DataFrame, p: MatrixParams, column: Column) -> bool:
    """Whether the attack of a column does anything where nobody defends; without that no row can show that it helps.

    Shown by `Column.works`: the whole interval lies beyond what matters (`judged`). True where nobody attacks.
    """
    if column.works is None:
        return True
    scenario, metric = column.works
    found = tables.select(summary, {"variant": "none", "scenario": scenario, "metric": metric, "round": ""})
    least, worse = p.matters[column.metric], column.high_is_bad
    return len(found) > 0 and judged(found.iloc[0], least, high_is_bad=worse) == WORSE


def against_none(summary: pd.DataFrame, p: MatrixParams, variant: str, column: Column, scenario: str = "") -> str:
    """A row's cell compared with that of ``none``: see `judged` and `Column.beats_constant`.

    `ALIKE` without such a pair. Never `BETTER` where there is nothing to help against (`works`); harm may show.

    Args:
        scenario: another one than the column's.
    """
    where = {"variant": variant, "scenario": scenario or column.scenario}
    difference = tables.select(summary, {**where, "metric": f"{column.metric}_minus_none"})
    if difference.empty:
        return ALIKE
    word = judged(difference.iloc[0], p.matters[column.metric], high_is_bad=column.high_is_bad)
    if word == BETTER and not works(summary, p, column):
        return ALIKE
    if word == BETTER and column.beats_constant:
        constant = tables.row(summary, variant="none", scenario="constant", metric=column.metric)["value"]
        return word if tables.row(summary, **where, metric=column.metric)["low"] > constant else ALIKE
    return word


def grid(summary: pd.DataFrame, p: MatrixParams) -> pd.DataFrame:
    """One line a cell of the matrix, row by row.

    Columns ``variant, column`` (its place in `COLUMNS`), ``value, low, high, n`` (NaN in an empty cell), ``judged``
    (`against_none`), ``why`` (the cell is empty, or lacks some of the runs), ``badness``: 0 for the best value of the column's
    scale, 1 for the worst; ``tested``: there is something to help against, or the row does harm.
    """
    named = [v for group in families(summary["variant"]).values() for v in group]
    places = [(v, i, c.scenario, c.metric) for v in named for i, c in enumerate(COLUMNS)]
    cells = pd.DataFrame(places, columns=["variant", "column", "scenario", "metric"])
    values = tables.without_keys(summary).set_index(["variant", "scenario", "metric"])[["value", "low", "high", "n"]]
    cells = cells.join(values, on=["variant", "scenario", "metric"])
    cells["judged"] = [
        against_none(summary, p, v, COLUMNS[i]) for v, i in zip(cells["variant"], cells["column"], strict=True)
    ]
    absent = [missing(v, s) or NOTHING_RIGHT for v, s in zip(cells["variant"], cells["scenario"], strict=True)]
    cells["why"] = np.where(cells["n"] == summary["n"].max(), "", absent)
    effective = [works(summary, p, column) for column in COLUMNS]
    cells["tested"] = cells["column"].map(effective.__getitem__) | (cells["judged"] == WORSE)
    best, worst = np.array([COLUMNS[i].scale for i in cells["column"]]).T
    best[cells["metric"] == "psnr"] = floor(summary)
    cells["badness"] = ((cells["value"] - best) / (worst - best)).clip(0.0, 1.0)
    return cells.drop(columns=["scenario", "metric"])


def floor(summary: pd.DataFrame) -> float:
    """The PSNR in dB of the mean image of the class, which needs no gradient."""
    return float(tables.row(summary, variant="none", scenario="prior_only", metric="psnr")["value"])


def size(summary: pd.DataFrame) -> str:
    """``5 seeds, each with 8 images for inversion and 624 for evasion``: on how much a matrix rests."""
    cells = [("naive", "retrieval"), ("pgd20", "balanced_accuracy")]
    found = [tables.row(summary, variant="none", scenario=s, metric=m, round="") for s, m in cells]
    images = [round(row["n_items"] / row["n"]) for row in found]
    return f"{found[1]['n']} seeds, each with {images[0]} images for inversion and {images[1]} for evasion"


def rows() -> pd.DataFrame:
    """One line a row of the matrix: its name, its title in the figure, and its parts."""
    lines = []
    for variant, row in ROWS.items():
        parts = {
            "server": "" if row.server == "mean" else row.server,
            "images of the clients": "" if row.images == "none" else row.images,
            "trained against attacks": "yes" * row.trained_against,
            "pruned weights": {"no": "", "small": "the smallest", "random": "at random"}[row.prune],
            "attention": "yes" * row.cbam,
        }
        lines.append({"row": f"`{variant}`", "in the figure": row.title, **parts})
    return pd.DataFrame(lines)


def reasons(cells: pd.DataFrame) -> pd.DataFrame:
    """Why cells are empty or lack a run: one line a column and reason."""
    lines = []
    for (place, why), part in cells[cells["why"] != ""].groupby(["column", "why"], sort=False):
        runs = [f" (n = {n:.0f})" if why == NOTHING_RIGHT else "" for n in part["n"].fillna(0)]
        named = ", ".join(f"`{variant}`{n}" for variant, n in zip(part["variant"], runs, strict=True))
        lines.append({"column": COLUMNS[place].name, "rows": named, "why": why})
    return pd.DataFrame(lines)


def better(cells: pd.DataFrame, scenario: str, metric: str) -> set[str]:
    """The rows of `grid` that are better than no defence in one column."""
    column = next(i for i, c in enumerate(COLUMNS) if (c.scenario, c.metric) == (scenario, metric))
    return set(cells.loc[(cells["column"] == column) & (cells["judged"] == BETTER), "variant"])


def message(cells: pd.DataFrame) -> str:
    """The matrix in a sentence: which defences, and which stacks, are better than none against every threat."""
    decisive = {place for place, column in enumerate(COLUMNS) if column.decides}
    better = cells[(cells["judged"] == BETTER) & cells["column"].isin(decisive)]
    threats = {column.threat for column in COLUMNS} - {COLUMNS[0].threat}
    met = better.groupby("variant")["column"].agg(lambda places: {COLUMNS[place].threat for place in places})
    all_three = [v for v in dict.fromkeys(cells["variant"]) if v in met and met[v] >= threats]
    single = ", ".join(named_row(v).title for v in all_three if v not in FAMILIES["stacks"])
    stacked = ", ".join(named_row(v).title for v in all_three if v in FAMILIES["stacks"])
    first = f"Better against all three threats: {single}" if single else "No single defence meets all three threats"
    return f"{first}; of the stacks: {stacked or 'none'}"


def answer(summary: pd.DataFrame, p: MatrixParams, variant: str, scenario: str, metric: str, digits: int = 2) -> str:
    """A paired difference to ``none`` in words: "−0.10 [−0.12, −0.08], clearly worse"."""
    difference = tables.row(summary, variant=variant, scenario=scenario, metric=f"{metric}_minus_none")
    column = max((c for c in COLUMNS if c.metric == metric), key=lambda c: c.scenario == scenario)
    word = against_none(summary, p, variant, column, scenario)
    return f"{tables.interval(difference, digits)}, {f'clearly {word}' if word else 'no clear difference'}"


def compared(
    summary: pd.DataFrame, p: MatrixParams, cells: Mapping[str, tuple[str, str]], variants: list[str]
) -> pd.DataFrame:
    """One line a row; for each cell its value and, where there is one, the paired difference to ``none`` in words.

    Args:
        cells: title -> (scenario, metric).
    """
    lines = []
    for variant in variants:
        line = {"row": f"`{variant}`"}
        for title, (scenario, metric) in cells.items():
            digits = 1 if metric == "psnr" else 2
            where = {"variant": variant, "scenario": scenario}
            value = tables.cell(summary, digits, **where, metric=metric)
            line[title] = value or "n/a"
            if value and not tables.select(summary, {**where, "metric": f"{metric}_minus_none"}).empty:
                line[f"{title}, minus none"] = answer(summary, p, variant, scenario, metric, digits)
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def stacking(summary: pd.DataFrame, p: MatrixParams) -> pd.DataFrame:
    """One line a stack and threat: the stack compared with the part of it that is made for that threat."""
    parts = [(stack, *pair) for stack, by_scenario in PARTS.items() for pair in by_scenario.items()]
    lines = []
    for stack, part, column in [(s, part, c) for s, scenario, part in parts for c in COLUMNS if c.scenario == scenario]:
        where = {"scenario": column.scenario, "metric": column.metric}
        change = tables.select(summary, {**where, "variant": stack, "metric": f"{column.metric}_minus_part"})
        if change.empty:
            continue
        word = judged(change.iloc[0], p.matters[column.metric], high_is_bad=column.high_is_bad)
        lines.append(
            {
                "stack": f"`{stack}`",
                "threat": column.name,
                "the part made for it": f"`{part}`: {tables.cell(summary, 2, variant=part, **where)}",
                "the stack": tables.cell(summary, 2, variant=stack, **where),
                "stack minus part": tables.interval(change.iloc[0]),
                "": {BETTER: "better", WORSE: "weaker", ALIKE: "kept, as far as one can see"}[word],
            }
        )
    return pd.DataFrame(lines)
