"""Notebook 05: its federation does what it says on a task that can be learnt in seconds, and its bookkeeping by hand."""

import dataclasses
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from experiments import params, record_designs
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.threat_matrix import arms as matrix_arms
from experiments.threat_matrix import cells as ev
from experiments.threat_matrix import federation as matrix_federation
from experiments.threat_matrix import figures as matrix_plots
from experiments.threat_matrix import surprises as matrix_surprises
from experiments.threat_matrix import tables as matrix_tables
from experiments.threat_matrix.arms import ROWS
from medsec import data
from medsec.backdoor import feddetect, triggers
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.evasion import pruning
from medsec.evidence import check
from medsec.federated.aggregators import uniform_mean
from medsec.federated.rounds import Update
from medsec.nets import cbam as attention

SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "inversion": {
        "purifier": {"images": 32, "width": 4, "epochs": 1},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
        "defences": {"k": 2},
    },
    "fedgan": {"trigger": {"size": 8}},
    "evasion": {"attacks": {"steps": 3}},
    "matrix": {
        "federation": {"width": 8, "n_clients": 4, "images_per_client": 48, "rounds": 6, "batch": 8, "lr": 0.05},
        "victims": 2,
        "iterations": 3,
        "test_images": 12,
        "looks": 16,
    },
}


def halves(n, rng):
    """Images of two classes that a tiny network tells apart: which half is brighter by a little."""
    labels = np.arange(n) % 2
    images = rng.integers(0, 160, (n, 28, 28))
    images[labels == 0, :14] += 15
    images[labels == 1, 14:20] += 15  # below, but not in the corner of the trigger
    return images.astype(np.uint8), labels[:, None].astype(np.uint8)


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 480), ("val", 40), ("test", 60)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = halves(n, rng)
    file = tmp_path_factory.mktemp("cohort") / "halves.npz"
    np.savez(file, **arrays)
    tree = params.merge(params.load().model_dump(), SMALL)
    yield params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))
    matrix_arms._instruments.cache_clear()


@pytest.fixture(scope="module")
def setup(p):
    return matrix_arms.prepare("npz", p)


@pytest.fixture(scope="module")
def finished(setup, p):
    """By row and scenario a finished federation, each trained once."""
    memory = {}

    def get(variant, scenario):
        if (variant, scenario) not in memory:
            memory[variant, scenario] = matrix_federation.train(setup, ROWS[variant], scenario, p.matrix, 0)
        return memory[variant, scenario]

    return get


# The attack ----------------------------------------------------------------------------------------------------------


def test_the_backdoor_works_and_the_control_does_not(setup, finished):
    attacked, clean = (ev.backdoor(setup, finished("none", s).model) for s in ("boost_liar", "no_attack"))
    assert attacked["attack_success"][0] > 0.8
    assert clean["attack_success"][0] < 0.1
    assert clean["attack_success"][1] > 25, "the clean network calls nearly all images of the other class rightly"
    assert clean["called_target"] == (pytest.approx(1 - clean["attack_success"][1] / 30), 30)


def test_success_counts_what_the_trigger_turns_by_hand(setup):
    class Corner(nn.Module):
        """Calls class 1 whatever is bright below, and class 0 what has a white pixel in the last corner or a bright first one."""

        def forward(self, x):
            is_target = (x[:, 0, -1, -1] > 0.95) | (x[:, 0, 0, 0] > self.first)
            return torch.stack([is_target.float(), 1 - is_target.float()], 1)

    model = Corner().eval()
    x, y = setup.splits["test"]
    x = x[y == 1]
    model.first = float(x[:, 0, 0, 0].median())
    wrong = int((x[:, 0, 0, 0] > model.first).sum())
    assert 0 < wrong < 30
    found = ev.backdoor(setup, model)
    assert found["called_target"] == (pytest.approx(wrong / 30), 30)
    assert found["attack_success"] == (1.0, 30 - wrong), "of those that it called rightly the trigger turns every one"
    model.first = -1.0
    assert set(ev.backdoor(setup, model)) == {"called_target"}, "nothing is called rightly: nothing to turn"


