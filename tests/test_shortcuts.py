"""The first look at images of one's own: what is planted is found, what is clean is not; `medsec run`, which begins with it."""

import io
import re
import signal
import sys

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

import medphantom.chest
import medsec.__main__ as command
from experiments import params
from medsec import data
from medsec.core import paths
from medsec.data import Cohort, Split
from medsec.judge import shortcuts
from medsec.judge.shortcuts import area_interval, first_look, near_copies, told

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
    assert command._follow([sys.executable, "-c", code], {}, tmp_path) == status


def test_progress_is_told_and_who_is_ended_takes_the_run_along(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "EVERY", 0.2)
    (tmp_path / "folder" / "01").mkdir(parents=True)
    (tmp_path / "folder" / "01" / "a.npz").touch()
    handler = signal.getsignal(signal.SIGTERM)
    code = "import os, signal, time; time.sleep(0.6); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert command._follow([sys.executable, "-c", code], {}, tmp_path) == 128 + signal.SIGTERM
    assert "1 cells finished" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_page_shows_what_a_run_prints(tmp_path, monkeypatch, capsys):
    """Its first block of Python draws the images, its report is that of `medsec describe` for them."""
    monkeypatch.chdir(tmp_path)
    page = (paths.ROOT / "docs" / "bring-your-own-images.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert command.main(["describe", "my-images"]) == 0
    said = capsys.readouterr().out
    assert said[said.index("# First look") :] == re.search(r"```text\n(# First look.*?)```", page, re.DOTALL)[1]
