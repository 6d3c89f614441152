"""Running a notebook: outputs change only when all went well, two runs give the same bytes, a replay finds a wrong table."""

import ast
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import v4

from experiments.__main__ import main
from medsec.core import parallel, paths
from medsec.core.errors import InputError
from medsec.evidence import execute, tables

WRITE = """
import os, pathlib
folder = pathlib.Path(os.environ["MEDSEC_OUT"], "results", cohort)
folder.mkdir(parents=True, exist_ok=True)
(folder / "07_toy.csv").write_text(f"profile,{profile}\\n")
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Outputs go to a folder of the test's own; the cohort "toy" loads and no other does."""
    folder = tmp_path / "out put"  # a blank in the path must do no harm

    def load(name, cohorts):
        if name != "toy":
            raise InputError(f"unknown cohort {name!r}")
        return SimpleNamespace(size=28, fingerprint="f" * 64)

    monkeypatch.setenv("MEDSEC_OUT", str(folder))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(execute, "data", SimpleNamespace(load=load))
    return folder


@pytest.fixture
def previous(out):
    """Outputs of an earlier run."""
    for name in ("results/toy/07_toy.csv", "executed/toy/07_toy.ipynb", "results/toy/07_old.png", "results/toy/08.csv"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("before")
    return out


def write(*cells, name="07_toy", tagged=True):
    """A stripped toy notebook: a parameters cell, then ``cells``."""
    first = v4.new_code_cell('cohort = "none"\nprofile = "none"')
    if tagged:
        first.metadata["tags"] = ["parameters"]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Toy"), first, *map(v4.new_code_cell, cells)])
    nbformat.write(notebook, paths.NOTEBOOKS / f"{name}.ipynb")


def run(*cells, name="07_toy", cohort="toy", profile="quick"):
    """The exit status; writes the notebook before, if cells are given."""
    if cells:
        write(*cells, name=name)
    return main(["run", name, "--cohort", cohort, "--profile", profile])


def contents(folder):
    """Content of the outputs by their relative name, without the scratch folder."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".medsec-tmp")}


def test_a_good_run_moves_everything_into_place(previous):
    assert run(WRITE, "print(cohort, profile)") == 0
    # 07_old.png was of an earlier version of this notebook; 08.csv is another notebook's.
    assert set(contents(previous)) == {"executed/toy/07_toy.ipynb", "results/toy/07_toy.csv", "results/toy/08.csv"}
    assert (previous / "results/toy/07_toy.csv").read_text() == "profile,quick\n"
    notebook = nbformat.read(previous / "executed/toy/07_toy.ipynb", as_version=4)
    assert notebook.cells[-1].outputs[0].text == "toy quick\n"


def test_a_failing_cell_leaves_the_old_outputs_and_keeps_the_notebook(previous, capfd):
    before = contents(previous)
    assert run(WRITE, "1 / 0") == 1
    assert contents(previous) == before
    failed = previous / ".medsec-tmp-toy/07_toy.failed.ipynb"
    assert capfd.readouterr().err.splitlines() == [
        "error: 07_toy.ipynb, cohort toy: cell [4]: ZeroDivisionError: division by zero",
        f"the notebook so far: {failed}",
    ]
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 1
    assert "kernel died" in capfd.readouterr().err
    assert contents(previous) == before
    assert run(WRITE) == 0
    assert not failed.exists(), "of no use any more"


@pytest.mark.parametrize("where", ["results/toy/08_other.csv", "results/other/07_toy.csv", "07_toy.csv"])
def test_writing_elsewhere_is_refused(previous, capfd, where):
    before = contents(previous)
    stray = f"path = pathlib.Path(os.environ['MEDSEC_OUT'], '{where}'); path.parent.mkdir(exist_ok=True, parents=True)"
    assert run(WRITE, f"{stray}; path.touch()") == 1
    assert where in capfd.readouterr().err
    assert contents(previous) == before


def test_two_runs_give_the_same_bytes(out, capfd):
    write(
        "print('one', flush=True)\nimport time; time.sleep(0.5)\nprint('two')",  # the kernel sends two pieces
        "import warnings; warnings.warn('look here')",  # names a temporary file and a process
        "{'a', 'b', 'c', 'd', 'e'}, list({'a', 'b', 'c', 'd', 'e'})",  # order depends on the hash seed
    )
    written = []
    for _ in range(2):
        assert run() == 0
        written.append((out / "executed/toy/07_toy.ipynb").read_bytes())
    assert written[0] == written[1]
    cells = json.loads(written[0])["cells"]
    assert [len(cell["outputs"]) for cell in cells[3:]] == [1, 0, 1]
    assert "cell [4] wrote to stderr" in (shown := capfd.readouterr().err)
    assert "look here" in shown


def test_the_kernel_is_this_interpreter_without_user_settings(tmp_path, out, monkeypatch):
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("surprise = 1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    checks = [
        f"import os, sys; assert sys.executable == {sys.executable!r}, sys.executable",
        "assert 'surprise' not in globals()",
        "assert os.environ['OMP_NUM_THREADS'] == '1'",
        f"import medsec; assert str(medsec.__path__[0]) == {str(paths.ROOT / 'medsec')!r}",
        f"assert os.getcwd() == {str(tmp_path)!r}",
    ]
    assert run(*checks) == 0


FIGURE = """
from matplotlib import pyplot as plt
from medsec.show import plots
plots.use_style()
fig, ax = plt.subplots(figsize=(2, 1))
ax.plot([0, 1])
print("ä", 1.5, hash("a"))
"""
HOSTILE = {
    "agg": {"MPLBACKEND": "Agg", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "17", "TZ": "Asia/Tokyo"},
    "nonsense": {
        **{"MPLBACKEND": "nonsense", "MPLCONFIGDIR": "/proc/no", "PYTHONOPTIMIZE": "1", "MKL_NUM_THREADS": "7"},
        **{"JUPYTER_DATA_DIR": "/proc/no", "JUPYTER_CONFIG_DIR": "/proc/no"},
    },
}


def test_figures_appear_and_nothing_else_changes_whatever_the_environment_says(out, monkeypatch):
    """Clusters, containers and CI set MPLBACKEND=Agg; with it notebooks lost every figure without a word."""
    written = []
    for environment in ({}, *HOSTILE.values()):
        with monkeypatch.context() as patch:
            patch.delenv("MPLBACKEND", raising=False)
            for key, value in environment.items():
                patch.setenv(key, value)
            assert run(FIGURE) == 0
        written.append((out / "executed/toy/07_toy.ipynb").read_bytes())
    outputs = nbformat.reads(written[0].decode(), as_version=4).cells[-1].outputs
    assert [set(each.get("data", {"text": each.get("text")})) for each in outputs] == [
        {"text"},
        {"image/png", "text/plain"},
    ]
    assert len(set(written)) == 1


def test_a_kernel_that_the_reader_starts_shows_figures_too(monkeypatch):
    """Also where pyplot was imported before medsec."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    notebook = v4.new_notebook(cells=[v4.new_code_cell(FIGURE)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert [output.output_type for output in notebook.cells[0].outputs] == ["stream", "display_data"]


def test_a_lock_is_respected(previous, capfd):
    with parallel.locked(previous / ".medsec-tmp-toy" / "07_toy.lock"):
        assert run(WRITE) == 2
    assert f"process {os.getpid()} is already running 07_toy" in capfd.readouterr().err
    assert (previous / "results/toy/07_toy.csv").read_text() == "before"
    assert run() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"cohort": "nowhere"}, "unknown cohort 'nowhere'"),
        ({"profile": "huge"}, "unknown profile 'huge'"),
        ({"name": "07_absent"}, "07_absent does not exist"),
        ({"name": "toy"}, "two digits"),
        ({"name": "08_text"}, "cannot be read"),
        ({"name": "09_untagged"}, "no cell tagged 'parameters'"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, out, capfd, call, message):
    for name in ("07_toy", "toy"):
        write(WRITE, name=name)
    write(WRITE, name="09_untagged", tagged=False)
    (tmp_path / "08_text.ipynb").write_text("no notebook")
    assert run(**call) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("fingerprints", "status"), [({"28": "f" * 64}, 0), ({"64": "a" * 64}, 0), ({"28": "a" * 64}, 2)]
)
def test_another_cohort_than_the_pinned_one_is_refused(tmp_path, out, capfd, monkeypatch, fingerprints, status):
    monkeypatch.setattr(execute, "PIPELINES", tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "cohort.json").write_text(json.dumps({"fingerprints": fingerprints}))
    assert run(WRITE) == status
    assert ("expected aaaa" in capfd.readouterr().err) == (status == 2)


