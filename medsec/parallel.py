"""Where things run: independent cells in parallel processes, one thread each, on the device of the parameters."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import joblib
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from medsec.errors import InputError

if TYPE_CHECKING:
    import torch

# The GNU C library gives large blocks of memory back at once and fetches them anew, page by page, in every training
# step: a seventh of the time of networks this small. Told at a process's start, it keeps what it has, up to 1 GiB; no
# number changes. Other C libraries ignore it.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def device(name: str) -> "torch.device":
    """The device of that name (parameter ``device``: "cpu" or "cuda").

    Raises:
        InputError: a GPU is asked for and PyTorch finds none.
    """
    import torch  # here: it is slow to import, and `medsec.execute` needs no device

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda, but PyTorch finds no CUDA GPU here; set device: cpu (the full profile instead of full-gpu)"
        )
    return torch.device(name)


@contextlib.contextmanager
def workers() -> Iterator[None]:
    """Where joblib starts processes in this time they have one thread each, and keep their memory."""
    _keep_memory()
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        yield


def _keep_memory() -> None:
    """In processes that start from here on; who set it otherwise is not overruled."""
    for key, value in HEAP.items():
        os.environ.setdefault(key, value)


def run_cells(function: Callable, cells: Sequence[tuple], *, processes: int | None = None) -> list[Any]:
    """``[function(*cell) for cell in cells]``, spread over processes.

    One thread a process: two would change the bits of a result and, on networks this small, be slower. The result does
    not depend on the number of processes. This process does its share: it has loaded what a new one must load first, and
    what a cell leaves in its caches can be used later in a notebook.

    Args:
        function: importable (defined in a module, not in a notebook).
        cells: arguments of each call; put the longest first.
        processes: with this one; default ``MEDSEC_PROCESSES``, else the number of cores this process may use.
    """
    wanted = processes or int(os.environ.get("MEDSEC_PROCESSES", 0)) or joblib.cpu_count()
    helpers = min(wanted, len(cells)) - 1
    waiting, results = deque(enumerate(cells)), [None] * len(cells)
    # A bar only where somebody watches: in an executed notebook it would differ from run to run.
    bar = tqdm(total=len(cells), disable=not sys.stderr.isatty())

    def work(call: Callable) -> None:
        while True:
            try:
                i, cell = waiting.popleft()
            except IndexError:  # none is left
                return
            try:
                results[i] = call(*cell)
            except BaseException:
                waiting.clear()  # what is on its way is finished, no more is begun
                raise
            bar.update()

    with bar, threadpool_limits(1):
        if helpers < 1:
            work(function)
        else:
            _share(work, function, helpers, waiting)
    return results


def _share(work: Callable, function: Callable, helpers: int, waiting: deque) -> None:
    """Let this process and others ``work`` until nothing is ``waiting``; an interrupt ends the others at once."""
    alone = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")}
    _keep_memory()
    others = get_reusable_executor(helpers, timeout=300, env=alone | {key: os.environ[key] for key in HEAP})
    with ThreadPoolExecutor(helpers) as threads:
        try:
            # A thread hands one cell at a time to a process, and waits for it.
            elsewhere = [
                threads.submit(work, lambda *cell: others.submit(function, *cell).result()) for _ in range(helpers)
            ]
            work(function)
            for each in elsewhere:
                each.result()
        except KeyboardInterrupt:  # nothing goes on training unseen
            waiting.clear()
            others.shutdown(wait=True, kill_workers=True)
            raise
