"""Somebody's own folder of colour images, three classes, through the whole of notebook 01 as the tutorial says."""

import os
import subprocess
import sys
import time

import nbformat
import numpy as np
import yaml
from PIL import Image

from medsec.core import paths
from medsec.evidence import tables

SMALL = {
    "seeds": {"evaluation": [0, 1]},
    "fedgan": {
        "n_clients": 2,
        "images_per_client": 40,
        "rounds": 3,
        "measure": {
            "synthetic": 100,
            "threshold_fpr": 0.05,
            "extractor_epochs": 1,
            "downstream_epochs": 1,
            "probe": 16,
        },
    },
}
LIMIT = 300  # seconds: five minutes
# In every process of the run, as Python's own sitecustomize: no way out of the machine. What is tried is written down, too.
GUARD = """
import pathlib, sys
TRIED = pathlib.Path(__file__).with_name("tried")

def watch(event, args):
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else "localhost"  # a tuple: an Internet address, else a local pipe
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "", None):
        with TRIED.open("a") as log:
            log.write(f"{event} {host}\\n")
        raise PermissionError(f"{event} {host}: nothing leaves this machine")

sys.addaudithook(watch)
"""


def test_a_folder_of_colour_images_runs_through_notebook_01(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("blue", "green", "red")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for patient in range(120):
            pixels = rng.integers(0, 120, (36, 36, 3), dtype=np.uint8)
            pixels[..., 2 - k] += 100
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"p{k}{patient:03d}_a.png")
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({**SMALL, "cohorts": {"folder": {"path": str(tmp_path / "images")}}}))
    out = tmp_path / "out"
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    python_path = os.pathsep.join(filter(None, (str(guard), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"MEDSEC_OUT": str(out), "PYTHONPATH": python_path}
    leak = "import socket; socket.create_connection(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", leak], env=environment, capture_output=True, check=False)
    assert b"nothing leaves this machine" in done.stderr
    (guard / "tried").unlink()
    command = [sys.executable, "-m", "experiments", "run", "01_backdoor_fedgan"]
    command += ["--cohort", "folder", "--profile", str(profile)]
    start = time.monotonic()
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (guard / "tried").exists(), (guard / "tried").read_text()
    assert time.monotonic() - start < LIMIT
    table = tables.read(paths.results("folder", out) / "01_backdoor_fedgan.csv")
    assert tables.row(table, variant="boost", scenario="attack", metric="trigger_rate")["n"] == 2
    executed = nbformat.read(paths.executed("folder", out) / "01_backdoor_fedgan.ipynb", as_version=4)
    last = [cell for cell in executed.cells if cell.cell_type == "code"][-1]
    assert "".join(output.get("text", "") for output in last.outputs) == "ok\n"
