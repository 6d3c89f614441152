"""Cells are spread over processes, this one among them, and the result is the same."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_info

from medsec.core import parallel


@pytest.fixture
def processes():
    """Worker processes of this test only: they inherit its environment."""
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def test_run_cells_keeps_the_order(processes):
    cells = [(5, 2), (1, 1), (9, 9), (0, 3)]
    expected = [math.comb(*cell) for cell in cells]
    assert parallel.run_cells(math.comb, cells, processes=1) == expected
    assert parallel.run_cells(math.comb, cells, processes=2) == expected


def test_the_number_of_processes_comes_from_the_environment(monkeypatch):
    seen = []

    def executor(helpers, **more):
        seen.append(helpers + 1)  # this process does its share
        return ThreadPoolExecutor(helpers)

    monkeypatch.setattr(parallel, "get_reusable_executor", executor)
    monkeypatch.setattr(parallel.joblib, "cpu_count", lambda: 7)
    cells = [(i, 1) for i in range(9)]
    monkeypatch.setenv("MEDSEC_PROCESSES", "3")
    assert parallel.run_cells(math.comb, cells) == list(range(9))
    parallel.run_cells(math.comb, cells, processes=2)
    monkeypatch.delenv("MEDSEC_PROCESSES")
    parallel.run_cells(math.comb, cells)
    parallel.run_cells(math.comb, cells[:4])
    assert seen == [3, 2, 7, 4]
    assert parallel.run_cells(math.comb, cells[:1]) == [0]  # nobody else is needed
    assert parallel.run_cells(math.comb, []) == []
    assert len(seen) == 4


def test_cells_run_here_and_elsewhere_with_one_thread(processes):
    """And a process that starts keeps its memory (`medsec.core.parallel.HEAP`)."""
    where = parallel.run_cells(_whereabouts, [(0.5,)] * 4, processes=2)
    assert {pid == os.getpid() for pid, *_ in where} == {True, False}
    assert {threads for _, threads, _ in where} == {1}
    assert {heap for pid, _, heap in where if pid != os.getpid()} == {parallel.HEAP["MALLOC_TRIM_THRESHOLD_"]}


def _whereabouts(seconds: float) -> tuple[int, int, str | None]:
    time.sleep(seconds)  # long enough for both to get one
    threads = max(pool["num_threads"] for pool in threadpool_info())
    return os.getpid(), threads, os.environ.get("MALLOC_TRIM_THRESHOLD_")


@pytest.mark.parametrize("n", [1, 2])
def test_an_error_ends_the_cells_that_wait(processes, n, tmp_path):
    cells = [(tmp_path / f"{k}", 1 / k if k else None) for k in range(30)]
    with pytest.raises(TypeError):
        parallel.run_cells(_touch_after, cells, processes=n)
    assert len(list(tmp_path.iterdir())) < 15
    assert parallel.run_cells(math.comb, [(5, 2), (4, 2)], processes=n) == [10, 6]  # nothing is left broken


def _touch_after(file: Path, seconds: float | None) -> None:
    time.sleep(seconds)  # the first has None
    file.touch()
