"""What docs/dvc.md promises, for real, in a copy of this repository: nothing to do at first, another number, a killed run.

The last two with a toy for notebook 01, which writes the stage's files without training.
"""

import json
import re
import shlex
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from nbformat import v4
from repository_copy import PATIENCE, copy_repository, run, start

from medsec.core import paths

STAGE = "01_backdoor_fedgan"
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
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
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
def test_the_commands_of_a_page_exist(page, caplog):
    """Every dvc command in its blocks and between its backticks: the command, its options, its stages, its parameters."""
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
            args = get_main_parser().parse_args(words)
        except DvcParserError:
            assert "arguments are required" in caplog.messages[-1], f"dvc does not take: {line}"
            continue  # a command that is only mentioned
        for target in (getattr(args, "targets", None) or []) if args.cmd in ("repro", "exp") else []:
            assert target.split(":")[-1] in {*stages, "dvc.yaml"}, line
        for change in getattr(args, "set_param", None) or []:
            found = numbers
            for part in change.split("=")[0].split("."):
                assert part in found, line
                found = found[part]
