"""What a clone promises: whole, small and clean, its layers hold, its pages lead somewhere, what is made is up to date."""

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
from importlinter.cli import lint_imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import params
from experiments.catalogue import DESIGNS
from experiments.feddetect.record import BASELINES
from experiments.gia_defense.clients import CONTROLS
from medsec import data
from medsec.core import paths
from medsec.evidence import cells, execute, ledger, tables

ROOT = paths.ROOT
# 450 before deployment, reports on one's own, a dishonest server, panels to move and a record of notebook 05
LIMIT_FILES = 500
LIMIT_MB, LIMIT_README = 27, 7000  # 26 before the networks of at_ramp
LIMIT_WORDS = 1500  # of a notebook's text
SOURCES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
EXECUTED = sorted((ROOT / "executed").glob("*/*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("**/[!.]*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *SOURCES, *EXERCISES]

# Cells of each notebook whose output a replay does not compare: training cells only, and this is how many there are.
IGNORED = dict.fromkeys(("00", "01", "02", "03", "04"), 1)
IGNORED |= {"05": 3, "99": 0}  # 05: and which cells lack a run, or surprise, by which paragraph

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
PLATFORMS = {
    "linux": LINUX,
    "linux-arm": LINUX | {"platform_machine": "aarch64"},
    "mac": LINUX | {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


MEANING = "pipelines/meaning.json"
DVC = ("dvc.yaml", "pipelines/pneumoniamnist/dvc.yaml")


def script(path):
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(text("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def tracked():
    """Files in git's index that exist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# A clone is whole, small and clean ------------------------------------------------------------------------------------


def stored(pointer):
    """What a .dvc file stands for: path -> (md5, file in the store)."""
    (out,) = yaml.safe_load(text(pointer))["outs"]
    store = ROOT / "dvcstore" / "files" / "md5"
    listing = store / out["md5"][:2] / out["md5"][2:]
    assert listing.is_file(), f"{pointer}: run: dvc push"
    entries = json.loads(listing.read_text(encoding="utf-8"))
    return {entry["relpath"]: (entry["md5"], store / entry["md5"][:2] / entry["md5"][2:]) for entry in entries}


@pytest.mark.parametrize("pointer", ["data.dvc", "networks.dvc"])
def test_a_clone_holds_its_data(pointer):
    assert re.search(r"^\s*url = \.\./dvcstore$", text(".dvc/config"), re.MULTILINE)
    for path, (md5, file) in stored(pointer).items():
        assert file.is_file(), f"{path}: run: dvc push"
        assert hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == md5, path


def test_the_default_cohort_can_be_drawn_again_to_the_byte(tmp_path):
    data.generate(params.load().cohorts.phantom, tmp_path / "phantom")
    drawn = {file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in tmp_path.glob("*/*")}
    found = {path: hashlib.md5(content, usedforsecurity=False).hexdigest() for path, content in drawn.items()}
    assert found == {path: md5 for path, (md5, _) in stored("data.dvc").items()}


def test_the_repository_stays_small(tracked):
    assert len(tracked) <= LIMIT_FILES
    assert sum(file.stat().st_size for file in tracked) <= LIMIT_MB * 2**20
    assert len(text("README.md").encode()) <= LIMIT_README


def test_no_tracked_file_names_a_machine_or_holds_a_secret(tracked):
    """No folder of somebody's, no package index but the public default, no key, no scratch file."""
    wrong = {
        "place": r"(?<![\w.~-])/(?:home|Users|root|work)/\w|[A-Za-z]:\\{1,2}Users",
        "index": r"--(?:extra-)?index(?:-url)?[= ]\S*://|--find-links[= ]|PIP_INDEX_URL=|https?://[^\s/]*\bpypi\b",
        "secret": r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:ghp|gho|glpat|hf|sk|xox[bp])[-_][A-Za-z0-9]{20}|\bAKIA[0-9A-Z]{16}\b",
    }
    found = [str(file) for file in tracked if re.search(r"\.medsec-tmp-|__pycache__|\.ipynb_checkpoints", str(file))]
    for file in tracked:
        if file == Path(__file__) or b"\0" in (content := file.read_bytes())[:4096]:
            continue
        for what, pattern in wrong.items():
            found += [
                f"{file.relative_to(ROOT)}: {what}: {m[0]}"
                for m in re.finditer(pattern, content.decode("utf-8", "ignore"))
            ]
    assert not found
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile", ".dvc/config"):
        assert "://" not in text(name), name


def test_sources_hold_no_outputs():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, [*SOURCES, *EXERCISES])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\nrun: nbstripout notebooks/*.ipynb"


# Installing -----------------------------------------------------------------------------------------------------------


def test_make_alone_lists_the_targets():
    # As if it were not called by `make test`.
    inner = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make"], cwd=ROOT, env=inner, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: make TARGET")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_direct_dependency_has_one_fitting_pin(project, platform):
    lock = [Requirement(line) for line in text("requirements.lock").splitlines() if line and not line.startswith("#")]
    assert all(str(entry.specifier).startswith("==") and not entry.url for entry in lock)
    for python in ("3.11", "3.12", "3.13", "3.14"):
        here = PLATFORMS[platform] | {"python_version": python, "python_full_version": f"{python}.9"}
        here |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
        pins = {}
        for entry in lock:
            if entry.marker is None or entry.marker.evaluate(here):
                pins.setdefault(canonicalize_name(entry.name), []).append(str(entry.specifier).removeprefix("=="))
        for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
            wanted = Requirement(line)
            if wanted.name != project["name"]:
                found = pins.get(canonicalize_name(wanted.name), [])
                assert len(found) == 1, f"{wanted.name}: {len(found)} pins; run: make lock"
                assert wanted.specifier.contains(found[0]), f"{found[0]} does not meet {line}; run: make lock"


def test_the_three_ways_to_install_are_one(project):
    conda = yaml.safe_load(text("environment.yml"))
    assert {"pip": ["-e .[dev]", "-c requirements.lock"]} in conda["dependencies"]
    assert f"python{project['requires-python']}" in conda["dependencies"]
    assert '-e ".[dev]" -c requirements.lock' in text("Makefile")
    assert 'pip install -e ".[dev]" -c requirements.lock' in text("README.md")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


# Who may import whom (docs/architecture.md): the contracts in pyproject.toml hold, and nobody goes around them --------


def test_the_contracts_of_the_layers_hold(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, f"{capsys.readouterr().out}\nrun: lint-imports"


def test_no_module_is_imported_by_a_string():
    """Such an import is an arrow that no tool sees."""
    for package in ("medsec", "medphantom"):
        for file in (ROOT / package).rglob("*.py"):
            assert not re.search(r"\b(import_module|__import__)\(", file.read_text(encoding="utf-8")), file.name


def test_few_names_are_public():
    """``__all__`` says what readers may build on. The names that `medsec.data` passes on count once."""
    total = 0
    for file in sorted((ROOT / "medsec").rglob("*.py")):
        if file.name in ("__init__.py", "__main__.py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        (names,) = [ast.literal_eval(node.value) for node in tree.body if _is_all(node)]
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        assert set(names) <= defined, file.name
        total += len(names)
    assert total <= 200


def _is_all(node):
    target = (
        node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
    )
    return isinstance(target, ast.Name) and target.id == "__all__"


# Pages ----------------------------------------------------------------------------------------------------------------


def markdown(page):
    """The text of a page, of a notebook that of its Markdown cells; without code."""
    content = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        listed = nbformat.reads(content, as_version=4).cells
        content = "\n".join(cell.source for cell in listed if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", content, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!\w+:)([^()\s#]*)(?:#([^()\s]+))?\)", markdown(page)):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", markdown(target), re.MULTILINE)  # their anchors as GitHub makes them
            found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in found, f"{path}#{anchor}"


def test_the_plan_for_a_class_names_headings_that_are_there():
    named = re.findall(r"(\d\d) “([^”]+)”", text("docs/teaching.md"))
    assert len(named) > 10
    for number, heading in named:
        (file,) = paths.NOTEBOOKS.glob(f"{number}_*.ipynb")
        assert re.search(rf"^#+ {re.escape(heading)}", markdown(file), re.MULTILINE), f"{number}: {heading}"


def test_the_pages_show_the_verdicts_and_the_times_of_today():
    readme = text("README.md")
    assert ledger.update_readme(readme) == readme, "run: python -m experiments ledger"
    kept = pd.read_csv(ROOT / ledger.FINDINGS, dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(
        kept, ledger.findings().astype(str), obj=f"{ledger.FINDINGS}; run: python -m experiments ledger"
    )
    measured = script("benchmarks/speed.py").block(json.loads(text("benchmarks/speed.json")))
    page = text("docs/cohorts-and-times.md")
    assert measured in page, "benchmarks/speed.json has changed"
    assert script("benchmarks/common.py").block() in page, "benchmarks/results.csv has changed"


# Pipelines and notebooks ----------------------------------------------------------------------------------------------


def test_a_comment_has_no_meaning_and_a_number_has():
    meaning = script("pipelines/meaning.py").meaning
    plain = "def f(x):\n    return x + 1\n"
    assert meaning('"""What it is."""\n# why\ndef f(x):\n    """Adds."""\n    return (x + 1)  # one\n') == meaning(
        plain
    )
    assert meaning(plain.replace("1", "2")) != meaning(plain)
    kept, folders = json.loads(text("pipelines/meaning.json")), script("pipelines/meaning.py").folders()
    assert list(kept) == list(folders)
    used = {key for file in DVC for stage in yaml.safe_load(text(file))["stages"].values() for key in _code(stage)}
    assert used <= kept.keys(), "a stage depends on a folder that is not there: it would never be stale"


def _code(stage):
    """The folders whose meaning a stage depends on."""
    return [key for section in stage.get("params", []) if isinstance(section, dict) for key in section[MEANING]]


def test_the_pipelines_are_what_their_description_gives():
    generate = script("pipelines/generate.py")
    for cohort, file in generate.COHORTS.items():
        assert text(file) == generate.pipeline(cohort), f"{file}: run: python pipelines/generate.py"
        stages = yaml.safe_load(text(file))["stages"]
        for name, stage in stages.items():
            assert len(stage["deps"]) <= 10, name
            missing = [
                dep for dep in stage["deps"] if not dep.startswith(("data/", "networks/")) and not (ROOT / dep).exists()
            ]
            assert not missing, name
        assert {file.stem for file in SOURCES} - set(stages) == (set() if cohort == "phantom" else {"99_claims"})
    assert generate.picture() in text("docs/dvc.md"), "run: python pipelines/generate.py"
    pinned = json.loads(text("pipelines/pneumoniamnist/cohort.json"))["fingerprints"]
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in pinned.values())


@pytest.mark.parametrize("file", [file for file in SOURCES if file.stem != "99_claims"], ids=lambda file: file.stem)
def test_a_notebook_depends_on_the_claims_that_it_reads(file):
    read = set(re.findall(r'claims\.(?:load|beside|verdicts)\(\s*"([^"]+)"', source_text(file)))
    told = set(script("pipelines/generate.py").NOTEBOOKS[file.stem].claims)
    assert read <= told
    assert told - read <= {"matrix-readings"}  # read by `experiments.threat_matrix.surprises`


def source_text(file):
    return "\n".join(cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_only_training_cells_are_not_compared(file):
    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(file, as_version=4).cells]
    skipped = [i for i, own in enumerate(tags) if any(tag.startswith("nbval-") for tag in own)]
    assert len(skipped) == IGNORED[file.stem[:2]], "state the number in IGNORED above, after thinking"
    assert {tag for own in tags for tag in own if tag.startswith("nbval-")} <= {"nbval-ignore-output"}
    assert not set(skipped) & {len(tags) - 1, len(tags) - 2}, "verdicts and check are compared"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_a_notebook_can_be_read_in_one_go(file):
    texts = [cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "markdown"]
    assert sum(len(each.split()) for each in texts) <= LIMIT_WORDS


@pytest.mark.parametrize("file", EXECUTED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_no_long_table_is_unfolded(file):
    for cell in nbformat.read(file, as_version=4).cells:
        said = [each.get("data", {}).get("text/markdown", "") for each in cell.get("outputs", [])]
        for part in [cell.source] * (cell.cell_type == "markdown") + said:
            unfolded = re.sub(r"<details>.*?</details>", "", part, flags=re.DOTALL)
            rows = re.findall(r"(?:^\|.*\n?)+", unfolded, re.MULTILINE)
            assert all(table.count("\n|") - 1 <= tables.UNFOLDED for table in rows), part[:200]


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


# Records: their designs, and those that are committed -----------------------------------------------------------------


@pytest.fixture(scope="module")
def p():
    return params.load("full")


@pytest.mark.parametrize("cohort", ["phantom", "fundus", "npz"])
@pytest.mark.parametrize("notebook", DESIGNS)
def test_a_plan_has_the_headline_on_every_seed_and_cells_that_can_be_run(notebook, cohort, p):
    plan = DESIGNS[notebook].cells(cohort, p)
    assert len({cell.name for cell in plan}) == len(plan)
    headline = [cell for cell in plan if not cell.keys]
    first = (headline[0].arm, headline[0].group)
    assert {cell.seed for cell in headline if (cell.arm, cell.group) == first} >= set(p.seeds.evaluation)
    for cell in plan:
        cells.resolved(p, cell)
        assert DESIGNS[notebook].cost(p, cell) > 0


def test_a_sweep_changes_one_factor_at_a_time(p):
    plan = DESIGNS["01_backdoor_fedgan"].cells("phantom", p)
    sweeps = [cell for cell in plan if cell.keys]
    assert all(len(cell.keys) == 1 for cell in sweeps)
    few = set(p.seeds.evaluation[: p.record.fedgan.seeds])
    assert {cell.seed for cell in sweeps} == few
    own_control = {"trigger", "area", "m", "partition", "size"}
    for factor in {next(iter(cell.keys)) for cell in sweeps}:
        arms = {cell.arm for cell in sweeps if factor in cell.keys}
        assert ("clean" in arms) == (factor in own_control), "what changes training or detector needs a clean run"


def test_the_readers_own_images_have_headlines_only(p):
    """Their record is that of a second modality, without what only drawn eyes can do."""
    for notebook, design in DESIGNS.items():
        own, eyes = (design.cells(cohort, p) for cohort in ("npz", "fundus"))
        assert own == [cell for cell in eyes if "size" not in cell.keys]
        assert not any(cell.keys for cell in own)
        section = {"03_gia_defense": "inversion", "04_adversarial_pruning_defense": "evasion"}.get(notebook)
        change = {section: p.record.other_modality.change[section]} if section else {}
        near = p.record.other_modality.near if section == "evasion" else None
        for cell in own:
            if near and cell.arm != "costs" and set(cell.variants) <= set(near.arms):
                assert cell.change["evasion"]["sweep"] == near.sweep
                assert cell.change["evasion"]["test_images"] == change["evasion"]["test_images"]
            else:
                assert cell.change == change


def test_committed_records_have_unique_rows_and_enough_seeds():
    files = sorted((ROOT / "records").glob("*/0?_*.json"))
    assert files
    for file in files:
        about = json.loads(file.read_text(encoding="utf-8"))
        table = tables.read(file.with_suffix(".csv"))
        assert not table.duplicated(tables.keys(table)).any(), file
        assert {"profile", "generation", "params", "versions", "hardware", "cpu_seconds"} <= about.keys()
        if about["cells_finished"] == about["cells_planned"]:
            headline = table[(table[tables.keys(table)[3:]] == "").all(axis=1)]
            fewer = headline["variant"].isin(BASELINES)  # robust aggregators, for comparison
            fewer |= headline["scenario"].eq("utility") & file.stem.startswith("03")  # of defences that decide no bar
            fewer |= headline["variant"].isin(CONTROLS)
            fewer |= headline["variant"].eq("prune_random")  # of notebook 05, a control that may call nothing rightly
            fewer |= headline["variant"].str.startswith("drawn_")  # by the GAN that draws, which takes long
            assert headline["n"][~fewer].min() >= 5, file
            assert headline["n"][headline["metric"] != "failed"].min() >= 3, file  # n of "failed": how many diverged
