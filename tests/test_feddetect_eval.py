"""Cells of notebook 02 end to end: fair pairs from one warm-up, rows that say what they promise, plan and record."""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments import params, record_plans
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan import drawing
from experiments.feddetect import cells as feddetect_eval
from experiments.feddetect import gans, hospitals
from experiments.feddetect import record as feddetect_record
from experiments.feddetect.cells import KEYS, ORACLE, READS_LOSSES, VARIANTS
from experiments.feddetect.tables import (
    SAME_BUT_FOR_LOSSES,
    TWIN,
    advice,
    complete,
    holds,
    of_gan,
    where_hospitals_differ,
)
from medsec.backdoor import feddetect, triggers
from medsec.backdoor import gan as fedgan
from medsec.backdoor.attackers import SCENARIOS, BackdoorAttack
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.evidence import cells, tables
from medsec.federated import aggregators
from medsec.federated.rounds import Update
from medsec.nets import fit as classifier

NOTEBOOK, COHORT, SEED = "02_feddetect", "npz", 0
SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "classifier": {"batch": 32},
    "fedgan": {
        "n_clients": 4,
        "malicious": [0],
        "partition": "iid",
        "images_per_client": 16,
        "rounds": 5,
        "gan": {"z_dim": 4, "width": 4, "batch": 8},
        "measure": {"synthetic": 100, "extractor_epochs": 1, "downstream_epochs": 1, "probe": 8, "threshold_fpr": 0.1},
    },
    "feddetect": {
        "warm_up": 0.4,
        "hardened": {"draws": 32, "watch": 0.5},
        "scenario": {"colluders": [2, 8], "strike_every": 2, "aware": {"steps": 2, "draws": 8}},
        "null_test": {"clients": [4, 5], "rounds": 3},
        "downstream": {"real_per_class": [2, 4], "synthetic": 100, "steps": 3},
    },
    "record": {
        "feddetect": {"baseline_seeds": 1, "seeds": 1, "n_clients": [6], "evade": [0.5], "false_alarm_seeds": [5, 6]}
    },
}
ROUNDS, WARM_UP = 5, 2
IMAGES = {"trigger_rate", "trigger_ncc", "frechet", "label_accuracy", "downstream_auc"}
FLAGS = {"fpr", "any_flag", "voided"}
WEIGHTS = {"false_exclusion", "benign_weight_min", "weight", "weight_lost", "penalised"}
PROMISED = {  # without an attack
    "none": IMAGES | WEIGHTS,
    "feddetect_released": IMAGES | FLAGS | WEIGHTS | {"acts", "fpr_acted"},
    "feddetect_described": IMAGES | FLAGS | WEIGHTS,
    "feddetect_hardened": IMAGES | FLAGS | WEIGHTS | {"evidence"},
    "median": IMAGES,
    "trimmed_mean": IMAGES,
    "krum": IMAGES | WEIGHTS,
    "multi_krum": IMAGES | WEIGHTS,
    "norm_clip": IMAGES | WEIGHTS,
    ORACLE: IMAGES | WEIGHTS,
}
# And in the cells of hospitals that differ:
DIFFERING = ("none", *hospitals.RULES, *hospitals.SERVED, hospitals.ONCE)
HOSPITALS = {v: {"trigger_rate", "frechet", "server_ms"} for v in DIFFERING}
HOSPITALS[hospitals.ONLY] = {"trigger_rate", "frechet"}
HOSPITALS |= {v: HOSPITALS[v] | WEIGHTS for v in HOSPITALS if v not in ("median", hospitals.ONLY)}
ADDRESS = ["seed", "variant", "scenario", "metric", *KEYS]
SUMMARY = ["variant", "scenario", "metric", *KEYS]


@pytest.fixture(scope="module")
def p(tmp_path_factory, write_npz):
    """Parameters of cells of seconds, for a file of random images (one for the whole module: cells are shared)."""
    file = write_npz(tmp_path_factory.mktemp("cohort"), per_class=120)
    tree = params.merge(params.load().model_dump(), SMALL)
    yield params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))
    fedgan_eval._prepare.cache_clear()


@pytest.fixture(scope="module")
def cell(p):
    """Function: the rows and pictures of one of `CELLS`, run once."""

    @functools.cache
    def run(scenario):
        return feddetect_eval.run_cell(COHORT, p, SEED, scenario, CELLS[scenario])

    return run


def about_images(table, variant):
    """The rows that describe the federation's images: they tell two generators apart."""
    rows = table[(table["variant"] == variant) & table["metric"].isin(IMAGES)]
    return rows.drop(columns=["variant", "scenario"]).reset_index(drop=True)


def value(table, **where):
    return tables.row(table.drop(columns="seed"), **where)["value"]


# --------------------------------------------------------------------------------------------------------------- cells

UNITS = {name: entry["unit"] for name, entry in tables.metrics().items()}
CELLS = {
    "no_attack": VARIANTS,
    "honest": ("none", "feddetect_released", "median", "norm_clip"),
    "boost": ("none", "feddetect_hardened", "median", "trimmed_mean", "norm_clip"),
    "liar": ("none", "median"),
    "framer": ("none", "median"),
    "boost_liar": ("none", "feddetect_described", "feddetect_hardened", "norm_clip", ORACLE),
    "colluders": ("none", "feddetect_hardened", "median", "trimmed_mean", "multi_krum"),
    "waitout": ("feddetect_released", "feddetect_hardened"),
    "aware": ("none", "feddetect_hardened"),
    "aware_late": ("feddetect_hardened",),
}


@pytest.mark.parametrize("scenario", CELLS)
def test_a_cell_has_the_rows_that_it_promises(cell, p, scenario):
    table, pictures = cell(scenario)
    assert tuple(table["variant"].unique()) == CELLS[scenario]
    assert (table["scenario"] == scenario).all()
    assert not table.duplicated(ADDRESS).any()
    assert np.isfinite(table["value"]).all()
    assert (table["unit"] == table["metric"].map(UNITS)).all()
    assert (table["n_items"] > 0).all()
    # Youden's J is a difference of two shares.
    bounded = table["unit"].isin(["share", "AUC"]) & (table["metric"] != "youden_j")
    assert table.loc[bounded, "value"].between(0, 1).all()
    for variant in CELLS[scenario]:
        rows = table[table["variant"] == variant]
        expected = set(PROMISED[variant])
        if SCENARIOS[scenario].attacks:
            expected |= {"tpr", "youden_j"} if "fpr" in expected else set()
            expected |= {"blocked_tpr", "rounds_to_detect"} if "weight" in expected else set()
            expected |= {"attacker_evidence"} if "evidence" in expected else set()
        assert set(rows["metric"]) == expected, variant
        per_round = rows[(rows["metric"] == "trigger_rate") & (rows["round"] != "")]
        assert list(per_round["round"]) == ["3", "4", "5"], "rounds of the warm-up are not the defence's"
        assert set(rows[(rows[list(KEYS)] == "").all(axis=1)]["metric"]) >= IMAGES
        assert pictures[variant].shape == (fedgan_eval.GALLERY, 1, 28, 28)
    clients = 8 if scenario == "colluders" else 4
    weights = table[table["metric"] == "weight"]
    assert set(weights["client"]) == set(map(str, range(clients)))
    sums = weights.groupby(["variant", "round"])["value"].sum()
    assert all(s == pytest.approx(1) or s == 0 for s in sums)
    summary = tables.summarise(table, KEYS)
    assert len(summary) == len(table)


