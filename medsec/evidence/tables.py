"""Reading, writing and addressing the tidy tables."""

import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import pandas as pd

from medsec.core import files, paths
from medsec.core.errors import InputError
from medsec.core.params import NotNegative, Section, validated
from medsec.evidence.intervals import bootstrap_interval, two_level_interval

__all__ = [
    "Rows",
    "cell",
    "counted",
    "headline",
    "interval",
    "markdown",
    "metrics",
    "minus",
    "read",
    "row",
    "select",
    "summarise",
    "wide",
    "without_keys",
    "write",
    "write_metrics",
]

FIXED = ("variant", "scenario", "metric", "value")  # columns of every table of metrics
UNFOLDED = 12  # rows of a table that a reader takes in
MEASURES = ("value", "low", "high", "sd", "n", "n_items", "unit", "seed", "base")


class Metric(Section):
    """``items``: of a share, whether all runs count the same items or each its own (see `two_level_interval`)."""

    unit: str
    tolerance: NotNegative
    items: Literal["same", "own"] | None = None


class Metrics(Section):
    metrics: dict[str, Metric]


def metrics(names: Iterable[str] = ()) -> dict[str, dict]:
    """Every metric of ``claims/metrics.yaml`` with its ``unit`` and ``tolerance``.

    Raises:
        InputError: one of ``names`` has no entry.
    """
    known = _metrics(paths.CLAIMS / "metrics.yaml")
    if unknown := sorted(set(names) - known.keys()):
        raise InputError(f"claims/metrics.yaml has no entry for {unknown[0]!r}; add its unit and its tolerance")
    return known


@functools.cache
def _metrics(file: Path) -> dict[str, dict]:
    tree = files.read_yaml(file)
    validated(Metrics, {"metrics": tree}, file.name)
    return tree


def run_row(
    keys: Sequence[str], seed: int, variant: str, scenario: str, metric: str, value: float, n_items: int, **cells
) -> dict:
    """One row of a runs table; the key columns ``keys`` that ``cells`` does not name are empty."""
    if unknown := set(cells) - set(keys):
        raise KeyError(f"{sorted(unknown)[0]!r} is no key column; they are {', '.join(keys)}")
    fixed = {"seed": seed, "variant": variant, "scenario": scenario, "metric": metric, "value": float(value)}
    own = {key: str(cells.get(key, "")) for key in keys}
    return {**fixed, "n_items": n_items, "unit": metrics([metric])[metric]["unit"], **own}


class Rows:
    """Collects the rows of one seed of one variant in one scenario."""

    def __init__(self, keys: Sequence[str], seed: int, variant: str, scenario: str):
        self.keys, self.fixed = keys, (seed, variant, scenario)
        self.rows: list[dict] = []

    def add(self, metric: str, value: float, n_items: int, **cells: int | str) -> None:
        self.rows.append(run_row(self.keys, *self.fixed, metric, value, n_items, **cells))

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


def write(table: pd.DataFrame, file: Path) -> None:
    """Write a table as CSV with six significant digits, packed if the name ends in .gz; complete or not at all."""
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    inside = file.with_suffix(".partial").name  # of the packed file, as in all records so far: the same bytes again
    files.write(file, files.packed(text, inside) if file.suffix == ".gz" else text)


def read(file: Path) -> pd.DataFrame:
    """Read a table that `write` wrote; key columns are text, and empty where a row has no such key.

    Raises:
        InputError: the file is missing or no table, or of a table of metrics some column is missing.
    """
    if not file.exists():
        raise InputError(f"{file.name} is missing from {file.parent.name}; make it with: make repro")
    text = files.read_text(file)
    try:
        return parse(io.StringIO(text))
    except (ValueError, OverflowError) as error:
        said = str(error).strip().split("\n")[0]
        raise InputError(f"{file.name} is no table: {said}; {files.restore(file)}") from None


def parse(source: TextIO) -> pd.DataFrame:
    """A table from CSV; numbers are the float64 values that were written, to the bit.

    Raises:
        ValueError: a column of a summary or runs table is missing, or holds what is no number.
    """
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex) or table.isna().any(axis=None):
        raise ValueError("a row has more or fewer fields than there are columns")
    if {"metric", "value"} & set(table.columns):
        needed = [*FIXED, *([] if "seed" in table else SUMMARY)]
        if missing := [column for column in needed if column not in table]:
            raise ValueError(f"no column {missing[0]}")
    numeric = [c for c in ("value", "low", "high", "sd", "base", "seconds") if c in table]
    counts = [c for c in ("n", "n_items", "seed", "peak_mb") if c in table]
    return table.astype({**dict.fromkeys(numeric, float), **dict.fromkeys(counts, int)})


