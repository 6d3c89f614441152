"""The habits of docs/dvc.md, for real: metrics, plots and the queue, on a copy of this repository with a toy for notebook 01.

The copy has the real dvc.yaml, parameters, package and images; its notebook 01 writes the stage's files without training.
"""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from nbformat import v4

from medsec.core import paths

STAGE = "01_backdoor_fedgan"
PATIENCE = 240  # seconds to wait for an experiment: this machine may be busy
TOY = """
import json, os, pathlib
import medsec
from medsec.core import paths
from experiments import params
from medsec.show import panels
home = pathlib.Path.cwd().parent
assert paths.ROOT == home, f"medsec of {paths.ROOT}, not of this experiment, {home}"
assert not panels.is_live()
rounds = params.load(profile).fedgan.rounds
folder = paths.results(cohort)
folder.mkdir(parents=True, exist_ok=True)
for name in names:
    (folder / name).write_bytes(b"toy")
metrics = {"poison": {"attack": {"trigger_rate": rounds / 100}}}
(folder / "01_metrics.json").write_text(json.dumps(metrics))
curve = [f"{r},0,{r / 100},{r / 50}" for r in range(1, rounds + 1)]
(folder / "01_rounds.csv").write_text("\\n".join(["round,clean,poison,boost", *curve]) + "\\n")
"""


