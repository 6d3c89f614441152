"""Colour and more than two classes: every experiment, end to end, on small fundus phantoms of three grades."""

import importlib
import inspect
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import test_evasion_eval
import test_feddetect_eval
import test_fedgan
import test_inversion_eval
import test_matrix_eval
import torch

from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells as evasion_eval
from experiments.adversarial_pruning_defense import figures as evasion_plots
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.data_and_threats import cells as cohort_eval
from experiments.feddetect import cells as feddetect_eval
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense import figures as inversion_plots
from experiments.threat_matrix import cells as matrix_eval
from medsec import data
from medsec.core import paths
from medsec.evidence import record
from medsec.show import plots

IMAGES = {"client": 96, "public": 72, "reference": 96, "val": 24, "test": 24}
COHORT = {"fundus": {"size": 28, "seed": 7, "images": IMAGES, "grades": 3}}
ATTACKED = [variant for variant in inversion_clients.VARIANTS if variant != "none"]

# Modules that never see an image: parameters, files, tables, claims, records, the text of the threats, and the pipeline.
BLIND = {"check", "claims", "execute", "ledger", "ledger_plots", "panels", "parallel", "params", "paths", "record"}
BLIND |= {"cells", "errors", "record_designs", "tables", "threats", "evasion_tables", "inversion_tables"}
# What a fundus phantom cannot reach, and the test that shows it colour or three classes; or why there is nothing to show.
ELSEWHERE = {
    "cohort.deduplicate": "test_data: images of another source",
    "data": "test_data: the command line",
    "exact": "test_fundus, test_phantom: numbers",
    "evasion_library.oracle": "test_adversarial: three classes",
    "evasion_plots": "test_a_colour_image_is_drawn_in_colour, and plots of numbers",
    "fedcls.best_threshold": "a threshold is for two classes; three take the highest probability",
    "feddetect.null_rates": "a simulation without images",
    "feddetect_eval": "tables, and a simulation without images",
    "federated": "test_federated: vectors",
    "folder": "test_folder: a colour folder of three classes",
    "image_files": "test_folder: every kind of colour",
    "inversion_eval": "tables",
    "inversion_plots": "test_a_colour_image_is_drawn_in_colour, and plots of numbers",
    "gradient_defences.image_noise": "the gradient at `noisy_image`, which has run",
    "inversion.client_update": "`_update`, which has run, without a graph",
    "matrix_eval.quick": "the plan of the notebook",
    "matrix_eval.missing": "the plan of the notebook",
    "matrix_plots": "numbers",
    "matrix_surprises": "tables",
    "matrix_tables": "tables",
    "medmnist_files": "test_data: another source",
    "metrics": "numbers",
    "phantom.render": "the chest phantom is grey",
    "png": "test_png: figures in colour",
    "plots": "test_a_colour_image_is_drawn_in_colour, and plots of numbers",
}
MODULES = sorted({file.stem for file in paths.PACKAGE.glob("*.py")} - BLIND)


