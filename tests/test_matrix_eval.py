"""Notebook 05: its federation does what it says on a task that can be learnt in seconds, and its tables agree with plain sums."""

import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from experiments import params
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.threat_matrix import arms, federation, figures, surprises, tables
from experiments.threat_matrix import cells as ev
from experiments.threat_matrix.arms import ROWS
from medsec import data
from medsec.backdoor import feddetect, triggers
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.seeds import torch_generator
from medsec.evasion import pruning
from medsec.evidence import tables as evidence_tables
from medsec.federated.aggregators import uniform_mean
from medsec.federated.rounds import Update
from medsec.nets import cbam as attention

SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "inversion": {
        "purifier": {"images": 32, "width": 4, "epochs": 1},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
        "defences": {"shadow_hardened": {"k": 2}},
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
CHOSEN = ("none", "feddetect_hardened", "shadow_hardened", "at", "shadow+at", "prune")


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
    arms._instruments.cache_clear()


@pytest.fixture(scope="module")
def setup(p):
    return arms.prepare("npz", p)


@pytest.fixture(scope="module")
def finished(setup, p):
    """By row and scenario a finished federation, each trained once."""
    done, memo = {}, {}

    def get(variant, scenario):
        if (variant, scenario) not in done:
            done[variant, scenario] = federation.train(setup, ROWS[variant], scenario, p.matrix, 0, memo)
        return done[variant, scenario]

    return get


def same(one, two):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one.states, two.states, strict=True) for name in a)


# The attack ----------------------------------------------------------------------------------------------------------


def test_the_backdoor_works_and_the_control_does_not(setup, finished):
    attacked, clean = (ev.backdoor(setup, finished("none", s).model) for s in ("boost_liar", "no_attack"))
    assert attacked["attack_success"][0] > 0.8
    assert clean["attack_success"][0] < 0.1
    assert clean["attack_success"][1] > 25, "the clean network calls nearly all images of the other class rightly"
    assert clean["called_target"] == (pytest.approx(1 - clean["attack_success"][1] / 30), 30)


def test_success_counts_what_the_trigger_turns_by_hand(setup):
    class Corner(nn.Module):
        """Class 0 for a white pixel in the last corner or a bright one in the first, class 1 otherwise."""

        def forward(self, x):
            is_target = (x[:, 0, -1, -1] > 0.95) | (x[:, 0, 0, 0] > self.first)
            return torch.stack([is_target.float(), 1 - is_target.float()], 1)

    model = Corner().eval()
    x, y = setup.splits["test"]
    x = x[y == 1]
    model.first = float(x[:, 0, 0, 0].median())
    wrong = int((x[:, 0, 0, 0] > model.first).sum())
    assert 0 < wrong < 30
    rates = ev.backdoor(setup, model)
    assert rates["called_target"] == (pytest.approx(wrong / 30), 30)
    assert rates["attack_success"] == (1.0, 30 - wrong), "the trigger turns every image that was called rightly"
    model.first = -1.0
    assert set(ev.backdoor(setup, model)) == {"called_target"}, "nothing is called rightly: nothing to turn"


def test_the_attacker_adds_stamped_copies(setup):
    images, labels = inversion_clients.deal(setup, 0)
    trigger = federation.new_trigger(setup)
    x, y = federation.poisoned(trigger, images[0], labels[0], 0, 1.0, 1)
    n, others = len(labels[0]), int((labels[0] != 0).sum())
    assert torch.equal(x[:n], images[0])
    assert torch.equal(y[:n], labels[0])
    assert len(x) == n + others
    assert (y[n:] == 0).all()
    assert (triggers.score(trigger, x[n:]) > 0.99).all()
    assert len(federation.poisoned(trigger, images[0], labels[0], 0, 0.5, 1)[0]) == n + round(others / 2)