def test_a_client_is_blocked_below_a_hundredth_of_its_equal_share(p, monkeypatch):
    """Of four clients that is 0.0025; counted from the end of the warm-up."""
    first = {2: 0.003, 3: 0.002, 4: 0.002}  # the attacker's weight by round

    def rule(updates, round=0):
        own = first.get(round, 0.25)
        return aggregators.fedavg(updates, weights=[own, *[(1 - own) / 3] * 3])

    monkeypatch.setitem(aggregators.RULES, "none", rule)
    table, _ = feddetect_eval.run_cell(COHORT, p, SEED, "honest", ("none",))
    found = {
        m: value(table, variant="none", scenario="honest", metric=m)
        for m in ("blocked_tpr", "rounds_to_detect", "false_exclusion", "benign_weight_min")
    }
    assert found == pytest.approx(
        {"blocked_tpr": 2 / 3, "rounds_to_detect": 2, "false_exclusion": 0, "benign_weight_min": 0.997 / 3}
    )


@pytest.mark.parametrize("scenario", ["boost_liar", "colluders"])
def test_weights_and_evidence_add_up_to_the_rows_on_detection(cell, p, scenario):
    """A second way to every share, from the per-client rows."""
    table, _ = cell(scenario)
    m, attackers = (8, ["0", "1"]) if scenario == "colluders" else (4, ["0"])
    rows = table[table["variant"] == "feddetect_hardened"]

    def grid(metric):
        return rows[rows["metric"] == metric].pivot(index="round", columns="client", values="value")

    found = {
        metric: value(rows, variant="feddetect_hardened", scenario=scenario, metric=metric)
        for metric in (
            "tpr",
            "fpr",
            "youden_j",
            "any_flag",
            "voided",
            "blocked_tpr",
            "false_exclusion",
            "benign_weight_min",
            "weight_lost",
            "penalised",
            "rounds_to_detect",
            "attacker_evidence",
        )
    }
    threshold = feddetect_eval.flag_threshold(p)
    weight, flag = grid("weight"), grid("evidence") > threshold
    assert weight.shape == flag.shape == (ROUNDS - WARM_UP, m)
    blocked = weight < 0.01 / m
    benign, best = weight.drop(columns=attackers).to_numpy(), weight.to_numpy().max(axis=1, keepdims=True)
    expected = {
        "tpr": flag[attackers].to_numpy().mean(),
        "fpr": flag.drop(columns=attackers).to_numpy().mean(),
        "youden_j": flag[attackers].to_numpy().mean() - flag.drop(columns=attackers).to_numpy().mean(),
        "any_flag": flag.any(axis=1).mean(),
        "voided": (flag.sum(axis=1) >= m / 2).mean(),
        "blocked_tpr": blocked[attackers].to_numpy().mean(),
        "false_exclusion": blocked.drop(columns=attackers).to_numpy().mean(),
        "benign_weight_min": benign.min(),
        "weight_lost": np.maximum(0, 1 - m * benign).mean(),
        "penalised": (benign < 0.999 * best).mean(),
        "rounds_to_detect": next((i + 1 for i, b in enumerate(blocked[attackers].all(axis=1)) if b), len(blocked) + 1),
        "attacker_evidence": grid("evidence")[attackers].to_numpy().max() / threshold,
    }
    assert found == pytest.approx(expected)


def hand_made(p, scenario, variant="feddetect_hardened", **diagnostics):
    """The rows without key of a log of given weights, flags and evidence, a list by client a round; None: turned away."""
    rounds = [
        {name: {c: v for c, v in enumerate(values[t]) if v is not None} for name, values in diagnostics.items()}
        for t in range(len(diagnostics["weights"]))
    ]
    log = [{"round": 3 + t, "diagnostics": d, "trigger_rate": 0.5} for t, d in enumerate(rounds)]
    rows = tables.Rows(KEYS, SEED, variant, scenario)
    feddetect_eval.detection_rows(rows, log, feddetect_eval.settings(p, scenario))
    table = rows.table()
    assert np.isfinite(table["value"]).all()
    return table[(table[list(KEYS)] == "").all(axis=1)].set_index("metric")["value"]


def test_penalties_by_hand(p):
    """Four clients, the first attacks. Lost: below 1/4. Penalised: below the largest weight of the round."""
    weights = [
        [0.25, 0.25, 0.25, 0.25],  # nothing lost, nobody penalised
        [0.0, 0.4, 0.4, 0.2],  # the last lost a fifth of its quarter
        [0.0, 0.375, 0.375, 0.25],  # a quarter still: nothing lost, but less than the others have
        [0.5, 0.3, 0.2, 0.0],  # the attacker has the most: all penalised; lost 0, 1/5 and all
        [0.0, 0.50002, 0.49998, None],  # rounding is no penalty; who was turned away weighs nothing
        [0.0, 0.0, 0.0, 0.0],  # nobody is left: all lost, all penalised
    ]
    found = hand_made(p, "boost_liar", weights=weights)
    expected = {
        "weight_lost": (0.2 + 0.2 + 1 + 1 + 3) / 18,
        "penalised": (1 + 1 + 3 + 1 + 3) / 18,
        "benign_weight_min": 0,
    }
    assert found[list(expected)].to_dict() == pytest.approx(expected)
    # Without an attack the first is honest as well.
    found = hand_made(p, "no_attack", weights=weights)
    expected = {"weight_lost": (3 + 0.2 + 0.2 + 1 + 1 + 4) / 24, "penalised": (3 + 1 + 1 + 3 + 1 + 4) / 24}
    assert found[list(expected)].to_dict() == pytest.approx(expected)


def test_void_rounds_and_the_attackers_evidence_by_hand(p):
    """Half of the clients flagged void a round, and who was turned away counts as flagged."""
    flagged = [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, None], [1, 1, 1, 1], [0, 0, 0, 0]]
    z = feddetect_eval.flag_threshold(p)
    evidence = [[0.5 * z, 3 * z, 0, 0], [-math.inf, 0, 0, 0], [1.5 * z, 0, 0, None], [math.inf, 0, 0, 0], [0] * 4]
    log = {"weights": [[0.25] * 4] * 5, "flagged": flagged, "evidence": evidence}
    found = hand_made(p, "boost_liar", **log)
    expected = {"voided": 3 / 5, "any_flag": 4 / 5, "tpr": 4 / 5, "fpr": 5 / 15, "attacker_evidence": 1.5}
    assert found[list(expected)].to_dict() == pytest.approx(expected)
    assert "attacker_evidence" not in hand_made(p, "no_attack", **log)


