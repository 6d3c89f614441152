"""Cells and records: what a cell's identity depends on, what is found again, and what becomes of damaged or foreign files.

Nearly all of it with a toy experiment that takes no time; once with a real one, notebook 01 on a handful of small images.
"""

import dataclasses
import io
import json
import shutil
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import instruments, params
from experiments.__main__ import main
from experiments.backdoor_fedgan import cells as fedgan_cells
from experiments.backdoor_fedgan import record as fedgan_record
from experiments.catalogue import DESIGNS, EXPERIMENTS
from medsec import data
from medsec.core import parallel, paths
from medsec.core.errors import InputError
from medsec.core.params import Section, Seeds, merge, validated
from medsec.core.settings import Cohorts
from medsec.evidence import cells, record, tables
from medsec.evidence.cells import Cell, Experiment

COHORT = "npz"


class ToyParams(Section):
    scale: float
    methods: dict[str, dict]


class AllParams(Section):
    device: Literal["cpu", "cuda"] = "cpu"
    seeds: Seeds = Seeds(tuning=[9], evaluation=[0, 1])
    cohorts: Cohorts
    toy: ToyParams = ToyParams(scale=1.0, methods={"plain": {"steps": 3}, "shared": {}, "other": {"steps": 4}})
    unread: int = 1


RAN: list[str] = []  # names of the cells that ran, in this process


def measure(cohort: str, p: AllParams, cell: Cell) -> cells.Finished:
    """A toy cell: one measured value, a time, and a picture."""
    RAN.append(cell.name)
    rng = np.random.default_rng(cell.seed)
    row = {
        "seed": cell.seed,
        "variant": cell.arm,
        "scenario": "toy",
        "metric": "share",
        "value": p.toy.scale * rng.random(),
    }
    time = row | {"metric": "time", "value": float(len(RAN)), "unit": "ms"}
    rows = pd.DataFrame([row | {"unit": "share"}, time]).assign(n_items=10, scale=str(cell.keys.get("scale", "")))
    return rows, {"noise": rng.random((2, 3))}


TOY = Experiment("06_toy", 1, ("toy",), measure, own=("toy.methods",), shared=("shared",))
PLAIN = Cell("b", 0, variants=("plain",))
PLAN = [Cell("a", 0), Cell("a", 1), PLAIN, Cell("b", 1, {"toy": {"scale": 2.0}}, {"scale": 2})]
DESIGN = record.Design(
    TOY,
    lambda cohort, p: PLAN,
    lambda rows, cell: rows[rows["unit"] != "ms"],
    lambda runs, p: tables.summarise(runs, ["scale"]),
    lambda p, cell: 1.0,
)


@pytest.fixture
def p(npz_cohorts, tiny_npz) -> AllParams:
    RAN.clear()
    return AllParams(cohorts=npz_cohorts(tiny_npz()))


def changed(p: AllParams, change: dict) -> AllParams:
    return validated(AllParams, merge(p.model_dump(), change), "test")


def run(p: AllParams, experiment: Experiment = TOY, plan=PLAN) -> pd.DataFrame:
    return cells.table(cells.run(experiment, COHORT, p, plan, processes=1))


def files() -> dict[str, bytes]:
    """Content of every file beside and with finished cells."""
    return {file.name: file.read_bytes() for file in paths.cells(COHORT).rglob("*") if file.is_file()}


def file_of(p: AllParams, cell: Cell):
    return cells.place(
        TOY, COHORT, cell, cells.names_of(TOY, data.load(COHORT, p.cohorts).fingerprint, p, PLAN)[cell.name]
    )


# What a cell's identity depends on ------------------------------------------------------------------------------------


def test_the_identity_changes_with_all_that_decides_the_numbers(p):
    def name(experiment=TOY, fingerprint="f" * 64, cell=PLAIN, **change):
        return cells.identity(experiment, fingerprint, changed(p, change), cell)

    found = [
        name(),
        name(dataclasses.replace(TOY, generation=2)),
        name(dataclasses.replace(TOY, name="07_toy")),
        name(fingerprint="e" * 64),
        name(device="cuda"),
        name(seeds={"tuning": [8]}),
        name(toy={"scale": 1.5}),
        name(toy={"methods": {"plain": {"steps": 2}}}),
        name(toy={"methods": {"shared": {"steps": 2}}}),
        *(
            name(cell=dataclasses.replace(PLAIN, **change))
            for change in (
                {"arm": "a"},
                {"seed": 1},
                {"change": {"toy": {"scale": 3.0}}},
                {"keys": {"scale": 3}},
                {"size": 32},
                {"variants": ("plain", "shared")},
                {"given": {"retrained": True}},
            )
        ),
    ]
    assert len(set(found)) == len(found)