def test_what_reaches_the_server_by_hand():
    def update(client, weight, loss):
        return Update(client, {"w": torch.tensor([weight])}, 10, {"loss_g": loss, "last_loss_g": loss + 1})

    updates = [update(0, 2.0, 9.0), update(1, 1.0, 0.1), update(2, 1.0, 0.3), update(3, 1.0, 0.2)]
    received = {"w": torch.tensor([1.5])}
    sent = federation.tampered(updates, received, federation.ATTACKS["boost_liar"], 3.0)
    assert sent[0].state["w"].item() == 1.5 + 3 * 0.5
    assert sent[0].metrics == {"loss_g": pytest.approx(0.2), "last_loss_g": pytest.approx(1.2)}
    assert [u.state["w"].item() for u in sent[1:]] == [1.0, 1.0, 1.0]
    plain = federation.tampered(updates, received, federation.ATTACKS["backdoor"], 3.0)
    assert [u.state["w"].item() for u in plain] == [2.0, 1.0, 1.0, 1.0]
    assert plain[0].metrics["loss_g"] == 9.0


def test_who_complies_runs_the_defence(setup, p):
    for scenario, first in (("backdoor", "none"), ("compliant", "shadow_hardened"), ("no_attack", "shadow_hardened")):
        attack = federation.ATTACKS[scenario]
        members = federation.clients(setup, ROWS["shadow_hardened"], attack, p.matrix, 0)
        assert [member.row.images for member in members] == [first, *["shadow_hardened"] * 3]
        assert (members[0].perturb is None) == (first == "none")


# The federation ------------------------------------------------------------------------------------------------------