@pytest.mark.parametrize(("scenario", "malicious"), [("boost_liar", 1), ("colluders", 2)])
def test_the_oracle_is_the_mean_of_the_honest_updates(p, scenario, malicious):
    assert ORACLE not in VARIANTS
    changed = feddetect_eval.settings(p, scenario)
    rows = np.random.default_rng(0).normal(size=(changed.fedgan.n_clients, 6)).astype(np.float32)
    federation = fedgan.FederatedGAN(0, changed.fedgan.gan, 5, "generator", [], updates_of([[7.0] * 6])[0].state)
    rule = feddetect_eval.defence(ORACLE, changed, federation, None)
    found, diagnostics = rule(updates_of(rows), 3)
    honest = range(malicious, changed.fedgan.n_clients)
    np.testing.assert_allclose(found["w"], rows[malicious:].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert diagnostics["weights"] == pytest.approx(dict.fromkeys(honest, 1 / len(honest)))
    # If the attackers alone are heard, the server keeps what it has.
    kept, diagnostics = rule(updates_of(rows)[:malicious], 4)
    assert (kept["w"] == 7).all()
    assert diagnostics["weights"] == {}


def test_a_run_with_the_oracle(cell, p):
    """The attacker weighs nothing from the first round, no honest client loses, and what it sends does not matter."""
    table, pictures = cell("boost_liar")
    expected = {
        "blocked_tpr": 1,
        "rounds_to_detect": 1,
        "false_exclusion": 0,
        "benign_weight_min": 1 / 3,
        "weight_lost": 0,
        "penalised": 0,
    }
    found = {metric: value(table, variant=ORACLE, scenario="boost_liar", metric=metric) for metric in expected}
    assert found == pytest.approx(expected)
    attackers = table[(table["variant"] == ORACLE) & (table["metric"] == "weight") & (table["client"] == "0")]
    assert list(attackers["value"]) == [0.0] * (ROUNDS - WARM_UP)
    assert not about_images(table, ORACLE).equals(about_images(table, "none"))
    # The same for every attacker of this warm-up, as the plan of the record takes it to be.
    other, pictures_other = feddetect_eval.run_cell(COHORT, p, SEED, "honest", (ORACLE,))
    pd.testing.assert_frame_equal(about_images(other, ORACLE), about_images(table, ORACLE), check_exact=True)
    assert np.array_equal(pictures_other[ORACLE], pictures[ORACLE])


def test_the_same_cell_again_in_another_order(cell, p):
    """Nothing of one defence leaks into the next; only times differ, and they are only there if asked for."""
    variants = CELLS["boost_liar"]
    first, pictures = cell("boost_liar")
    again, pictures_again = feddetect_eval.run_cell(COHORT, p, SEED, "boost_liar", variants[::-1], timed=True)
    timed = again["metric"] == "server_ms"
    assert sorted(again[timed]["variant"]) == sorted(variants)
    assert (again[timed]["value"] > 0).all()
    first, again = (table.sort_values(ADDRESS, ignore_index=True) for table in (first, again[~timed]))
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    assert all(np.array_equal(pictures[name], pictures_again[name]) for name in variants)


@pytest.mark.parametrize("scenario", ["boost_liar", "colluders", "aware"])
def test_all_variants_continue_the_same_warm_up(p, scenario):
    """No defence acts in the warm-up, none changes it, and one that never acts is the undefended federation."""
    changed = feddetect_eval.settings(p, scenario)
    setup = feddetect_eval.instruments(COHORT, p, changed, scenario)
    start, watcher = feddetect_eval.warm_up(setup, SEED, scenario)
    assert start.round == WARM_UP == feddetect_eval.warm_up_rounds(changed)
    held = {k: v.clone() for k, v in start.state.items()}
    suspicion = dict(watcher.suspicion)
    assert set(suspicion) == set(range(changed.fedgan.n_clients)), "the watcher saw nothing"
    plain, log = feddetect_eval.run_variant(setup, start, watcher, scenario, "none")
    patient = params.validate(params.merge(changed.model_dump(), {"feddetect": {"patience": 99}}))
    idle, _ = feddetect_eval.run_variant(
        dataclasses.replace(setup, params=patient), start, watcher, scenario, "feddetect_described"
    )
    strict, _ = feddetect_eval.run_variant(setup, start, watcher, scenario, "krum")
    assert [entry["round"] for entry in log] == [3, 4, 5]
    assert (plain.round, idle.round, start.round) == (ROUNDS, ROUNDS, WARM_UP)
    assert all(torch.equal(plain.state[k], v) for k, v in idle.state.items())
    assert any(not torch.equal(plain.state[k], v) for k, v in strict.state.items())
    assert all(torch.equal(held[k], v) for k, v in start.state.items())
    assert watcher.suspicion == suspicion
    # The clients' boosts belong to the copies.
    assert [c.boost for c in start.clients] == [1.0] * changed.fedgan.n_clients
    boosted = [c.index for c in plain.clients if c.boost > 1]
    assert boosted == (changed.fedgan.malicious if SCENARIOS[scenario].boosted else [])


def test_the_hardened_defence_remembers_the_second_part_of_the_warm_up(p):
    setup = feddetect_eval.instruments(COHORT, p, p, "no_attack")
    start, watcher = feddetect_eval.warm_up(setup, SEED, "no_attack")
    rule = feddetect_eval.defence("feddetect_hardened", p, start, watcher)
    assert rule.suspicion == watcher.suspicion
    assert rule.suspicion is not watcher.suspicion
    assert (rule.watch, rule.warm_up) == (1, 2)
    assert rule.threshold == feddetect_eval.flag_threshold(p) == watcher.threshold


def test_the_server_draws_fresh_latents_each_round_alike_for_all(p):
    setup = feddetect_eval.instruments(COHORT, p, p, "no_attack")
    federation, _ = feddetect_eval.warm_up(setup, SEED, "no_attack")
    draw = feddetect_eval.drawer(federation, 40)
    first, again, later = draw(federation.state, 3), draw(federation.state, 3), draw(federation.state, 4)
    assert first.shape == (40, 1, 28, 28)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    # What is drawn follows from the state, not from the last one drawn.
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in federation.state.items()}
    assert not torch.equal(draw(other, 3), first)
    assert torch.equal(draw(federation.state, 3), first)
    same_seed = fedgan.synthesise(federation.generator(), 40, derive_seed(SEED, "server", 3))[0]
    assert torch.equal(first, same_seed)


# ------------------------------------------------------------------------------------------------------------ scenarios


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_settings_and_instruments_of_every_scenario(p, scenario):
    what, changed = SCENARIOS[scenario], feddetect_eval.settings(p, scenario)
    assert (changed.fedgan.n_clients, changed.fedgan.malicious) == ((8, [0, 1]) if what.colluders else (4, [0]))
    stealth = p.feddetect.scenario.stealth_ratio
    assert changed.fedgan.poison.ratio == (stealth if what.stealthy else p.fedgan.poison.ratio)
    own = p.feddetect.scenario.stealth_boost if what.stealthy else p.fedgan.poison.boost
    assert changed.fedgan.poison.boost == own
    setup = feddetect_eval.instruments(COHORT, p, changed, scenario)
    assert setup.params == changed
    plain = fedgan_eval.prepare(COHORT, p)
    assert setup.extractor is plain.extractor, "defences are measured with the same instruments"
    if what.trigger is None:
        assert setup.trigger is plain.trigger
    else:
        assert setup.trigger.kind == ("blended" if what.trigger == "stripes" else what.trigger)
        assert not torch.equal(setup.trigger.pattern, plain.trigger.pattern) or what.trigger == "moving"
    public = setup.splits["public"][0]
    assert setup.threshold == triggers.calibrate(setup.trigger, public, p.fedgan.measure.threshold_fpr)


def test_keys_change_what_they_name(p):
    changed = feddetect_eval.settings(p, "boost_liar", {"m": 6, "partition": "dirichlet", "trigger": "grid"})
    assert (changed.fedgan.n_clients, changed.fedgan.partition, changed.fedgan.trigger.kind) == (6, "dirichlet", "grid")
    # One of more clients scales its update the more, so that it weighs as much as one of four.
    assert changed.fedgan.poison.boost == pytest.approx(p.fedgan.poison.boost * 6 / 4)
    assert changed.fedgan.poison.ratio == p.fedgan.poison.ratio
    assert feddetect_eval.settings(p, "boost_liar", {"m": 4}).fedgan.poison == p.fedgan.poison
    assert feddetect_eval.settings(p, "aware", {"evade": 0.5}).feddetect.scenario.aware.evade == 0.5
    with pytest.raises(InputError, match="scenario boost_liar"):
        feddetect_eval.settings(p, "boost_liar", {"m": 0})


