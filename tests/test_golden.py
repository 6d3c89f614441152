"""Golden cells: tiny cells of every experiment still give the committed numbers, and no method is without one."""

import pytest
from golden import cells

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan import drawing
from experiments.catalogue import DESIGNS
from experiments.feddetect import cells as feddetect_eval
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from experiments.threat_matrix import arms as matrix_arms
from experiments.threat_matrix import federation as matrix_federation
from medsec.backdoor import attackers as fedgan_attackers
from medsec.backdoor import triggers
from medsec.core import paths
from medsec.evasion import scenarios

EVASIONS = [*scenarios.CONFIGURED, "fgsm"]


@pytest.mark.parametrize("name", cells.CELLS)
def test_gives_the_committed_numbers(name):
    assert cells.differences(cells.made(name), cells.stored()[name], cells.notes()[name]) == []


def test_is_committed_for_the_cells_that_there_are():
    assert list(cells.notes()) == list(cells.CELLS)
    assert set(cells.stored()) == set(cells.CELLS)


@pytest.fixture
def table():
    return cells.stored()["04-hardened"]


def test_finds_a_change_of_the_seventh_digit(table):
    note = {"processor": cells.processor(), "sha256": cells.digest(table)}
    assert cells.differences(table, table, note) == []
    changed = table.copy()
    changed.loc[5, "value"] *= 1 + 1e-9
    assert cells.differences(changed, table, note) == ["equal to six digits, but not bit for bit"]


@pytest.mark.parametrize("note", ["same", "other"])
def test_finds_a_large_change_and_a_missing_row_on_any_processor(table, note):
    note = {"processor": cells.processor() if note == "same" else "another", "sha256": cells.digest(table)}
    assert cells.differences(table, table, note) == []
    changed = table.copy()
    changed.loc[5, "value"] += 1
    assert len(cells.differences(changed, table, note)) == 1
    assert cells.differences(table[:-1], table, note) != []


def of(experiment):
    return [golden for golden in cells.CELLS.values() if golden.experiment == experiment]


def recorded(experiment):
    return [cell for golden in of(experiment) for cell in golden.cells]


def column(prefix, name):
    """All that stands in one column of an experiment's committed tables."""
    parts = [table[name] for cell, table in cells.stored().items() if cell.startswith(prefix) and name in table]
    return {value for part in parts for value in part}


def test_has_cells_of_every_experiment():
    notebooks = {file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb")}
    assert {golden.experiment for golden in cells.CELLS.values()} == notebooks >= set(DESIGNS)


def test_covers_the_federated_gan():
    planned = recorded("01_backdoor_fedgan")
    assert {cell.arm for cell in planned} == {*fedgan_eval.ARMS, *drawing.ARMS}
    kinds = {cell.change.get("fedgan", {}).get("trigger", {}).get("kind", "checker") for cell in planned}
    assert kinds == set(triggers.KINDS)
    assert {cell.change.get("fedgan", {}).get("partition", "iid") for cell in planned} == {"iid", "dirichlet", "style"}


def test_covers_every_aggregator_and_attacker():
    compared = column("02", "variant") - {"augmentation"}
    assert compared <= {*feddetect_eval.VARIANTS, feddetect_eval.ORACLE}
    assert len(compared) == 10
    assert column("02", "scenario") >= {*fedgan_attackers.SCENARIOS, "null", "downstream"}


def test_covers_every_defence_of_images_and_gradients():
    attacked = {v for cell in recorded("03_gia_defense") if cell.arm == "attack" for v in cell.variants}
    assert attacked == {*cells.TRAINED, *inversion_clients.CONTROLS} <= set(inversion_clients.VARIANTS)
    # Controls of equal norm are attacked, and trained with nowhere: neither in the record.
    trained = {v for cell in recorded("03_gia_defense") if cell.arm == "federation" for v in cell.variants}
    assert trained == set(cells.TRAINED)
    assert column("03", "attack") >= {"dlg", "ig", "bn", "prior", *inversion_eval.ADAPTIVE}
    assert {cell.arm for cell in recorded("03_gia_defense")} == {
        "attack",
        "longer",
        "federation",
        "rounds",
        "strength",
        "fingerprint",
        "fingerprint_later",
    }


def test_covers_every_arm_and_attack_of_evasion():
    assert column("04", "variant") >= set(evasion_arms.ARMS)
    assert column("04", "scenario") >= {*EVASIONS, "noise", "deepfool", "cw_l2", "check", "attribution"}


def test_covers_every_row_of_the_matrix():
    assert column("05", "variant") >= set(matrix_arms.ROWS)
    assert column("05", "scenario") >= {*matrix_federation.ATTACKS, "adaptive", "pgd20"}