def test_a_federation_equals_a_plain_second_implementation(setup, p, finished):
    """FedAvg by hand: no attack, no defence."""
    f = p.matrix.federation
    images, labels = inversion_clients.deal(setup, 0)
    model = arms.network(setup, ROWS["none"], 0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for round_idx in range(f.rounds):
        sent = []
        for i in range(f.n_clients):
            model.load_state_dict(state)
            velocity = [torch.zeros_like(w) for w in model.parameters()]
            order = torch.randperm(len(images[i]), generator=torch_generator(0, "local", i, round_idx))
            for batch in order.split(f.batch):
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


def test_the_other_order_is_the_only_difference_of_the_second_undefended_row(finished):
    first, second = (finished(v, "no_attack").states for v in ("none", "none_again"))
    assert all(torch.equal(first[0][k], second[0][k]) for k in first[0])
    assert not torch.equal(first[-1]["head.weight"], second[-1]["head.weight"])


@pytest.mark.parametrize("variant", ["prune", "prune_random"])
def test_pruned_weights_stay_zero(p, finished, variant):
    for scenario in ("no_attack", "boost_liar"):  # an attacker who fills them gains nothing
        done = finished(variant, scenario)
        assert pruning.sparsity(done.model) >= p.evasion.prune - 0.01
        zero = [done.model.state_dict()[name][~mask] for name, mask in done.keep.items()]
        assert all((part == 0).all() for part in zero)
    assert finished("none", "no_attack").keep is None


def test_random_masks_keep_as_many_in_every_layer(setup, p):
    model = arms.network(setup, ROWS["none"], 0)
    small, random = (arms.masks(model, ROWS[v], p.evasion, 3) for v in ("prune", "prune_random"))
    assert {k: int(m.sum()) for k, m in small.items()} == {k: int(m.sum()) for k, m in random.items()}
    assert any(not torch.equal(small[k], random[k]) for k in small)
    largest = pruning.masks(model, p.evasion.prune)
    assert all(torch.equal(small[k], largest[k]) for k in small)
    kept = sum(m.float().mean() for m in arms.masks(model, ROWS["hardened"], p.evasion, 3).values())
    assert kept > sum(m.float().mean() for m in small.values()), "fewer go where the network is trained against attacks"


def test_attention_is_added_and_nothing_else_changes(setup):
    plain, attended = (arms.network(setup, ROWS[v], 0) for v in ("none", "cbam"))
    assert len(attention.modules(attended)) == 1
    assert sum(isinstance(layer, nn.Conv2d) for layer in plain.body) == len(arms.STRIDES)
    theirs = dict(attended.named_parameters())
    assert all(sum(torch.equal(w, v) for v in theirs.values() if v.shape == w.shape) for w in plain.parameters())
    x = setup.splits["val"][0]
    assert 0.3 < attended(x).std() / plain(x).std() < 3, "what the gates take away is given back"


def test_adversarial_images_stay_within_eps_and_raise_the_loss(setup, p, finished):
    model, (x, y) = finished("none", "no_attack").model, setup.splits["val"]
    perturb = arms.perturbation(setup, ROWS["at"], x, y, 0)
    changed = perturb(model, x, y, 0)
    assert 0 < (changed - x).abs().max() <= p.evasion.robust.eps / 255 + 1e-6
    assert F.cross_entropy(model(changed), y) > F.cross_entropy(model(x), y)
    assert torch.equal(changed, perturb(model, x, y, 0))
    assert not torch.equal(changed, perturb(model, x, y, 1))
    assert arms.perturbation(setup, ROWS["none"], x, y, 0) is None


@pytest.mark.parametrize("variant", ["feddetect_hardened", "prune", "feddetect+shadow", "shadow_described"])
def test_shared_local_epochs_run_once_and_nothing_changes(setup, p, variant, monkeypatch):
    counted, epoch = [], federation.local_epoch
    monkeypatch.setattr(federation, "local_epoch", lambda *a: (counted.append(1), epoch(*a))[1])

    def train(row, memo):
        counted.clear()
        return federation.train(setup, ROWS[row], "backdoor", p.matrix, 0, memo), len(counted)

    fresh, everything = train(variant, None)
    assert everything == p.matrix.federation.rounds * p.matrix.federation.n_clients
    memo = {}
    train({"feddetect+shadow": "shadow_hardened"}.get(variant, "none"), memo)
    again, some = train(variant, memo)
    # Of a defence that remembers, only the attacker's first epoch is shared: it leaves the defence out.
    assert some == everything - 1 if variant == "shadow_described" else some < everything - 2
    assert same(fresh, again)
    assert fresh.diagnostics == again.diagnostics


def test_a_memo_serves_no_other_settings_and_no_defence_that_remembers(setup, p):
    memo = {}
    slow = p.matrix.model_copy(update={"federation": p.matrix.federation.model_copy(update={"lr": 1e-4})})
    first, second = (federation.train(setup, ROWS["none"], "no_attack", each, 0, memo) for each in (p.matrix, slow))
    assert not torch.equal(first.states[1]["head.weight"], second.states[1]["head.weight"])
    row = dataclasses.replace(ROWS["none"], images="gaussian")  # a control around the shadow generator; no row has it
    federation.train(setup, dataclasses.replace(row, server="norm_clip"), "no_attack", p.matrix, 0, memo)
    after, fresh = (federation.train(setup, row, "no_attack", p.matrix, 0, each) for each in (memo, None))
    assert same(after, fresh)


# The server ----------------------------------------------------------------------------------------------------------


def test_saliency_is_the_gradient_of_the_margin_at_images_that_change_every_round(setup, finished):
    model = arms.network(setup, ROWS["none"], 0)
    state = finished("none", "no_attack").model.state_dict()
    maps = arms.saliency(setup, model, 5, 7, state, 2)
    assert maps.shape == (5, 1, 28, 28)
    torch.testing.assert_close(maps.square().mean((1, 2, 3)), torch.ones(5))
    public, labels = setup.splits["public"]
    chosen = torch.randperm(len(public), generator=torch_generator(7, "server", 2))[:5]
    x = public[chosen[:1]].requires_grad_()
    logits = model(x)[0]  # with the state that was looked at
    y = int(labels[chosen[0]])
    (g,) = torch.autograd.grad(logits[1 - y] - logits[y], x)
    torch.testing.assert_close(maps[:1], g / g.square().mean().sqrt())
    assert not torch.equal(maps, arms.saliency(setup, model, 5, 7, state, 3))
    doubled = {k: v * (2 if k.startswith("head") else 1) for k, v in state.items()}
    torch.testing.assert_close(arms.saliency(setup, model, 5, 7, doubled, 2), maps, rtol=1e-3, atol=1e-4)


def test_the_hardened_server_leaves_the_attacker_out_and_nobody_else():
    """With the parameters of the repository, on the phantom and a tuning seed."""
    p = params.load()
    whole = data.load("phantom", p.cohorts)
    splits = {k: (torch.from_numpy(s.float()), torch.from_numpy(s.labels)) for k, s in whole.splits.items()}
    inversion = p.inversion.model_copy(update={"federation": p.matrix.federation})
    setup = Setup(p.model_copy(update={"inversion": inversion}), whole, splits, None, None)
    done, success = {}, {}
    for variant in ("none", "feddetect_hardened"):
        done[variant] = federation.train(setup, ROWS[variant], "boost_liar", p.matrix, p.seeds.tuning[0])
        success[variant] = ev.backdoor(setup, done[variant].model)["attack_success"][0]
    said = [each["weights"] for each in done["feddetect_hardened"].diagnostics]
    assert said[-1] == {0: 0, 1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 3)}
    assert min(weights[client] for weights in said for client in (1, 2, 3)) > 0.2
    assert success["none"] > 0.9
    assert success["feddetect_hardened"] < 0.3