def test_keys_address_the_rows(p):
    table, _ = feddetect_eval.run_cell(COHORT, p, SEED, "boost_liar", ("none",), {"m": 5})
    assert (table["m"] == "5").all()
    assert set(table[table["metric"] == "weight"]["client"]) == {"0", "1", "2", "3", "4"}


def test_one_who_waits_strikes_in_the_last_round_and_never_in_the_warm_up(p):
    longer = params.merge(feddetect_eval.settings(p, "waitout").model_dump(), {"fedgan": {"rounds": 6}})
    setup = feddetect_eval.instruments(COHORT, p, params.validate(longer), "waitout")
    federation, watcher = feddetect_eval.warm_up(setup, SEED, "waitout")
    attack = feddetect_eval.attack_of("waitout", setup, federation, watcher)
    updates = [Update(i, {"w": torch.tensor([10.0 * (i == 0)])}, 1, {"loss_g": 1.0}) for i in range(4)]
    sent = [float(attack(updates, t)[0].state["w"]) for t in range(6)]
    assert sent == [0.0, 0.0, 0.0, 10.0, 0.0, 10.0]  # every second round, counted from the end


@pytest.mark.parametrize(("arm", "scenario"), [("clean", "no_attack"), ("attack", "boost_liar")])
def test_federations_that_begin_alike_train_once_and_nothing_changes(p, monkeypatch, arm, scenario):
    """Notebook 02 goes on from the federations of notebook 01 (`medsec.backdoor.epochs`)."""
    trained, original = [], fedgan.train_client
    monkeypatch.setattr(fedgan, "train_client", lambda *a: trained.append(1) or original(*a))

    def run(forget):
        forget()
        first, _ = fedgan_eval.run_cell(COHORT, p, SEED, arm)
        forget()
        second, _ = feddetect_eval.run_cell(COHORT, p, SEED, scenario, ("none", "median"))
        n = len(trained)
        trained.clear()
        return first, second, n

    *apart, all_of_them = run(cells.SHARED.clear)
    cells.SHARED.clear()
    *together, fewer = run(lambda: None)
    assert fewer == all_of_them - p.fedgan.n_clients * ROUNDS, "all rounds of the undefended federation"
    for a, b in zip(apart, together, strict=True):
        pd.testing.assert_frame_equal(a, b)
    with monkeypatch.context() as plainly:
        plainly.setattr(fedgan_eval, "train_client", fedgan.train_client)
        *plain, most = run(lambda: None)
    assert most > all_of_them, "and of two defences the first round after the warm-up"
    for a, b in zip(plain, together, strict=True):
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize(("scenario", "fades"), [("waitout", False), ("boost_liar", True)])
def test_the_learning_rate_of_one_who_waits_does_not_fade(p, monkeypatch, scenario, fades):
    """It fades in the last round only, so that both runs come to that round alike; the others' fades in any case."""
    sent, original = [], fedgan.train_client

    def train(own, state, federation, round):
        update = original(own, state, federation, round)
        if round == ROUNDS - 1:
            sent.append((feddetect.update_length(update.state, state), update.state))
        return update

    monkeypatch.setattr(fedgan, "train_client", train)
    for share in (0.6, 1.0):
        tree = params.merge(
            feddetect_eval.settings(p, scenario).model_dump(), {"fedgan": {"gan": {"decay_after": share}}}
        )
        setup = feddetect_eval.instruments(COHORT, p, params.validate(tree), scenario)
        cells.SHARED.clear()  # who waits trains alike in both
        feddetect_eval.run_variant(setup, *feddetect_eval.warm_up(setup, SEED, scenario), scenario, "none")
    faded, full = sent[:4], sent[4:]
    assert len(full) == 4
    for client, ((length, state), (length_full, state_full)) in enumerate(zip(faded, full, strict=True)):
        if client == 0 and not fades:
            assert length == length_full > 0
            assert all(torch.equal(state[k], v) for k, v in state_full.items())
        else:
            assert length < 0.9 * length_full


def test_the_aware_attackers_begin_and_allow_themselves_what_the_parameters_say(p):
    """Both go to work after the warm-up and stay below the CUSUM's drift; the one spends its limit in the last rounds."""
    aware = p.feddetect.scenario.aware
    memory = p.feddetect.hardened
    assert aware.evade <= memory.drift < aware.late_evade < memory.drift + memory.limit / aware.late_rounds
    late = [aware.evade] * (ROUNDS - WARM_UP - aware.late_rounds) + [aware.late_evade] * aware.late_rounds
    for scenario, evade in {"aware": [aware.evade] * (ROUNDS - WARM_UP), "aware_late": late}.items():
        setup = feddetect_eval.instruments(COHORT, p, feddetect_eval.settings(p, scenario), scenario)
        federation, watcher = feddetect_eval.warm_up(setup, SEED, scenario)
        assert not any(client.malicious for client in federation.clients), "it trains on clean images"
        found = feddetect_eval.attack_of(scenario, setup, federation, watcher).aware
        assert found.begin == WARM_UP
        assert [found.evade(round) for round in range(WARM_UP, ROUNDS)] == evade
        assert found.threshold == feddetect_eval.flag_threshold(p)
        assert (found.measure, found.draws, found.steps) == (p.feddetect.hardened.draws, aware.draws, aware.steps)


@pytest.mark.parametrize(("liar", "truthful"), SAME_BUT_FOR_LOSSES.items())
def test_to_a_defence_that_reads_no_losses_a_liar_is_a_truthful_attacker(cell, liar, truthful):
    first, second = (cell(scenario)[0] for scenario in (liar, truthful))
    variants = set(first["variant"]) & set(second["variant"]) - set(READS_LOSSES)
    assert variants
    for variant in variants:
        pd.testing.assert_frame_equal(about_images(first, variant), about_images(second, variant), check_exact=True)


def test_with_four_clients_the_trimmed_mean_is_the_median(cell):
    """Both are the mean of the middle two; with eight and two attackers they differ."""
    table, _ = cell("boost")
    pd.testing.assert_frame_equal(*(about_images(table, v) for v in TWIN), check_exact=True)
    table, _ = cell("colluders")
    assert not about_images(table, TWIN[0]).equals(about_images(table, TWIN[1]))


# ---------------------------------------------------------------------------------------------------- aggregation rules


def updates_of(rows):
    return [Update(i, {"w": torch.tensor(row, dtype=torch.float32)}, 1 + i) for i, row in enumerate(rows)]


def test_krum_of_four_takes_one_of_the_closest_pair(p):
    """Four clients with one attacker miss the paper's condition by one; the notebook's rule is computed all the same."""
    rows = np.random.default_rng(0).normal(size=(4, 6))
    with pytest.raises(InputError, match="2 f"):
        aggregators.krum(updates_of(rows), n_malicious=1)
    distance = {(i, j): np.linalg.norm(rows[i] - rows[j]) for i in range(4) for j in range(i)}
    found, diagnostics = feddetect_eval.defence("krum", p, None, None)(updates_of(rows), 0)
    (chosen,) = [client for client, w in diagnostics["weights"].items() if w == 1]
    assert chosen in min(distance, key=distance.get)
    np.testing.assert_array_equal(found["w"], np.float32(rows[chosen]))


