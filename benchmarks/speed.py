"""How long the companion takes and how much memory it needs, on this machine.

``python benchmarks/speed.py`` does what `make repro` does, into a temporary folder: all cells, then every notebook. It also
draws phantoms, and writes what it measured to ``benchmarks/speed.json`` and into docs/cohorts-and-times.md. It is no test.
``python benchmarks/speed.py --write`` measures nothing and only writes the page's table.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from experiments import params
from medphantom import chest as phantom
from medsec.core import paths
from medsec.evidence import ledger
from medsec.evidence.record import processor

RESULT = paths.ROOT / "benchmarks" / "speed.json"
BEGIN, END = "<!-- speed: made by benchmarks/speed.py, do not edit -->", "<!-- end of speed -->"


def phantom_rate(size: int = 64, n: int = 256, repeats: int = 7) -> float:
    """Median number of phantoms drawn per second, on one core."""
    seed = params.load().cohorts.phantom.seed
    rates = []
    for repeat in range(repeats):
        start = time.perf_counter()
        phantom.render(range(n), [k % 2 for k in range(n)], seed=seed + repeat, size=size)
        rates.append(n / (time.perf_counter() - start))
    return statistics.median(rates)


def timed(arguments: list[str], out: Path) -> dict[str, float]:
    """Wall seconds of a command and the peak memory of all its processes (sum of resident sets, GB)."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "experiments", *arguments, "--cohort", "phantom"]
    environment = os.environ | {"MEDSEC_OUT": str(out), "MEDSEC_CELLS": str(out / "cells")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, memory(running.pid))
            time.sleep(2)  # the proportional memory is slow to read, and would take time from what is timed
    if running.returncode:
        raise SystemExit(f"it failed: {' '.join(command[1:])}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak / 1e9, 2)}


def memory(pid: int) -> int:
    """Proportional memory of a process and all its descendants, in bytes; shared pages count once."""
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            found = process.memory_full_info()
            total += getattr(found, "pss", found.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def tracked_megabytes() -> float:
    """Size of all files that a clone checks out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=True
    ).stdout
    return sum((paths.ROOT / name).stat().st_size for name in listed.split("\0") if name) / 1e6


def block(result: dict) -> str:
    """The page's paragraph, marks included, from a result."""
    lines = [
        f"| {name} | {step['seconds'] / 60:.1f} min | {step['peak_gb']:.1f} GB |"
        for name, step in result["steps"].items()
    ]
    total = sum(step["seconds"] for step in result["steps"].values())
    return "\n".join(
        [
            BEGIN,
            f"Measured on {result['cores']} cores ({result['processor']}), without a GPU, PyTorch {result['torch']}, "
            "with nothing finished before:",
            "",
            "| step of `make repro` | wall time | peak memory |",
            "| --- | --- | --- |",
            *lines,
            "",
            f"Together {total / 60:.0f} minutes; DVC itself adds some seconds a notebook. Phantoms: "
            f"{result['phantoms_per_second_64px']:.0f} images/s at 64 px on one core. Tracked files: "
            f"{result['tracked_mb']:.0f} MB, besides git's history. (`python benchmarks/speed.py` measures yours.)",
            END,
        ]
    )


def write(result: dict) -> None:
    page = paths.ROOT / "docs" / "cohorts-and-times.md"
    text = ledger.replace_block(page.read_text(encoding="utf-8"), BEGIN, END, block(result))
    page.write_text(text, encoding="utf-8")


def machine() -> dict:
    """What a time belongs to."""
    return {
        "processor": processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/speed.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="measure nothing, write the table of docs/cohorts-and-times.md"
    )
    if parser.parse_args().write:
        write(json.loads(RESULT.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(1)
    result = machine() | {
        "phantoms_per_second_64px": round(phantom_rate()),
        "tracked_mb": round(tracked_megabytes(), 1),
        "steps": {},
    }
    steps = {"all cells of all notebooks": ["cells"]}
    steps |= {file.stem: ["run", file.stem] for file in sorted(paths.NOTEBOOKS.glob("*.ipynb"))}
    with tempfile.TemporaryDirectory() as out:
        for name, arguments in steps.items():
            result["steps"][name] = timed(arguments, Path(out))
            print(name, result["steps"][name], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write(result)


if __name__ == "__main__":
    main()
