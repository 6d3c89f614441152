"""Views of notebook 05's summary table: the matrix and its answers. All read a table."""

from collections.abc import Mapping

import pandas as pd

from experiments.threat_matrix import cells as matrix_eval
from experiments.threat_matrix.arms import FAMILIES, ROWS
from experiments.threat_matrix.cells import COLUMNS, PARTS, Column
from experiments.threat_matrix.params import MatrixParams
from medsec.evidence import tables

BETTER, WORSE, ALIKE = "better", "worse", ""


def judged(difference: pd.Series, least: float, *, high_is_bad: bool) -> str:
    """`BETTER` or `WORSE`, if the whole interval of a paired difference lies beyond ``least``."""
    if difference["low"] > least:
        return WORSE if high_is_bad else BETTER
    if difference["high"] < -least:
        return BETTER if high_is_bad else WORSE
    return ALIKE


def against_none(summary: pd.DataFrame, p: MatrixParams, variant: str, column: Column, scenario: str = "") -> str:
    """What a row's cell is beside that of ``none``: see `judged`, `Column.beats_constant`; alike where there is no such pair.

    Args:
        scenario: another one than the column's, in which the same is measured.
    """
    where = {"variant": variant, "scenario": scenario or column.scenario}
    difference = tables.select(summary, {**where, "metric": f"{column.metric}_minus_none"})
    if difference.empty:
        return ALIKE
    word = judged(difference.iloc[0], p.matters[column.metric], high_is_bad=column.high_is_bad)
    if word == BETTER and column.beats_constant:
        constant = tables.row(summary, variant="none", scenario="constant", metric=column.metric)["value"]
        return word if tables.row(summary, **where, metric=column.metric)["low"] > constant else ALIKE
    return word


def grid(summary: pd.DataFrame, p: MatrixParams) -> pd.DataFrame:
    """One line a cell of the matrix, row by row.

    Columns ``variant, column`` (its place in `COLUMNS`), ``value, low, high, n`` (NaN where there is no cell), ``judged``
    (`against_none`), ``why`` (there is no such cell, or only in some of the runs), ``badness``: 0 for the best value of the
    column's scale, 1 for the worst.
    """
    lines, most = [], summary["n"].max()
    for variant in ROWS:
        for place, column in enumerate(COLUMNS):
            where = {"variant": variant, "scenario": column.scenario}
            found = tables.select(summary, {**where, "metric": column.metric})
            line = {"variant": variant, "column": place, "judged": ALIKE, "why": ""}
            if found.empty:
                why = matrix_eval.missing(variant, column.scenario) or NOTHING_RIGHT
                lines.append({**line, "why": why})
                continue
            row = found.iloc[0]
            best, worst = column.scale
            if column.metric == "psnr":
                best = floor(summary)
            line["badness"] = min(1.0, max(0.0, (row["value"] - best) / (worst - best)))
            line["judged"] = against_none(summary, p, variant, column)
            line["why"] = NOTHING_RIGHT if row["n"] < most else ""
            lines.append({**line, **row[["value", "low", "high", "n"]].to_dict()})
    return pd.DataFrame(lines)


def floor(summary: pd.DataFrame) -> float:
    """The PSNR that needs no gradient, in dB: of the mean image of the class."""
    return float(tables.row(summary, variant="none", scenario="prior_only", metric="psnr")["value"])


def rows() -> pd.DataFrame:
    """One line a row of the matrix: its name, what the figure calls it, and what it is made of."""
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


NOTHING_RIGHT = "in a run that is missing, the network calls everything the target class: there is nothing to turn"


def reasons(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that are empty or lack a run, and why: one line a column and reason."""
    empty = cells[cells["why"] != ""]
    lines = []
    for (place, why), part in empty.groupby(["column", "why"], sort=False):
        runs = part["n"].fillna(0).astype(int)
        named = zip(part["variant"], runs, strict=True)
        rows = ", ".join(f"`{variant}`{f' (n = {n})' * (why == NOTHING_RIGHT)}" for variant, n in named)
        lines.append({"column": COLUMNS[place].name, "rows": rows, "why": why})
    return pd.DataFrame(lines)


def message(cells: pd.DataFrame) -> str:
    """The matrix in a sentence: which single defence is better than none against all three threats, somewhere in each.

    Args:
        cells: see `grid`.
    """
    better = cells[(cells["judged"] == BETTER) & ~cells["variant"].isin(FAMILIES["stacks"])]
    threats = {column.threat for column in COLUMNS} - {COLUMNS[0].threat}
    met = better.groupby("variant")["column"].agg(lambda places: {COLUMNS[place].threat for place in places})
    all_three = [ROWS[variant].title for variant in ROWS if variant in met and met[variant] >= threats]
    if not all_three:
        return "No single defence meets all three threats"
    return f"Better against all three threats: {', '.join(all_three)}"


def answer(summary: pd.DataFrame, p: MatrixParams, variant: str, scenario: str, metric: str, digits: int = 2) -> str:
    """A paired difference to ``none`` as text, and what it comes to: "−0.10 [−0.12, −0.08], clearly worse"."""
    difference = tables.row(summary, variant=variant, scenario=scenario, metric=f"{metric}_minus_none")
    column = next((c for c in COLUMNS if (c.scenario, c.metric) == (scenario, metric)), None)
    column = column or next(c for c in COLUMNS if c.metric == metric)
    word = against_none(summary, p, variant, column, scenario)
    told = f"clearly {word}" if word else "no clear difference"
    return f"{tables.interval(difference, digits)}, {told}"


def compared(
    summary: pd.DataFrame, p: MatrixParams, cells: Mapping[str, tuple[str, str]], variants: list[str]
) -> pd.DataFrame:
    """One line a row, one column for every (scenario, metric): value, and the paired difference to ``none`` in words.

    Args:
        cells: title -> (scenario, metric).
        variants: rows of the matrix; what one has not been run in stays empty.
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
    """One line a stack and threat: the stack less the part of it that is made for that threat, and what that comes to."""
    lines = []
    for stack, by_scenario in PARTS.items():
        for scenario, part in by_scenario.items():
            for column in (c for c in COLUMNS if c.scenario == scenario):
                where = {"scenario": scenario, "metric": column.metric}
                least = p.matters[column.metric]
                metric = f"{column.metric}_minus_part"
                found = tables.select(summary, {"variant": stack, "scenario": scenario, "metric": metric})
                if found.empty:
                    continue
                word = judged(found.iloc[0], least, high_is_bad=column.high_is_bad)
                lines.append(
                    {
                        "stack": f"`{stack}`",
                        "threat": column.name,
                        "the part made for it": f"`{part}`: {tables.cell(summary, 2, variant=part, **where)}",
                        "the stack": tables.cell(summary, 2, variant=stack, **where),
                        "stack minus part": tables.interval(found.iloc[0]),
                        "": {BETTER: "better", WORSE: "weaker", ALIKE: "kept, as far as one can see"}[word],
                    }
                )
    return pd.DataFrame(lines)