def test_a_rule_that_joins_the_registry_is_a_variant_and_comes_last(p, monkeypatch):
    assert VARIANTS[-1] == "norm_clip", "the order of the tables, whose cells are found again by it"
    assert set(aggregators.RULES) <= set(VARIANTS)
    monkeypatch.setitem(aggregators.RULES, "first", lambda updates, round=0: (updates[0].state, {}))
    table, _ = feddetect_eval.run_cell(COHORT, p, SEED, "honest", ("first",))
    assert set(table["metric"]) == IMAGES
    with pytest.raises(InputError, match="server rule 'second': choose one of none, median"):
        feddetect_eval.defence("second", p, None, None)


# ----------------------------------------------------------------------------------------------------- null, downstream


def test_null_rows(p):
    for m in (4, 5):
        table = feddetect_eval.run_null(p, 3, m)
        expected = feddetect.null_rates(m, 3, derive_seed(3, "null", m))
        found = {
            metric: value(table, variant="feddetect_released", scenario="null", metric=metric, m=str(m))
            for metric in ("fpr", "any_flag", "acts")
        }
        assert found == pytest.approx(expected)
        assert dict(zip(table["metric"], table["n_items"], strict=True)) == {"fpr": 3 * m, "any_flag": 3, "acts": 3}


def test_downstream_compares_classifiers_on_the_same_real_images(p, monkeypatch):
    """Every classifier takes equally many steps from the same start; without synthetic images it sees few real ones."""
    fedgan_eval.prepare(COHORT, p)
    seen, fit = [], classifier.fit

    def watched(images, labels, *args, **options):
        if options["seed"] == derive_seed(SEED, "augmented"):
            seen.append((images, options["epochs"]))
        return fit(images, labels, *args, **options)

    monkeypatch.setattr(classifier, "fit", watched)
    table = feddetect_eval.run_downstream(COHORT, p, SEED)
    assert not table.duplicated(ADDRESS).any()
    auc, gain = (
        table[table["metric"] == m].set_index(["source", "real"])["value"]
        for m in ("augmented_auc", "augmented_auc_gain")
    )
    sources = list(feddetect_eval.SOURCES)
    assert set(auc.index) == {(s, r) for s in ("real", *sources) for r in ("2", "4")}
    assert set(gain.index) == {(s, r) for s in sources for r in ("2", "4")}
    for source, real in gain.index:
        assert gain[source, real] == pytest.approx(auc[source, real] - auc["real", real])
    assert len(seen) == 8
    assert {(len(images), epochs) for images, epochs in seen} == {(3 * 32, 1)}
    public = fedgan_eval.prepare(COHORT, p).splits["public"][0]
    known = {image.numpy().tobytes() for image in public}
    for per_class, (control, *mixed) in ((2, seen[:4]), (4, seen[4:])):
        few = {image.numpy().tobytes() for image in control[0]}
        assert few <= known
        assert len(few) == 2 * per_class
        for images, _ in mixed:
            kept = (images == control[0]).flatten(1).all(1)
            assert 0.3 < kept.float().mean() < 0.7, "half of the stream is synthetic, at the same places"


# --------------------------------------------------------------------------------------------------------------- tables


def row(variant, scenario, metric, number, seed=0, **cells):
    return tables.run_row(KEYS, seed, variant, scenario, metric, number, 10, **cells)


def test_complete_fills_what_follows_and_nothing_twice(cell, p):
    """The copied rows are those that running the cell gives; what was run itself stays."""
    honest, boost, ran = (cell(scenario)[0] for scenario in ("honest", "boost", "boost_liar"))
    ran = ran[ran["variant"] == "none"].assign(value=0.125)
    full = complete(pd.concat([honest, boost, ran], ignore_index=True), p)
    assert not full.duplicated(ADDRESS).any()
    names = full.groupby("scenario")["variant"].unique().map(set).to_dict()
    blind = {"none", "median", "trimmed_mean", "norm_clip"}
    assert names == {
        "honest": {*CELLS["honest"], "trimmed_mean"},
        "boost": set(CELLS["boost"]),
        "liar": blind,
        "framer": blind,
        "boost_liar": blind,
    }
    part = full[(full["scenario"] == "boost_liar") & (full["variant"] == "none")]
    assert len(part) == len(ran)
    assert (part["value"] == 0.125).all()
    for scenario, truthful in (("liar", honest), ("framer", boost)):
        own, source = full[full["scenario"] == scenario], truthful[truthful["variant"] == "median"]
        for variant in ("median", "trimmed_mean"):
            pd.testing.assert_frame_equal(
                own[own["variant"] == variant].drop(columns=["variant", "scenario"]).reset_index(drop=True),
                source.drop(columns=["variant", "scenario"]).reset_index(drop=True),
            )
    assert len(tables.summarise(full, KEYS)) == len(full)


def test_the_twin_is_not_copied_where_it_is_none(p):
    median = [row("median", s, "frechet", 3.0, **k) for s, k in (("colluders", {}), ("honest", {"m": 8}))]
    assert len(complete(pd.DataFrame(median[:1]), p)) == 1
    assert TWIN[0] not in set(complete(pd.DataFrame(median), p)["variant"])
    five = params.validate(params.merge(p.model_dump(), {"fedgan": {"n_clients": 5}}))
    honest = pd.DataFrame([row("median", "honest", "frechet", 3.0)])
    assert TWIN[0] not in set(complete(honest, five)["variant"])
    assert TWIN[0] in set(complete(honest, p)["variant"])


def test_differences_to_the_clean_federation_by_hand(p):
    """Same seed, same size, same partition; colluders are eight, and so is their control."""
    hardened = "feddetect_hardened"
    runs = pd.DataFrame(
        [
            row("none", "no_attack", "frechet", 10.0),
            row("none", "no_attack", "frechet", 20.0, seed=1),
            row("none", "no_attack", "frechet", 100.0, m=8),
            row("none", "no_attack", "frechet", 1000.0, partition="dirichlet"),
            row("none", "no_attack", "trigger_rate", 0.25),
            row("none", "no_attack", "trigger_rate", 0.0, round=3),
            row("none", "boost_liar", "frechet", 40.0),  # under attack the undefended one is compared as well
            row("none", "colluders", "frechet", 140.0),
            row("none", "boost_liar", "frechet", 1.0, seed=7),  # without a control: no row
            row(hardened, "no_attack", "frechet", 11.0),
            row(hardened, "no_attack", "frechet", 9.0, seed=7),  # without a control: no row
            row(hardened, "boost_liar", "frechet", 12.0),
            row(hardened, "boost_liar", "frechet", 23.0, seed=1),
            row(hardened, "boost_liar", "frechet", 104.0, m=8),
            row(hardened, "boost_liar", "frechet", 1005.0, partition="dirichlet"),
            row(hardened, "boost_liar", "frechet", 1.0, m=16),  # without a control
            row(hardened, "boost_liar", "trigger_rate", 0.75),
            row(hardened, "boost_liar", "trigger_rate", 1.0, round=3),
            row(hardened, "boost_liar", "label_accuracy", 1.0),
            row(hardened, "colluders", "frechet", 106.0),
            row(hardened, "aware", "frechet", 17.0, evade=0.5),
        ]
    )
    full = complete(runs, p)
    found = full[full["metric"].str.endswith("_minus_clean")]
    columns = ["variant", "scenario", "metric", "seed", "m", "partition", "evade"]
    assert {tuple(map(str, r[:-1])): r[-1] for r in found[[*columns, "value"]].itertuples(index=False)} == {
        (hardened, "no_attack", "frechet_minus_clean", "0", "", "", ""): 1.0,
        (hardened, "boost_liar", "frechet_minus_clean", "0", "", "", ""): 2.0,
        (hardened, "boost_liar", "frechet_minus_clean", "1", "", "", ""): 3.0,
        (hardened, "boost_liar", "frechet_minus_clean", "0", "8", "", ""): 4.0,
        (hardened, "boost_liar", "frechet_minus_clean", "0", "", "dirichlet", ""): 5.0,
        (hardened, "colluders", "frechet_minus_clean", "0", "", "", ""): 6.0,
        (hardened, "aware", "frechet_minus_clean", "0", "", "", "0.5"): 7.0,
        ("none", "boost_liar", "frechet_minus_clean", "0", "", "", ""): 30.0,
        ("none", "colluders", "frechet_minus_clean", "0", "", "", ""): 40.0,
    }
    assert set(found["metric"]) <= UNITS.keys()
    assert not full.duplicated(ADDRESS).any()