def run(command, folder, *more, **environment):
    """What a command prints in a folder; it must succeed. No name of a user is set, and another medsec is in the path."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEDSEC_", "DVC_", "GIT_"))}
    clean |= {"PYTHONPATH": str(paths.ROOT), "DVC_NO_ANALYTICS": "1", "MEDSEC_LIVE": "1"}
    clean["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), clean["PATH"]))  # a stage says "python"
    done = subprocess.run(
        [*shlex.split(command), *more],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def dvc(command, folder, *more, **environment):
    return run(f"{shlex.quote(sys.executable)} -m dvc {command}", folder, *more, **environment)


def left_running(folder):
    """Processes that work in a folder or were started for it."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        about = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.pid != os.getpid() and any(str(folder) in part for part in about):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A repository of its own: the tracked files as they are here, images fetched, notebook 01 a toy, results its own."""
    if subprocess.run(["git", "rev-parse"], cwd=paths.ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("habits") / "repository"
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=paths.ROOT, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (paths.ROOT / name).is_file() and not name.startswith(("records/", "executed/", "results/pneumoniamnist/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.ROOT / name, folder / name)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    needed = [name for name in stages[STAGE]["deps"] if name.startswith("records/")]  # large, and the toy reads none
    for name in [*needed, f"executed/phantom/{STAGE}.ipynb"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("toy", encoding="utf-8")
    names = [Path(next(iter(out))).name for kind in ("outs", "plots") for out in stages[STAGE][kind]]
    names = [name for name in names if name.startswith("01_") and not name.endswith((".ipynb", "rounds.csv"))]
    cells = [v4.new_code_cell('cohort = ""\nprofile = ""'), v4.new_code_cell(f"names = {names}\n{TOY}")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / f"{STAGE}.ipynb")

    run("git init --quiet --initial-branch main", folder)
    run("git config user.email habits@example.org", folder)
    run("git config user.name Habits", folder)
    run("git config gc.auto 0", folder)
    run("git add --all", folder)
    run("git commit --quiet --message start", folder)
    dvc("pull --quiet", folder)
    yield folder
    dvc("queue stop --kill", folder)
    for process in left_running(folder):
        process.kill()


@pytest.fixture(scope="module")
def queued(copy):
    """One experiment, from the queue, with another number of rounds; and how the folder looked before."""
    assert run("git status --porcelain", copy) == ""
    dvc("exp run --queue --name few -S fedgan.rounds=3", copy, STAGE)
    dvc("queue start -j 1", copy)
    deadline = time.monotonic() + PATIENCE
    while not (found := run("git for-each-ref refs/exps --format=%(refname)", copy)).endswith("/few\n"):
        if time.monotonic() > deadline or "Failed" in (status := dvc("queue status", copy)):
            pytest.fail(f"{found}\n{status}\n{dvc('queue logs few', copy)}")
        time.sleep(3)
    return SimpleNamespace(folder=copy, name="few", rounds=3)


def test_the_queue_leaves_the_folder_alone(queued):
    assert run("git status --porcelain", queued.folder) == ""
    assert "Success" in dvc("queue status", queued.folder)


def test_metrics_of_an_experiment(queued):
    (changed,) = json.loads(dvc("metrics diff --json HEAD", queued.folder, queued.name)).items()
    file, metrics = changed
    assert file == "results/phantom/01_metrics.json"
    assert metrics["poison.attack.trigger_rate"]["new"] == queued.rounds / 100
    shown = json.loads(dvc("metrics show --json", queued.folder))[""]["data"]
    assert shown[file]["data"]["poison"]["attack"]["trigger_rate"] == metrics["poison.attack.trigger_rate"]["old"]
    before = yaml.safe_load((queued.folder / "params.yaml").read_text(encoding="utf-8"))["fedgan"]["rounds"]
    params = json.loads(dvc("params diff --json HEAD", queued.folder, queued.name))
    assert params == {"params.yaml": {"fedgan.rounds": {"old": before, "new": queued.rounds, "diff": 3 - before}}}


def test_the_table_of_experiments(queued):
    columns = r"Experiment|fedgan\.rounds|.*poison\.attack\.trigger_rate"
    table = dvc("exp show --csv --only-changed", queued.folder, "--drop", ".*", "--keep", columns)
    rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(table))}
    assert float(rows["few"]["fedgan.rounds"]) == queued.rounds
    assert any(name.endswith("trigger_rate") and float(rows["few"][name]) == 0.03 for name in rows["few"])


def test_plots_are_one_page_of_figures_and_curves(queued):
    """Also that the template of the curves fits the table they are made of, for both revisions."""
    dvc("plots diff HEAD", queued.folder, queued.name)
    page = (queued.folder / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    (curves,) = re.findall(r'<div id = "trigger_rate_phantom">.*?var spec = (\{.*?\});\s*vegaEmbed', page, re.DOTALL)
    points = json.loads(curves)["data"]["values"]
    new = {(point["field"], point["round"]) for point in points if point["rev"] == queued.name}
    assert new == {(name, str(r)) for name in ("clean", "poison", "boost") for r in range(1, queued.rounds + 1)}
    assert {point["rev"] for point in points} == {"HEAD", queued.name}
    assert 'id="no-vega"' in page, "says it where the curves cannot be drawn"
    images = {file.name for file in (queued.folder / "dvc_plots" / "static").glob("*.png")}
    assert {f"{rev}_results_phantom_01_backdoor_fedgan_gallery.png" for rev in ("HEAD", queued.name)} <= images
    assert run("git status --porcelain", queued.folder) == "", "the page is ignored"


def test_taking_an_experiment_and_going_back(queued):
    """Last: it changes the folder, and goes back."""
    mine = queued.folder / "README.md"
    mine.write_text("mine", encoding="utf-8")
    dvc("exp apply", queued.folder, queued.name)
    assert mine.read_text(encoding="utf-8") != "mine", "docs/dvc.md warns of this"
    metrics = json.loads((queued.folder / "results" / "phantom" / "01_metrics.json").read_text(encoding="utf-8"))
    assert metrics["poison"]["attack"]["trigger_rate"] == queued.rounds / 100

    run("git checkout --quiet params.yaml", queued.folder)
    file = queued.folder / "params.yaml"
    section, rest = file.read_text(encoding="utf-8").split("\nfedgan:", 1)
    typed, n = re.subn(r"(?m)^  rounds: \d+", f"  rounds: {queued.rounds}", rest, count=1)
    assert n == 1
    file.write_text(f"{section}\nfedgan:{typed}", encoding="utf-8")
    assert "up to date" in dvc("status", queued.folder, STAGE), "DVC compares values, not layout"

    run("git checkout --quiet .", queued.folder)
    assert run("git status --porcelain", queued.folder) == ""
    run("git stash apply --quiet refs/exps/apply/stash", queued.folder)
    assert mine.read_text(encoding="utf-8") == "mine"
    run("git checkout --quiet .", queued.folder)


def test_nothing_goes_on_running(queued):
    """A worker that has nothing left to do ends by itself."""
    deadline = time.monotonic() + 60
    while left := left_running(queued.folder):
        if time.monotonic() > deadline:
            pytest.fail(f"still running: {[process.info['cmdline'] for process in left]}")
        time.sleep(1)


# What the pages say -------------------------------------------------------------------------------------------------------

PAGES = [paths.ROOT / "README.md", paths.ROOT / "CONTRIBUTING.md", *sorted((paths.ROOT / "docs").glob("*.md"))]


def commands(page):
    """Every dvc command of a page: the lines of its blocks, and what stands in the text between backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = [line.split("   #")[0].strip() for line in blocks.splitlines()]
    return [line for line in [*lines, *re.findall(r"`([^`\n]+)`", text)] if re.match(r"(\w+=\S+ )*dvc \w", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_dvc_knows_every_command_and_option_that_a_page_names(page, caplog):
    stages = yaml.safe_load((paths.ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    numbers = yaml.safe_load((paths.ROOT / "params.yaml").read_text(encoding="utf-8"))
    for line in commands(page):
        words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S+", word)][1:]
        try:
            args = get_main_parser().parse_args([word for word in words if word != "…"])
        except DvcParserError:
            problem = caplog.messages[-1]
            assert "arguments are required" in problem, f"{page.name}: dvc does not take: {line}: {problem}"
            continue  # a command that is only mentioned
        if args.cmd in ("repro", "exp") and getattr(args, "targets", None):
            for target in args.targets:
                assert target.split(":")[-1] in {*stages, "dvc.yaml"}, f"{page.name}: no stage {target} in: {line}"
        for change in getattr(args, "set_param", None) or []:
            found = numbers
            for part in change.split("=")[0].split("."):
                assert part in found, f"{page.name}: params.yaml has no {change.split('=')[0]}: {line}"
                found = found[part]