def write_metrics(summary: pd.DataFrame, file: Path) -> None:
    """The headline rows (no key set) as nested JSON, ``variant -> scenario -> metric``, for ``dvc metrics``."""
    tree: dict = {}
    for row in without_keys(summary).to_dict("records"):
        tree.setdefault(row["variant"], {}).setdefault(row["scenario"], {})[row["metric"]] = float(
            f"{row['value']:.6g}"
        )
    files.write(file, json.dumps(tree, indent=1) + "\n")


def keys(table: pd.DataFrame) -> list[str]:
    """The columns that address a row."""
    return [column for column in table.columns if column not in MEASURES]


def select(table: pd.DataFrame, where: Mapping[str, str]) -> pd.DataFrame:
    """Rows that match ``where``; a key that it does not name must be empty.

    Raises:
        InputError: ``where`` names a column that is no key of the table.
    """
    if unknown := set(where) - set(keys(table)):
        raise InputError(f"no column {sorted(unknown)[0]!r} in the table; it has {', '.join(keys(table))}")
    places = np.arange(len(table))
    for column in keys(table):  # each on what the former have left: comparing text is slow
        places = places[np.asarray(table[column].array[places] == str(where.get(column, "")))]
    return table.iloc[places]


def row(table: pd.DataFrame, **where: str) -> pd.Series:
    """The one row that matches; see `select`.

    Raises:
        InputError: no such row, or several.
    """
    found = select(table, where)
    if len(found) != 1:
        raise InputError(f"{len(found)} rows match {where}, expected one")
    return found.iloc[0]


def minus(rows: pd.DataFrame, base: pd.DataFrame, by: Sequence[str], name: str) -> pd.DataFrame:
    """Rows of a runs table less those of ``base`` with the same seed, metric and ``by``: ``<metric>_minus_<name>``.

    Of several such rows of ``base`` their mean counts. A row without its counterpart is left out. A column ``base`` has what was
    subtracted.
    """
    by, rows = ["seed", "metric", *by], rows.drop(columns="base", errors="ignore")  # a difference of differences
    joined = rows.join(base.groupby(by)["value"].mean().rename("base"), on=by).dropna(subset="base")
    joined["value"] -= joined["base"]
    joined["metric"] += f"_minus_{name}"
    return joined[[*rows.columns, "base"]]


