"""A reader's own images: all of notebook 01 runs, nothing made from them is committed, too few of a class are refused."""

import io
import math
import os
import re
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_repository import script

from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.gia_defense import cells as inversion_eval
from experiments.threat_matrix import cells as matrix_eval
from medsec import data
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.data import folder
from medsec.evidence import cells, check, tables
from medsec.nets import fit
from medsec.nets.models import SmallResNet

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
    """Three classes; no process of the run calls anybody."""
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


# What is made from them is ignored by git, refused by the hook, and nobody advises to commit it -----------------------

HOOK = "pipelines/own_images.py"


def png():
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("cohort", paths.OWN)
@pytest.mark.parametrize("place", [paths.executed, paths.results, paths.records, paths.networks, paths.cells])
def test_git_ignores_it(cohort, place, monkeypatch):
    monkeypatch.delenv("MEDSEC_CELLS")
    file = place(cohort) / "01_backdoor_fedgan.x"
    done = subprocess.run(["git", "check-ignore", "-q", file], cwd=paths.ROOT, check=False)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0
    assert script(HOOK).why_not(file.relative_to(paths.ROOT).as_posix()) == "made from your own images"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("mine/a.PNG", png(), "a PNG outside"),
        ("a.ipynb", b"\xff\xd8\xff\xe0", "a JPEG outside"),
        ("dvcstore/files/md5/ab/cd", b"PK\x03\x04", "an npz or another zip"),
        ("tests/IM0001", bytes(128) + b"DICM", "a DICOM file"),
        ("results/phantom/a.png", png(), None),
        ("results/npz.csv", b"x", None),
        ("medsec/data/folder.py", b"x", None),
        ("deleted.png", None, None),
    ],
)
def test_the_hook_knows_images_by_their_content(tmp_path, monkeypatch, name, content, why):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = script(HOOK).why_not(name)
    assert found == why if why is None else found.startswith(why)