def test_the_identity_ignores_what_decides_nothing(p, monkeypatch):
    """Other methods' parameters, other sections and seeds, where the code is and what is in any file."""

    def moved(cohort, p, cell):
        """The same code, in other words, in another place."""
        return measure(cohort, p, cell)

    def closed(*args, **more):
        raise AssertionError("an identity is made of parameters only, not of files")

    here, elsewhere = TOY, dataclasses.replace(TOY, run=moved)
    more = [{"toy": {"methods": {"new": {"steps": 9}, "other": {"steps": 9}}}}, {"unread": 2}]
    more.append({"seeds": {"evaluation": [0, 1, 2, 3]}})
    monkeypatch.setattr(io, "open", closed)
    monkeypatch.setattr("builtins.open", closed)
    found = {cells.identity(here, "f" * 64, p, PLAIN), cells.identity(elsewhere, "f" * 64, p, PLAIN)}
    found |= {cells.identity(here, "f" * 64, changed(p, change), PLAIN) for change in more}
    assert len(found) == 1


MODULE = """
from test_cells import TOY, dataclasses, measure

def run(*all):
    return measure(*all)

EXPERIMENT = dataclasses.replace(TOY, run=run)
"""


def test_a_comment_a_docstring_or_a_moved_module_leaves_every_finished_cell_valid(p, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    tables_made = []
    for module, text in (
        ("toy_before", MODULE),
        ("toy_after", f'"""A docstring."""\n\n# A comment.\n{MODULE.replace("*all):", "*all):  # said again")}'),
    ):
        (tmp_path / f"{module}.py").write_text(text)
        tables_made.append(run(p, __import__(module).EXPERIMENT))
    assert len(RAN) == len(PLAN), "the edited and moved module finds all cells"
    pd.testing.assert_frame_equal(*tables_made)


def test_a_new_method_with_parameters_of_its_own_leaves_the_real_cells_valid():
    """A gradient defence, as CONTRIBUTING adds one: notebooks 03 and 05 keep every cell of today's methods."""
    p = params.load()
    grown = p.inversion.defences if isinstance(p.inversion.defences, dict) else p.inversion.defences.model_dump()
    inversion = p.inversion.model_copy(update={"defences": {**grown, "signs": {"strength": 1.0}}})
    after = p.model_copy(update={"inversion": inversion})
    for name in ("03_gia_defense", "05_threat_matrix"):
        for method in grown:
            cell = Cell("attack", 0, variants=(method,))
            assert len({cells.identity(EXPERIMENTS[name], "f" * 64, each, cell) for each in (p, after)}) == 1


def test_only_the_cells_of_an_arm_depend_on_its_section():
    p = params.load()
    after = p.model_copy(update={"drawing": p.drawing.model_copy(update={"rounds": p.drawing.rounds + 1})})
    experiment = EXPERIMENTS["01_backdoor_fedgan"]
    for arm, identities in (("clean", 1), ("attack", 1), ("controls", 1), ("drawing_clean", 2), ("drawing_class", 2)):
        found = {cells.identity(experiment, "f" * 64, each, Cell(arm, 0)) for each in (p, after)}
        assert len(found) == identities, arm


@pytest.mark.parametrize("notebook", DESIGNS)
@pytest.mark.parametrize("cohort", ["phantom", "pneumoniamnist", "fundus"])
def test_committed_cells_are_found_again(notebook, cohort, request):
    """By the parameters that stand in the record: a change of `identity` would throw away days of computing."""
    about = record.about(notebook, cohort)
    design = DESIGNS[notebook]
    if about is None or about["generation"] != design.experiment.generation:
        pytest.skip("no record of this generation")
    if cohort == "pneumoniamnist":
        request.getfixturevalue("real_root")
    # No cell of a record depends on a section that came after it.
    p = params.validate(params.merge(params.load("full").model_dump(), about["params"]), f"{notebook}.json")
    planned = {cell.name: cell for cell in design.cells(cohort, p)}
    runs = record.committed(paths.records(cohort), notebook).drop_duplicates("cell")
    assert len(runs) == about["cells_finished"]
    fingerprint = about["cohort_fingerprint"]
    for name, identity in zip(runs["cell"], runs["identity"], strict=True):
        if name in planned:
            assert cells.identity(design.experiment, fingerprint, p, planned[name]) == identity, name


# Finding finished cells -----------------------------------------------------------------------------------------------


def test_finished_cells_are_not_run_again_and_say_the_same(p, capsys, monkeypatch):
    whole = cells.run(TOY, COHORT, p, PLAN, processes=1)
    assert [cell.name for cell in PLAN] == RAN
    assert [len(rows) for rows, _ in whole] == [2, 2, 2, 2]
    again = cells.run(TOY, COHORT, p, PLAN[:3], processes=1)
    assert len(RAN) == 4
    assert "3 of 3 cells were finished before (MEDSEC_FRESH=1 runs them anew)" in capsys.readouterr().err
    for (rows, pictures), (rows_again, pictures_again) in zip(whole, again, strict=False):
        pd.testing.assert_frame_equal(rows, rows_again)
        np.testing.assert_array_equal(pictures["noise"], pictures_again["noise"])
    assert "ms" not in set(cells.table(whole)["unit"]), "times belong to records only"

    monkeypatch.setenv("MEDSEC_FRESH", "1")
    pd.testing.assert_frame_equal(run(p), cells.table(whole))
    assert len(RAN) == 8


def test_cells_of_one_family_run_one_after_the_other_whatever_the_experiment(p):
    """What they share is remembered by a process, and `finish` takes several experiments at a time."""
    other = dataclasses.replace(TOY, name="07_toy", family=lambda cell: f"seed {cell.seed}")
    mine = dataclasses.replace(TOY, family=lambda cell: f"seed {cell.seed}" if cell is PLAIN else "")
    cells.SHARED["left"] = "by somebody else"
    places = cells.finish(COHORT, p, [(mine, PLAN[:3]), (other, PLAN[:2])], processes=1)
    assert not cells.SHARED
    assert RAN == ["a-seed0", "a-seed1", "b-seed0", "a-seed0", "a-seed1"]
    assert [place.parent.name for place in places] == [TOY.name] * 3 + ["07_toy"] * 2
    assert all(cells.read(place) is not None for place in places)


def test_the_cells_of_all_notebooks_are_run_at_once(p, monkeypatch, capsys):
    asked = {}

    def finish(cohort, p, plans):
        asked.update({experiment.name: [cell.name for cell in plan] for experiment, plan in plans})

    monkeypatch.setattr(cells, "finish", finish)
    assert main(["cells", "--cohort", "phantom"]) == 0
    assert asked.keys() == EXPERIMENTS.keys(), "another notebook's cells would run while it draws"
    assert all(asked.values())
    with parallel.locked(paths.cells("phantom") / "cells.lock"):
        assert main(["cells", "--cohort", "phantom"]) == 2
    assert "is already running cells" in capsys.readouterr().err


def test_an_instrument_is_trained_once(p, monkeypatch, capsys):
    cohort, ran = data.load(COHORT, p.cohorts), []

    def get(width=3, **decides):
        def train():
            ran.append(1)
            torch.manual_seed(7)
            return nn.Linear(2, width).eval()

        return instruments.trained(cohort, "toy", {"width": width, **decides}, lambda: nn.Linear(2, width), train)

    first, state = get(), torch.random.get_rng_state()
    again = get()
    assert len(ran) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not again.training
    get(width=4)
    get(lr=1.0)
    assert len(ran) == 3
    for file in (paths.cells(COHORT) / "instruments").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(get().weight, first.weight)
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("MEDSEC_FRESH", "1")
    get()
    assert len(ran) == 5


def test_an_interrupted_run_goes_on_where_it_was(p, monkeypatch):
    def interrupted(cohort, p, cell):
        if len(RAN) == 2:
            raise KeyboardInterrupt
        return measure(cohort, p, cell)

    with pytest.raises(KeyboardInterrupt):
        run(p, dataclasses.replace(TOY, run=interrupted))
    assert len(files()) == 2
    resumed = run(p)
    assert [cell.name for cell in PLAN] == RAN, "no cell ran twice"
    monkeypatch.setenv("MEDSEC_FRESH", "1")
    assert run(p).to_csv() == resumed.to_csv()


def test_a_process_that_lives_already_writes_where_this_one_reads(p, tmp_path, monkeypatch):
    """Worker processes keep the environment that they were started with."""

    def elsewhere(function, calls, *, processes):
        with monkeypatch.context() as other:
            other.setenv("MEDSEC_CELLS", str(tmp_path / "of-an-earlier-call"))
            return [function(*call) for call in calls]

    monkeypatch.setattr(cells.parallel, "run_cells", elsewhere)
    assert len(run(p)) == len(files()) == len(PLAN)


def test_another_generation_stays_beside_this_one(p, capsys):
    run(p)
    before = files()
    assert "another generation" not in capsys.readouterr().err
    run(p, dataclasses.replace(TOY, generation=2))
    assert (
        "4 cells, such as a-seed0, lie there with other parameters or of another generation" in capsys.readouterr().err
    )
    assert len(RAN) == 8
    assert len(files()) == 8
    assert files().items() >= before.items()


# Damaged files --------------------------------------------------------------------------------------------------------


def swapped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no cell at all",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: swapped(content, 200),
    ],
    ids=["empty", "garbage", "half", "cut", "one-wrong-byte"],
)
def test_a_damaged_cell_is_set_aside_said_and_run_again(p, damage, capsys):
    table = run(p)
    file = file_of(p, PLAIN)
    wrong = damage(file.read_bytes())
    file.write_bytes(wrong)
    others = {name: content for name, content in files().items() if name != file.name}
    capsys.readouterr()
    pd.testing.assert_frame_equal(run(p), table)
    assert RAN[4:] == [PLAIN.name], "all others are still used"
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith(f"{file.name}.damaged: this cell cannot be read")] == said[:1]
    assert files()[f"{file.name}.damaged"] == wrong, "it is not lost"
    assert files().items() >= others.items()