def test_the_attacker_adds_stamped_copies(setup, p):
    images, labels = inversion_clients.deal(setup, 0)
    trigger = matrix_federation.new_trigger(setup)
    x, y = matrix_federation.poisoned(trigger, images[0], labels[0], 0, 1.0, 1)
    n, others = len(labels[0]), int((labels[0] != 0).sum())
    assert torch.equal(x[:n], images[0])
    assert torch.equal(y[:n], labels[0])
    assert len(x) == n + others
    assert (y[n:] == 0).all()
    assert (triggers.score(trigger, x[n:]) > 0.99).all()
    assert len(matrix_federation.poisoned(trigger, images[0], labels[0], 0, 0.5, 1)[0]) == n + round(others / 2)


def test_what_reaches_the_server_by_hand():
    def update(client, weight, loss):
        return Update(client, {"w": torch.tensor([weight])}, 10, {"loss_g": loss, "last_loss_g": loss + 1})

    updates = [update(0, 2.0, 9.0), update(1, 1.0, 0.1), update(2, 1.0, 0.3), update(3, 1.0, 0.2)]
    received = {"w": torch.tensor([1.5])}
    sent = matrix_federation.tampered(updates, received, matrix_federation.ATTACKS["boost_liar"], 3.0)
    assert sent[0].state["w"].item() == 1.5 + 3 * 0.5
    assert sent[0].metrics == {"loss_g": pytest.approx(0.2), "last_loss_g": pytest.approx(1.2)}
    assert [u.state["w"].item() for u in sent[1:]] == [1.0, 1.0, 1.0]
    same = matrix_federation.tampered(updates, received, matrix_federation.ATTACKS["backdoor"], 3.0)
    assert [u.state["w"].item() for u in same] == [2.0, 1.0, 1.0, 1.0]
    assert same[0].metrics["loss_g"] == 9.0


def test_who_complies_runs_the_defence(setup, p, monkeypatch):
    seen = []
    real = matrix_arms.perturbation
    monkeypatch.setattr(matrix_arms, "perturbation", lambda s, row, x, y, k: seen.append(row) or real(s, row, x, y, k))
    one = p.matrix.model_copy(update={"federation": p.matrix.federation.model_copy(update={"rounds": 1})})
    for scenario, first in (("backdoor", "none"), ("compliant", "shadow_hardened"), ("no_attack", "shadow_hardened")):
        seen.clear()
        matrix_federation.train(setup, ROWS["shadow_hardened"], scenario, one, 0)
        assert [row.images for row in seen] == [first, *["shadow_hardened"] * 3]


# The federation ------------------------------------------------------------------------------------------------------


def test_a_federation_equals_a_plain_second_implementation(setup, p, finished):
    """FedAvg by hand: no attack, no defence."""
    f = p.matrix.federation
    images, labels = inversion_clients.deal(setup, 0)
    model = matrix_arms.network(setup, ROWS["none"], 0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for round in range(f.rounds):
        sent = []
        for i in range(f.n_clients):
            model.load_state_dict(state)
            velocity = [torch.zeros_like(w) for w in model.parameters()]
            order = torch.randperm(len(images[i]), generator=torch_generator(0, "local", i, round))
            for start in range(0, len(order), f.batch):
                batch = order[start : start + f.batch]
                loss = F.cross_entropy(model(images[i][batch]), labels[i][batch])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for w, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                        v.mul_(f.momentum).add_(g)
                        w.sub_(f.lr * v)
            sent.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        state = {k: sum(s[k].double() for s in sent).div(len(sent)).float() for k in state}
    for name, value in finished("none", "no_attack").model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def test_the_other_order_is_the_only_difference_of_the_second_undefended_row(setup, finished):
    first, second = (finished(v, "no_attack").model.state_dict() for v in ("none", "none_again"))
    start = [matrix_arms.network(setup, ROWS[v], 0).state_dict() for v in ("none", "none_again")]
    assert all(torch.equal(start[0][k], start[1][k]) for k in start[0])
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize("variant", ["prune", "prune_random"])
def test_pruned_weights_stay_zero(p, finished, variant):
    for scenario in ("no_attack", "boost_liar"):  # an attacker who fills them gains nothing
        done = finished(variant, scenario)
        assert pruning.sparsity(done.model) >= p.evasion.prune - 0.01
        zero = [done.model.state_dict()[name][~mask] for name, mask in done.keep.items()]
        assert all((part == 0).all() for part in zero)
    assert finished("none", "no_attack").keep is None


def test_random_masks_keep_as_many_in_every_layer(setup, p):
    model = matrix_arms.network(setup, ROWS["none"], 0)
    small, random = (matrix_arms.masks(model, ROWS[v], 0.5, 3) for v in ("prune", "prune_random"))
    assert {k: int(m.sum()) for k, m in small.items()} == {k: int(m.sum()) for k, m in random.items()}
    assert any(not torch.equal(small[k], random[k]) for k in small)
    largest = pruning.masks(model, 0.5)
    assert all(torch.equal(small[k], largest[k]) for k in small)


def test_attention_is_added_and_nothing_else_changes(setup):
    plain, attended = (matrix_arms.network(setup, ROWS[v], 0) for v in ("none", "cbam"))
    assert len(attention.modules(attended)) == 1
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in plain.body) == len(matrix_arms.STRIDES)
    theirs = dict(attended.named_parameters())
    assert all(sum(torch.equal(w, v) for v in theirs.values() if v.shape == w.shape) for w in plain.parameters())
    x = setup.splits["val"][0]
    ratio = attended(x).std() / plain(x).std()
    assert 0.3 < ratio < 3, "what the gates take away is given back"


