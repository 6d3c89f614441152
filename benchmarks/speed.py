"""How long the companion takes and how much memory it needs, on this machine.

``python benchmarks/speed.py`` reruns the default pipeline's notebooks into a temporary folder, draws phantoms, and
writes what it measured to ``benchmarks/speed.json`` and into the README. A benchmark, not a test: nothing fails.
"""

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

from medsec import claims, params, paths, phantom
from medsec.record import processor

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


def notebook(file: Path, out: Path) -> dict[str, float]:
    """Wall seconds of a notebook and the peak memory of all its processes (sum of resident sets, GB)."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "medsec.execute", str(file), "--cohort", "phantom"]
    environment = os.environ | {"MEDSEC_OUT": str(out), "MEDSEC_CHECKPOINTS": str(out / "checkpoints")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, memory(running.pid))
            time.sleep(2)  # the proportional memory is slow to read, and would take time from what is timed
    if running.returncode:
        raise SystemExit(f"{file.name} failed; run: {' '.join(command[1:])}")
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


def readme_block(result: dict) -> str:
    """The README's paragraph, from a result."""
    books = result["notebooks"]
    total = sum(book["seconds"] for book in books.values())
    lines = [f"| {name} | {book['seconds']:.0f} s | {book['peak_gb']:.1f} GB |" for name, book in books.items()]
    return "\n".join(
        [
            BEGIN,
            f"Measured on {result['cores']} cores of a {result['processor']} without a GPU, PyTorch {result['torch']}:",
            "",
            "| notebook | wall time | peak memory |",
            "| --- | --- | --- |",
            *lines,
            "",
            f"Together {total / 60:.1f} minutes. Phantoms: {result['phantoms_per_second_64px']:.0f} images/s at 64 px on "
            f"one core. The files of a clone: {result['tracked_mb']:.0f} MB. (`python benchmarks/speed.py` measures yours.)",
            END,
        ]
    )


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "processor": processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "phantoms_per_second_64px": round(phantom_rate()),
        "tracked_mb": round(tracked_megabytes(), 1),
        "notebooks": {},
    }
    with tempfile.TemporaryDirectory() as out:
        for file in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
            result["notebooks"][file.stem] = notebook(file, Path(out))
            print(file.stem, result["notebooks"][file.stem], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    readme = paths.ROOT / "README.md"
    text = claims.replace_block(readme.read_text(encoding="utf-8"), BEGIN, END, readme_block(result))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
