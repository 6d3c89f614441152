"""In a copy of this repository, for real: what docs/dvc.md promises, and commands killed at random moments."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from dvc.cli import DvcParserError, parser
from nbformat import v4

from medsec.core import paths
from medsec.core.params import merge

STAGE = "01_backdoor_fedgan"
PATIENCE = 240  # seconds to wait: this machine may be busy


def start(command, folder):
    """A command in a folder. No name of a user is set, and another medsec is in the path."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEDSEC_", "DVC_", "GIT_"))}
    clean |= {"PYTHONPATH": str(paths.ROOT), "DVC_NO_ANALYTICS": "1", "MEDSEC_LIVE": "1"}
    clean["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), clean["PATH"]))  # a stage says "python"
    words = shlex.split(command)
    words = [sys.executable, "-m", *words] if words[0] == "dvc" else words
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=clean, start_new_session=True, **pipes)


def run(command, folder):
    """What a command prints; it must succeed."""
    process = start(command, folder)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"{command}: {printed[-1000:]}\n{errors[-2000:]}"
    return printed


def copy_repository(folder):
    """A repository of its own: the files that git knows or would take, as they are here, and what `dvc pull` brings."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=paths.ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (paths.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.ROOT / name, folder / name)
    run("git init --quiet --initial-branch main", folder)
    for setting in ("user.email habits@example.org", "user.name Habits", "gc.auto 0"):
        run(f"git config {setting}", folder)
    run("git add --all", folder)
    run("git commit --quiet --message start", folder)
    run("dvc pull --quiet", folder)
    return folder


# What docs/dvc.md promises --------------------------------------------------------------------------------------------
# Nothing to do at first, another number, a killed run; the last two with a toy for notebook 01, which writes the stage's files
# without training.

ENDLESS = 99  # so many rounds go on for ever
TOY = f"""
import json, pathlib, time
from experiments import params
from medsec.core import paths
home = pathlib.Path.cwd().parent
assert paths.ROOT == home, f"medsec of {{paths.ROOT}}, not of this copy, {{home}}"
rounds = params.load(profile).fedgan.rounds
folder = paths.results(cohort)
folder.mkdir(parents=True, exist_ok=True)
for name in names:
    (folder / name).write_bytes(b"toy")
(folder / "01_metrics.json").write_text(json.dumps({{"poison": {{"attack": {{"trigger_rate": rounds / 100}}}}}}))
(home / "out").mkdir(exist_ok=True)
(home / "out" / "written").touch()
while rounds == {ENDLESS}:
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("habits") / "repository")


@pytest.fixture(scope="module")
def toy(copy):
    """The copy with a toy for notebook 01, and its outputs."""
    outputs = yaml.safe_load((copy / "dvc.yaml").read_text(encoding="utf-8"))["stages"][STAGE]
    names = [Path(next(iter(out))).name for kind in ("outs", "plots") for out in outputs[kind]]
    names = [name for name in names if not name.endswith(".ipynb")]
    cells = [v4.new_code_cell('cohort = ""\nprofile = ""'), v4.new_code_cell(f"names = {names}\n{TOY}")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=cells), copy / "notebooks" / f"{STAGE}.ipynb")
    run("git commit --quiet --all --message toy", copy)
    return copy


def test_a_clone_has_nothing_to_do(copy):
    found = json.loads(run("dvc status --json", copy))
    ours = {stage: why for stage, why in found.items() if not re.search(r"record_\d\d$", stage)}  # frozen: made by hand
    assert not ours, "the pipeline has not been run since; or run: dvc push"


def test_another_number_and_back(toy):
    before = yaml.safe_load((toy / "params.yaml").read_text(encoding="utf-8"))["fedgan"]["rounds"]
    run(f"dvc exp run -S fedgan.rounds=3 -S seeds.evaluation=[0] {STAGE}", toy)
    ((file, metrics),) = json.loads(run("dvc metrics diff --json", toy)).items()
    assert file == "results/phantom/01_metrics.json"
    assert metrics["poison.attack.trigger_rate"]["new"] == 0.03
    changed = json.loads(run("dvc params diff --json", toy))["params.yaml"]
    assert changed["fedgan.rounds"] == {"old": before, "new": 3, "diff": 3 - before}
    run("git checkout --quiet .", toy)
    assert run("git status --porcelain", toy) == ""


def test_a_killed_run_leaves_the_old_outputs(toy):
    old = {file: file.read_bytes() for file in [*toy.glob("results/phantom/*"), *toy.glob("executed/phantom/*")]}
    (written := toy / "out" / "written").unlink(missing_ok=True)
    process = start(f"dvc exp run -S fedgan.rounds={ENDLESS} {STAGE}", toy)
    deadline = time.monotonic() + PATIENCE
    while not written.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:  # it first: it must not see its stage fail and tidy up
        each.kill()
    process.wait(60)
    assert {file: file.read_bytes() for file in old} == old
    changed = run("git status --porcelain", toy).splitlines()
    assert [line[3:] for line in changed] == ["params.yaml"]  # whether DVC has staged it depends on how far it was
    run("git checkout --quiet HEAD -- .", toy)
    run(f"dvc repro {STAGE}", toy)  # no lock is left
    assert json.loads((toy / "results" / "phantom" / "01_metrics.json").read_text(encoding="utf-8"))