def test_the_hook_is_installed_and_lets_this_repository_pass(tmp_path):
    hooks = yaml.safe_load((paths.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (hook,) = (hook for hook in hooks if HOOK in hook["entry"])
    assert not {"files", "types", "types_or", "exclude"} & set(hook)  # it sees every file
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert script(HOOK).main([name for name in listed.stdout.split("\0") if name]) == 0
    (tmp_path / "x\n.dcm").write_bytes(bytes(128) + b"DICM")
    done = subprocess.run(
        [sys.executable, paths.ROOT / HOOK, "x\n.dcm"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(r"'x\n.dcm' is a DICOM file: not to be committed")


@pytest.mark.parametrize("cohort", paths.OWN)
def test_check_does_not_advise_to_commit_it(cohort):
    with pytest.raises(InputError, match=f"cohort {cohort} is committed: what is made from your own images stays out"):
        check.against_commit(cohort)


# Three classes of which one is rare: nothing fails late, and a cohort too small is refused at once --------------------


def written(write_npz, place, train=400, rare=0.05):
    """An npz with 80 %, 15 % and the rest of three classes; the last one last."""
    content = {}
    for split, n in (("train", train), ("val", 40), ("test", 120)):
        cuts = [int(0.8 * n), n - max(1, round(rare * n))]
        content[f"{split}_labels"] = np.searchsorted(cuts, np.arange(n), side="right").astype(np.uint8)
        content[f"{split}_images"] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return write_npz(place, name="uneven.npz", **content)


def with_file(file, **change):
    tree = params.merge(params.load().model_dump(), {"cohorts": {"npz": {"path": str(file)}}})
    return params.validate(params.merge(tree, change))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, write_npz):
    return written(write_npz, tmp_path_factory.mktemp("uneven"), rare=0.02)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_every_class_is_among_the_first(labels, n, seed):
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = fit.with_every_class(order, labels, n)
    assert sorted(found.tolist()) == list(range(len(labels)))
    front = max(n, len(labels.unique()))
    assert set(labels[found[:front]].tolist()) == set(labels.tolist())
    if set(labels[order[:n]].tolist()) == set(labels.tolist()):
        assert torch.equal(found, order)  # nothing lacked, nothing moves


def test_the_first_test_images_have_the_last_class_in_every_draw(uneven):
    """Notebook 04 shows the first eight, and maps of those of the last class."""
    lacked = 0
    for seed in range(8):
        p = with_file(uneven, seeds={"tuning": [seed + 100], "evaluation": [0]})
        labels = torch.from_numpy(data.load("npz", p.cohorts)["test"].labels)
        plain = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        lacked += 2 not in labels[plain[: evasion_arms.FIRST]]
        assert set(evasion_arms.prepare("npz", p).splits["test"][1][: evasion_arms.FIRST].tolist()) == {0, 1, 2}
    assert lacked > 4  # a plain draw mostly has none


@pytest.mark.parametrize(
    ("change", "name"),
    [({"test_images": 2}, "evasion.test_images"), ({"attacks": {"slow_images": 1}}, "evasion.attacks.slow_images")],
)
def test_too_few_test_images_are_refused_before_training(uneven, change, name):
    with pytest.raises(
        InputError, match=rf"{name} leaves \d test images of npz without class .*; raise it to 8 or more"
    ):
        evasion_arms.prepare("npz", with_file(uneven, evasion=change))


def test_labels_to_draw_hold_every_class(uneven):
    """A classifier is trained on what a GAN draws: a class that none was drawn of would end it after the training."""
    labels = torch.tensor([0] * 997 + [1, 1, 2])
    setup = type("Setup", (), {"splits": {"reference": (None, labels)}})
    for seed in range(10):
        assert set(fedgan_eval.reference_labels(setup, 100, seed).tolist()) == {0, 1, 2}


def never(*_):
    raise AssertionError("something was trained")


@pytest.mark.parametrize("evaluated", [fedgan_eval, inversion_eval, matrix_eval])
def test_all_that_a_cohort_lacks_is_said_before_any_cell_runs(tmp_path, write_npz, evaluated, monkeypatch):
    p = with_file(written(write_npz, tmp_path, train=100))
    monkeypatch.setattr(cells.parallel, "run_cells", never)
    with pytest.raises(InputError) as caught:
        cells.run(evaluated.EXPERIMENT, "npz", p, evaluated.quick(p))
    message, lacking = str(caught.value), []
    if evaluated is fedgan_eval:
        lacking = [rf"split {name} has [1-9]\d images" for name in ("reference", "client", "public")]
        lacking.append("or raise fedgan.measure.threshold_fpr")
        lacking += ["raise cohorts.npz.shares.reference", "raise cohorts.npz.shares.client"]
    else:
        lacking = [
            r"seed \d: client \d holds a single image of class 2",
            r"split public has \d\d images",
            "lower n_clients",
        ]
    assert message.startswith("cohort npz is too small: ")
    assert message.isprintable()
    assert all(re.search(text, message) for text in lacking), message


def test_the_page_on_own_images_says_how_many_are_needed():
    """With the shares and parameters of params.yaml, of two classes alike and one image a patient."""
    p = params.load()
    shares, rate = p.cohorts.folder.shares, math.ceil(1 / p.fedgan.measure.threshold_fpr)
    needed = {"client": SmallResNet.n_features + 1, "reference": SmallResNet.n_features + 1, "public": rate}
    number = max(math.ceil(least / getattr(shares, split)) for split, least in needed.items())
    page = (paths.ROOT / "docs" / "bring-your-own-images.md").read_text(encoding="utf-8")
    assert f"**{number} images**" in page
    for n, enough in ((number, True), (number - 20, False)):
        split = folder.draw_splits([f"p{i}" for i in range(n)], np.arange(n) % 2, shares, p.cohorts.folder.seed)
        counts = dict(zip(data.SPLITS, np.bincount(split), strict=True))
        assert all(counts[name] >= least for name, least in needed.items()) == enough