def test_no_single_wrong_byte_ends_in_a_traceback(p, capsys):
    run(p, plan=[PLAIN])
    file = file_of(p, PLAIN)
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        file.write_bytes(swapped(content, at))
        cells.read(file)


def test_a_half_written_cell_is_no_cell(p):
    table = run(p)
    file = file_of(p, PLAIN)
    file.replace(file.with_name(f"{file.name}.4711.partial"))
    pd.testing.assert_frame_equal(run(p), table)
    assert RAN[4:] == [PLAIN.name]


def test_where_no_cell_can_be_written_none_is_run(p, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEDSEC_CELLS", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file/npz"):
        run(p)
    assert not RAN


# Records --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Records go to a temporary folder."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return paths.records(COHORT)


def make(p, **more) -> int:
    return record.run(DESIGN, COHORT, p, "full", processes=1, **more)


def record_files(place) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.glob("*")}


def test_a_record_is_three_files_and_takes_the_notebooks_cells(p, place):
    run(p, plan=PLAN[:2])  # what the notebook runs
    assert make(p) == 0
    assert len(RAN) == 4, "the record runs the rest only"
    assert set(record_files(place)) == {"06_toy_runs.csv.gz", "06_toy.csv", "06_toy.json"}
    runs = record.committed(place, "06_toy")
    assert list(runs["cell"]) == [cell.name for cell in PLAN]
    assert dict(zip(runs["cell"], runs["identity"], strict=True)) == cells.names_of(
        TOY, data.load(COHORT, p.cohorts).fingerprint, p, PLAN
    )
    about = record.about("06_toy", COHORT)
    assert about["cells_planned"] == about["cells_finished"] == 4
    assert about["params"] == p.model_dump()
    assert record.is_finished("06_toy", COHORT)
    assert not record.is_stale(TOY, COHORT)
    assert record.is_stale(dataclasses.replace(TOY, generation=2), COHORT)
    assert tables.row(record.load("06_toy", COHORT), variant="b", scenario="toy", metric="share", scale="2")["n"] == 1

    before = record_files(place)
    shutil.rmtree(paths.cells(COHORT))  # in a clone
    assert make(p) == 0
    assert len(RAN) == 4, "what is in the record is not run again"
    assert record_files(place) == before


