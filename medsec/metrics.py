"""Measures with intervals: what goes into the tables.

A *runs* table has one row per seed, a *summary* one row per quantity with the interval over the runs. Both are tidy and
share the columns ``variant, scenario, metric`` and the notebook's key columns; see `summarise`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
SUMMARY = ["variant", "scenario", "metric", "value", "low", "high", "n", "n_items", "unit"]


def bootstrap_interval(values: Sequence[float], level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Expanded percentile bootstrap interval of the mean (Hesterberg 2015, The American Statistician 69:371).

    The plain percentile interval is too narrow for few runs. The expanded one takes more extreme percentiles, those at
    which it would equal Student's t for normal data; it never leaves the range of the data. For n = 3 it *is* that
    range and covers about 75 %, for n = 5 about 90 % (simulated in the tests); n is therefore always shown.

    Args:
        values: one number a run, all finite; a single one gives an interval of no width.
        level: nominal coverage.
        seed: of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, got {values.tolist()}")
    if n == 1 or np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    means = np.sort(values[np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))].mean(1))
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    # With few runs the wanted percentile lies beyond the resamples; the range of the data is its limit.
    return (float(values.min()), float(values.max())) if tail < n**-n else (float(low), float(high))


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); for independent items only.

    Raises:
        ValueError: n < 1 or successes outside 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(
    first: Sequence[float], second: Sequence[float], level: float = LEVEL
) -> tuple[float, float, float]:
    """Mean of ``first − second`` over runs that share a seed, and its `bootstrap_interval`.

    Raises:
        ValueError: the two differ in length.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} runs cannot be paired")
    difference = first - second
    return (float(difference.mean()), *bootstrap_interval(difference, level))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017 for images).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), with the trace of the root from symmetric eigenvalues.

    Args:
        first, second: (n, d) features, n > d in both, else the covariances are singular and the distance is biased.

    Raises:
        ValueError: different d, n ≤ d, or values that are not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    for features in (first, second):
        if features.ndim != 2 or features.shape[1] != first.shape[1] or len(features) <= features.shape[1]:
            raise ValueError(f"features of shape {features.shape}: need (n, {first.shape[-1]}) with n > d")
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values")
    cov1, cov2 = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    shift = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(max(shift + np.trace(cov1) + np.trace(cov2) - 2 * cross, 0.0))


# Tables --------------------------------------------------------------------------------------------------------------


def summarise(runs: pd.DataFrame, keys: Sequence[str], *, paired_with: str | None = None) -> pd.DataFrame:
    """The summary of a runs table: mean over seeds, interval, number of seeds.

    Args:
        runs: columns ``seed, variant, scenario, metric, value, n_items, unit`` and ``keys``; one row a seed.
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
        rows.append({**dict(zip(by, group, strict=True)), **_row(part["value"]), **_items(part)})
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
        control, mine = (t.set_index("seed")["value"] for t in (table[like], part))
        if control.index.has_duplicates:
            raise ValueError(f"cannot pair with {base}: it has several scenarios")
        if variant == base or control.empty or set(mine.index) != set(control.index):
            continue
        row = {"variant": variant, "scenario": f"minus_{base}", "metric": metric, **dict(zip(keys, cell, strict=True))}
        rows.append({**row, **_row(mine - control.loc[mine.index]), **_items(part)})
    return rows


def _row(values: pd.Series) -> dict:
    low, high = bootstrap_interval(values.to_numpy())
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def _items(part: pd.DataFrame) -> dict:
    return {"n_items": int(part["n_items"].sum()), "unit": part["unit"].iloc[0]}
