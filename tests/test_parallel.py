"""Cells are spread over processes, and the result is the same; one process alone holds a lock."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import joblib
import psutil
import pytest
from threadpoolctl import threadpool_info

from medsec.core import parallel, paths
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


def _touch_and_stay(file: Path) -> None:
    file.touch()
    time.sleep(120)


START = """import sys
from pathlib import Path
from medsec.core import parallel
from test_parallel import _touch_and_stay as stay
"""


def _killed(command: list, files: list[Path], **more) -> list[psutil.Process]:
    """What a command had started when it was killed, once each of ``files`` was there, and did not end within 10 seconds."""
    path = os.pathsep.join((str(paths.ROOT), str(Path(__file__).parent)))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **more}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(20)
    assert started
    _, alive = psutil.wait_procs(started, 10)
    for left in alive:
        left.kill()
    return alive


def test_workers_end_with_who_waits_for_them(tmp_path):
    files = [tmp_path / "one", tmp_path / "two"]
    code = f"{START}parallel.run_cells(stay, [(Path(name),) for name in sys.argv[1:]], processes=2)"
    assert _killed([sys.executable, "-c", code, *map(str, files)], files) == []


@pytest.mark.parametrize("stage", ["01", ""])
def test_a_stage_ends_with_dvc(stage, tmp_path):
    """Outside a pipeline it goes on: somebody may have closed a terminal."""
    dvc, file = tmp_path / "dvc", tmp_path / "there"
    code = f"{START}parallel.end_with_pipeline()\nstay(Path(sys.argv[1]))"
    dvc.write_text(f"{sys.executable} -c '{code}' {file} &\nwait\n")
    left = _killed(["sh", str(dvc)], [file], **({"DVC_STAGE": stage} if stage else {}))
    assert len(left) == (0 if stage else 1)


def test_a_lock_is_held_once_and_free_afterwards(tmp_path):
    file = tmp_path / "sub" / "work.lock"
    held = pytest.raises(InputError, match=f"process {os.getpid()} is already running work")
    with parallel.locked(file), held, parallel.locked(file):
        pytest.fail("two hold it")
    with parallel.locked(file):
        assert file.read_text() == f"{os.getpid()}\n"
