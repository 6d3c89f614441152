"""Where things run: independent cells in parallel processes, one thread each, on the device of the parameters; and locks."""

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import psutil
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from medsec.core.errors import InputError

__all__: list[str] = []  # for the other modules of the package

if TYPE_CHECKING:
    import torch

# The GNU C library gives large blocks of memory back at once and fetches them anew, page by page, in every training
# step: a seventh of the time of networks this small. Told at a process's start, it keeps what it has, up to 1 GiB; no
# number changes. Other C libraries ignore it.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
WATCH = "medsec-watch"  # the thread of `end_with`


def device(name: str) -> "torch.device":
    """The device of that name (parameter ``device``: "cpu" or "cuda").

    Raises:
        InputError: a GPU is asked for and PyTorch finds none.
    """
    import torch  # here: it is slow to import, and `medsec.evidence.execute` needs no device

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda, but PyTorch finds no CUDA GPU here; set device: cpu (the full profile instead of full-gpu)"
        )
    return torch.device(name)


def count(value: str | int, name: str = "processes") -> int:
    """How many processes, 1 to 1024.

    Raises:
        InputError: it is no such number; the message says that ``name`` is wrong.
    """
    digits = str(value).strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 4 and 1 <= int(digits) <= 1024):
        raise InputError(f"{name} = {digits[:40]!r}: a number of processes is needed, 1 to 1024")
    return int(digits)


def run_cells(function: Callable, cells: Sequence[tuple], *, processes: int | None = None) -> list[Any]:
    """``[function(*cell) for cell in cells]``, spread over processes.

    One thread a process: two would change the bits of a result and, on networks this small, be slower. The result does
    not depend on the number of processes.

    Args:
        function: importable (defined in a module, not in a notebook).
        cells: arguments of each call; put the longest first.
        processes: default ``MEDSEC_PROCESSES``, else the number of cores this process may use.
    """
    wanted = processes or count(os.environ.get("MEDSEC_PROCESSES") or joblib.cpu_count(), "MEDSEC_PROCESSES")
    for key, value in HEAP.items():  # in processes that start from here on; who set it otherwise is not overruled
        os.environ.setdefault(key, value)
    calls = (joblib.delayed(_in_worker)(os.getpid(), function, cell) for cell in cells)
    with threadpool_limits(1), joblib.parallel_config("loky", inner_max_num_threads=1):
        found = joblib.Parallel(min(wanted, max(1, len(cells))), return_as="generator", batch_size=1)(calls)
        # A bar only where somebody watches: in an executed notebook it would differ from run to run.
        return list(tqdm(found, total=len(cells), disable=not sys.stderr.isatty()))


def _in_worker(owner: int, function: Callable, cell: tuple) -> Any:
    """A call in a worker process, which does not outlive the process ``owner`` that waits for it."""
    if owner != os.getpid() and not any(thread.name == WATCH for thread in threading.enumerate()):
        end_with([owner])
    return function(*cell)


def end_with(owners: Sequence[int], every: float = 0.5) -> None:
    """From now on this process ends within ``every`` seconds of any of the processes ``owners``, however that one ended.

    Else what a killed command has started works on, and writes, for as long as its cell takes.
    """

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched = [psutil.Process(owner) for owner in owners]
            while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in watched):
                time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, name=WATCH, daemon=True).start()


def end_with_pipeline() -> None:
    """Where this is a stage of a DVC pipeline: end with ``dvc``, and with the shell between, if one of them is killed."""
    if "DVC_STAGE" not in os.environ:
        return
    owners = []
    for parent in psutil.Process().parents():
        owners.append(parent.pid)
        if any("dvc" in Path(word).parts[-1:] for word in parent.cmdline()[:3]):  # dvc repro, python -m dvc repro
            end_with(owners)
            return


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold ``file`` as a lock; its content is the owner's process number.

    The file stays: removing it would let two processes hold "the same" lock. A lock whose owner is gone is free.

    Raises:
        InputError: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise InputError(f"process {owner} is already running {file.stem}; wait for it, or end it") from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield
