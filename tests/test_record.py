"""Records: planned cells, written one by one, resumed to the identical table; a record of other code is noticed."""

import dataclasses
import json

import pandas as pd
import pytest

from experiments import params, record_designs
from experiments.adversarial_pruning_defense import cells as evasion_eval
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evidence import record, tables

NOTEBOOK, COHORT = "01_backdoor_fedgan", "npz"
SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "classifier": {"batch": 32},
    "fedgan": {
        "n_clients": 2,
        "images_per_client": 16,
        "rounds": 2,
        "gan": {"z_dim": 4, "width": 4},
        "measure": {"synthetic": 100, "extractor_epochs": 1, "downstream_epochs": 1, "probe": 8, "threshold_fpr": 0.1},
    },
    "record": {
        "fedgan": {
            "seeds": 1,
            "trigger": ["grid"],
            "trigger_size": [2],
            "ratio": [0.5],
            "attackers": [2],
            "n_clients": [3],
            "partition": ["dirichlet", "style"],
            "image_size": [64],
        }
    },
}


@pytest.fixture
def small(tiny_npz, tmp_path, monkeypatch):
    """Parameters of a record of seconds, for a cohort in a file; records and checkpoints go to a temporary folder."""
    tree = params.merge(params.load().model_dump(), SMALL)
    tree = params.merge(tree, {"cohorts": {"npz": {"path": str(tiny_npz(per_class=120))}}})
    p = params.validate(tree)
    monkeypatch.setattr(params, "load", lambda profile: p)
    monkeypatch.setattr(record_designs, "SWEPT", (COHORT,))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "records", lambda cohort: tmp_path / "records" / cohort)
    monkeypatch.setenv("MEDSEC_CHECKPOINTS", str(tmp_path / "checkpoints"))
    yield p
    fedgan_eval._prepare.cache_clear()


def call(*more):
    return record.main([NOTEBOOK, "--cohort", COHORT, "--processes", "1", *more])


def test_plan_is_a_headline_and_one_factor_at_a_time(small):
    cells = record_designs.cells_01(COHORT, small)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    headline = [cell for cell in cells if not cell.keys]
    assert [(c.arm, c.seed) for c in headline] == [(a, s) for s in (0, 1) for a in ("attack", "clean", "controls")]
    sweeps = [cell for cell in cells if cell.keys]
    assert all(len(cell.keys) == 1 and cell.seed == 0 for cell in sweeps), "a sweep changes one factor, on fewer seeds"
    factors = {next(iter(cell.keys)) for cell in sweeps}
    assert factors == {"trigger", "area", "ratio", "attackers", "m", "partition"}, (
        "an npz file has one size, no hospitals"
    )
    assert {c.arm for c in sweeps if "m" in c.keys} == {"attack", "clean"}, "another federation needs its own control"
    for cell in cells:
        params.validate(params.merge(small.model_dump(), {"fedgan": cell.change}))


def test_plan_runs_nothing(small, capsys, tmp_path):
    assert call("--plan") == 0
    printed = capsys.readouterr().out
    assert "attack-ratio=0.5-seed0" in printed
    assert "cells" in printed.splitlines()[-1]
    assert not (tmp_path / "records").exists()


def test_interrupted_and_resumed_gives_the_same_table(small, tmp_path, monkeypatch, capsys):
    design = dataclasses.replace(
        record_designs.DESIGNS[NOTEBOOK],
        cells=lambda c, p: [x for x in record_designs.cells_01(c, p) if not x.keys or "ratio" in x.keys],
    )
    monkeypatch.setitem(record_designs.DESIGNS, NOTEBOOK, design)
    assert call() == 0
    place = record.place(COHORT, small) / NOTEBOOK
    target = paths.records(COHORT) / f"{NOTEBOOK}.csv"
    whole = target.read_bytes()
    about = json.loads(target.with_suffix(".json").read_text())
    assert about["cells_finished"] == about["cells_planned"] == 7
    assert record.is_finished(NOTEBOOK, COHORT)
    assert about["params"]["fedgan"]["rounds"] == 2
    assert about["peak_mb_of_a_process"] > 0

    # Killed after three cells: the tables of the others are not there, and one was only half written.
    for cell in ("clean-seed1", "attack-seed1", "controls-seed0"):
        (place / f"{cell}.csv.gz").unlink()
        (place / f"{cell}.json").unlink()
    (place / "clean-seed1.csv.partial").write_text("seed,variant\n")
    (place / "attack-ratio=0.5-seed0.json").unlink()
    target.unlink()
    ran = []
    run_cell = record.run_cell
    monkeypatch.setattr(record, "run_cell", lambda *args: ran.append(args[3].name) or run_cell(*args))
    assert call() == 0
    assert sorted(ran) == ["attack-ratio=0.5-seed0", "attack-seed1", "clean-seed1", "controls-seed0"]
    assert target.read_bytes() == whole

    # The headline agrees with the cells, and the sweep is addressable beside it.
    table = tables.read(target)
    row = tables.row(table, variant="boost", scenario="attack", metric="trigger_rate")
    cells = [tables.read(place / f"attack-seed{seed}.csv.gz") for seed in (0, 1)]
    singles = [tables.row(cell, variant="boost", scenario="attack", metric="trigger_rate")["value"] for cell in cells]
    assert row["value"] == pytest.approx(sum(singles) / 2)
    assert row["n"] == 2
    assert tables.row(table, variant="boost", scenario="attack", metric="trigger_rate", ratio="0.5")["n"] == 1
    assert not record.is_stale(NOTEBOOK, COHORT)

    # Other code: nothing is mixed, and it is said.
    monkeypatch.setattr(record, "code_hash", lambda modules: "another")
    assert record.is_stale(NOTEBOOK, COHORT)
    ran.clear()
    capsys.readouterr()
    assert call() == 2
    assert "made by other code or parameters; add --restart" in capsys.readouterr().err
    assert ran == []
    assert target.read_bytes() == whole