# ------------------------------------------------------------------------------------------------- clients that go wrong


def failing(client, rounds):
    """`medsec.backdoor.gan.train_client`, but this client sends NaN in these rounds."""
    original = fedgan.train_client

    def train(own, state, federation, round):
        update = original(own, state, federation, round)
        if own.index == client and round in rounds:
            name = next(iter(update.state))
            update.state[name] = torch.full_like(update.state[name], math.nan)
        return update

    return train


@pytest.mark.parametrize(("client", "rounds"), [(1, (3,)), (0, (2, 3, 4))])
def test_a_client_that_sends_nan_leaves_a_table(p, monkeypatch, client, rounds):
    """The server rejects it; what is left is measured, and every row can be summarised."""
    monkeypatch.setattr(fedgan, "train_client", failing(client, rounds))
    variants = ("none", "feddetect_released", "feddetect_hardened")
    table, _ = feddetect_eval.run_cell(COHORT, p, SEED, "boost_liar", variants)
    assert np.isfinite(table["value"]).all()
    assert len(tables.summarise(table, KEYS)) == len(table)


@pytest.mark.parametrize("variant", ["none", "feddetect_hardened"])
def test_what_an_attacker_made_of_its_update_is_screened_again(p, monkeypatch, variant):
    """A poisoned update that turns to NaN on the way is left out, as if that client had sent nothing."""

    def attack_of(scenario, setup, *rest):
        return BackdoorAttack(
            SCENARIOS[scenario],
            setup.params.fedgan.malicious,
            aware=lambda own, others, round: {k: v * math.nan if v.is_floating_point() else v for k, v in own.items()},
        )

    start = feddetect_eval.warm_up  # of the original attacker
    setup = feddetect_eval.instruments(COHORT, p, p, "boost_liar")
    federation, watcher = start(setup, SEED, "boost_liar")
    monkeypatch.setattr(feddetect_eval, "attack_of", attack_of)
    finished, log = feddetect_eval.run_variant(setup, federation, watcher, "boost_liar", variant)
    assert all(torch.isfinite(v).all() for v in finished.state.values())
    assert [set(entry["diagnostics"]["weights"]) for entry in log] == [{1, 2, 3}] * (ROUNDS - WARM_UP)


# ----------------------------------------------------------------------------------------------------------- other GANs


@pytest.fixture(scope="module")
def other(p):
    """The rows of all arms, after `complete`, and those of the same federation in notebook 01."""
    gan = {"z_dim": 4, "width": 4}
    change = {"drawing": {"rounds": ROUNDS, "gan": gan, "real_per_class": 4}, "regularised": {**gan, "batch": 8}}
    p = params.validate(params.merge(p.model_dump(), change))
    listed = [cells.Cell(name, SEED, variants=arm.variants) for name, arm in gans.ARMS.items()]
    runs = pd.concat([gans.run(COHORT, p, cell)[0] for cell in listed], ignore_index=True).fillna("")
    return complete(runs, p), drawing.run(COHORT, p, cells.Cell("drawing_clean", SEED))[0]


def test_every_rule_on_other_gans(other):
    table, same = other
    assert set(table["metric"]) <= UNITS.keys()
    assert not table.duplicated(ADDRESS).any()
    for scenario, arm in gans.ARMS.items():
        rows = table[table["scenario"] == scenario]
        assert tuple(rows["variant"].unique()) == arm.variants
        expected = {"frechet", "label_accuracy", "downstream_auc", "trigger_rate", "false_exclusion"}
        expected |= set(gans.HARM) if arm.gan == "drawing" else set()
        for _, of_one in rows.groupby("variant"):
            assert expected <= set(of_one["metric"])
    for metric in gans.HARM:  # the control is the very federation of notebook 01
        there = same[same["metric"] == metric]["value"].item()
        assert value(table, variant="none", scenario="harm_clean", metric=metric) == pytest.approx(there, abs=1e-6)


def test_other_gans_are_compared_with_their_own_clean_federation(other):
    table, _ = other
    for scenario, arm in gans.ARMS.items():
        for variant in arm.variants:
            if (scenario, variant) in {(clean, "none") for clean in gans.CLEAN.values()}:
                continue
            for metric in ("frechet", "downstream_auc", *(["attack_success"] if arm.gan == "drawing" else [])):
                clean = value(table, variant="none", scenario=gans.CLEAN[arm.gan], metric=metric)
                its = value(table, variant=variant, scenario=scenario, metric=metric)
                more = value(table, variant=variant, scenario=scenario, metric=f"{metric}_minus_clean")
                assert more == pytest.approx(its - clean)
    summary = tables.summarise(table, KEYS)
    for gan, (attacker, rule, column, metric, digits) in {
        "drawing": ("boost_liar", "multi_krum", "without it", "attack_success_unstamped", 2),
        "regularised": ("honest", "feddetect_released", "trigger rate", "trigger_rate", 3),
    }.items():
        shown = of_gan(summary, gan)
        assert len(shown) == sum(len(arm.variants) for arm in gans.ARMS.values() if arm.gan == gan)
        (scenario,) = [name for name, arm in gans.ARMS.items() if (arm.gan, arm.behaves) == (gan, attacker)]
        its = value(table, variant=rule, scenario=scenario, metric=metric)
        cell = shown[(shown["attacker"] == attacker) & (shown["rule"] == rule)][column].item()
        assert cell.startswith(f"{its:.{digits}f}")


def test_a_harm_below_the_clean_federations_has_an_interval():
    """A share's interval over images asks for the shares that were subtracted, not for their difference."""
    success = {("harm_clean", "none"): 0.3, ("harm", "multi_krum"): 0.02}
    runs = pd.DataFrame(
        [
            row(v, scenario, "attack_success", share + 0.01 * seed, seed) | {"n_items": 100}
            for (scenario, v), share in success.items()
            for seed in range(5)
        ]
    )
    table = tables.summarise(pd.concat([runs, gans.minus_clean(runs)], ignore_index=True), KEYS)
    found = tables.row(table, variant="multi_krum", scenario="harm", metric="attack_success_minus_clean")
    assert found["value"] == pytest.approx(-0.28)
    assert -0.4 < found["low"] < -0.28 < found["high"] < -0.15


def test_only_its_own_cells_depend_on_another_gan(p):
    cell = {name: cells.Cell(name, SEED, variants=arm.variants) for name, arm in gans.ARMS.items()}
    changed = params.validate(params.merge(p.model_dump(), {"regularised": {"penalty": 1.0}}))
    for name, each in cell.items():
        names = {cells.identity(gans.EXPERIMENT, "cohort", version, each) for version in (p, changed)}
        assert len(names) == (2 if gans.ARMS[name].gan == "regularised" else 1), name


# ----------------------------------------------------------------------------------------------------------- hospitals

DIFFER = {"partition": "dirichlet"}


