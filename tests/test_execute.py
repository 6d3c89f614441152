"""medsec.evidence.execute: outputs change only when everything went well, and two runs give the same bytes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbformat import v4

import medsec
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evidence import execute

WRITE = """
import os, pathlib
folder = pathlib.Path(os.environ["MEDSEC_OUT"], "results", cohort)
folder.mkdir(parents=True, exist_ok=True)
(folder / "07_toy.csv").write_text(f"profile,{profile}\\n")
"""


def make_notebook(path, *cells, tagged=True):
    """A stripped toy notebook: a parameters cell, then ``cells``."""
    first = v4.new_code_cell('cohort = "none"\nprofile = "none"')
    if tagged:
        first.metadata["tags"] = ["parameters"]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Toy"), first, *map(v4.new_code_cell, cells)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Outputs go to a folder of the test's own; the cohort "toy" loads and no other does."""
    folder = tmp_path / "out put"  # a blank in the path must do no harm
    monkeypatch.setenv("MEDSEC_OUT", str(folder))

    def load(name, cohorts):
        if name != "toy":
            raise InputError(f"unknown cohort {name!r}")
        return SimpleNamespace(size=28, fingerprint="f" * 64)

    fake = SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "medsec.data", fake)
    monkeypatch.setattr(medsec, "data", fake, raising=False)
    return folder


def run(notebook, cohort="toy", *more):
    return execute.main([str(notebook), "--cohort", cohort, *more])


def files(folder):
    """Relative names of the outputs, without the scratch folder."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith(".medsec-tmp"))


@pytest.fixture
def previous(out):
    """Outputs of an earlier run."""
    for name in ("results/toy/07_toy.csv", "executed/toy/07_toy.ipynb", "results/toy/07_old.png", "results/toy/08.csv"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("before")
    return out


def test_a_good_run_moves_everything_into_place(tmp_path, previous):
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE, "print(cohort, profile)")) == 0
    # 07_old.png was of an earlier version of this notebook; 08.csv is another notebook's.
    assert files(previous) == ["executed/toy/07_toy.ipynb", "results/toy/07_toy.csv", "results/toy/08.csv"]
    assert (previous / "results/toy/07_toy.csv").read_text() == "profile,quick\n"
    notebook = nbformat.read(previous / "executed/toy/07_toy.ipynb", as_version=4)
    assert notebook.cells[-1].outputs[0].text == "toy quick\n"
    assert not (previous / ".medsec-tmp-toy/07_toy").exists()


def test_a_failing_cell_leaves_the_old_outputs_and_keeps_the_notebook(tmp_path, previous, capfd):
    before = {name: (previous / name).read_bytes() for name in files(previous)}
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE, "1 / 0")) == 1
    assert {name: (previous / name).read_bytes() for name in files(previous)} == before
    error = capfd.readouterr().err
    failed = previous / ".medsec-tmp-toy/07_toy.failed.ipynb"
    assert error.splitlines() == [
        "error: 07_toy.ipynb, cohort toy: cell [4]: ZeroDivisionError: division by zero",
        f"the notebook so far: {failed}",
    ]
    assert "ZeroDivisionError" in failed.read_text()
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE)) == 0
    assert not failed.exists()  # of no use any more


def test_a_dead_kernel_is_told_as_such(tmp_path, out, capfd):
    assert run(make_notebook(tmp_path / "07_toy.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")) == 1
    assert "kernel died" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["results/toy/08_other.csv", "results/other/07_toy.csv", "07_toy.csv"])
def test_writing_elsewhere_is_refused(tmp_path, previous, capfd, where):
    before = files(previous)
    stray = f"path = pathlib.Path(os.environ['MEDSEC_OUT'], '{where}'); path.parent.mkdir(exist_ok=True, parents=True)"
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE, f"{stray}; path.touch()")) == 1
    assert where in capfd.readouterr().err
    assert files(previous) == before


def test_two_runs_give_the_same_bytes(tmp_path, out, capfd):
    cells = [
        "print('one', flush=True)\nimport time; time.sleep(0.5)\nprint('two')",  # the kernel sends two pieces
        "import warnings; warnings.warn('look here')",  # names a temporary file and a process
        "{'a', 'b', 'c', 'd', 'e'}, list({'a', 'b', 'c', 'd', 'e'})",  # order depends on the hash seed
    ]
    notebook = make_notebook(tmp_path / "07_toy.ipynb", *cells)
    written = []
    for _ in range(2):
        assert run(notebook) == 0
        written.append((out / "executed/toy/07_toy.ipynb").read_bytes())
    assert written[0] == written[1]
    tree = json.loads(written[0])
    assert "papermill" not in tree["metadata"]
    assert "version" not in tree["metadata"]["language_info"]
    assert len(tree["cells"][3]["outputs"]) == 1
    assert tree["cells"][4]["outputs"] == []
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
    monkeypatch.setenv("MEDSEC_LIVE", "1")
    checks = [
        f"import os, sys; assert sys.executable == {sys.executable!r}, sys.executable",
        "assert 'surprise' not in globals()",
        "assert os.environ['OMP_NUM_THREADS'] == '1'",
        "from medsec.show import panels; assert not panels.is_live()",
        "assert os.environ['MEDSEC_OUT'] == os.environ['MEDSEC_REFERENCE']",
        f"import medsec; assert str(medsec.__path__[0]) == {str(paths.ROOT / 'medsec')!r}",
        f"assert os.getcwd() == {str(tmp_path)!r}",
    ]
    assert run(make_notebook(tmp_path / "07_toy.ipynb", *checks)) == 0
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "foreign")


def test_a_lock_held_by_a_live_process_is_respected(tmp_path, previous, capfd):
    lock = previous / ".medsec-tmp-toy" / "07_toy.lock"
    hold = f"""