def test_adversarial_images_stay_within_eps_and_raise_the_loss(setup, p, finished):
    model, (x, y) = finished("none", "no_attack").model, setup.splits["val"]
    perturb = matrix_arms.perturbation(setup, ROWS["at"], x, y, 0)
    changed = perturb(model, x, y, 0)
    assert 0 < (changed - x).abs().max() <= p.evasion.robust.eps / 255 + 1e-6
    assert F.cross_entropy(model(changed), y) > F.cross_entropy(model(x), y)
    assert torch.equal(changed, perturb(model, x, y, 0))
    assert not torch.equal(changed, perturb(model, x, y, 1))
    assert matrix_arms.perturbation(setup, ROWS["none"], x, y, 0) is None


# The server's look ---------------------------------------------------------------------------------------------------


def test_looks_are_gradients_of_the_margin_and_secret_in_every_round(setup, finished):
    model = matrix_arms.network(setup, ROWS["none"], 0)
    state = finished("none", "no_attack").model.state_dict()
    maps = matrix_arms.looks(setup, model, 5, 7, state, 2)
    assert maps.shape == (5, 1, 28, 28)
    torch.testing.assert_close(maps.square().mean((1, 2, 3)), torch.ones(5))
    public, labels = setup.splits["public"]
    chosen = torch.randperm(len(public), generator=torch_generator(7, "server", 2))[:5]
    x = public[chosen[:1]].requires_grad_()
    logits = model(x)[0]  # with the state that was looked at
    y = int(labels[chosen[0]])
    (g,) = torch.autograd.grad(logits[1 - y] - logits[y], x)
    torch.testing.assert_close(maps[:1], g / g.square().mean().sqrt())
    assert not torch.equal(maps, matrix_arms.looks(setup, model, 5, 7, state, 3))
    doubled = {k: v * (2 if k.startswith("head") else 1) for k, v in state.items()}
    torch.testing.assert_close(matrix_arms.looks(setup, model, 5, 7, doubled, 2), maps, rtol=1e-3, atol=1e-4)


def test_the_hardened_server_leaves_the_attacker_out_and_nobody_else():
    """With the parameters of the repository, on the phantom and a tuning seed."""
    p = params.load()
    whole = data.load("phantom", p.cohorts)
    splits = {k: (torch.from_numpy(s.float()), torch.from_numpy(s.labels)) for k, s in whole.splits.items()}
    inversion = p.inversion.model_copy(update={"federation": p.matrix.federation})
    setup = Setup(p.model_copy(update={"inversion": inversion}), whole, splits, None, None)
    done, success = {}, {}
    for variant in ("none", "feddetect_hardened"):
        done[variant] = matrix_federation.train(setup, ROWS[variant], "boost_liar", p.matrix, p.seeds.tuning[0])
        success[variant] = ev.backdoor(setup, done[variant].model)["attack_success"][0]
    said = [each["weights"] for each in done["feddetect_hardened"].diagnostics]
    assert said[-1] == {0: 0, 1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 3)}
    assert min(weights[client] for weights in said for client in (1, 2, 3)) > 0.2
    assert success["none"] > 0.9
    assert success["feddetect_hardened"] < 0.3


