"""The files that hold the project together agree with one another."""

import ast
import hashlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import params
from medsec import data
from medsec.core import paths
from medsec.evidence import execute, ledger

ROOT = paths.ROOT
INSTALL = '-e ".[dev]" -c requirements.lock'
LIMIT_MB = 25

# Cells of each notebook whose output nbval does not compare: training cells only, and this is how many there are.
IGNORED: dict[str, int] = {
    "00_data_and_threats": 1,
    "01_backdoor_fedgan": 1,
    "02_feddetect": 1,
    "03_gia_defense": 1,
    "04_adversarial_pruning_defense": 1,
    "05_threat_matrix": 3,  # and which cells lack a run, or surprise, by which paragraph
    "99_claims": 0,
}

PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(text("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def tracked():
    """Files in git's index that exist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


# ----------------------------------------------------------------------------------------------------------- versions


def lock_entries():
    return [Requirement(line) for line in text("requirements.lock").splitlines() if line and not line.startswith("#")]


def test_the_lock_pins_and_names_no_index():
    assert all(str(entry.specifier).startswith("==") and not entry.url for entry in lock_entries())
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile"):
        assert "://" not in text(name), name
        assert not re.search(r"--(extra-)?index|--find-links|--default-index", text(name)), name


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['sys_platform']}-{p['platform_machine']}")
@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_fitting_pin(project, platform, python):
    environment = platform | {"python_version": python, "python_full_version": f"{python}.9"}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    pins = {}
    for entry in lock_entries():
        if entry.marker is None or entry.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(entry.name), []).append(str(entry.specifier).removeprefix("=="))
    for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        wanted = Requirement(line)
        if wanted.name == project["name"]:
            assert wanted.extras <= set(project["optional-dependencies"])
            continue
        found = pins.get(canonicalize_name(wanted.name), [])
        assert len(found) == 1, f"{wanted.name}: {len(found)} pins; run: make lock"
        assert wanted.specifier.contains(found[0]), f"{wanted.name}=={found[0]} does not meet {line}; run: make lock"


def test_the_three_ways_to_install_are_one(project):
    environment = yaml.safe_load(text("environment.yml"))
    assert environment["name"] == project["name"]
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (by_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert sorted(packages) == sorted([f"python{project['requires-python']}", "pip", "make", "git"])
    assert by_pip == ["-e .[dev]", "-c requirements.lock"]
    assert "dev" in project["optional-dependencies"]
    assert INSTALL in text("Makefile")
    assert f"pip install {INSTALL}" in text("README.md")
    assert f"sys.version_info < ({project['requires-python'].removeprefix('>=').replace('.', ', ')})" in text(
        "Makefile"
    )


# -------------------------------------------------------------------------------------------------------------- files


def test_no_tracked_file_names_a_place_on_somebodys_machine(tracked):
    places = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work)/\w|[A-Za-z]:\\{1,2}Users")
    found = []
    for file in tracked:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: …{match.group()}…" for match in places.finditer(content)]
    assert not found


def test_the_repository_stays_small(tracked):
    assert sum(file.stat().st_size for file in tracked) <= LIMIT_MB * 2**20


def test_no_scratch_file_is_tracked(tracked):
    assert not [file for file in tracked if re.search(r"\.medsec-tmp-|__pycache__|\.ipynb_checkpoints", str(file))]


def test_citation(project):
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["authors"] == project["authors"]


def test_pre_commit_downloads_nothing():
    for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]:
        assert repo["repo"] == "local"
        assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_ci_is_an_executable_bash_script():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------- notebooks

SOURCES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("**/[!.]*.ipynb"))
EXECUTED = sorted((ROOT / "executed").glob("*/*.ipynb"))


def test_source_notebooks_are_stripped():
    if files := [*SOURCES, *EXERCISES]:
        command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\nrun: nbstripout notebooks/*.ipynb"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_only_training_cells_are_not_compared(file):
    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(file, as_version=4).cells]
    ignored = [found for found in tags if "nbval-ignore-output" in found]
    assert len(ignored) == IGNORED.get(file.stem), "state the number in IGNORED above, after thinking"
    others = {tag for found in tags for tag in found if tag.startswith("nbval-")} - {"nbval-ignore-output"}
    assert not others, "no other way around the comparison"
    assert not any({"nbval-ignore-output"} & set(found) for found in tags[-2:]), "verdicts and check are compared"


@pytest.mark.parametrize("file", EXECUTED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_executed_notebooks_are_normalised_and_of_this_source(file):
    notebook = nbformat.read(file, as_version=4)
    before = json.dumps(notebook, sort_keys=True)
    assert execute.normalise(notebook) == {}
    assert json.dumps(notebook, sort_keys=True) == before
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert not re.search(r"\bat 0x[0-9a-f]{6}", outputs), "prints the address of an object: another one in every run"
    source = nbformat.read(paths.NOTEBOOKS / file.name, as_version=4)
    own = [cell.source for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert own == [cell.source for cell in source.cells], "the source has changed since: run the pipeline"


# ---------------------------------------------------------------------------------------------------------- pipelines

STAGES = yaml.safe_load(text("dvc.yaml"))["stages"]
ACROSS = ("99_claims",)  # read the tables of all cohorts: once is enough, in the default pipeline
PIPELINES = sorted((ROOT / "pipelines").glob("*/dvc.yaml"))


def outputs(stage):
    """Path and options of every output of a stage, metrics and plots too."""
    listed = itertools.chain(*(stage.get(kind, []) for kind in ("outs", "metrics", "plots")))
    return [next(iter(entry.items())) for entry in listed]


def imported(tree):
    """Names of medsec's modules that a piece of code imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "medsec":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medsec."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("medsec.")}
    return {name for name in found if (ROOT / "medsec" / f"{name}.py").is_file()}


def modules_used(notebook):
    """Modules of medsec that running a notebook imports, directly or through others."""
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    code = [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in code]
    waiting = {"execute"}.union(*(imported(ast.parse(source)) for source in code))
    seen = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= imported(ast.parse(text(f"medsec/{name}.py"))) - seen
    return seen


def test_every_notebook_is_a_stage_and_every_stage_a_notebook():
    assert {file.stem for file in SOURCES} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_notebook_and_replaces_its_files_only(name):
    stage = STAGES[name]
    assert stage["cmd"] == f"python -m medsec.evidence.execute notebooks/{name}.ipynb --cohort phantom"
    assert f"notebooks/{name}.ipynb" in stage["deps"]
    found = dict(outputs(stage))
    assert f"executed/phantom/{name}.ipynb" in found
    for path, options in found.items():
        assert options == {"cache": False, "persist": True}, path
        assert re.match(rf"(executed|results)/phantom/{name[:3]}[\w-]*\.\w+$", path), path


@pytest.mark.parametrize("name", [name for name in STAGES if (paths.NOTEBOOKS / f"{name}.ipynb").is_file()])
def test_a_stage_depends_on_the_modules_it_uses_and_no_others(name):
    listed = {Path(path).stem for path in STAGES[name]["deps"] if path.startswith("medsec/")}
    assert listed == modules_used(paths.NOTEBOOKS / f"{name}.ipynb")


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_names_exists(name):
    missing = [path for path in STAGES[name]["deps"] if not path.startswith("data/") and not (ROOT / path).exists()]
    assert not missing


def test_stages_and_sections_of_the_parameters_match():
    sections = list(yaml.safe_load(text("params.yaml")))
    assert sections == list(params.Params.model_fields)
    for name, stage in STAGES.items():
        assert {"seeds", "cohorts"} <= set(stage["params"]), name
        assert len(set(stage["params"])) == len(stage["params"]), name
        for path in stage["params"]:  # a section, or one within a section: record.inversion
            found = yaml.safe_load(text("params.yaml"))
            for part in path.split("."):
                assert part in found, f"{name}: params.yaml has no {path}"
                found = found[part]
    used = {section for stage in STAGES.values() for section in stage["params"]}
    assert {section for section in used if "." in section} <= {"record.inversion"}, "read by the notebook's own tables"
    used = {section for section in used if "." not in section}
    assert set(sections) - used == {"record"}, "only records, which no stage makes, have a section of their own"


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.parent.name)
def test_another_pipeline_is_the_default_one_for_another_cohort(file):
    cohort = file.parent.name
    pinned = f"pipelines/{cohort}/cohort.json"
    stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    assert list(stages) == [name for name in STAGES if name not in ACROSS]
    for name in stages:
        stage = STAGES[name]
        swapped = json.dumps(stage).replace("data/phantom", pinned).replace("/phantom/", f"/{cohort}/")
        swapped = json.loads(swapped.replace("--cohort phantom", f"--cohort {cohort}")) | {"wdir": "../.."}
        # Figures may be missing: not every cohort has masks and hospitals.
        swapped["plots"] = [plot for plot in swapped["plots"] if plot in stages[name]["plots"]]
        assert stages[name] == swapped
    fingerprints = json.loads(text(pinned))["fingerprints"]
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in fingerprints.values())