@pytest.fixture(scope="module")
def differing(p):
    """Function: the rows of one arm, run once."""
    p = params.validate(params.merge(p.model_dump(), {"hospitals": {"public": 12, "aware": {"steps": 4, "draws": 8}}}))

    @functools.cache
    def run(arm):
        listed = [cells.Cell(arm, SEED, keys=DIFFER, variants=some) for some in hospitals.plan(arm).values()]
        return pd.concat([hospitals.run(COHORT, p, cell)[0] for cell in listed], ignore_index=True).fillna("")

    return run


@pytest.mark.parametrize("arm", hospitals.ARMS)
def test_every_rule_differing(differing, arm):
    table, scenario = differing(arm), hospitals.ARMS[arm]
    assert list(table["variant"].unique()) == [v for some in hospitals.plan(arm).values() for v in some]
    assert (table["scenario"] == scenario).all()
    assert (table["partition"] == "dirichlet").all()
    assert not table.duplicated(ADDRESS).any()
    assert np.isfinite(table["value"]).all()
    for variant, rows in table.groupby("variant"):
        attacked = (
            {"blocked_tpr", "rounds_to_detect"}
            if scenario != "no_attack" and "weight" in set(rows["metric"])
            else set()
        )
        assert set(rows["metric"]) == HOSPITALS[variant] | attacked, variant
    summary = tables.summarise(table, KEYS)
    assert len(summary) == len(table)


def test_rules_differ_and_clip_then_train_excludes_nobody(differing):
    table = differing("hospitals_no_attack")
    rows = table[(table["round"] == "") & (table["client"] == "")]
    assert rows[rows["metric"] == "frechet"]["value"].nunique() == len((*hospitals.RULES, *hospitals.SERVED))
    assert value(rows, variant="clip_then_train", scenario="no_attack", metric="false_exclusion", **DIFFER) == 0
    assert value(rows, variant="clip_then_train", scenario="no_attack", metric="weight_lost", **DIFFER) == 0


def test_hospitals_begin_as_the_cells_of_the_sweep_do(p):
    """The same clients, the same warm-up: what these cells leave out is measured on the same federations."""
    setup = feddetect_eval.instruments(COHORT, p, feddetect_eval.settings(p, "boost_liar", DIFFER), "boost_liar")
    for scenario in ("no_attack", "boost_liar"):
        first, _ = feddetect_eval.warm_up(setup, SEED, scenario)
        second, servers = hospitals.warm_up(setup, SEED, scenario, {1, 2})
        assert all(torch.equal(first.state[k], v) for k, v in second.state.items())
        assert {(server.index, server.malicious) for server in servers.values()} == {(4, False)}
        learnt = [server.discriminator.state_dict() for server in servers.values()]
        assert not all(torch.equal(v, learnt[1][k]) for k, v in learnt[0].items())
    # The one who knows the rule is honest until the defences act.
    clean, _ = hospitals.warm_up(setup, SEED, "no_attack", set())
    aware, _ = hospitals.warm_up(setup, SEED, "aware_rule", set())
    assert all(torch.equal(clean.state[k], v) for k, v in aware.state.items())


def test_every_pass_of_the_server_has_random_numbers_of_its_own(p, monkeypatch):
    seeds = []
    setup = feddetect_eval.instruments(COHORT, p, p, "no_attack")
    federation, servers = hospitals.warm_up(setup, SEED, "no_attack", {1})

    def train_client(client, state, federation, round):
        seeds.append(federation.seed)
        return Update(client.index, state, 1)

    monkeypatch.setattr(fedgan_eval, "train_client", train_client)
    hospitals.trains(servers[1], federation, 3)(federation.state, 4)
    assert len(set(seeds)) == 3
    assert seeds[0] == federation.seed  # a single pass is a client's epoch
    assert [hospitals.passes(v, p) for v in ("root_set", hospitals.ONCE, "clip_then_train", hospitals.ONLY)] == [
        1,
        1,
        p.hospitals.passes,
        p.hospitals.passes,
    ]


def test_the_server_trains_on_public_images_only_and_needs_some(p):
    setup = feddetect_eval.instruments(COHORT, p, p, "no_attack")
    server, (images, _) = hospitals.server_of(setup, SEED), setup.splits["public"]
    assert len(server.images) == min(p.hospitals.public, len(images))
    known = {image.numpy().tobytes() for image in images}
    assert all(image.numpy().tobytes() in known for image in server.images)
    empty = dataclasses.replace(setup, splits=setup.splits | {"public": (images[:1], setup.splits["public"][1][:1])})
    with pytest.raises(InputError, match="split 'public' has 1 images"):
        hospitals.server_of(empty, SEED)


def test_only_cells_of_hospitals_depend_on_their_section(p):
    """So a record that lacks them keeps every other cell."""
    other = params.validate(params.merge(p.model_dump(), {"hospitals": {"public": 99}}))
    for cell in feddetect_record.plan(COHORT, p):
        names = {cells.identity(hospitals.EXPERIMENT, "cohort", each, cell) for each in (p, other)}
        assert len(names) == (2 if cell.arm in hospitals.ARMS else 1), cell.name
        if cell.arm not in hospitals.ARMS:
            assert names == {cells.identity(feddetect_eval.EXPERIMENT, "cohort", p, cell)}


def summary_of(rates, scheme="style"):
    """A summary: rule -> trigger rate of ``boost_liar``, of its own attacker, share excluded, distance."""
    lines = []
    for variant, (liar, own, excluded, distance) in rates.items():
        knowing = "aware" if variant == "feddetect_hardened" else "aware_rule"
        told = [("boost_liar", "trigger_rate", liar), (knowing, "trigger_rate", own)]
        told += [("no_attack", "false_exclusion", excluded), ("no_attack", "frechet", distance)]
        told += [(knowing, "frechet", own and 7 + distance)]
        lines += [
            dict.fromkeys(KEYS, "")
            | {"variant": variant, "scenario": s, "metric": m, "partition": scheme}
            | {"value": x, "low": x - 0.01, "high": x + 0.01, "n": 5}
            for s, m, x in told
            if x is not None
        ]
    return pd.DataFrame(lines)


def test_the_rule_that_a_hospital_should_take_by_hand():
    rates = {
        "none": (1.0, 1.0, 0.0, 15.0),
        "feddetect_hardened": (0.0, 0.9, 0.1, 15.0),
        "median": (0.02, 0.03, None, 40.0),
        "krum": (0.0, 0.045, 0.0, 20.0),  # its interval reaches beyond
        "multi_krum": (0.0, 0.01, 0.02, 12.0),  # leaves out honest ones
        "clip_then_train": (0.0, 0.03, -0.01, 10.0),
        hospitals.ONLY: (None, None, None, 30.0),
    }
    table = where_hospitals_differ(summary_of(rates))
    assert list(dict.fromkeys(table["name"])) == list(rates)
    assert holds(table, 0.05, 0.01) == ["clip_then_train", "median"]
    said = advice(table, 0.5, 0.05, 0.01)
    assert "take `clip_then_train`" in said
    assert "0.03 [0.02, 0.04] of the images, without it in 1 [0.99, 1.01]" in said
    assert "is 10 [9.99, 10] without an attack and 17 [17, 17] under that one" in said
    assert said.endswith("a server that never hears a hospital 30 [30, 30].")
    alike = where_hospitals_differ(summary_of(rates | {hospitals.ONLY: (None, None, None, 10.0)}))
    told = advice(alike, 0.5, 0.05, 0.01)
    assert "it is not shown to draw better than a server without hospitals" in told
    assert "take" not in told
    worse = where_hospitals_differ(summary_of({k: rates[k] for k in ("none", "feddetect_hardened", "multi_krum")}))
    assert "No rule holds" in advice(worse, 0.5, 0.05, 0.01)
    assert "with `multi_krum`" in advice(worse, 0.5, 0.05, 0.01)
    weak = where_hospitals_differ(summary_of(rates | {"none": (0.4, 0.4, 0.0, 15.0)}, "dirichlet"))
    assert "no rule is tested" in advice(weak, 0.5, 0.05, 0.01)
    assert not len(where_hospitals_differ(summary_of({"none": (1.0, None, 0.0, 15.0)})))