PAGES = [paths.ROOT / "README.md", paths.ROOT / "CONTRIBUTING.md", *sorted((paths.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_exist(page, monkeypatch):
    """Every dvc command in its blocks and between its backticks: the command, its options, its stages, its parameters."""
    said = []
    monkeypatch.setattr(parser.logger, "error", said.append)  # other tests' libraries change how things are logged
    stages = yaml.safe_load((paths.ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    numbers = yaml.safe_load((paths.ROOT / "params.yaml").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    lines = [
        line.split("   #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        if not re.match(r"(\w+=\S+ )*dvc \w", line):
            continue
        words = [word for word in shlex.split(line) if word != "…" and not re.fullmatch(r"[A-Z_]+=\S+", word)][1:]
        try:
            args = parser.get_main_parser().parse_args(words)
        except DvcParserError:
            assert "arguments are required" in said[-1], f"dvc does not take: {line}"
            continue  # a command that is only mentioned
        for target in (getattr(args, "targets", None) or []) if args.cmd in ("repro", "exp") else []:
            assert target.split(":")[-1] in {*stages, "dvc.yaml"}, line
        for change in getattr(args, "set_param", None) or []:
            found = numbers
            for part in change.split("=")[0].split("."):
                assert part in found, line
                found = found[part]


# Killed commands: nothing stays behind, and the next run says the same ------------------------------------------------
# "The same" is what an undisturbed run says. The copy has tiny parameters. It is part of `make fuzz`, which kills twenty times.

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
def tiny(tmp_path_factory):
    """A copy of its own: tiny parameters and the notebook above."""
    folder = copy_repository(tmp_path_factory.mktemp("kills") / "repository")
    numbers, small = (
        yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (folder / "params.yaml", folder / "tests" / "golden" / "params.yaml")
    )
    del small["cohorts"]  # the stored one stays
    few = {"seeds": {"evaluation": [0, 1]}}  # without sweeps: six cells
    few["record"] = {
        "fedgan": {key: [] if isinstance(old, list) else old for key, old in numbers["record"]["fedgan"].items()}
    }
    (folder / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(merge(small, few)), encoding="utf-8")
    (folder / "params.yaml").write_text(yaml.safe_dump(merge(numbers, merge(small, few))), encoding="utf-8")
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
def undisturbed(tiny):
    """By a command its outcome, and how many seconds it took before and after its first finished cell."""
    found = {}
    for name, command in COMMANDS.items():
        again(tiny, name)
        begin, first = time.monotonic(), None
        process = start(command, tiny)
        while process.poll() is None and time.monotonic() - begin < PATIENCE:
            first = first or (time.monotonic() if cells_on_disk(tiny) else None)
            time.sleep(0.05)
        assert process.returncode == 0, process.communicate()
        found[name] = outcome(tiny, name), first - begin, time.monotonic() - first
    return found


@pytest.mark.kills
def test_a_killed_command_leaves_nothing_behind_and_is_run_again(tiny, undisturbed, command, who, seed):
    whole, before_first, after_first = undisturbed[command]
    chance = random.Random(seed)
    again(tiny, command)
    process = start(COMMANDS[command], tiny)
    begin = time.monotonic()
    if command == "record":  # with cells on disk
        while not cells_on_disk(tiny):
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
    while left := alive(tiny):
        assert time.monotonic() < deadline, f"killed after {wait:.1f} s: {[each.cmdline() for each in left]} go on"
        time.sleep(0.2)
    run(COMMANDS[command], tiny)
    assert outcome(tiny, command) == whole, f"killed after {wait:.1f} s"
    assert not list((tiny / ".cells").rglob("*.damaged"))


@pytest.mark.kills
def test_two_runs_at_once_are_told_apart(tiny):
    """Of each of two pairs the second is told, in a line, that the first is at work; and that one ends well."""
    for first, second, said in (
        ("record", "record", "is already running"),
        ("repro", "repro", "Unable to acquire lock|is busy"),
    ):
        again(tiny, first)
        running = start(COMMANDS[first], tiny)
        begin = time.monotonic()
        while not cells_on_disk(tiny):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.05)
        other = start(COMMANDS[second], tiny)
        printed, errors = other.communicate(timeout=PATIENCE)
        assert other.returncode != 0
        assert re.search(said, printed + errors), printed + errors
        assert "Traceback" not in printed + errors
        running.communicate(timeout=PATIENCE)
        assert running.returncode == 0
