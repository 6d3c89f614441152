"""Running commands are really killed, at random moments: nothing stays behind, and the next run says the same.

"The same" is what an undisturbed run says. It happens in a copy of this repository with tiny parameters. It is
part of `make fuzz`, which kills twenty times.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from nbformat import v4
from repository_copy import PATIENCE, copy_repository, run, start

from medsec.core.params import merge

STAGE = "01_backdoor_fedgan"
# The stage's real cells, few and tiny, in two processes; its figures and prose would tell nothing more here.
NOTEBOOK = """
import pandas as pd
from experiments import params
from experiments.backdoor_fedgan import cells as fedgan
from medsec.core import paths
from medsec.evidence import cells
plan = [cells.Cell(arm, seed) for seed in (0, 1) for arm in ("attack", "clean")]
made = cells.run(fedgan.EXPERIMENT, cohort, params.load(profile), plan, processes=2)
folder = paths.results(cohort)
folder.mkdir(parents=True, exist_ok=True)
for name in NAMES:
    cells.table(made).to_csv(folder / name, index=False)
"""
COMMANDS = {
    "repro": f"dvc repro {STAGE}",  # what `make repro` calls, of one stage
    "record": f"python -m experiments record {STAGE} --cohort phantom --profile tiny --processes 2",
}


def pytest_generate_tests(metafunc):
    if "who" not in metafunc.fixturenames:
        return
    kills = [("repro", "one", 0), ("record", "one", 0)]
    if metafunc.config.getoption("--hypothesis-profile") == "fuzz":
        kills = [(command, who, None) for command in COMMANDS for who in ("one", "all") for _ in range(5)]
    metafunc.parametrize(("command", "who", "seed"), kills)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The copy: tiny parameters and the notebook above."""
    folder = copy_repository(tmp_path_factory.mktemp("kills") / "repository")
    numbers, tiny = (
        yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (folder / "params.yaml", folder / "tests" / "golden" / "params.yaml")
    )
    del tiny["cohorts"]  # the stored one stays
    few = {"seeds": {"evaluation": [0, 1]}}  # without sweeps: six cells
    few["record"] = {
        "fedgan": {key: [] if isinstance(old, list) else old for key, old in numbers["record"]["fedgan"].items()}
    }
    (folder / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(merge(tiny, few)), encoding="utf-8")
    (folder / "params.yaml").write_text(yaml.safe_dump(merge(numbers, merge(tiny, few))), encoding="utf-8")
    outputs = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"][STAGE]
    names = [Path(next(iter(out))).name for kind in ("outs", "plots", "metrics") for out in outputs.get(kind, [])]
    code = NOTEBOOK.replace("NAMES", repr([name for name in names if not name.endswith(".ipynb")]))
    cells = [v4.new_code_cell('cohort = ""\nprofile = ""'), v4.new_code_cell(code)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / f"{STAGE}.ipynb")
    run("git add --all", folder)
    run("git commit --quiet --message tiny", folder)
    return folder


def again(folder, command):
    """As if the command had never been run."""
    run("git checkout --quiet HEAD -- .", folder)
    run("git clean --quiet --force -d -x --exclude data --exclude networks --exclude .dvc", folder)
    if command == "record":  # the stage of the other command needs it
        for old in (folder / "records" / "phantom").glob(f"{STAGE}*"):
            old.unlink()


def outcome(folder, command):
    """What a reader gets: the files of the stage, or the record without what its cells cost."""
    if command == "repro":
        files = [*folder.glob(f"results/phantom/{STAGE[:3]}*"), folder / "executed" / "phantom" / f"{STAGE}.ipynb"]
        return {file.name: file.read_bytes() for file in files}
    runs = pd.read_csv(folder / "records" / "phantom" / f"{STAGE}_runs.csv.gz", dtype=str)
    summary = (folder / "records" / "phantom" / f"{STAGE}.csv").read_text(encoding="utf-8")
    return runs.drop(columns=["seconds", "peak_mb"]).to_csv(), summary


def alive(folder):
    """Processes that work in the copy, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def cells_on_disk(folder):
    return list((folder / ".cells").rglob("*.npz"))


@pytest.fixture(scope="module")
def undisturbed(copy):
    """By a command its outcome, and how many seconds it took before and after its first finished cell."""
    found = {}
    for name, command in COMMANDS.items():
        again(copy, name)
        begin, first = time.monotonic(), None
        process = start(command, copy)
        while process.poll() is None and time.monotonic() - begin < PATIENCE:
            first = first or (time.monotonic() if cells_on_disk(copy) else None)
            time.sleep(0.05)
        assert process.returncode == 0, process.communicate()
        found[name] = outcome(copy, name), first - begin, time.monotonic() - first
    return found


@pytest.mark.kills
def test_a_killed_command_leaves_nothing_behind_and_is_run_again(copy, undisturbed, command, who, seed):
    whole, before_first, after_first = undisturbed[command]
    chance = random.Random(seed)
    again(copy, command)
    process = start(COMMANDS[command], copy)
    begin = time.monotonic()
    if command == "record":  # with cells on disk
        while not cells_on_disk(copy):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.05)
        wait = after_first * chance.random()
    else:
        wait = (before_first + after_first) * chance.random()
    time.sleep(wait)
    os.kill(process.pid, signal.SIGKILL) if who == "one" else os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 20
    while left := alive(copy):
        assert time.monotonic() < deadline, f"killed after {wait:.1f} s: {[each.cmdline() for each in left]} go on"
        time.sleep(0.2)
    run(COMMANDS[command], copy)
    assert outcome(copy, command) == whole, f"killed after {wait:.1f} s"
    assert not list((copy / ".cells").rglob("*.damaged"))


@pytest.mark.kills
def test_two_runs_at_once_are_told_apart(copy):
    """Of each of two pairs the second is told, in a line, that the first is at work; and that one ends well."""
    for first, second, said in (
        ("record", "record", "is already running"),
        ("repro", "repro", "Unable to acquire lock|is busy"),
    ):
        again(copy, first)
        running = start(COMMANDS[first], copy)
        begin = time.monotonic()
        while not cells_on_disk(copy):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.05)
        other = start(COMMANDS[second], copy)
        printed, errors = other.communicate(timeout=PATIENCE)
        assert other.returncode != 0
        assert re.search(said, printed + errors), printed + errors
        assert "Traceback" not in printed + errors
        running.communicate(timeout=PATIENCE)
        assert running.returncode == 0
