"""A round against the number of clients: the plain loop, Flower in this process, Flower's simulation (Ray).

``python benchmarks/federation.py`` (needs ``medsec[flower-simulation]``) writes ``benchmarks/results.csv``. Clients are those
of notebook 03 with 8 images each, so that what is measured is what a round costs besides training. Memory is the most that the
server and all that it started held at once, shared pages counted once.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from common import OURS, one_thread, write

from experiments import flower as app
from medsec.core import paths
from medsec.federated import flower
from medsec.federated.in_process import InProcessGrid

CLIENTS, ROUNDS, IMAGES = (4, 16, 64, 256), 4, 8
PATIENCE = 180  # seconds for a run
BIN = Path(sys.executable).parent
SETTINGS = {"kind": '"classifier"', "rule": '"none"', "rounds": str(ROUNDS), "timeout": "600.0"}


def federation(n: int) -> app.Federation:
    it = app.federation(app.run_config([f"{k}={v}" for k, v in (SETTINGS | {"clients": str(n)}).items()]))
    it.params["inversion"]["federation"]["images_per_client"] = IMAGES
    return it


def loop(n: int) -> float:
    start = time.perf_counter()
    app.loop(federation(n))
    return (time.perf_counter() - start) / ROUNDS


def in_process(n: int, place: Path) -> list[dict]:
    """The history of a run on an in-process Grid."""
    os.environ["MEDSEC_FEDERATION"] = str(place)
    it = federation(n)
    state, rule = app.server_side(it)
    grid = InProcessGrid(app.client_app, [{"partition-id": i} for i in range(n)])
    options = {"rounds": ROUNDS, "n_clients": n, "settings": it.model_dump(), "timeout": 600}
    return flower.serve(grid, state, rule, folder=place / "run", **options)[1]


class Memory(threading.Thread):
    """The most memory that a process and its descendants held, MB; every half second."""

    def __init__(self, process: psutil.Process):
        super().__init__(daemon=True)
        self.process, self.most, self.over = process, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            held = 0
            for each in [self.process, *self.process.children(recursive=True)]:
                try:
                    held += each.memory_full_info().pss
                except psutil.Error:
                    continue
            self.most = max(self.most, held / 2**20)


def simulation(n: int, place: Path) -> tuple[list[dict], float]:
    """The history of a run in Flower's simulation, and its memory in MB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = {"TELEMETRY_ENABLED": "0", "DISABLE_UPDATE_CHECK": "1", "DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    environment = os.environ | {f"FLWR_{key}": value for key, value in keys.items()}
    environment |= {"FLWR_HOME": str(place), "MEDSEC_FEDERATION": str(place / "federation")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(paths.ROOT)}
    connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (place / "config.toml").write_text(connection)
    shutil.copytree(paths.ROOT / "flower_app", place / "app")
    listen = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (place / "log").open("w") as log:
        server = subprocess.Popen([BIN / "flower-superlink", *listen], env=environment, stdout=log, stderr=log)
    memory = Memory(psutil.Process(server.pid))
    try:
        memory.start()
        time.sleep(10)
        config = " ".join(
            f"{k}={v}" for k, v in (SETTINGS | {"clients": str(n), "profile": f'"{place}/few.yaml"'}).items()
        )
        (place / "few.yaml").write_text(f"inversion: {{federation: {{images_per_client: {IMAGES}}}}}\n")
        options = ["--federation-config", f"num-supernodes={n}", "--run-config", config]
        subprocess.run([BIN / "flwr", "run", place / "app", "here", *options], env=environment, check=True)
        lines, checkpoint, end = [], place / "federation" / "first" / "server.pt", time.monotonic() + PATIENCE
        while len(lines) < ROUNDS:
            time.sleep(2)
            lines = torch.load(checkpoint, weights_only=True)["history"] if checkpoint.exists() else []
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError((place / "log").read_text(errors="replace")[-2000:])
    finally:
        memory.over.set()
        for each in [*psutil.Process(server.pid).children(recursive=True), server]:
            each.kill()
    return [json.loads(line) for line in lines], memory.most


def fit(seconds: dict[int, float]) -> str:
    """Fixed cost and cost a client, by least squares on the ratio to the measured times."""
    n, t = np.array(list(seconds)), np.array(list(seconds.values()))
    slope, fixed = np.polyfit(n, t, 1, w=1 / t)
    return f"{1000 * fixed:.0f} ms + {1000 * slope:.1f} ms a client"


def main() -> None:
    one_thread()
    lines, by_way = [], {OURS: {}, "in-process Grid": {}, "simulation": {}}
    for n in CLIENTS:
        what = f"round, {n} clients"
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            by_way[OURS][n] = statistics.median(loop(n) for _ in range(3))
            history = in_process(n, Path(first))
            kept = sum(file.stat().st_size for file in Path(first).rglob("*.pt"))
            server = (Path(first) / "run" / "server.pt").stat().st_size
            by_way["in-process Grid"][n] = statistics.median(line["seconds"] for line in history[1:])
            history, memory = simulation(n, Path(second))
            by_way["simulation"][n] = statistics.median(line["seconds"] for line in history[1:])
        size = sum(value.nbytes for value in app.server_side(federation(n))[0].values()) / 1000
        each = (kept - server) / n / 1000
        disk = (
            f"{size:.0f} kB down and up a client; on disk {server / 1000:.0f} kB at the server, {each:.1f} kB a client"
        )
        for way, result, peak in ((OURS, "", ""), ("in-process Grid", disk, ""), ("simulation", "", round(memory))):
            lines.append(
                {
                    "what": what,
                    "library": way,
                    "seconds": float(f"{by_way[way][n]:.3g}"),
                    "result": result,
                    "peak MB": peak,
                }
            )
    lines += [{"what": "fit", "library": way, "seconds": "", "result": fit(found)} for way, found in by_way.items()]
    write("federation", lines, ("flwr", "ray"))


if __name__ == "__main__":
    main()
