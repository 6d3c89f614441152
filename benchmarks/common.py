"""What all benchmarks share: libraries take turns on the same work, in one process with one thread; medians and ratios.

Their results are lines of one table, ``benchmarks/results.csv``; each benchmark replaces its own.
"""

import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import pandas as pd
import psutil
import torch

from medsec.core import paths
from medsec.evidence import ledger, tables
from medsec.evidence.record import processor

REPEATS = 5
OURS = "medsec"
RESULTS = paths.ROOT / "benchmarks" / "results.csv"
PAGE = paths.ROOT / "docs" / "cohorts-and-times.md"
BEGIN, END = "<!-- benchmarks: made by `make bench`, do not edit -->", "<!-- end of benchmarks -->"
COLUMNS = ("benchmark", "what", "library", "seconds", "of the fastest other", "peak MB", "result", "made with")


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every call, by its name: after one round to warm up they take `REPEATS` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_mb(call: Callable[[], object]) -> int:
    """Memory that a call needs beyond what the process has, measured in a forked process."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def measured() -> None:
        before = psutil.Process().memory_info().rss
        call()
        found.put(max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))

    process = context.Process(target=measured)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the measured call ended with status {process.exitcode}")
    return round(found.get() / 2**20)


def compared(what: str, calls: dict[str, Callable[[], object]], results: dict[str, str] | None = None) -> list[dict]:
    """A line for every library: median seconds, ratio to the fastest that is not ours, memory, and what came out."""
    median = {name: statistics.median(each) for name, each in interleaved(calls).items()}
    fastest = min((value for name, value in median.items() if not name.startswith(OURS)), default=float("nan"))
    return [
        {
            "what": what,
            "library": name,
            "seconds": float(f"{value:.3g}"),
            "of the fastest other": round(value / fastest, 2),
            "peak MB": peak_mb(calls[name]),
            "result": (results or {}).get(name, ""),
        }
        for name, value in median.items()
    ]


def write(benchmark: str, lines: list[dict], packages: tuple[str, ...] = ()) -> None:
    """Put the lines of a benchmark into the table in the place of its old ones, with machine and versions; and show them."""
    made = [processor(), f"Python {platform.python_version()}", *(f"{k} {version(k)}" for k in ("torch", *packages))]
    fresh = pd.DataFrame(lines).assign(**{"benchmark": benchmark, "made with": ""})
    fresh.loc[0, "made with"] = ", ".join(made)  # once for all lines
    print(fresh.drop(columns="made with").to_string(index=False))
    if RESULTS.exists():
        old = pd.read_csv(RESULTS, keep_default_na=False)
        fresh = pd.concat([old[old["benchmark"] != benchmark], fresh])
    fresh.reindex(columns=COLUMNS).sort_values("benchmark", kind="stable").to_csv(RESULTS, index=False)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(ledger.replace_block(page, BEGIN, END, block()), encoding="utf-8")


def block() -> str:
    """The page's tables, marks included, from the committed results: a line for every task, a column for every library."""
    found, parts = pd.read_csv(RESULTS, dtype=str, keep_default_na=False), [BEGIN]
    for benchmark, lines in found.groupby("benchmark"):
        shown = []
        for what, each in lines.groupby("what", sort=False):
            line = {"": what}
            for row in each.to_dict("records"):
                line[row["library"]] = "; ".join(
                    filter(None, [row["seconds"] and f"{row['seconds']} s", row["result"]])
                )
                if row["library"] == OURS:
                    line["ours / fastest other"] = row["of the fastest other"]
            shown.append(line)
        table = pd.DataFrame(shown).fillna("")
        table["ours / fastest other"] = table.pop("ours / fastest other")  # the last column
        parts += [f"**{benchmark}** ({lines['made with'].iloc[0]})", tables.markdown(table)]
    return "\n\n".join([*parts, END])


def one_thread() -> None:
    torch.set_num_threads(1)
