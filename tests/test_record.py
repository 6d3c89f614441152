"""The designs of the records, and the records that are committed."""

import json

import pytest

from experiments import params
from experiments.catalogue import DESIGNS
from experiments.feddetect.record import BASELINES
from experiments.gia_defense.clients import CONTROLS
from medsec.core import paths
from medsec.evidence import cells, tables


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
        assert all(cell.change == change for cell in own)


def test_committed_records_have_unique_rows_and_enough_seeds():
    files = sorted((paths.ROOT / "records").glob("*/0?_*.json"))
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
            assert headline["n"][~fewer].min() >= 5, file
            assert headline["n"][headline["metric"] != "failed"].min() >= 3, file  # n of "failed": how many diverged