def test_a_plan_runs_and_writes_nothing(p, place, capsys):
    assert make(p, only_plan=True) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:4]] == [cell.name for cell in PLAN]
    assert printed[-1].startswith("4 cells, 4 to do")
    assert not RAN
    assert not place.exists()


def test_an_interrupted_record_resumes_to_the_same_bytes(p, place):
    assert make(p) == 0
    whole = (place / "06_toy.csv").read_bytes()
    shutil.rmtree(place)
    shutil.rmtree(paths.cells(COHORT))
    RAN.clear()

    def interrupted(cohort, p, cell):
        if len(RAN) == 2:
            raise KeyboardInterrupt
        return measure(cohort, p, cell)

    cut = dataclasses.replace(DESIGN, experiment=dataclasses.replace(TOY, run=interrupted))
    with pytest.raises(KeyboardInterrupt):
        record.run(cut, COHORT, p, "full", processes=1)
    assert record.about("06_toy", COHORT)["cells_finished"] == 2
    assert not record.is_finished("06_toy", COHORT)
    assert len(record.load("06_toy", COHORT)) == 1, "cut short, it is a record of what is finished"
    assert make(p) == 0
    assert len(RAN) == 4
    assert (place / "06_toy.csv").read_bytes() == whole


def test_cells_of_other_parameters_are_not_replaced_unless_asked(p, place):
    make(p)
    before = record_files(place)
    other = changed(p, {"toy": {"scale": 3.0}})
    with pytest.raises(InputError, match=r"^3 cells, such as a-seed0, were made with other .* add --restart [^\n]*$"):
        make(other)
    newer = dataclasses.replace(DESIGN, experiment=dataclasses.replace(TOY, generation=2))
    with pytest.raises(InputError, match=r"^4 cells, .* by another generation"):
        record.run(newer, COHORT, p, "full", processes=1)
    assert record_files(place) == before
    assert len(RAN) == 4
    assert make(other, restart=True) == 0
    assert len(RAN) == 7, "the cell that sets the scale itself is the same in both"
    assert record_files(place) != before