def test_servers(setup, p):
    model = matrix_arms.network(setup, ROWS["none"], 0)
    third = p.matrix.model_copy(update={"warm_up": 1 / 3})  # of six rounds
    found = {
        s: matrix_arms.aggregator(setup, dataclasses.replace(ROWS["none"], server=s), third, model, 0)
        for s in matrix_arms.SERVERS
    }
    assert found["mean"] is uniform_mean
    kinds = {"released": feddetect.Released, "described": feddetect.Described}
    kinds |= {"hardened": feddetect.Hardened, "norm_clip": feddetect.NormClip}
    assert all(isinstance(found[name], kind) for name, kind in kinds.items())
    assert {each.warm_up for name, each in found.items() if name in ("released", "described", "hardened")} == {2}


# What the server has of a victim ---------------------------------------------------------------------------------------


def test_the_victims_gradient_has_no_pruned_entry_and_is_that_of_the_used_image(setup, finished):
    done = finished("prune", "no_attack")
    images, labels = inversion_clients.deal(setup, 0)
    x, y = images[1][:2, None], labels[1][:2, None]
    found = ev.sent(ROWS["prune"], done.model, None, done.keep, x, y, 4)
    dense = ev.sent(ROWS["none"], done.model, None, None, x, y, 4)
    for name, sparse, full in zip(
        dict(done.model.named_parameters()), found.view.gradients, dense.view.gradients, strict=True
    ):
        expected = full * done.keep[name] if name in done.keep else full
        assert torch.equal(sparse, expected)
    robust = finished("at", "no_attack")
    perturb = robust.perturbations[ev.VICTIM]
    found = ev.sent(ROWS["at"], robust.model, perturb, None, x, y, 4)
    assert found.changed is None, "nothing that paper 2's attackers could undo"
    at = perturb(robust.model, x[0], y[0], 4)
    loss = F.cross_entropy(robust.model(at), y[0])
    for mine, theirs in zip(
        torch.autograd.grad(loss, list(robust.model.parameters())), found.view.gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs[0])


ADAPTIVE = {"none": set(), "at": set(), "prune": {"known"}, "shadow_hardened": {"purified", "generator"}}


@pytest.mark.parametrize("variant", ADAPTIVE)
def test_who_knows_the_defence_does_more(setup, finished, variant):
    done = finished(variant, "no_attack")
    images, labels = inversion_clients.deal(setup, 0)
    found = ev.sent(
        ROWS[variant], done.model, done.perturbations[1], done.keep, images[1][:2, None], labels[1][:2, None], 4
    )
    assert set(ev.known(setup, ROWS[variant], found, 0)) == ADAPTIVE[variant]


# Cells and tables ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(p):
    """The same in fewer steps: what comes out need not be good."""
    small = {"federation": {"rounds": 3, "images_per_client": 24, "width": 4}}
    return params.validate(params.merge(p.model_dump(), {"matrix": small}))


CHOSEN = ("none", "feddetect_hardened", "shadow_hardened", "at", "shadow+at", "prune")


@pytest.fixture(scope="module")
def runs(tiny):
    return pd.concat([ev.cell("npz", tiny, v, seed) for v in CHOSEN for seed in (0, 1)], ignore_index=True)


