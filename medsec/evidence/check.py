"""Do fresh tables agree with the committed ones?

``python -m experiments check`` compares the tables in the working tree with those of the last commit; the last cell of a
notebook compares what it has just written with the repository's (`against_reference`). Every row has a tolerance: its
metric's entry in ``claims/metrics.yaml`` plus twice the committed standard deviation between seeds (for `SCALED` metrics, plus
a share of the value). The interval itself would allow too much where few images make it wide: they are the same images.

On the processor and versions that made a table nothing moves at all. On another one rounding differs, and a network that is
trained takes another path: its single rounds are then other draws, so a curve over rounds is judged by its mean; an interval
of three runs ends somewhere else, so its ends may lie twice as far off; and a claim close to its bound may become undecided,
but what held must not fail, nor the other way round.
"""

import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evidence import claims, tables

__all__ = ["against_reference", "run"]

SHOWN = 10
ITEMS = 0.2  # share by which ``n_items`` may differ, where it is itself measured: the images that a trained network gets right
# Share of a value by which it may move as well: a distance in the feature space of a classifier that is trained anew, which has
# a scale of its own. Spoiled X-rays moved by 9 and 13 % from an AMD EPYC to an Intel Xeon, by 21 % from AVX-512 to AVX2.
SCALED = {"frechet": 0.3}


def compare(fresh: pd.DataFrame, committed: pd.DataFrame, deciding: Sequence[dict] = ()) -> list[str]:
    """What differs between two summary tables, one line a row; an empty list if they agree.

    Args:
        deciding: rows (`claims`: ``where``) that are judged by themselves even if they are a single round of a curve.

    Raises:
        InputError: a metric without a tolerance, or tables with other columns.
    """
    if list(fresh.columns) != list(committed.columns):
        return [f"columns differ: {', '.join(fresh.columns)} instead of {', '.join(committed.columns)}"]
    allowed = {name: entry["tolerance"] for name, entry in tables.metrics(committed["metric"]).items()}
    by = tables.keys(committed)
    for name, table in (("fresh", fresh), ("committed", committed)):
        if table.duplicated(by).any():
            return [f"the {name} table holds a row twice: {_address(table[table.duplicated(by)].iloc[0], by)}"]
    alone = {tuple(where.get(key, "") for key in by) for where in deciding}
    both = committed.merge(fresh, on=by, how="outer", suffixes=("_was", "_is"), indicator="where", sort=False)
    lines = []
    for row in both.to_dict("records"):
        if row["where"] != "both":
            lines.append(f"{'new' if row['where'] == 'right_only' else 'missing'} row: {_address(row, by)}")
            continue
        lines += [
            f"{_address(row, by)}: {column} is {row[f'{column}_is']}, was {row[f'{column}_was']}"
            for column, room in (("n", 0), ("n_items", ITEMS if allowed[row["metric"]] else 0), ("unit", 0))
            if not _same(row[f"{column}_is"], row[f"{column}_was"], room)
        ]
        in_curve = row.get("round", "").isdigit() and math.isfinite(row["value_is"])
        if not in_curve or tuple(row[key] for key in by) in alone:
            lines += _moved(row, allowed[row["metric"]], by)
    return lines + _moved_curves(both, allowed, by)


def _same(is_: int | str, was: int | str, room: float) -> bool:
    return is_ == was or (room > 0 and abs(is_ - was) <= room * was)


def _moved(row: dict, allowed: float, by: list[str]) -> list[str]:
    """The first of value, low and high that lies too far from the committed one."""
    share = SCALED.get(row["metric"], 1e-5)
    slack = allowed + 2 * row["sd_was"] + share * abs(row["value_was"])
    for column, room in (("value", slack), ("low", 2 * slack), ("high", 2 * slack)):
        is_, was = row[f"{column}_is"], row[f"{column}_was"]
        if not abs(is_ - was) <= room:
            return [f"{_address(row, by)}: {column} {is_:.4g}, committed {was:.4g} ± {room:.2g}"]
    return []


def _moved_curves(both: pd.DataFrame, allowed: dict[str, float], by: list[str]) -> list[str]:
    """The same for the mean over rounds of each curve."""
    if "round" not in by:
        return []
    curves = both[(both["where"] == "both") & both["round"].str.isdigit() & np.isfinite(both["value_is"])]
    columns = [f"{column}_{when}" for column in ("value", "low", "high", "sd") for when in ("was", "is")]
    lines = []
    for _, curve in curves.groupby([key for key in by if key != "round"], sort=False):
        rounds = " to ".join(dict.fromkeys(curve["round"].iloc[[0, -1]]))
        row = curve.iloc[0].to_dict() | curve[columns].mean().to_dict() | {"round": rounds}
        lines += _moved(row, allowed[row["metric"]], by)
    return lines