def small(changes):
    """The parameters of a notebook's own small tests, with a small fundus phantom of three grades."""
    tree = params.merge(params.load().model_dump(), changes)
    return params.validate(params.merge(tree, {"cohorts": COHORT}))


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Tables of one cell of every experiment, by name; and the code of the package that ran on the way."""
    patch, called = pytest.MonkeyPatch(), set()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        tables = dict(run(tmp_path_factory.mktemp("root")))
    finally:
        sys.setprofile(None)
        patch.undo()
        for prepared in (fedgan_eval._prepare, inversion_clients._prepare):
            prepared.cache_clear()
    return tables, called


def run(folder):
    p = small({"threats": {"shift_images": 24, "shift_epochs": 1}})
    cohort = data.load("fundus", p.cohorts)
    yield "cohort", pd.DataFrame(cohort_eval.count_rows(cohort) + cohort_eval.partition_rows(cohort, p))
    yield "shift", pd.DataFrame(cohort_eval.shift_rows("fundus", p, 0, 0))

    p = small(test_fedgan.SMALL)
    for arm in ("attack", "clean", "controls"):
        yield f"fedgan {arm}", fedgan_eval.run_cell("fundus", p, 0, arm)[0]

    p = small(test_feddetect_eval.SMALL)
    for scenario in ("boost_liar", "aware", "blended_trigger", "stripes_trigger"):
        yield f"feddetect {scenario}", feddetect_eval.run_cell("fundus", p, 0, scenario, feddetect_eval.VARIANTS)[0]
    yield "feddetect downstream", feddetect_eval.run_downstream("fundus", p, 0)

    p = small(test_inversion_eval.SMALL)
    more = {"inversion": {"victims": 8, "attack": {"together": 8}}}  # one of them with a lesion
    every = params.validate(params.merge(p.model_dump(), more))
    yield "inversion none", inversion_eval.attack_cell("fundus", every, "none", 0)[0]
    few = {"inversion": {"attacks": ["ig"], "adaptive": ["known", "purified", "unmasked"]}}
    p = params.validate(params.merge(p.model_dump(), few))
    for variant in ATTACKED:
        yield f"inversion {variant}", inversion_eval.attack_cell("fundus", p, variant, 0)[0]
    yield "inversion batch", inversion_eval.sweep_cell("fundus", p, "none", 0, batch=2, labels="inferred")
    yield "inversion steps", inversion_eval.sweep_cell("fundus", p, "none", 0, steps=2)
    yield "inversion strength", inversion_eval.strength_cell("fundus", p, "soteria", 0, 1)
    yield "inversion federation", inversion_eval.federation_cell("fundus", p, "dp_sgd", 0, [0.0, 1.0])
    shown = inversion_eval.changes("fundus", p, ("shadow_released",), 0)
    yield "inversion spectrum", inversion_eval.spectrum(shown.deltas["shadow_released"])

    p = small(test_evasion_eval.SMALL)
    arms = [evasion_eval.arm_cell("fundus", p, variant, 0) for variant in ("base", "hardened")]
    yield from zip(("evasion base", "evasion hardened"), arms, strict=True)
    yield "evasion prune", evasion_eval.prune_cell("fundus", p, "prune", 0, 0.5)
    p = small(test_matrix_eval.SMALL)
    p = params.validate(
        params.merge(p.model_dump(), {"matrix": {"federation": {"images_per_client": 24, "rounds": 4}}})
    )
    rows = [matrix_eval.rows_of("fundus", p, row, 0) for row in ("none", "hardened", "feddetect+shadow")]
    yield "matrix", matrix_eval.summarise(pd.concat(rows, ignore_index=True))

    p = small(test_evasion_eval.SMALL)
    yield "evasion summary", evasion_eval.summarise(pd.concat(arms, ignore_index=True), p)
    setup = evasion_arms.prepare("fundus", p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", folder)
        evasion_arms.save(evasion_arms.train(setup, "base", 0), setup, "base", 0)
        assert evasion_arms.seeds_with_checkpoints(setup, ["base"], [0]) == {"base": [0]}


def test_a_second_modality_has_headlines_only():
    p = params.load("full")
    for notebook in record.NOTEBOOKS:
        cells = record.design(notebook).cells("fundus", p)
        assert len({cell.name for cell in cells}) == len(cells)
        assert {cell.seed for cell in cells if not cell.keys} == set(p.seeds.evaluation)
        assert len(cells) < len(record.design(notebook).cells("phantom", p)) / 2
        assert all(cell.keys == {"trigger": "grid", "size": 64} for cell in cells if cell.keys)


def test_every_number_is_finite(experiments):
    for name, table in experiments[0].items():
        assert len(table), name
        assert np.isfinite(table["value"]).all(), name


def test_lesions_are_measured_in_colour(experiments):
    tables, _ = experiments
    regions = tables["inversion none"]["region"]
    assert {"lesion", "outside"} <= set(regions)
    assert (tables["evasion hardened"]["metric"] == "pointing_game").any()


def test_a_colour_image_is_drawn_in_colour():
    red = np.zeros((2, 3, 8, 8), dtype=np.float32)
    red[:, 0] = 1
    x, y = torch.from_numpy(red), torch.tensor([0, 1])
    drawn = [
        plots.gallery({"red": red}, ""),
        inversion_plots.changes(red, {"a": red / 2}, None, ""),
        evasion_plots.examples(x, {"a": x}, "", times=1, answers={"a": y}, y=y),
        evasion_plots.looks(x, {"a": x[:, 0]}, None, ""),
    ]
    for fig, _ in drawn:
        image = fig.axes[0].get_images()[0]
        assert np.allclose(np.asarray(image.get_array())[..., :3], [1, 0, 0])
    plt.close("all")


def public_functions(module):
    """Functions of a module's own that its users may call, by their names."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in found if not name.startswith("_") and f.__module__ == module.__name__}


def test_every_public_function_has_run(experiments):
    missing = []
    for name in MODULES:
        module = importlib.import_module(f"medsec.{name}")
        for function, found in public_functions(module).items():
            ran = inspect.unwrap(found).__code__ in experiments[1]
            if not ran and not {name, f"{name}.{function}"} & ELSEWHERE.keys():
                missing.append(f"{name}.{function}")
    assert not missing, "\n".join(missing)