def test_servers(setup, p):
    model = arms.network(setup, ROWS["none"], 0)
    third = p.matrix.model_copy(update={"warm_up": 1 / 3})  # of six rounds
    servers = {
        name: arms.aggregator(setup, dataclasses.replace(ROWS["none"], server=name), third, model, 0)
        for name in arms.SERVERS
    }
    assert servers["mean"] is uniform_mean
    kinds = {"released": feddetect.Released, "described": feddetect.Described}
    kinds |= {"hardened": feddetect.Hardened, "norm_clip": feddetect.NormClip}
    assert all(isinstance(servers[name], kind) for name, kind in kinds.items())
    assert {servers[name].warm_up for name in ("released", "described", "hardened")} == {2}


# Gradient inversion --------------------------------------------------------------------------------------------------


def test_the_victims_gradient_has_no_pruned_entry_and_is_that_of_the_used_image(setup, finished):
    done = finished("prune", "no_attack")
    images, labels = inversion_clients.deal(setup, 0)
    x, y = images[1][:2, None], labels[1][:2, None]
    sparse = ev.sent(ROWS["prune"], done.model, None, done.keep, x, y, 4).view.gradients
    dense = ev.sent(ROWS["none"], done.model, None, None, x, y, 4).view.gradients
    for name, mine, full in zip(dict(done.model.named_parameters()), sparse, dense, strict=True):
        assert torch.equal(mine, full * done.keep[name] if name in done.keep else full)
    robust = finished("at", "no_attack")
    perturb = robust.perturbations[ev.VICTIM]
    case = ev.sent(ROWS["at"], robust.model, perturb, None, x, y, 4)
    assert case.changed is None, "nothing that paper 2's attackers could undo"
    loss = F.cross_entropy(robust.model(perturb(robust.model, x[0], y[0], 4)), y[0])
    gradients = torch.autograd.grad(loss, list(robust.model.parameters()))
    for mine, theirs in zip(gradients, case.view.gradients, strict=True):
        torch.testing.assert_close(mine, theirs[0])


ADAPTIVE = {"none": set(), "at": set(), "prune": {"known"}, "shadow_hardened": {"purified", "generator"}}


@pytest.mark.parametrize("variant", ADAPTIVE)
def test_who_knows_the_defence_does_more(setup, finished, variant):
    done, row = finished(variant, "no_attack"), ROWS[variant]
    images, labels = inversion_clients.deal(setup, 0)
    x, y = images[1][:2, None], labels[1][:2, None]
    case = ev.sent(row, done.model, done.perturbations[1], done.keep, x, y, 4)
    assert set(ev.known(setup, row, case, 0)) == ADAPTIVE[variant]


# Cells and tables ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(p):
    """The same in fewer steps: what comes out need not be good."""
    small = {"federation": {"rounds": 3, "images_per_client": 24, "width": 4}}
    small |= {"warm_up": 0.34, "prune_after": 0.34, "leak_after": 0.67}  # rounds 1, 1 and 2
    return params.validate(params.merge(p.model_dump(), {"matrix": small}))


@pytest.fixture(scope="module")
def runs(tiny):
    return pd.concat([ev.rows_of("npz", tiny, v, seed) for v in CHOSEN for seed in (0, 1)], ignore_index=True)