def test_a_cell_has_the_rows_that_it_promises(runs):
    assert np.isfinite(runs["value"]).all()
    assert not runs.duplicated(["seed", "variant", "scenario", "metric", *ev.KEYS]).any()
    for variant, part in runs.groupby("variant"):
        scenarios = {
            "no_attack",
            "backdoor",
            "boost_liar",
            "naive",
            "adaptive",
            "prior_only",
            "midway",
            "noise",
            "pgd20",
        }
        if ev.missing(variant, "compliant") is None:
            scenarios.add("compliant")
        if variant == "none":
            scenarios.add("constant")
        assert set(part["scenario"]) == scenarios
        for column in ev.COLUMNS:
            if column.scenario in scenarios and column.metric != "attack_success":
                one = part[(part["scenario"] == column.scenario) & (part["metric"] == column.metric)]
                assert (one["round"] == "").sum() == 2, (variant, column)
        rounds = {"none": {"", "0", "1"}, "at": {"", ev.NETWORK}}
        assert set(part["round"]) == rounds.get(variant, {""})
    rows = runs.pivot_table(index=["seed", "variant", "scenario"], columns="metric", values="value")
    some_right = rows["called_target"].dropna() < 1
    assert (rows.loc[some_right.index, "attack_success"].notna() == some_right).all(), "no rate without a denominator"
    psnr = runs[runs["metric"] == "psnr"].set_index(["seed", "variant", "round", "scenario"])["value"].unstack()
    assert (psnr["adaptive"] >= psnr["naive"] - 1e-9).all(), "who knows more is not worse off"


