"""Cells are spread over processes, and the result is the same; one process alone holds a lock."""

import math
import os
import time
from pathlib import Path

import joblib
import pytest
from threadpoolctl import threadpool_info

from medsec.core import parallel
from medsec.core.errors import InputError


@pytest.mark.parametrize("processes", [1, 2])
def test_run_cells_keeps_the_order(processes):
    cells = [(5, 2), (1, 1), (9, 9), (0, 3)]
    assert parallel.run_cells(math.comb, cells, processes=processes) == [math.comb(*cell) for cell in cells]
    assert parallel.run_cells(math.comb, [], processes=processes) == []


def test_the_number_of_processes_comes_from_the_environment(monkeypatch):
    seen = []
    real = joblib.Parallel

    def spied(n, **more):
        seen.append(n)
        return real(1, **more)

    monkeypatch.setattr(joblib, "Parallel", spied)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 7)
    cells = [(i, 1) for i in range(9)]
    monkeypatch.setenv("MEDSEC_PROCESSES", "3")
    assert parallel.run_cells(math.comb, cells) == list(range(9))
    parallel.run_cells(math.comb, cells, processes=2)
    monkeypatch.delenv("MEDSEC_PROCESSES")
    parallel.run_cells(math.comb, cells)
    parallel.run_cells(math.comb, cells[:4])  # no more processes than cells
    assert seen == [3, 2, 7, 4]


def test_every_process_has_one_thread_and_keeps_its_memory():
    where = parallel.run_cells(_whereabouts, [(0.5,)] * 4, processes=2)
    assert {threads for threads, _ in where} == {1}
    assert {heap for _, heap in where} == {parallel.HEAP["MALLOC_TRIM_THRESHOLD_"]}


def _whereabouts(seconds: float) -> tuple[int, str | None]:
    time.sleep(seconds)  # long enough for both to get one
    return max(pool["num_threads"] for pool in threadpool_info()), os.environ.get("MALLOC_TRIM_THRESHOLD_")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_ends_the_cells_that_wait(processes, tmp_path):
    cells = [(tmp_path / f"{k}", 1 / k if k else None) for k in range(30)]
    with pytest.raises(TypeError):
        parallel.run_cells(_touch_after, cells, processes=processes)
    assert len(list(tmp_path.iterdir())) < 15
    assert parallel.run_cells(math.comb, [(5, 2), (4, 2)], processes=processes) == [10, 6], "nothing is left broken"


def _touch_after(file: Path, seconds: float | None) -> None:
    time.sleep(seconds)  # the first has None
    file.touch()


def test_a_lock_is_held_once_and_free_afterwards(tmp_path):
    file = tmp_path / "sub" / "work.lock"
    held = pytest.raises(InputError, match=f"process {os.getpid()} is already running work")
    with parallel.locked(file), held, parallel.locked(file):
        pytest.fail("two hold it")
    with parallel.locked(file):
        assert file.read_text() == f"{os.getpid()}\n"