def test_a_record_that_is_cut_short_has_a_table_of_what_is_finished(small, monkeypatch):
    run_cell, ran = record.run_cell, []

    def stopped(*args):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(args[3].name)
        return run_cell(*args)

    monkeypatch.setattr(record, "run_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        call("--processes", "1")
    about = json.loads((paths.records(COHORT) / f"{NOTEBOOK}.json").read_text())
    assert about["cells_finished"] == 2 < about["cells_planned"]
    assert not record.is_finished(NOTEBOOK, COHORT)
    assert len(record.load(NOTEBOOK, COHORT))


def test_the_readers_own_images_have_headlines_only():
    """A record of any other images is planned like that of the second modality, without what only drawn eyes can do."""
    p = params.load("full")
    for notebook in record.NOTEBOOKS:
        plan = record_designs.DESIGNS[notebook].cells
        own = [(cell.arm, cell.seed, cell.keys, cell.variants) for cell in plan("npz", p)]
        eyes = [(c.arm, c.seed, c.keys, c.variants) for c in plan("fundus", p) if "size" not in c.keys]
        assert own == eyes
        assert all(not keys for _, _, keys, _ in own)


@pytest.mark.parametrize("section", ["inversion", "evasion"])
def test_another_modality_has_headlines_with_fewer_attacks(section, monkeypatch):
    """Every cell of it runs with the parameters' change, those of other cohorts without."""
    p = params.load("full")
    change = p.record.other_modality.change[section]
    cells_of, run, module, called = {
        "inversion": (
            record_designs.cells_03,
            record_designs.run_03,
            inversion_eval,
            ("federation_cell", "attack_cell"),
        ),
        "evasion": (record_designs.cells_04, record_designs.run_04, evasion_eval, ("arm_cell",)),
    }[section]
    used = []
    for name in called:
        monkeypatch.setattr(module, name, lambda cohort, p, *rest, **more: used.append(p) or (pd.DataFrame(),))
    monkeypatch.setattr(record_designs, "_worth_keeping", lambda table: table)
    cells = cells_of("fundus", p)
    assert {cell.seed for cell in cells} == set(p.seeds.evaluation)
    for cell in cells:
        assert not cell.keys
        run("fundus", p, cell)
    changed = params.validate(params.merge(p.model_dump(), {section: change}))
    assert changed != p
    assert used == [changed] * len(cells)
    used.clear()
    run("phantom", p, next(cell for cell in cells_of("phantom", p) if not cell.keys))
    assert used == [p]


def test_no_record(small):
    assert record.load(NOTEBOOK, "nowhere") is None
    assert not record.is_finished(NOTEBOOK, "nowhere")
    with pytest.raises(InputError, match="no record of 01_backdoor_fedgan for nowhere"):
        record.is_stale(NOTEBOOK, "nowhere")


def test_committed_records_meet_their_plan():
    """Every committed record has its metadata, unique rows, and at least five seeds in the headline."""
    for file in sorted((paths.ROOT / "records").glob("*/*.csv")):
        table = tables.read(file)
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        assert not table.duplicated(tables.keys(table)).any(), file
        assert {"profile", "params", "versions", "hardware", "code", "cpu_seconds"} <= about.keys()
        if about["cells_finished"] == about["cells_planned"]:
            headline = table[(table[tables.keys(table)[3:]] == "").all(axis=1)]
            fewer = headline["variant"].isin(record_designs.BASELINES)  # robust aggregators, for comparison
            fewer |= headline["scenario"].eq("utility") & file.stem.startswith("03")  # of defences that decide no bar
            fewer |= headline["variant"].isin(inversion_clients.CONTROLS)
            assert headline["n"][~fewer].min() >= 5, file
            assert headline["n"][headline["metric"] != "failed"].min() >= 3, file  # n of "failed": how many diverged
        assert isinstance(table, pd.DataFrame)