# --------------------------------------------------------------------------------------------------------------- data


def test_the_remote_is_in_the_repository_and_dvc_calls_nobody():
    config = text(".dvc/config")
    assert re.search(r"^\s*url = \.\./dvcstore$", config, re.MULTILINE)
    assert re.search(r"^\s*analytics = false$", config, re.MULTILINE)
    assert "://" not in config


def test_a_clone_holds_its_data():
    (out,) = yaml.safe_load(text("data.dvc"))["outs"]
    assert out["path"] == "data"
    store = ROOT / "dvcstore" / "files" / "md5"
    listing = store / out["md5"][:2] / out["md5"][2:]
    assert listing.is_file(), "run: dvc push"
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        assert (store / entry["md5"][:2] / entry["md5"][2:]).is_file(), f"{entry['relpath']}: run: dvc push"


def test_the_default_cohort_can_be_drawn_again_to_the_byte(tmp_path):
    """`python -m medsec.data` writes the files whose hashes data.dvc records."""
    (out,) = yaml.safe_load(text("data.dvc"))["outs"]
    listing = ROOT / "dvcstore" / "files" / "md5" / out["md5"][:2] / out["md5"][2:]
    expected = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8"))}
    data.generate(params.load().cohorts.phantom, tmp_path / "phantom")
    found = {
        file.relative_to(tmp_path).as_posix(): hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    assert found == expected


def test_the_readme_shows_the_verdicts_of_the_committed_tables():
    readme = text("README.md")
    assert ledger.update_readme(readme) == readme, "run: python -m experiments ledger"
    kept = pd.read_csv(paths.CLAIMS / "findings.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(
        kept, ledger.findings().astype(str), obj="results/findings.csv; run: python -m experiments ledger"
    )


def script(path):
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_draws_the_pipeline():
    dag = script("pipelines/dag.py")
    assert dag.block() in text("README.md"), "dvc.yaml has changed; run: python pipelines/dag.py"


def test_the_readme_shows_the_measured_times():
    speed = script("benchmarks/speed.py")
    result = json.loads(text("benchmarks/speed.json"))
    assert set(result["notebooks"]) <= {file.stem for file in SOURCES}, "speed.json has a notebook that is gone"
    assert speed.readme_block(result) in text("README.md"), "run: python benchmarks/speed.py --readme"