def test_a_cell_has_the_rows_that_it_promises(runs):
    assert np.isfinite(runs["value"]).all()
    assert not runs.duplicated(["seed", "variant", "scenario", "metric", *ev.KEYS]).any()
    everywhere = {"no_attack", "backdoor", "boost_liar", "naive", "adaptive", "prior_only", "midway", "noise", "pgd20"}
    for variant, part in runs.groupby("variant"):
        extra = {"none": {"constant"}, "feddetect_hardened": set(), "prune": set()}.get(variant, {"compliant"})
        assert set(part["scenario"]) == everywhere | extra
        for column in ev.COLUMNS:
            if column.scenario in everywhere | extra and column.metric != "attack_success":
                one = part[(part["scenario"] == column.scenario) & (part["metric"] == column.metric)]
                assert (one["round"] == "").sum() == 2, (variant, column)
        rounds = {"none": {"", "0", "1"}, "at": {"", ev.NETWORK}}
        assert set(part["round"]) == rounds.get(variant, {""})
    constant = runs[runs["scenario"] == "constant"]
    assert (constant["metric"] == "balanced_accuracy").all()
    assert (constant["value"] == 0.5).all()
    rows = runs.pivot_table(index=["seed", "variant", "scenario"], columns="metric", values="value")
    some_right = rows["called_target"].dropna() < 1
    assert (rows.loc[some_right.index, "attack_success"].notna() == some_right).all(), "no rate without a denominator"
    psnr = runs[runs["metric"] == "psnr"].set_index(["seed", "variant", "round", "scenario"])["value"].unstack()
    assert (psnr["adaptive"] >= psnr["naive"] - 1e-9).all(), "who knows more is not worse off"


