"""Measures with intervals: what goes into the tables.

A *runs* table has one row per seed, a *summary* one row per quantity with the interval over the runs. Both are tidy and
share the columns ``variant, scenario, metric`` and the notebook's key columns; see `summarise`.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

__all__ = ["bootstrap_interval", "paired_difference", "two_level_interval", "wilson_interval"]

LEVEL = 0.95
RESAMPLES = 10_000


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
    # Normal distribution of Student's quantile; scipy.stats has the same functions under other names, and is slow to import.
    tail = special.ndtr(np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 - level) / 2))
    low, high = np.quantile(means, [tail, 1 - tail])
    # With few runs the wanted percentile lies beyond the resamples; the range of the data is its limit.
    return (float(values.min()), float(values.max())) if tail < n**-n else (float(low), float(high))


def wilson_interval(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); for independent items only.

    Args:
        successes: need not be whole, so that a mean over runs has an interval too.
        n: items.
        level: nominal coverage.

    Raises:
        ValueError: n < 1 or successes outside 0 to n.
    """

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    p, z = successes / n, float(special.ndtri((1 + level) / 2))
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    shrunk = 1 + z**2 / n
    low, high = float((middle - half) / shrunk), float((middle + half) / shrunk)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # at 0 and 1 it ends there, but for rounding


def two_level_interval(
    values: Sequence[float], items: int, *, same: bool, base: Sequence[float] | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Interval of a mean share that knows how few items it rests on, not only how few runs.

    With the ``same`` items in every run (one set of test images) runs say nothing of other items. The two sources of doubt
    then add up, the `bootstrap_interval` over runs and `wilson_interval` over the items of one run, as the squares of their
    widths do (MOVER, Zou & Donner 2008, Stat Med 27:1693). A little wide: Wilson's holds some of what differs between runs.
    With items of each run's own, runs differ by them already; then Wilson's interval over all of them is only the least
    that the interval can be, as it is where all runs agree.

    Args:
        values: shares in [0, 1], one a run; with ``base``, differences to it.
        items: in one run.
        same: the items of all runs are the same.
        base: the shares that were subtracted from those of the same items. Their doubts add up as if independent (Newcombe
            1998, Stat Med 17:873, method 10): wide, since what is hard for one network is hard for the other.
        level: nominal coverage of both.

    Returns:
        Lower and upper end, in [0, 1], of a difference in [-1, 1].

    Raises:
        ValueError: no items, shares that are none, or as `bootstrap_interval`.
    """
    mean, n = float(np.mean(values)), items if same else items * len(values)
    low, high = bootstrap_interval(values, level)
    control = 0.0 if base is None else float(np.mean(base))
    p = round(mean + control, 12)  # the sum of what was subtracted and what was left may miss 1 by rounding
    least, most = wilson_interval(p * n, n, level)
    below, above = p - least, most - p
    if base is not None:
        least, most = wilson_interval(control * n, n, level)
        below, above = np.hypot(below, most - control), np.hypot(above, control - least)
    join = np.hypot if same else max
    lowest = 0.0 if base is None else -1.0
    return max(lowest, float(mean - join(mean - low, below))), min(1.0, float(mean + join(high - mean, above)))


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