def test_outputs_go_where_dvc_and_other_profiles_may_put_them(out, monkeypatch, capfd):
    """DVC would hash the old outputs, which are still there, and call them those of the new parameters."""
    monkeypatch.setenv("DVC_STAGE", "07_toy")
    assert run(WRITE) == 2
    assert "MEDSEC_OUT is set: DVC would take the old files" in capfd.readouterr().err
    monkeypatch.delenv("DVC_STAGE")
    monkeypatch.setenv("MEDSEC_OUT", str(paths.ROOT))
    assert run(profile="full") == 2
    assert "set MEDSEC_OUT" in capfd.readouterr().err


def test_the_command_is_ready_before_pytorch_is_loaded():
    """Every stage pays for what it imports, and the kernel loads PyTorch again."""
    code = "import sys, medsec.evidence.execute, medsec.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert done.stdout == "False\n"


SLOW = (
    "art",
    "captum",
    "flwr",
    "foolbox",
    "scipy.optimize",
    "scipy.stats",
    "seaborn",
    "skimage",
    "sklearn",
    "torchvision",
)


def loaded(code, modules):
    """Which of the modules a process has loaded when it has run the code."""
    code = f"import sys\n{code}\nprint([name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_first_cells_load_only_what_all_that_follows_needs():
    """Such a library costs up to seconds a process: who uses it imports it where it is used."""
    lines = ["import medsec"]
    for file in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        (first,) = [
            c.source for c in nbformat.read(file, 4).cells if c.cell_type == "code" and "NOTEBOOK =" in c.source
        ]
        imports = [ast.unparse(node) for node in ast.parse(first).body if isinstance(node, ast.Import | ast.ImportFrom)]
        lines += [
            line for line in imports if line.split()[1].split(".")[0] not in SLOW
        ]  # what it shows a reader itself
    assert len(lines) > 50
    assert loaded("\n".join([*lines, "plots.use_style()"]), SLOW) == []


@pytest.mark.parametrize("command", ["medsec", "experiments"])
def test_a_command_tells_its_usage_without_loading_anything(command):
    code = f"import contextlib\nfrom {command}.__main__ import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
    assert loaded(code, ("torch", "pandas", "matplotlib", "scipy", *SLOW)) == []


def test_the_schema_of_the_parameters_loads_before_pytorch():
    """Only to read them, and to compare names with the registries of methods, needs it."""
    assert loaded("from experiments import params", ("torch", "pandas", "scipy")) == []


# Replaying an executed notebook: the last two cells of notebook 01, without its training ------------------------------

NOTEBOOK = "01_backdoor_fedgan"
COHORT = "phantom"
COPY = """import shutil
from medsec.core import paths
target = paths.results(cohort)
target.mkdir(parents=True, exist_ok=True)
for file in (paths.ROOT / "results" / cohort).glob(f"{NOTEBOOK}*.csv*"):
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
    executed.cells = [*start, v4.new_code_cell(COPY), reader, evidence, *code[-2:]]
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