def _address(row: dict | pd.Series, by: list[str]) -> str:
    return ", ".join(f"{key}={row[key]}" for key in by if row[key] != "")


def against_reference(notebook: str, cohort: str) -> str:
    """Compare the summary that this run wrote with the repository's: ``ok``, or the rows and claims that differ.

    While the pipeline makes a table there is nothing yet to compare it with, and `medsec.core.paths.reference` points at the new
    one; the check then only proves that it can be read back and that every metric has a tolerance.
    """
    fresh, committed = (
        tables.read(paths.results(cohort, base) / f"{notebook}.csv") for base in (paths.out(), paths.reference())
    )
    return report(differences(notebook, cohort, fresh, committed))


def differences(notebook: str, cohort: str, fresh: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """What differs between two summary tables of a notebook: rows, and claims that turn into their opposite."""
    deciding = [claim["where"] for name in _ledgers(notebook) for claim in claims.load(name)["claims"]]
    return compare(fresh, committed, deciding) + contradictions(notebook, cohort, fresh, committed)


OPPOSITE = {(claims.HOLDS, claims.FAILS), (claims.FAILS, claims.HOLDS)}


def contradictions(notebook: str, cohort: str, fresh: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """Claims that hold in one of two summary tables of a notebook and do not hold in the other."""
    return [line for pair, line in _changed(notebook, cohort, fresh, committed) if pair in OPPOSITE]


def remarks(notebook: str, cohort: str, fresh: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """Claims near their bound, whose verdict became undecided or ceased to be: no difference, but worth a word."""
    return [line for pair, line in _changed(notebook, cohort, fresh, committed) if pair not in OPPOSITE]


def _changed(
    notebook: str, cohort: str, fresh: pd.DataFrame, committed: pd.DataFrame
) -> list[tuple[tuple[str, str], str]]:
    """(verdict before, now) and a line of every claim whose verdict is another."""
    found = []
    for name in _ledgers(notebook):
        judged = [claims.verdicts(name, table, cohort).to_dict("records") for table in (committed, fresh)]
        was, now = ({row["id"]: row["verdict"] for row in rows} for rows in judged)
        for id_ in was:
            if was[id_] != now[id_]:
                found.append(((was[id_], now[id_]), f"claim {id_}: {now[id_]}, committed: {was[id_]}"))
    return found


def _ledgers(notebook: str) -> list[str]:
    return [name for name in claims.names() if claims.load(name)["table"] == notebook]


def report(lines: list[str]) -> str:
    """``ok``, or the first differing rows and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(lines[:SHOWN] + more) or "ok"


def against_commit(cohort: str) -> dict[str, tuple[list[str], list[str]]]:
    """Compare every committed summary of a cohort with the one in the working tree.

    Returns:
        By name of the notebook its `differences` and `remarks`.

    Raises:
        InputError: this is no git checkout, nothing is committed for the cohort, or nothing shall be.
    """
    if cohort in paths.OWN:
        apart = "what is made from your own images stays out of git; compare two runs of yours by MEDSEC_REFERENCE"
        raise InputError(f"no table of cohort {cohort} is committed: {apart}")
    folder = f"results/{cohort}"
    listed = _git("ls-tree", "--name-only", "HEAD", f"{folder}/").split()
    found = {}
    for name in (f for f in listed if f.endswith(".csv")):
        with tempfile.TemporaryDirectory() as temporary:
            committed = Path(temporary) / Path(name).name
            committed.write_text(_git("show", f"HEAD:{name}"), encoding="utf-8")
            was = tables.read(committed)
            if "metric" in was:  # else it is no summary, but numbers for a plot
                fresh = tables.read(paths.ROOT / name)
                pair = committed.stem, cohort, fresh, was
                found[committed.stem] = differences(*pair), remarks(*pair)
    if not found:
        raise InputError(f"no table is committed in {folder}; run the pipeline and commit its results first")
    return found


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("cannot compare with the last commit: git is not installed") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise InputError(f"cannot compare with the last commit: git {args[0]} says {said[-1]}")
    return done.stdout


def run(cohort: str) -> int:
    """Print what differs from the last commit, and how many claims have which verdict; 1 where something differs."""
    found = against_commit(cohort)
    for name, (lines, notes) in found.items():
        print(f"{name} ({cohort}): {report(lines)}")
        for note in notes:
            print(f"{name} ({cohort}), a remark and no difference: {note}")
    for ledger in claims.names():
        table = paths.results(cohort, paths.ROOT) / f"{claims.load(ledger)['table']}.csv"
        if table.is_file():
            counts = claims.verdicts(ledger, tables.read(table), cohort)["verdict"].value_counts(sort=False)
            print(f"claims {ledger} ({cohort}): " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return 1 if any(lines for lines, _ in found.values()) else 0