import pathlib, sys, time
from medsec.evidence import execute
with execute.locked(pathlib.Path({str(lock)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    notebook = make_notebook(tmp_path / "07_toy.ipynb", WRITE)
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert run(notebook) == 2
        assert f"process {other.pid} is already running 07_toy" in capfd.readouterr().err
        assert (previous / "results/toy/07_toy.csv").read_text() == "before"
        other.kill()  # no chance to tidy up: the file stays and names a dead process
    assert lock.read_text() == f"{other.pid}\n"
    assert run(notebook) == 0
    assert lock.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("name", "cohort", "more", "message"),
    [
        ("07_toy.ipynb", "nowhere", [], "unknown cohort 'nowhere'"),
        ("07_toy.ipynb", "toy", ["--profile", "huge"], "unknown profile 'huge'"),
        ("07_absent.ipynb", "toy", [], "07_absent.ipynb does not exist"),
        ("toy.ipynb", "toy", [], "two digits"),
        ("08_text.ipynb", "toy", [], "cannot be read"),
        ("09_untagged.ipynb", "toy", [], "no cell tagged 'parameters'"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, out, capfd, name, cohort, more, message):
    for good in ("07_toy.ipynb", "toy.ipynb"):
        make_notebook(tmp_path / good, WRITE)
    make_notebook(tmp_path / "09_untagged.ipynb", WRITE, tagged=False)
    (tmp_path / "08_text.ipynb").write_text("no notebook")
    assert run(tmp_path / name, cohort, *more) == 2
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
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE)) == status
    assert ("expected aaaa" in capfd.readouterr().err) == (status == 2)


def test_wrong_parameters_are_one_line_and_write_nothing(tmp_path, out, capfd, monkeypatch):
    wrong = paths.PARAMS.read_text(encoding="utf-8").replace("fedgan:", "fedgam:", 1)
    (tmp_path / "params.yaml").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(paths, "PARAMS", tmp_path / "params.yaml")
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE)) == 2
    error = capfd.readouterr().err
    assert "unknown key fedgam; did you mean fedgan?" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_stage_of_dvc_may_not_write_elsewhere(tmp_path, out, monkeypatch, capfd):
    """DVC would hash the old outputs, which are still there, and call them those of the new parameters."""
    monkeypatch.setenv("DVC_STAGE", "07_toy")
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE)) == 2
    assert "MEDSEC_OUT is set: DVC would take the old files" in capfd.readouterr().err
    assert not out.exists()


def test_another_profile_may_not_write_into_the_repository(tmp_path, out, monkeypatch, capfd):
    monkeypatch.setenv("MEDSEC_OUT", str(paths.ROOT))
    monkeypatch.setattr(execute.params, "load", lambda profile: SimpleNamespace(cohorts=None))
    assert run(make_notebook(tmp_path / "07_toy.ipynb", WRITE), "toy", "--profile", "full") == 2
    assert "set MEDSEC_OUT" in capfd.readouterr().err


def test_the_command_is_ready_before_pytorch_is_loaded():
    """Every stage pays for what it imports, and the kernel loads PyTorch again."""
    code = "import sys, medsec.evidence.execute, medsec.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert done.stdout == "False\n"