def headline(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric that have no key column set, one a variant and scenario."""
    rows = without_keys(table)
    return rows[rows["metric"] == metric]


def without_keys(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have no key column set: one a variant, scenario and metric."""
    return table[(table[keys(table)[3:]] == "").all(axis=1)]


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table without padding, so that its text changes only where a value does; folded if it has many rows."""
    lines = [" | ".join(map(str, table.columns)), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(str(cell).replace("|", "\\|") for cell in record) for record in table.itertuples(index=False)]
    text = "\n".join(f"| {line} |" for line in lines)
    if len(table) <= UNFOLDED:
        return text
    return f"<details><summary>{len(table)} rows</summary>\n\n{text}\n\n</details>"


def interval(record: pd.Series, digits: int = 2) -> str:
    """``value [low, high]`` of a summary row; of a single run the value only, since it has no interval."""
    if record.get("n") == 1:
        return f"{record['value']:.{digits}f}"
    return f"{record['value']:.{digits}f} [{record['low']:.{digits}f}, {record['high']:.{digits}f}]"


def counted(n: pd.Series, what: str) -> str:
    """``n = 5 seeds``, or ``n = 1 to 5 seeds`` where rows have different numbers: for the title of a figure."""
    low, high = int(n.min()), int(n.max())
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"n = {number} {what[: -1 if high == 1 and what.endswith('s') else None]}"


def cell(summary: pd.DataFrame, digits: int = 2, **where: str) -> str:
    """The row that matches as text, see `interval`; empty where there is none."""
    found = select(summary, where)
    return interval(found.iloc[0], digits) if len(found) else ""


def wide(
    summary: pd.DataFrame, index: str, column: str, names: Sequence[str], columns: Mapping[str, tuple[int, dict]]
) -> pd.DataFrame:
    """One line a name in a key column of the summary, one column for each row that is asked for, as text (`cell`).

    Args:
        summary: of a notebook.
        index: what the first column is called, which holds the names.
        column: the key column that they are from, such as "variant".
        names: which, in this order.
        columns: by the name of a column its digits, and what addresses the row beside ``column``.
    """
    lines = [
        {index: name}
        | {title: cell(summary, digits, **{column: name}, **where) for title, (digits, where) in columns.items()}
        for name in names
    ]
    return pd.DataFrame(lines, columns=[index, *columns])


SUMMARY = [*FIXED, "low", "high", "sd", "n", "n_items", "unit"]


def summarise(runs: pd.DataFrame, keys: Sequence[str], *, paired_with: str | None = None) -> pd.DataFrame:
    """The summary of a runs table: mean over seeds, interval, standard deviation between seeds, number of seeds.

    A share whose metric says whose ``items`` it counts has a `two_level_interval`, everything else one over the seeds.

    Args:
        runs: columns ``seed, variant, scenario, metric, value, n_items, unit`` and ``keys``, and ``base`` where `minus` made
            some of them; one row a seed.
        keys: the notebook's key columns; empty strings in a headline row.
        paired_with: a variant; adds rows ``scenario = minus_<variant>``, the paired differences of every row that
            both variants have for the same seeds, except per-round rows and controls.

    Returns:
        Columns `SUMMARY` + ``keys``, every row unique, in the order in which they first appear in ``runs``.

    Raises:
        ValueError: a seed that occurs twice in one row of the summary, a value that is not finite, or a variant that is
            to be paired and has several scenarios.
    """
    by = ["variant", "scenario", "metric", *keys]
    rows = []
    for group, part in runs.groupby(by, sort=False, dropna=False):
        if part["seed"].duplicated().any():
            raise ValueError(f"seed counted twice in {dict(zip(by, group, strict=True))}")
        rows.append({**dict(zip(by, group, strict=True)), **_row(part), **_items(part)})
    if paired_with:
        rows += _paired_rows(runs, keys, paired_with)
    return pd.DataFrame(rows)[SUMMARY + list(keys)]


def _paired_rows(runs: pd.DataFrame, keys: Sequence[str], base: str) -> list[dict]:
    table = runs[(runs["scenario"] != "control") & (runs["round"] == "" if "round" in keys else True)]
    rows = []
    for (variant, metric, *cell), part in table.groupby(["variant", "metric", *keys], sort=False):
        if part["seed"].duplicated().any():
            raise ValueError(f"cannot pair {variant} with {base}: it has several scenarios; pair each by itself")
        like = (table["variant"] == base) & (table["metric"] == metric) & (table[list(keys)] == cell).all(axis=1)
        control, mine = table[like].set_index("seed")["value"], part.set_index("seed")
        if control.index.has_duplicates:
            raise ValueError(f"cannot pair with {base}: it has several scenarios")
        if variant == base or control.empty or set(mine.index) != set(control.index):
            continue
        row = {"variant": variant, "scenario": f"minus_{base}", "metric": metric, **dict(zip(keys, cell, strict=True))}
        less = control.loc[mine.index]
        rows.append({**row, **_row(mine.assign(metric=metric, base=less, value=mine["value"] - less)), **_items(part)})
    return rows


def _row(part: pd.DataFrame) -> dict:
    """Mean, interval, spread and number of the runs of one quantity."""
    values, base = part["value"].to_numpy(float), part["base"].to_numpy(float) if "base" in part else None
    base = None if base is None or np.isnan(base).all() else base
    entry = metrics().get(part["metric"].iloc[0], {})
    if items := entry.get("items"):
        each = max(1, round(float(part["n_items"].mean())))
        low, high = two_level_interval(values, each, same=items == "same", base=base)
    else:
        low, high = bootstrap_interval(values)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"value": float(values.mean()), "low": low, "high": high, "sd": spread, "n": len(values)}


def _items(part: pd.DataFrame) -> dict:
    return {"n_items": int(part["n_items"].sum()), "unit": part["unit"].iloc[0]}
