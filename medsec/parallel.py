"""Where things run: independent cells in parallel processes, one thread each, on the device of the parameters."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import joblib
import torch
from tqdm import tqdm

from medsec.errors import InputError


def device(name: str) -> torch.device:
    """The device of that name (parameter ``device``: "cpu" or "cuda").

    Raises:
        InputError: a GPU is asked for and PyTorch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda, but PyTorch finds no CUDA GPU here; set device: cpu (the full profile instead of full-gpu)"
        )
    return torch.device(name)


def run_cells(function: Callable, cells: Sequence[tuple], *, processes: int | None = None) -> list[Any]:
    """``[function(*cell) for cell in cells]``, spread over processes.

    One thread a process: two would change the bits of a result and, on networks this small, be slower. The result does
    not depend on the number of processes.

    Args:
        function: importable (defined in a module, not in a notebook).
        cells: arguments of each call; put the longest first.
        processes: default ``MEDSEC_PROCESSES``, else the number of cores this process may use.
    """
    if not cells:
        return []
    wanted = processes or int(os.environ.get("MEDSEC_PROCESSES", 0)) or joblib.cpu_count()
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        calls = (joblib.delayed(function)(*cell) for cell in cells)
        results = joblib.Parallel(n_jobs=min(wanted, len(cells)), return_as="generator")(calls)
        # A bar only where somebody watches: in an executed notebook it would differ from run to run.
        return list(tqdm(results, total=len(cells), disable=not sys.stderr.isatty()))