# --------------------------------------------------------------------------------------------------------------- record


@pytest.fixture(autouse=True)
def swept(monkeypatch):
    """The small cohort of these tests is planned like those that the companion is about."""
    monkeypatch.setattr(record_plans, "SWEPT", (COHORT,))


def plan(p, profile=None):
    if profile is not None:
        tree = params.merge(params.load(profile).model_dump(), {"cohorts": {"npz": {"path": p.cohorts.npz.path}}})
        p = params.validate(tree)
    return p, feddetect_record.plan(COHORT, p)


@pytest.mark.parametrize("profile", [None, "quick", "full", "full-gpu"])
def test_cells_of_the_plan_have_names_of_their_own(p, profile):
    """A name is a file: two cells of one name would overwrite each other."""
    changed, cells = plan(p, profile)
    names = [c.name for c in cells]
    assert len(set(names)) == len(names)
    assert {len(c.keys) for c in cells} == {0, 1}
    for c in cells:
        if c.arm in SCENARIOS:
            feddetect_eval.settings(changed, c.arm, c.keys)
            assert set(c.variants) <= {*VARIANTS, ORACLE}
        elif c.arm in hospitals.ARMS:
            assert c.variants == hospitals.plan(c.arm)[c.group]
        elif c.arm in gans.ARMS:
            assert c.variants == gans.ARMS[c.arm].variants
        else:
            assert c.arm in ("null", "downstream")


def planned(p, cells):
    """What the record's table will hold: the (variant, scenario, seed) of the headline, after `complete`."""
    rows = [row(v, c.arm, "label_accuracy", 1.0, c.seed) for c in cells if not c.keys for v in c.variants]
    rows = [each for each in rows if each["scenario"] not in gans.ARMS]
    full = complete(pd.DataFrame(rows), p)
    assert not full.duplicated(ADDRESS).any(), "two cells give the same row"
    return set(full[["variant", "scenario", "seed"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("profile", [None, "full"])
def test_the_plan_has_every_defence_against_every_attacker(p, profile):
    """Directly or through what `complete` copies; FedDetect on all evaluation seeds, the baselines on the first."""
    p, cells = plan(p, profile)
    ours = ("none", "feddetect_released", "feddetect_hardened")
    baseline_seeds = p.seeds.evaluation[: p.record.feddetect.baseline_seeds]
    expected = {(v, s, seed) for seed in p.seeds.evaluation for s in SCENARIOS for v in ours}
    expected |= {(v, s, seed) for seed in baseline_seeds for s in SCENARIOS for v in VARIANTS}
    expected |= {(ORACLE, "boost_liar", seed) for seed in p.seeds.evaluation}
    alarms = {
        (v, "no_attack", s) for s in p.record.feddetect.false_alarm_seeds for v in READS_LOSSES if "desc" not in v
    }
    assert planned(p, cells) == expected | alarms
    # Each federation of another kind has its control on the same seed.
    swept = {(tuple(c.keys.items()), c.seed) for c in cells if c.variants and c.keys.keys() & {"m", "partition"}}
    controls = {(tuple(c.keys.items()), c.seed) for c in cells if c.arm == "no_attack" and "none" in c.variants}
    assert swept <= controls
    many = p.feddetect.scenario.colluders[1]
    assert {((("m", many),), seed) for seed in p.seeds.evaluation} <= controls, "colluders have no control"


def test_the_plan_of_another_federation_has_the_trimmed_mean(p):
    """With five clients it is no twin of the median, so it has to be run."""
    five = params.validate(params.merge(p.model_dump(), {"fedgan": {"n_clients": 5}}))
    found = planned(five, feddetect_record.plan(COHORT, five))
    assert {s for v, s, _ in found if v == "trimmed_mean"} == set(SCENARIOS)


def test_a_new_rule_has_cells_of_its_own(p, monkeypatch):
    """So every finished cell of the record stays valid, and only the new ones are to be run."""
    before = feddetect_record.plan(COHORT, p)
    monkeypatch.setattr(feddetect_record, "ADDED", ("geometric_median",))
    after = feddetect_record.plan(COHORT, p)
    added = [c for c in after if c not in before]
    assert [c for c in after if c not in added] == before
    assert {c.variants for c in added} == {("geometric_median",)}
    assert {c.arm for c in added} == set(SCENARIOS) - set(SAME_BUT_FOR_LOSSES)
    assert len({c.name for c in after}) == len(after)


# --------------------------------------------------------------------------------------------------------------- claims


def test_every_claim_asks_for_a_row_that_can_exist():
    """A misspelt claim would otherwise be found only once the record, which takes hours, is there."""
    ledger = yaml.safe_load((paths.CLAIMS / "1-fedgan-defence.yaml").read_text(encoding="utf-8"))
    assert ledger["table"] == NOTEBOOK
    assert len({claim["id"] for claim in ledger["claims"]}) == len(ledger["claims"]) > 40
    p = params.load().feddetect
    for claim in ledger["claims"]:
        where, name = dict(claim["where"]), claim["id"]
        variant, scenario, metric = (where.pop(key) for key in ("variant", "scenario", "metric"))
        assert variant in {*VARIANTS, *DIFFERING, "augmentation"}, name
        assert scenario in {*SCENARIOS, *hospitals.ARMS.values(), *gans.ARMS, "null", "downstream"}, name
        assert metric in UNITS, name
        assert set(where) <= set(KEYS), name
        assert all(isinstance(v, str) for v in where.values()), f"{name}: keys of a table are text"
        if scenario == "null":
            assert (variant, set(where)) == ("feddetect_released", {"m"}), name
            assert int(where["m"]) in p.null_test.clients, name
        elif scenario == "aware_rule" or variant in ("root_set", "clip_then_train"):
            # Only measured where hospitals differ.
            arms = [arm for arm, of in hospitals.ARMS.items() if of == scenario]
            assert any(variant in some for arm in arms for some in hospitals.plan(arm).values()), name
            assert set(where) == {"partition"}, name
            assert metric in HOSPITALS[variant] | {"frechet_minus_clean"}, name
        elif scenario in gans.ARMS:
            assert variant in gans.ARMS[scenario].variants, name
            follow = {f"{metric}_minus_clean" for metric in ("attack_success", "downstream_auc", "frechet")}
            assert metric in gans.KEPT | follow, name
            assert not where, name
        elif scenario == "downstream" or variant == "augmentation":
            assert (variant, scenario, set(where)) == ("augmentation", "downstream", {"source", "real"}), name
            assert where["source"] in feddetect_eval.SOURCES, name
            assert int(where["real"]) in p.downstream.real_per_class, name
        else:
            # What that defence measures (`test_a_cell_has_the_rows_that_it_promises`), or what follows from it.
            attacked = {"tpr", "blocked_tpr"} if SCENARIOS[scenario].attacks else set()
            follows = {"frechet_minus_clean", "downstream_auc_minus_clean", "youden_j"}
            assert metric in PROMISED[variant] | attacked | follows, name
