"""The replay of executed notebooks must notice a wrong table: the last two cells of notebook 01, without its training."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from medsec.core import paths
from medsec.evidence import tables

NOTEBOOK = "01_backdoor_fedgan"
COHORT = "phantom"
COPY = """import shutil
from medsec.core import paths
target = paths.results(cohort)
target.mkdir(parents=True, exist_ok=True)
for file in (paths.ROOT / "results" / cohort).glob(f"{NOTEBOOK}*.csv"):
    shutil.copy(file, target)
"""


@pytest.fixture
def short_notebook(tmp_path):
    """The executed notebook with its training replaced by a copy of the committed tables, and nothing but the verdicts."""
    executed = nbformat.read(paths.executed(COHORT, paths.ROOT) / f"{NOTEBOOK}.ipynb", as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    start = [cell for cell in code if cell.source.startswith("# Parameters") or "NOTEBOOK =" in cell.source]
    reader = next(cell for cell in code if cell.source.startswith("summary = tables.read"))
    evidence = next(cell for cell in code if cell.source.startswith("recorded = "))
    executed.cells = [*start, nbformat.v4.new_code_cell(COPY), reader, evidence, *code[-2:]]
    file = tmp_path / f"{NOTEBOOK}.ipynb"
    nbformat.write(executed, file)
    return file


def replay(notebook, tmp_path):
    """nbval as `make test` calls it, judged by the tables below ``tmp_path/reference``."""
    environment = os.environ | {
        "MEDSEC_OUT": str(tmp_path / "out"),
        "MEDSEC_REFERENCE": str(tmp_path / "reference"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    sanitize = paths.ROOT / "tests" / "nbval_sanitize.cfg"
    options = ["--nbval", "--nbval-current-env", f"--nbval-sanitize-with={sanitize}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(notebook), "-c", os.devnull, f"--rootdir={tmp_path}"]
    return subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )


def test_committed_tables_pass(short_notebook, tmp_path):
    shutil.copytree(paths.results(COHORT, paths.ROOT), paths.results(COHORT, tmp_path / "reference"))
    done = replay(short_notebook, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]


def test_planted_wrong_table_fails(short_notebook, tmp_path):
    folder = paths.results(COHORT, tmp_path / "reference")
    shutil.copytree(paths.results(COHORT, paths.ROOT), folder)
    table = tables.read(folder / f"{NOTEBOOK}.csv")
    wrong = tables.select(table, {"variant": "boost", "scenario": "attack", "metric": "trigger_rate"}).index
    assert len(wrong) == 1
    table.loc[wrong, ["value", "low", "high"]] -= 0.5
    tables.write(table, folder / f"{NOTEBOOK}.csv")
    done = replay(short_notebook, tmp_path)
    assert done.returncode == 1
    assert "variant=boost, scenario=attack, metric=trigger_rate" in done.stdout


def test_every_notebook_ends_with_its_check():
    for file in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        last = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"][-1]
        assert "check.against_reference(NOTEBOOK, cohort)" in last.source, file.name
        assert not last.metadata.get("tags"), f"{file.name}: the check must be compared strictly"