@pytest.mark.parametrize("damage", [b"", b"no table", None], ids=["empty", "garbage", "half"])
def test_a_damaged_record_is_left_alone(p, place, damage):
    make(p)
    file = place / "06_toy_runs.csv.gz"
    file.write_bytes(file.read_bytes()[:-20] if damage is None else damage)
    before = record_files(place)
    with pytest.raises(InputError) as caught:
        make(p, restart=True)
    assert str(caught.value).split(" ")[0].endswith("06_toy_runs.csv.gz")
    assert str(caught.value).endswith("restore it with: git checkout records/npz/06_toy_runs.csv.gz")
    assert "\n" not in str(caught.value)
    assert record_files(place) == before


def test_a_missing_file_of_a_record_is_made_again_from_the_others(p, place):
    with pytest.raises(InputError, match=r"^no record of 06_toy for npz; make it with: [^\n]*$"):
        record.is_stale(TOY, COHORT)
    assert record.load("06_toy", COHORT) is None
    assert not record.is_finished("06_toy", COHORT)
    make(p)
    before = record_files(place)
    for name in before:
        (place / name).unlink()
        if name.endswith(".json"):
            assert record.is_stale(TOY, COHORT), "nobody knows by what it was made"
            assert not record.is_finished("06_toy", COHORT)
        make(p)
        assert record_files(place) == before, name
    assert len(RAN) == 4
    (place / "06_toy.json").write_text('{"generation": ')
    with pytest.raises(
        InputError, match=r"^records/npz/06_toy\.json is no JSON .*git checkout records/npz/06_toy\.json$"
    ):
        record.is_stale(TOY, COHORT)


# A real experiment ----------------------------------------------------------------------------------------------------

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
}


def test_notebook_01_and_its_record_share_their_cells(tiny_npz, place):
    npz = {"cohorts": {"npz": {"path": str(tiny_npz(per_class=120))}}}
    p = params.validate(merge(merge(params.load().model_dump(), SMALL), npz))
    quick = [cell for cell in fedgan_cells.quick(p) if cell.arm != "controls"]
    finished = cells.run(fedgan_cells.EXPERIMENT, COHORT, p, quick, processes=1)
    few = [*quick, Cell("attack", 0, {"fedgan": {"poison": {"ratio": 0.5}}}, {"ratio": 0.5})]
    design = dataclasses.replace(fedgan_record.DESIGN, cells=lambda cohort, p: few)
    times = {file: file.stat().st_mtime_ns for file in paths.cells(COHORT).rglob("*.npz")}
    try:
        assert record.run(design, COHORT, p, "full", processes=1) == 0
    finally:
        fedgan_cells._prepare.cache_clear()
    assert len(times) == len(quick)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    summary = record.load("01_backdoor_fedgan", COHORT)
    where = {"variant": "boost", "scenario": "attack", "metric": "trigger_rate"}
    singles = [tables.row(rows, **where)["value"] for rows, _ in finished[:2]]
    assert tables.row(summary, **where)["value"] == pytest.approx(np.mean(singles), abs=1e-5)
    assert tables.row(summary, **where)["n"] == 2
    assert tables.row(summary, **where, ratio="0.5")["n"] == 1
    about = json.loads((place / "01_backdoor_fedgan.json").read_text(encoding="utf-8"))
    assert about["cells_finished"] == about["cells_planned"] == 5
    assert about["peak_mb_of_a_process"] > 0
