"""The recipes of CONTRIBUTING.md work as they are printed: typed into a copy of the repository, and used as a reader would."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest

from medsec.core import paths

BLOCK = re.compile(
    r"<!-- recipe: (\w+); file: (\S+); (append|create) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
RECIPES = defaultdict(list)  # kind -> (file, how, text)
for kind, *step in BLOCK.findall((paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
    RECIPES[kind].append(step)
NEEDED = (
    "medsec",
    "medphantom",
    "experiments",
    "claims",
    "profiles",
    "results",
    "tests",
    "notebooks",
    "params.yaml",
    "conftest.py",
)

# What a reader does next, on tiny parameters and on the cohort of the recipe; a line a kind.
USE = """
import json, sys, traceback
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.catalogue import EXPERIMENTS, QUICK
from medsec import data
from medsec.core import paths
from medsec.evidence import cells
from medsec.evidence.cells import Cell

tiny = params.load("tests/golden/params.yaml")


def with_change(change):
    return params.validate(params.merge(tiny.model_dump(), change))


def run(number, p, cell):
    (experiment,) = (each for name, each in EXPERIMENTS.items() if name.startswith(number))
    (rows, _), = cells.run(experiment, "stripes", p, [cell], processes=1)
    return rows


def added(number, p):
    # The cells that a notebook runs more than without what is named; the others keep their identity.
    (name,) = (name for name in QUICK if name.startswith(number))
    cohort = SimpleNamespace(name="phantom", labels=None)
    before, after = (
        {cells.identity(EXPERIMENTS[name], "f" * 64, each, cell): cell for cell in QUICK[name](each, cohort)}
        for each in (tiny, p)
    )
    assert after.keys() > before.keys()
    return [cell for identity, cell in after.items() if identity not in before]


def in_the_matrix(name, p):
    # A row of the matrix beside the others, in its figure, too.
    from experiments.threat_matrix import figures
    from experiments.threat_matrix.arms import ROWS
    (cell, *_) = added("05", p)
    assert cell.variants == (name,)
    rows = run("05", p, cell)
    assert set(rows["variant"]) == {name}
    shown = pd.DataFrame({"variant": [*ROWS, name], "column": 0, "value": 0.5, "low": 0.4, "high": 0.6})
    fig, ax = figures.heat_map(shown.assign(judged="", why="", badness=0.5, n=3, tested=True), "")
    assert name in [text.get_text() for text in ax.get_yticklabels()]
    return rows


def attack():
    from medsec.evasion import scenarios
    mine = params.load("mine")  # the recipe's profile
    assert mine.own.attacks == ["best_corner"]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0])
    x_adv = scenarios.craft("best_corner", model, x, y, 0.1, tiny.evasion.attacks, 0)
    torch.testing.assert_close((x_adv - x).abs(), torch.full_like(x, 0.1))
    p = with_change({"own": {"attacks": ["best_corner"]}})
    new = added("04", p)
    assert {cell.variants for cell in new} == {(variant,) for variant in evasion_arms.QUICK}
    rows = run("04", p, next(cell for cell in new if cell.variants == ("base",)))
    assert set(rows["scenario"]) == {"best_corner"} and "dr_whitebox" in set(rows["metric"])
    assert pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_best_corner.py"]) == 0


def defence():
    from experiments.gia_defense import clients
    from medsec.nets import convnet
    setup = clients.prepare("stripes", tiny)
    images, labels = (each[:2] for each in setup.splits["client"])
    sent = clients.client("signs", setup, images, labels, 0).defend(clients.network(setup, 0), images, labels, 0)
    assert len({round(float(value), 6) for value in convnet.flat(sent).abs() if value}) == 1
    p = with_change({"own": {"defences": ["signs"]}})
    new = added("03", p)
    assert {cell.arm for cell in new} == {"attack", "federation", "fingerprint", "imprint"}
    rows = run("03", p, next(cell for cell in new if cell.arm == "attack"))
    assert {"psnr", "ssim"} <= set(rows["metric"])
    rows = in_the_matrix("signs", p)
    assert {"psnr", "retrieval"} <= set(rows.loc[rows["scenario"] == "adaptive", "metric"])