def test_a_cell_is_the_same_again(runs, tiny):
    again = ev.cell("npz", tiny, "prune", 1)
    first = runs[(runs["variant"] == "prune") & (runs["seed"] == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, again)


def test_differences_are_paired_by_seed(runs):
    """All of them, from a plain dictionary."""
    whole = ev.complete(runs)
    assert not whole.duplicated(["seed", "variant", "scenario", "metric", *ev.KEYS]).any()
    rows = whole.to_dict("records")
    value = {tuple(r[k] for k in ("seed", "variant", "scenario", "metric", "round")): r["value"] for r in rows}
    seen = set()
    for (seed, variant, scenario, metric, round), difference in value.items():
        name, _, base = metric.partition("_minus_")
        if base == "none":
            other = (
                "none",
                {"compliant": "backdoor"}.get(scenario, scenario),
                name,
                "" if round == ev.NETWORK else round,
            )
        elif base == "part":
            other = ev.PARTS[variant][scenario], scenario, name, round
        elif base in ("control", "noise"):
            other = variant, {"control": "no_attack", "noise": "noise"}[base], name, round
        elif base == "matched":
            own = value[seed, variant, "midway", "auc", ""]
            learnt = {r: abs(value[seed, "none", "midway", "auc", r] - own) for r in ("", "0", "1")}
            other = "none", scenario, name, min(learnt, key=learnt.get)
        else:
            continue
        seen.add((base, scenario))
        least = value[seed, "none", "prior_only", "psnr", ""] if name == "psnr" else -math.inf
        mine, theirs = (
            max(least, found) for found in (value[seed, variant, scenario, name, round], value[seed, *other])
        )
        assert difference == mine - theirs, (variant, scenario, metric)
        assert not (base == "none" and variant == "none")
    assert {
        ("none", "compliant"),
        ("none", "adaptive"),
        ("part", "pgd20"),
        ("noise", "pgd20"),
        ("matched", "naive"),
    } <= seen


def test_a_reconstruction_worse_than_none_is_not_counted_twice(runs):
    """Below what the mean image has, less is no more privacy: both sides of a difference end there."""
    floor = runs[(runs["scenario"] == "prior_only") & (runs["metric"] == "psnr")].groupby("seed")["value"].first()
    bad = (runs["variant"] == "prune") & (runs["metric"] == "psnr") & (runs["scenario"] == "adaptive")
    spoiled = runs.copy()
    spoiled.loc[bad, "value"] = -40.0
    whole = ev.complete(spoiled)
    where = (whole["variant"] == "prune") & (whole["scenario"] == "adaptive") & (whole["round"] == "")
    found = whole[where & (whole["metric"] == "psnr_minus_none")].set_index("seed")["value"]
    none = runs[(runs["variant"] == "none") & (runs["scenario"] == "adaptive") & (runs["metric"] == "psnr")]
    none = none[none["round"] == ""].set_index("seed")["value"]
    assert len(found) == 2
    for seed, value in found.items():
        assert value == floor[seed] - max(floor[seed], none[seed]) > -40
    assert (whole[where & (whole["metric"] == "psnr")]["value"] == -40).all(), "the table itself says what was measured"


def test_a_constant_answer_has_its_row(runs):
    rows = runs[runs["scenario"] == "constant"]
    assert rows[["variant", "metric", "value"]].drop_duplicates().values.tolist() == [
        ["none", "balanced_accuracy", 0.5]
    ]


def test_every_empty_cell_has_a_reason_and_every_other_a_value(runs, p):
    cells = matrix_tables.grid(ev.summarise(runs), p.matrix)
    assert len(cells) == len(ROWS) * len(ev.COLUMNS)
    there = cells[cells["variant"].isin(CHOSEN)]
    whole = there["n"] == 2
    assert (whole == (there["why"] == "")).all(), "every cell that lacks a run says why"
    assert (there["value"].notna() == (there["n"] > 0)).all()
    assert there.loc[there["value"].notna(), "badness"].between(0, 1).all()
    told = matrix_tables.reasons(there)
    assert told.notna().all().all()
    listed = told.loc[told["why"] == ev.NOTHING_TO_RUN, "rows"].item()
    assert {name.strip("`") for name in listed.split(", ")} == {"none", "feddetect_hardened", "prune"}
    with pytest.raises(InputError, match="row 'shield' of the matrix: choose one of none"):
        ev.missing("shield", "compliant")


def test_a_run_in_which_there_is_nothing_to_turn_is_told(runs, p):
    lost = (runs["variant"] == "at") & (runs["metric"] == "attack_success") & (runs["seed"] == 1)
    cells = matrix_tables.grid(ev.summarise(runs[~lost]), p.matrix)
    cell = cells[(cells["variant"] == "at") & (cells["column"] == 3)].iloc[0]
    assert (cell["n"], cell["why"]) == (1, matrix_tables.NOTHING_RIGHT) or pd.isna(cell["n"])
    rows = matrix_tables.reasons(cells[cells["variant"] == "at"])["rows"]
    assert rows.str.contains(r"`at` \(n = [01]\)").any()


@pytest.mark.parametrize("chance", [0.5, 1 / 3])
def test_who_always_answers_the_same_is_not_robust(p, chance):
    """So many answers are right whatever the attacker does: that is no defence, although ``none`` has less."""
    column = next(c for c in ev.COLUMNS if c.scenario == "pgd20")
    where = {"variant": "at", "scenario": "pgd20", "round": "", "n": 3, "n_items": 3, "unit": "share"}

    def said(low):
        value = {**where, "metric": "balanced_accuracy", "value": low, "low": low, "high": low}
        change = {**where, "metric": "balanced_accuracy_minus_none", "value": 0.2, "low": 0.2, "high": 0.2}
        constant = {**value, "variant": "none", "scenario": "constant", "value": chance}
        return matrix_tables.against_none(pd.DataFrame([value, change, constant]), p.matrix, "at", column)

    assert said(chance) == matrix_tables.ALIKE
    assert said(chance + 0.1) == matrix_tables.BETTER


def test_better_and_worse_by_hand():
    def said(low, high, **kind):
        return matrix_tables.judged(pd.Series({"low": low, "high": high}), 0.1, **kind)

    assert said(0.11, 0.3, high_is_bad=True) == matrix_tables.WORSE
    assert said(0.11, 0.3, high_is_bad=False) == matrix_tables.BETTER
    assert said(-0.3, -0.11, high_is_bad=True) == matrix_tables.BETTER
    assert said(0.09, 0.3, high_is_bad=True) == said(-0.3, -0.09, high_is_bad=True) == matrix_tables.ALIKE


def test_controls_are_made_for_nothing():
    assert matrix_surprises.made_for("none") == matrix_surprises.made_for("prune_random") == set()
    assert matrix_surprises.made_for("feddetect+shadow+at") == {"backdoor", "boost_liar", "adaptive", "pgd20"}
    assert matrix_surprises.made_for("cbam") == {"pgd20"}


def test_the_message_of_the_matrix():
    places = [1, 3, 6, 7]  # one of each threat
    assert len({ev.COLUMNS[place].threat for place in places}) == 4
    better = [{"variant": "at", "column": place, "judged": matrix_tables.BETTER} for place in places]
    alike = [{"variant": "cbam", "column": place, "judged": matrix_tables.ALIKE} for place in places]
    stack = [{**cell, "variant": "shadow+at"} for cell in better]
    said = matrix_tables.message(pd.DataFrame(better[1:] + alike))
    assert said == "Better against all three threats: adversarial training"
    assert (
        matrix_tables.message(pd.DataFrame(better[:3] + alike + stack)) == "No single defence meets all three threats"
    )


def test_what_is_surprising_is_read_where_it_is_understood():
    columns = {(c.scenario, c.metric): c for c in ev.COLUMNS}
    for each in matrix_surprises.READINGS:
        assert set(each.rows) <= set(ROWS)
        assert set(each.cells) <= set(columns)
    complied = columns["compliant", "attack_success"]
    assert "Stand-ins replace them" in matrix_surprises.reading("shadow_hardened", complied, matrix_tables.BETTER)
    assert matrix_surprises.reading("shadow_hardened", complied, matrix_tables.WORSE) == matrix_surprises.UNEXPLAINED
    line = {"value": "0.1 [0.0, 0.2]", "minus none": "-0.3 [-0.4, -0.2]", "what": "not made for it, and better"}
    texts = [("`at`", "why"), ("`cbam`", "else"), ("`prune`", "why")]
    odd = pd.DataFrame([{"row": row, "column": "evasion: x", **line, "reading": text} for row, text in texts])
    said = matrix_surprises.paragraphs(odd).split("\n\n")
    assert len(said) == 2
    assert said[0].startswith("**`at`, evasion: x: 0.1 [0.0, 0.2] (minus none")
    assert "`prune`" in said[0]
    assert said[0].endswith(".** why")
    assert matrix_surprises.paragraphs(odd[:0]) == "None."


def test_views_and_the_figure(runs, p):
    summary = ev.summarise(runs)
    stacked = matrix_tables.stacking(summary, p.matrix)
    assert set(stacked["stack"]) == {"`shadow+at`"}
    table = matrix_tables.compared(summary, p.matrix, {"AUC": ("no_attack", "auc")}, ["none", "at"])
    assert list(table.columns) == ["row", "AUC", "AUC, minus none"]
    assert re.search(r"clearly (better|worse)|no clear difference", table["AUC, minus none"][1])
    odd = matrix_surprises.side_effects(summary, p.matrix)
    assert not odd["row"].eq("`none`").any()
    cells = matrix_tables.grid(summary, p.matrix)
    fig, ax = matrix_plots.heat_map(cells, "title")
    shown = [text.get_text() for text in ax.texts]
    assert sum(text == "n/a" for text in shown) == cells["value"].isna().sum()
    assert sum(text.startswith("[") for text in shown) == cells["value"].notna().sum()
    plt.close(fig)


def test_families_hold_every_row_once():
    members = [variant for group in matrix_arms.FAMILIES.values() for variant in group]
    assert members == list(ROWS)


def test_every_claim_asks_for_a_row_that_can_exist():
    ledger = yaml.safe_load((paths.CLAIMS / "5-matrix.yaml").read_text())
    known = check.tolerances()
    for claim in ledger["claims"]:
        where = claim["where"]
        assert where["variant"] in ROWS
        assert ev.missing(where["variant"], where["scenario"]) is None
        assert where["metric"] in known
    assert all(metric in known for metric in ev.UNITS)


def test_all_cells_are_planned_dearest_first(p):
    planned = ev.cells(p, "npz")
    rows = [(name, seed) for _, _, names, seed in planned for name in names]
    assert sorted(rows) == sorted((name, seed) for name in ROWS for seed in p.seeds.evaluation)
    assert {"none", "feddetect_hardened", "prune"} < set(planned[0][2]), "rows that begin alike are together"
    assert planned[-1][2] == ("none_again",)


def test_rows_of_one_cell_are_those_of_several(p):
    both = ev.cell("npz", p, ("none", "prune"), 0)
    apart = pd.concat([ev.cell("npz", p, name, 0) for name in ("none", "prune")], ignore_index=True)
    pd.testing.assert_frame_equal(both, apart)


@pytest.mark.parametrize("variant", ["feddetect_hardened", "prune", "feddetect+shadow", "shadow_described"])
def test_local_epochs_in_common_are_done_once_and_nothing_changes(setup, p, variant, monkeypatch):
    counted, epoch = [], matrix_federation.local_epoch
    monkeypatch.setattr(matrix_federation, "local_epoch", lambda *a: (counted.append(1), epoch(*a))[1])

    def train(row):
        counted.clear()
        done = matrix_federation.train(setup, ROWS[row], "backdoor", p.matrix, 0)
        return done, len(counted)

    monkeypatch.setattr(matrix_federation, "_done", {})
    fresh, everything = train(variant)
    assert everything == p.matrix.federation.rounds * p.matrix.federation.n_clients
    monkeypatch.setattr(matrix_federation, "_done", {})
    train({"feddetect+shadow": "shadow_hardened"}.get(variant, "none"))
    again, some = train(variant)
    if variant == "shadow_described":  # the attacker alone, who does not run it, in the first round
        assert some == everything - 1
    else:
        assert some < everything - 2
    for one, two in zip(fresh.states, again.states, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert fresh.diagnostics == again.diagnostics


def test_other_settings_are_another_local_epoch(setup, p, monkeypatch):
    monkeypatch.setattr(matrix_federation, "_done", {})
    slow = p.matrix.model_copy(update={"federation": p.matrix.federation.model_copy(update={"lr": 1e-4})})
    first, second = (matrix_federation.train(setup, ROWS["none"], "no_attack", each, 0) for each in (p.matrix, slow))
    assert not torch.equal(first.states[1]["head.weight"], second.states[1]["head.weight"])


def test_a_defence_that_remembers_is_never_left_out(setup, p, monkeypatch):
    """Whatever is not known to forget: a control around the shadow generator, which no row has today."""
    row = dataclasses.replace(ROWS["none"], images="gaussian")
    federations = []
    for before in ((), (dataclasses.replace(row, server="norm_clip"),)):
        monkeypatch.setattr(matrix_federation, "_done", {})
        for each in (*before, row):
            last = matrix_federation.train(setup, each, "no_attack", p.matrix, 0)
        federations.append(last)
    for one, two in zip(federations[0].states, federations[1].states, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_few_local_epochs_are_kept(monkeypatch):
    monkeypatch.setattr(matrix_federation, "_done", {})
    monkeypatch.setattr(matrix_federation, "KEPT", 2)
    for name in "abcb":
        assert matrix_federation._once(name, lambda name=name: name) == name
    assert list(matrix_federation._done) == ["b", "c"]


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(setup, p):
    with pytest.raises(InputError, match="row 'shield' of the matrix"):
        ev.cell("npz", p, "shield", 0)
    with pytest.raises(InputError, match="scenario 'flood': choose one of no_attack"):
        matrix_federation.train(setup, ROWS["none"], "flood", p.matrix, 0)
    far = p.matrix.model_copy(update={"target": 2})
    with pytest.raises(InputError, match=r"matrix\.target 2: npz has classes 0 to 1"):
        matrix_federation.train(setup, ROWS["none"], "backdoor", far, 0)
    tree = p.model_dump()
    for change, said in (
        ({"federation": {"n_clients": 2}}, "2 clients: FedDetect compares"),
        ({"poison_few": 0.0}, "matrix.poison_few"),
        ({"matters": {"aucc": 0.1}}, "matrix.matters.aucc"),
        ({"boost": 0.5}, "matrix.boost"),
        ({"leak_after": 0.1}, "leak_after 0.1 is before prune_after"),
    ):
        with pytest.raises(InputError, match=said):
            params.validate(params.merge(tree, {"matrix": change}))


def test_seeds_of_clients_differ(setup):
    assert derive_seed(0, "client", 0) != derive_seed(0, "client", 1)
    assert "05_threat_matrix" not in record_designs.DESIGNS, "a record of the matrix would need a design"