def test_rows_of_one_cell_are_those_of_several_and_the_same_again(runs, tiny):
    both = ev.rows_of("npz", tiny, ("none", "prune"), 1)
    apart = runs[(runs["seed"] == 1) & runs["variant"].isin(["none", "prune"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, apart, check_exact=True)


def test_differences_are_paired_by_seed(runs):
    """All of them, from a plain dictionary. A PSNR below the mean image's is no more privacy: differences end there."""
    bad = (runs["variant"] == "prune") & (runs["metric"] == "psnr") & (runs["scenario"] == "adaptive")
    whole = ev.with_differences(runs.assign(value=runs["value"].mask(bad, -40.0)))
    assert not whole.duplicated(["seed", "variant", "scenario", "metric", *ev.KEYS]).any()
    rows = whole.to_dict("records")
    value = {tuple(r[k] for k in ("seed", "variant", "scenario", "metric", "round")): r["value"] for r in rows}
    seen = set()
    for (seed, variant, scenario, metric, key), difference in value.items():
        name, _, base = metric.partition("_minus_")
        if base == "none":
            plain = {"compliant": "backdoor"}.get(scenario, scenario)
            other = "none", plain, name, "" if key == ev.NETWORK else key
        elif base == "part":
            other = ev.PARTS[variant][scenario], scenario, name, key
        elif base in ("control", "noise"):
            other = variant, {"control": "no_attack", "noise": "noise"}[base], name, key
        elif base == "matched":
            own = value[seed, variant, "midway", "auc", ""]
            learnt = {r: abs(value[seed, "none", "midway", "auc", r] - own) for r in ("", "0", "1")}
            other = "none", scenario, name, min(learnt, key=learnt.get)
        else:
            continue
        seen.add((base, scenario))
        least = value[seed, "none", "prior_only", "psnr", ""] if name == "psnr" else -math.inf
        mine, theirs = max(least, value[seed, variant, scenario, name, key]), max(least, value[seed, *other])
        assert difference == mine - theirs, (variant, scenario, metric)
        assert not (base == "none" and variant == "none")
    assert min(value[seed, "prune", "adaptive", "psnr", ""] for seed in (0, 1)) == -40, "measured values stay"
    pairs = [("none", "compliant"), ("none", "adaptive"), ("part", "pgd20"), ("noise", "pgd20"), ("matched", "naive")]
    assert {*pairs, ("control", "backdoor")} <= seen


def test_every_empty_cell_has_a_reason_and_every_other_a_value(runs, p):
    lost = (runs["variant"] == "at") & (runs["metric"] == "attack_success") & (runs["seed"] == 1)
    for table, gone in ((runs, False), (runs[~lost], True)):
        cells = tables.grid(ev.summarise(table), p.matrix)
        assert len(cells) == len(ROWS) * len(ev.COLUMNS)
        there = cells[cells["variant"].isin(CHOSEN)]
        assert ((there["n"] == 2) == (there["why"] == "")).all(), "every cell that lacks a run says why"
        assert (there["value"].notna() == (there["n"] > 0)).all()
        assert there.loc[there["value"].notna(), "badness"].between(0, 1).all()
        told = tables.reasons(there)
        assert told.notna().all().all()
        listed = told.loc[told["why"] == ev.NOTHING_TO_RUN, "rows"].item()
        assert {name.strip("`") for name in listed.split(", ")} == {"none", "feddetect_hardened", "prune"}
        assert not gone or told["rows"].str.contains(r"`at` \(n = [01]\)").any()


def test_better_and_worse_by_hand():
    def said(low, high, **kind):
        return tables.judged(pd.Series({"low": low, "high": high}), 0.1, **kind)

    assert said(0.11, 0.3, high_is_bad=True) == tables.WORSE
    assert said(0.11, 0.3, high_is_bad=False) == tables.BETTER
    assert said(-0.3, -0.11, high_is_bad=True) == tables.BETTER
    assert said(0.09, 0.3, high_is_bad=True) == said(-0.3, -0.09, high_is_bad=True) == tables.ALIKE


@pytest.mark.parametrize("chance", [0.5, 1 / 3])
def test_who_always_answers_the_same_is_not_robust(p, chance):
    """So many answers are right whatever the attacker does: that is no defence, although ``none`` has less."""
    column = next(c for c in ev.COLUMNS if c.scenario == "pgd20")
    where = {"variant": "at", "scenario": "pgd20", "round": "", "n": 3, "n_items": 3, "unit": "share"}

    def said(low):
        value = {**where, "metric": "balanced_accuracy", "value": low, "low": low, "high": low}
        change = {**where, "metric": "balanced_accuracy_minus_none", "value": 0.2, "low": 0.2, "high": 0.2}
        constant = {**value, "variant": "none", "scenario": "constant", "value": chance}
        attack = {**change, "variant": "none", "metric": "balanced_accuracy_minus_noise", "low": -0.4, "high": -0.3}
        return tables.against_none(pd.DataFrame([value, change, constant, attack]), p.matrix, "at", column)

    assert said(chance) == tables.ALIKE
    assert said(chance + 0.1) == tables.BETTER


@pytest.mark.parametrize(("low", "works"), [(0.5, True), (0.05, False), (None, False)])
def test_nothing_helps_against_an_attack_that_does_nothing_but_harm_shows(p, low, works):
    """``low``: of the undefended success beside its control; None: in no run was anything called rightly."""
    column = next(c for c in ev.COLUMNS if c.scenario == "boost_liar")
    where = {"scenario": "boost_liar", "round": "", "n": 3, "n_items": 30, "unit": "share"}
    control = {"variant": "none", "metric": "attack_success_minus_control", "value": 0.6, "low": low, "high": 0.9}
    rows = [] if low is None else [{**where, **control}]
    for variant, change in (("multi_krum", -0.3), ("at", 0.3)):
        difference = {"metric": "attack_success_minus_none", "value": change, "low": change - 0.1, "high": change + 0.1}
        rows += [{**where, "variant": variant, **difference}]
    summary = pd.DataFrame(rows)
    assert tables.works(summary, p.matrix, column) == works
    assert tables.against_none(summary, p.matrix, "multi_krum", column) == (tables.BETTER if works else tables.ALIKE)
    assert tables.against_none(summary, p.matrix, "at", column) == tables.WORSE
    assert tables.works(summary, p.matrix, ev.COLUMNS[0]), "nobody attacks: nothing has to work"


def test_a_single_defence_must_meet_every_threat():
    places = [1, 3, 6, 7]  # one of each threat
    assert len({ev.COLUMNS[place].threat for place in places}) == 4
    better = [{"variant": "at", "column": place, "judged": tables.BETTER} for place in places]
    alike = [{"variant": "cbam", "column": place, "judged": tables.ALIKE} for place in places]
    stack = [{**cell, "variant": "shadow+at"} for cell in better]
    said = tables.message(pd.DataFrame(better[1:] + alike))
    assert said == "Better against all three threats: adversarial training; of the stacks: none"
    said = tables.message(pd.DataFrame(better[:3] + alike + stack))
    assert said == "No single defence meets all three threats; of the stacks: shadow h. + adv. training"


def test_a_reading_is_shown_only_with_cells_that_it_fits():
    assert surprises.made_for("none") == surprises.made_for("prune_random") == set()
    assert surprises.made_for("feddetect+shadow+at") == {"backdoor", "boost_liar", "adaptive", "pgd20"}
    assert surprises.made_for("cbam") == {"pgd20"}
    place = {(c.scenario, c.metric): i for i, c in enumerate(ev.COLUMNS)}
    for each in surprises.ledger():
        assert set(each["rows"]) <= set(ROWS)
        column = place[each["scenario"], each["metric"]]
        shown = {}
        for judged in (tables.BETTER, tables.WORSE, tables.ALIKE):
            cells = [
                {"variant": v, "column": column, "judged": judged, "value": 0.5, "tested": True}
                for v in (each["rows"][0], "none")
            ]
            effects = surprises.side_effects(pd.DataFrame(cells))
            assert "none" not in set(effects["variant"])
            shown[judged] = each["text"] in surprises.readings(effects)
            assert shown[judged] == (list(effects["effect"]) == [each["effect"]])
        assert any(shown.values())


def test_views_and_the_figure(runs, p):
    summary = ev.summarise(runs)
    assert set(tables.stacking(summary, p.matrix)["stack"]) == {"`shadow+at`"}
    table = tables.compared(summary, p.matrix, {"AUC": ("no_attack", "auc")}, ["none", "at"])
    assert list(table.columns) == ["row", "AUC", "AUC, minus none"]
    cells = tables.grid(summary, p.matrix)
    effects = surprises.side_effects(cells)
    listed = surprises.table(summary, effects)["rows, minus none"]
    assert listed.str.split("; ").map(len).sum() == len(effects)
    fig, ax = figures.heat_map(cells, "title")
    decisive = cells[[ev.COLUMNS[place].decides for place in cells["column"]]]
    assert 0 < len(decisive) < len(cells)
    shown = [text.get_text() for text in ax.texts]
    drawn = decisive["value"].notna() & decisive["tested"]
    assert sum(text == "n/a" for text in shown) == (decisive["value"].isna() & decisive["tested"]).sum()
    assert sum(text.startswith("untested") for text in shown) == (~decisive["tested"]).sum()
    assert sum(text.startswith("[") for text in shown) == drawn.sum()
    plt.close(fig)


def test_rows_families_claims_and_plan_agree(p):
    assert [variant for group in arms.FAMILIES.values() for variant in group] == list(ROWS)
    planned = ev.quick(p)
    rows = [(name, cell.seed) for cell in planned for name in cell.variants]
    assert sorted(rows) == sorted((name, seed) for name in ROWS for seed in p.seeds.evaluation)
    assert {"none", "feddetect_hardened", "prune"} < set(planned[0].variants), "rows that begin alike are together"
    known = evidence_tables.metrics()
    for claim in yaml.safe_load((paths.CLAIMS / "5-matrix.yaml").read_text())["claims"]:
        where = claim["where"]
        assert ev.missing(where["variant"], where["scenario"]) is None
        assert where["metric"] in known


def test_bad_input_is_named(setup, p):
    with pytest.raises(InputError, match="row 'shield' of the matrix: choose one of none"):
        ev.rows_of("npz", p, "shield", 0)
    with pytest.raises(InputError, match="scenario 'flood': choose one of no_attack"):
        federation.train(setup, ROWS["none"], "flood", p.matrix, 0)
    far = p.matrix.model_copy(update={"target": 2})
    with pytest.raises(InputError, match=r"matrix\.target 2: npz has classes 0 to 1"):
        federation.train(setup, ROWS["none"], "backdoor", far, 0)
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
