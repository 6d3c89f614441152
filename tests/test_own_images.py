"""Images of one's own: notebooks on them, the checks of a first look and their command, and that none gets into git."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_repository import script

import medphantom.chest
import medsec.__main__ as command
from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.catalogue import EXPERIMENTS
from experiments.gia_defense import cells as inversion_eval
from experiments.threat_matrix import cells as matrix_eval
from medsec import data
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.data import Cohort, Split
from medsec.data import folder as folder_files
from medsec.evidence import cells, check, claims, tables
from medsec.judge import own, shortcuts
from medsec.judge.shortcuts import area_interval, first_look, near_copies, told
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
        split = folder_files.draw_splits([f"p{i}" for i in range(n)], np.arange(n) % 2, shares, p.cohorts.folder.seed)
        counts = dict(zip(data.SPLITS, np.bincount(split), strict=True))
        assert all(counts[name] >= least for name, least in needed.items()) == enough


N, SIDE, COPIES = 240, 32, 12


@pytest.fixture(scope="module")
def chests():
    """(N, 1, SIDE, SIDE) drawn without disease: nothing in them tells the label, every second one."""
    styles = np.array(list(medphantom.chest.STYLES))[np.arange(N) // 2 % len(medphantom.chest.STYLES)]
    drawn = medphantom.chest.render(np.arange(N), np.zeros(N, np.uint8), seed=3, size=SIDE, style=styles)
    return drawn.images[:, None], np.arange(N) % 2


def halves(images, labels):
    return (images[: N // 2], labels[: N // 2]), (images[N // 2 :], labels[N // 2 :])


def in_colour(images):
    return np.repeat(images, 3, axis=1)


# Can the class be told? -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shortcuts.VIEWS)
def test_labels_that_mean_nothing_are_not_told(name, chests):
    images, labels = chests
    drawn = [
        told(shortcuts.VIEWS[name][0], *halves(images, np.random.default_rng(s).permutation(labels))) for s in range(10)
    ]
    assert sum(found.found for found in drawn) <= 1
    assert abs(np.mean([found.value for found in drawn]) - 0.5) < 0.05
    assert all(abs(found.shuffled.mean() - 0.5) < 0.05 for found in drawn)


@pytest.mark.parametrize("change", [lambda x: x, in_colour], ids=["grey", "colour"])
def test_a_marker_at_the_border_is_found_there_only(change, chests):
    images, labels = change(chests[0]).copy(), chests[1]
    images[labels == 1, :, 1:4, 28:31] = 255
    found = told(shortcuts.ring, *halves(images, labels))
    assert found.weighty
    assert found.shuffled.max() < 0.7
    assert found.low < found.value
    inner = images.copy()
    inner[:, :, :5], inner[:, :, :, -5:] = 0, 0
    assert not told(shortcuts.ring, *halves(inner, labels)).found


def test_a_marker_inside_is_none_of_the_border(chests):
    images, labels = chests[0].copy(), chests[1]
    images[labels == 1, :, 12:20, 12:20] = 255
    assert not told(shortcuts.ring, *halves(images, labels)).found
    assert told(shortcuts.thumbnail, *halves(images, labels)).weighty


@pytest.mark.parametrize("shift", [lambda y: 25 * y, lambda y: 30 * y * (1 - 2 * (np.arange(N) % 4 // 2))])
def test_a_shift_of_brightness_is_found_also_to_both_sides(shift, chests):
    images, labels = chests
    level = images.mean((1, 2, 3), keepdims=True)
    grey = 128 + (images - level) / 4  # all alike bright, and nothing is clipped
    assert not told(shortcuts.brightness, *halves(grey / 255, labels)).found
    moved = grey + shift(labels)[:, None, None, None]
    assert told(shortcuts.brightness, *halves(np.rint(moved).astype(np.uint8), labels)).weighty


def test_three_classes_and_floats_give_the_same_kinds_of_answer(chests):
    images, labels = chests[0].copy(), np.arange(N) % 3
    images[labels == 2, :, :3, :3] = 255
    found = told(shortcuts.ring, *halves(images, labels))
    assert found.found
    assert 0.7 < found.value < 0.95  # one class is told from the rest, the other two are not told from one another
    again = told(shortcuts.ring, *halves(images / 255, labels))
    assert again.value == pytest.approx(found.value, abs=0.01)


def test_a_rare_class_of_a_large_folder_is_not_lost(chests, monkeypatch):
    monkeypatch.setattr(shortcuts, "TRAINED_ON", 30)
    monkeypatch.setattr(shortcuts, "SCORED_ON", 30)
    images, labels = chests[0].copy(), (np.arange(N) % (N // 2) < 6).astype(int)
    images[labels == 1] = 255
    assert told(shortcuts.ring, *halves(images, labels)).value == 1


def test_the_interval_covers_and_has_a_width_where_all_pairs_are_right():
    rng, inside, runs = np.random.default_rng(0), 0, 400
    truth = 0.8413  # of normals one standard deviation times √2 apart
    for _ in range(runs):
        a, b = rng.normal(2**0.5, 1, 15), rng.normal(0, 1, 20)
        low, high = area_interval(float((a[:, None] > b).mean()), 15, 20)
        inside += low <= truth <= high
    assert 0.92 <= inside / runs <= 0.99
    assert area_interval(1.0, 10, 10)[0] < 0.85
    assert area_interval(0.0, 10, 10)[1] == pytest.approx(1 - area_interval(1.0, 10, 10)[0])


# Near copies ----------------------------------------------------------------------------------------------------------


def saved_anew(images):
    kept = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image[0]).save(stream, "JPEG", quality=70)
        kept.append(np.asarray(Image.open(stream))[None])
    return np.stack(kept)


CHANGES = {
    "saved anew": saved_anew,
    "brightened": lambda x: np.clip(1.15 * x + 10, 0, 255).astype(np.uint8),
    "moved": lambda x: np.roll(x, (1, -1), (2, 3)),
    "moved by half": lambda x: ((x + np.roll(x, 1, 3).astype(float)) / 2).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_near_copies_in_another_split_are_found_and_nothing_else(change, chests):
    images, labels = chests
    splits = np.arange(N) % 4 // 2  # 0, 0, 1, 1: both classes in both
    source = np.flatnonzero(splits == 0)[:COPIES]
    more = np.concatenate([images, change(images[source])]), np.concatenate([labels, labels[source]])
    found = near_copies(*more, np.concatenate([splits, np.ones(COPIES, int)]))
    planted = {*source.tolist(), *range(N, N + COPIES)}
    assert set(found.index.tolist()) <= planted
    assert len(found.index) >= 0.8 * len(planted)
    pairs = dict(zip(found.index.tolist(), found.of.tolist(), strict=True))
    assert all(pairs[N + k] == at for k, at in enumerate(source.tolist()) if N + k in pairs)
    assert found.unrelated == 0
    same = near_copies(*more, np.concatenate([splits, np.zeros(COPIES, int)]))
    assert not len(same.index)


def test_copies_are_found_where_every_image_has_one(chests):
    """A folder that was augmented before it was divided."""
    images, labels = chests
    both = np.concatenate([images, CHANGES["brightened"](images)])
    found = near_copies(both, np.concatenate([labels, labels]), np.repeat([0, 1], N))
    assert len(found.index) > 0.8 * len(both)


def test_of_many_images_some_are_compared(chests, monkeypatch):
    monkeypatch.setattr(shortcuts, "COMPARED", 100)
    images, labels = chests
    both = np.concatenate([images, images])
    found = near_copies(both, np.concatenate([labels, labels]), np.repeat([0, 1], N))
    assert found.n == 100
    assert len(found.index)
    assert all(abs(a - b) == N for a, b in zip(found.index, found.of, strict=True))


# The report -----------------------------------------------------------------------------------------------------------


def cohort(images, labels, shares=(0.4, 0.15, 0.2, 0.1, 0.15), classes=("ill", "well")) -> Cohort:
    ends = np.rint(np.cumsum(shares) * len(labels)).astype(int)
    parts = np.split(np.random.default_rng(0).permutation(len(labels)), ends[:-1])
    splits = {name: Split(images[part], labels[part]) for name, part in zip(data.SPLITS, parts, strict=True)}
    return Cohort("folder", splits, classes, (), "", "", "", (), {})


def test_the_report_warns_of_what_is_planted_and_of_nothing_else(chests):
    images, labels = chests
    assert first_look(cohort(images, labels)).verdict.startswith(("Nothing gives", "Too few"))
    marked = images.copy()
    marked[labels == 1, :, :3, :3] = 255
    marked[labels == 0, :, :3, :3] = 0
    report = first_look(cohort(marked, labels))
    assert report.verdict.startswith("Look before you train: the class can be told from the border alone")
    assert "copy" not in report.verdict
    copied = first_look(cohort(np.concatenate([images, images[:40]]), np.concatenate([labels, labels[:40]])))
    assert "have a near copy in another split" in copied.verdict
    assert "border" not in copied.verdict.partition("Too few")[0]


@pytest.mark.parametrize("name", ["phantom", "fundus"])
def test_the_drawn_cohorts_give_no_false_alarm(name):
    p = params.load().cohorts
    images = p.phantom.images.model_copy(update=dict.fromkeys(data.SPLITS, 160))
    sections = {key: getattr(p, key).model_copy(update={"images": images}) for key in ("phantom", "fundus")}
    report = first_look(data.load(name, p.model_copy(update=sections), size=28))
    said = report.table.set_index("measure")
    assert "near copy" not in report.verdict
    assert said.loc["images with one in another split", "value"] == 0
    assert "Look before" not in report.verdict
    # The phantom's opacities are large and bright, which its pixels show; the eyes' lesions are small.
    assert (said.loc["8 × 8 pixels", "low"] > 0.6) == (name == "phantom")


@pytest.mark.parametrize("n", [2, 12, 50])
def test_few_images_are_no_reason_to_crash_nor_to_acquit(n):
    images = np.random.default_rng(0).integers(0, 256, (n, 3, 28, 28), dtype=np.uint8)
    report = first_look(cohort(images, np.arange(n) % 2))
    assert "Too few images to judge" in report.verdict
    assert "near copies" in report.verdict or n >= shortcuts.LEAST_COMPARED
    assert "Nothing" not in report.verdict
    if n <= 12:
        assert report.to_markdown().count("cannot be judged") == 2 * (len(shortcuts.VIEWS) + 1)


def test_images_without_content_are_reported(chests):
    report = first_look(cohort(np.zeros((N, 1, 28, 28), np.uint8), chests[1]))
    assert "the class can be told" not in report.verdict


# medsec run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """80 images of noise in two classes, in the working directory."""
    rng = np.random.default_rng(0)
    for k in range(80):
        place = tmp_path / "my-images" / ("ill", "well")[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(place / f"p{k:02d}_a.png")
    (tmp_path / "my-images" / "ill" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_notebook_runs_on_a_folder_and_the_report_comes_first(folder, capfd):
    written = [paths.ROOT / name for name in ("executed", "results", "profiles", "networks", ".cells")]
    before = [sorted(place.rglob("*")) for place in written]
    assert command.main(["run", "00", "--data", "my-images"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("# Cohort folder")
    assert "| client | 32 | 16 | 16 |" in said.out
    assert "skipped, neither PNG, JPEG nor DICOM: 1 (ill/notes.txt)" in said.out
    assert "# First look" in said.out
    out = folder / "my-images-medsec-00"
    assert (out / "first-look.md").read_text(encoding="utf-8") == said.out[:-1]
    executed = nbformat.read(paths.executed("folder", out) / "00_data_and_threats.ipynb", as_version=4)
    last = [cell for cell in executed.cells if cell.cell_type == "code"][-1]
    assert "".join(output.get("text", "") for output in last.outputs) == "ok\n"
    assert [sorted(place.rglob("*")) for place in written] == before
    assert command.main(["run", "00", "--data", "my-images", "--size", "32"]) == 2
    assert "holds something else than this run" in capfd.readouterr().err


def started(monkeypatch, arguments):
    """The command that `medsec run` would start, and its environment."""
    kept = []
    monkeypatch.setattr(command, "_follow", lambda *given: kept.append(given) or 0)
    assert command.main(["run", *arguments]) == 0
    return kept[0]


def test_what_was_asked_for_is_in_the_profile_that_the_notebook_gets(folder, monkeypatch):
    lines = [f"{file.parent.name}/{file.name},x{file.stem}" for file in (folder / "my-images").rglob("*.png")]
    (folder / "who.csv").write_text("\n".join(["file,patient", *lines]))
    (folder / "few.yaml").write_text(yaml.safe_dump({"fedgan": {"rounds": 5}}))
    asked = ["01_backdoor_fedgan", "--data", "my-images", "--patients", "who.csv", "--size", "32", "--channels", "3"]
    line, environment, _ = started(monkeypatch, [*asked, "--profile", "few.yaml", "--out", "o"])
    assert line[1:] == [
        *("-m", "experiments", "run", "01_backdoor_fedgan", "--cohort", "folder"),
        *("--profile", str(folder / "o" / "mine.yaml")),
    ]
    assert environment["MEDSEC_OUT"] == str(folder / "o")
    assert environment["MEDSEC_CELLS"].startswith(environment["MEDSEC_OUT"])
    p = params.load(line[-1])
    assert (p.cohorts.folder.path, p.cohorts.folder.table) == (str(folder / "my-images"), str(folder / "who.csv"))
    assert (p.cohorts.folder.size, p.cohorts.folder.channels, p.fedgan.rounds) == (32, 3, 5)
    assert p.fedgan.n_clients == params.load().fedgan.n_clients
    assert data.load("folder", p.cohorts).channels == 3


def test_an_npz_runs_as_well(folder, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) if what == "images" else np.arange(n) % 2
        for split, n in (("train", 60), ("val", 20), ("test", 20))
        for what in ("images", "labels")
    }
    np.savez(folder / "mine.npz", **arrays)
    line, *_ = started(monkeypatch, ["02", "--data", "mine.npz"])
    assert line[5:7] == ["--cohort", "npz"]
    assert params.load(line[-1]).cohorts.npz.path == str(folder / "mine.npz")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["run", "07", "--data", "my-images"], "choose one of 00_data_and_threats, 01_"),
        (["run", "99", "--data", "my-images"], "choose one of"),
        (["run", "00", "--data", "nowhere"], "nowhere is no folder; give a folder"),
        (
            ["run", "00", "--data", "my-images", "--out", "my-images/out"],
            "inside the folder of your images; name another",
        ),
        (["run", "00", "--data", "my-images", "--out", str(paths.ROOT / "x")], "inside the folder of the repository"),
        (["run", "00", "--data", "my-images", "--out", "."], "holds something else than this run"),
        (["run", "00", "--data", "my-images", "--profile", "fast"], "unknown profile 'fast'"),
        (["describe", "my-images", "--patients", "^p"], "--patients: '^p' has 0 groups"),
        (["describe", "my-images", "--patients", "(z)"], "correct --patients"),
        (["describe", "my-images", "--patients", "no.csv"], "--patients no.csv does not exist"),
        (["describe", "my-images", "--size", "30"], "--size = 30: input should be a multiple of 4"),
        (["describe", "my-images", "--patients", "^(.)"], "missing from split"),
    ],
)
def test_mistakes_are_told_in_a_line_and_nothing_is_written(asked, said, folder, capsys):
    before = sorted(folder.iterdir())
    assert command.main(asked) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.abort()", 128 + signal.SIGABRT)]
)
def test_the_exit_status_is_passed_on(code, status, tmp_path):
    assert command._follow([sys.executable, "-c", code], {}, tmp_path / "plan.json") == status


def test_progress_is_told_and_who_is_ended_takes_the_run_along(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "EVERY", 0.2)
    plan, files = tmp_path / "plan.json", [tmp_path / f"{k}.npz" for k in range(4)]
    files[0].touch()
    handler = signal.getsignal(signal.SIGTERM)
    code = f"open({str(plan)!r}, 'w').write({json.dumps(list(map(str, files)))!r}); import os, signal, time; time.sleep(0.6); "
    code += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    plan.write_text("of a run before", encoding="utf-8")
    assert command._follow([sys.executable, "-c", code], {}, plan) == 128 + signal.SIGTERM
    assert "1 of 4 cells finished, about 1 min left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    os.utime(plan, (time.time() - 300,) * 2)
    assert command._left(plan).endswith("about 15 min left")
    for file in files:
        file.touch()
    assert command._left(plan) == ", 4 of 4 cells finished"


def test_who_waits_reads_what_is_planned(tmp_path, monkeypatch):
    """`cells.finish` says which files it is going to make, and makes them."""
    monkeypatch.setenv("MEDSEC_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("MEDSEC_CELLS", str(tmp_path))
    p = params.load()
    cell = cells.Cell("null", 0, keys={"m": 4})
    cells.run(EXPERIMENTS["02_feddetect"], "phantom", p, [cell], processes=1)
    (planned,) = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert Path(planned).is_file()
    assert Path(planned).name.startswith(cell.name)


# Verdicts, and a smaller notebook 04 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", sorted(file.stem for file in paths.NOTEBOOKS.glob("0[1-5]*.ipynb")))
def test_the_page_of_verdicts_says_what_the_claims_say(notebook):
    table = tables.read(paths.results("phantom") / f"{notebook}.csv")
    report = own.summary(notebook, table, "folder")
    (ledger,) = (name for name in claims.names() if claims.load(name)["table"] == notebook)
    expected = claims.verdicts(ledger, table, "folder")
    judged = expected[~expected["verdict"].isin([claims.NOT_HERE, claims.NOT_YET])]
    assert dict(zip(report.table["measure"], report.table["part"], strict=True)) == dict(
        zip(judged["claim"], judged["verdict"], strict=True)
    )
    assert f"Of {len(expected)} claims {len(judged)} can be judged" in report.verdict
    lacking = [int(text.split()[0]) for text in report.not_tested if "cannot be judged here" in text]
    assert sum(lacking) == len(expected) - len(judged)


def test_a_table_that_lacks_rows_is_no_error_and_no_verdict():
    table = tables.read(paths.results("phantom") / "01_backdoor_fedgan.csv")
    report = own.summary("01_backdoor_fedgan", table[:0], "folder")
    assert report.verdict.startswith("None of the 23 claims")
    assert report.table.empty
    assert "nothing was measured" in report.to_html()
    assert own.summary("00_data_and_threats", table, "folder") is None


@pytest.mark.parametrize(
    ("each", "size", "epochs"), [(10, 28, (8, 30, 40)), (400, 32, (3, 12, 17)), (4000, 64, (3, 6, 8))]
)
def test_many_images_are_seen_in_fewer_epochs(each, size, epochs):
    images, labels = np.zeros((each, 1, size, size), np.uint8), np.arange(each) % 2
    of = Cohort("folder", {name: Split(images, labels) for name in data.SPLITS}, ("a", "b"), (), "", "", "", (), {})
    change = own.smaller("04_adversarial_pruning_defense", of)
    assert tuple(own.epochs(change).values()) == epochs
    assert own.smaller("03_gia_defense", of) == {}
    whole, usual = params.validate(params.merge(params.load().model_dump(), change)), params.load().evasion
    assert whole.evasion.sweep == usual.sweep  # what claims are about is measured
    assert {name: most for name, (most, _) in own.EPOCHS.items()} == own.epochs(params.load().model_dump())
    if each == 10:
        few, many = (own.seconds(of, change, whole.evasion.clean, n) for n in (1, 30))
        assert 0 < few < many


def test_notebook_04_says_its_time_and_a_profile_has_its_way(folder, monkeypatch, capsys):
    line, *_ = started(monkeypatch, ["04", "--data", "my-images", "--out", "o"])
    assert params.load(line[-1]).evasion.test_images == own.FEWER["test_images"]
    assert re.search(r"about \d+ minutes of one processor, \d+ on the \d+ here", capsys.readouterr().err)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"evasion": {"test_images": 20}}))
    line, *_ = started(monkeypatch, ["04", "--data", "my-images", "--profile", "mine.yaml", "--out", "o2"])
    assert params.load(line[-1]).evasion.test_images == 20
    assert params.load(line[-1]).evasion.hardened.epochs == params.load().evasion.hardened.epochs
    (folder / "mine.yaml").write_text(yaml.safe_dump({"at_ramp": {"epochs": 5}}))
    line, *_ = started(monkeypatch, ["04", "--data", "my-images", "--profile", "mine.yaml", "--out", "o3"])
    assert params.load(line[-1]).at_ramp.epochs == 5
    assert params.load(line[-1]).evasion.test_images == own.FEWER["test_images"]


def test_the_page_shows_what_a_run_prints(tmp_path, monkeypatch, capsys):
    """Its first block of Python draws the images, its report is that of `medsec describe` for them."""
    monkeypatch.chdir(tmp_path)
    page = (paths.ROOT / "docs" / "bring-your-own-images.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert command.main(["describe", "my-images"]) == 0
    said = capsys.readouterr().out
    assert said[said.index("# First look") :] == re.search(r"```text\n(# First look.*?)```", page, re.DOTALL)[1]