def rule():
    from experiments.feddetect import cells as feddetect_cells
    from medsec.federated.rounds import Update
    updates = [Update(i, {"w": torch.tensor([value])}, 1, {}) for i, value in enumerate((0.9, 1.0, 1.1, 50.0))]
    state, diagnostics = feddetect_cells.defence("geometric_median", tiny, None, None)(updates, 0)
    assert abs(state["w"].item() - 1.05) < 0.1
    assert diagnostics["weights"][3] < 0.01
    p = with_change({"own": {"rules": ["geometric_median"]}})
    new = added("02", p)
    assert {cell.arm for cell in new} == {"no_attack", "boost_liar"}
    rows = run("02", p, next(cell for cell in new if cell.arm == "boost_liar"))
    assert set(rows["variant"]) == {"geometric_median"}
    rows = in_the_matrix("geometric_median", p)
    assert "called_target" in set(rows.loc[rows["scenario"] == "boost_liar", "metric"])


def cohort():
    stripes = data.load("stripes", tiny.cohorts)
    assert (stripes.name, stripes.n_classes) == ("stripes", 2)
    assert data.load("stripes", tiny.cohorts).fingerprint == stripes.fingerprint


def claim():
    from medsec.evidence import claims, tables
    (new,) = (each for each in claims.load("3-pruning")["claims"] if each["id"] == "noise-harmless")
    table = tables.read(paths.results("phantom") / "04_adversarial_pruning_defense.csv")
    assert claims.verdict(new, table, "phantom")["verdict"] == "holds"


said = {}
for use in (attack, defence, rule, cohort, claim):
    try:
        use()
    except Exception:
        said[use.__name__] = traceback.format_exc()[-3000:]
with open(sys.argv[1], "w") as file:
    json.dump(said, file)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What the notebooks need, with every recipe typed in; the images are those of this folder."""
    folder = tmp_path_factory.mktemp("recipes") / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "*.png", "*.partial")
    for name in NEEDED:
        here, there = paths.ROOT / name, folder / name
        if here.is_dir():
            shutil.copytree(here, there, ignore=ignored)
        else:
            shutil.copy2(here, there)
    (folder / "data").symlink_to(paths.ROOT / "data")
    for steps in RECIPES.values():
        for name, how, text in steps:
            assert (folder / name).exists() == (how == "append"), name
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write(text if name.endswith(".yaml") else f"\n\n{text}")
    return folder


def python(folder, code, *arguments):
    """Run code in a folder as its user would; what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDSEC_")}
    environment |= {"PYTHONPATH": str(folder), "MEDSEC_CELLS": str(folder / ".cells"), "MEDSEC_PROCESSES": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def said(copy):
    """By the kind of a recipe what went wrong."""
    python(copy, USE, "said.json")
    return json.loads((copy / "said.json").read_text(encoding="utf-8"))


def test_there_is_a_recipe_for_everything():
    assert set(RECIPES) == {"attack", "defence", "rule", "cohort", "claim"}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_touches_few_files(kind):
    assert len({name for name, _, _ in RECIPES[kind]}) <= 3


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_works(said, kind):
    assert said.get(kind) is None, said[kind]


def test_no_recipe_costs_a_finished_cell(copy):
    """Also a golden cell stays what it was."""
    code = """
import json, sys
sys.path.insert(0, "tests")
from golden import cells as golden
from experiments import params
from experiments.catalogue import EXPERIMENTS
from experiments.gia_defense import cells as inversion_cells
from experiments.threat_matrix import cells as matrix_cells
from medsec.evidence import cells
p = params.load()
plans = {"03_gia_defense": inversion_cells.quick(p), "05_threat_matrix": matrix_cells.quick(p)}
made = {f"{n} {c.name}": cells.identity(EXPERIMENTS[n], "f" * 64, p, c) for n, plan in plans.items() for c in plan}
print(json.dumps([made, {name: [cell.name for cell in each.cells] for name, each in golden.CELLS.items()}]))
"""
    before, after = (json.loads(python(folder, code)) for folder in (paths.ROOT, copy))
    assert after[0].items() >= before[0].items()
    assert after[1] == before[1]
