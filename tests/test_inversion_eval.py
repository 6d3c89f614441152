"""Cells of notebook 03 end to end on random images, and the bookkeeping behind its tables by hand."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments import params
from experiments.gia_defense import adaptive as attackers
from experiments.gia_defense import cells as ev
from experiments.gia_defense import clients as instruments
from experiments.gia_defense import figures as inversion_plots
from experiments.gia_defense import fingerprint as fingerprints
from experiments.gia_defense import record
from experiments.gia_defense import tables as inversion_tables
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.evidence import cells, tables
from medsec.evidence.cells import Cell
from medsec.inversion import adaptive
from medsec.inversion import attacks as inversion
from medsec.inversion import defences as gradient_defences
from medsec.inversion import scores as reconstruction
from medsec.inversion.attacks import View
from medsec.nets import convnet

SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "inversion": {
        "federation": {"width": 4, "n_clients": 2, "images_per_client": 12, "rounds": 3, "batch": 6},
        "victims": 3,
        "sweep_victims": 2,
        "joint_rounds": 2,
        "attacks": ["ig", "bn", "prior"],
        "adaptive": ["known", "smoother", "joint", "generator", "purified", "unmasked"],
        "attack": {"iterations": 3, "together": 2},
        "purifier": {"images": 32, "width": 4, "epochs": 1},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
        "defences": {"shadow_hardened": {"k": 2}},
        "shadow": {"steps": 1},
    },
}
EACH = {"psnr", "ssim", "retrieval", "retrieval_projected", "retrieval_latent", "failed"}
HEADLINE = EACH | {"st_lpips"}


@pytest.fixture(scope="module")
def p(tmp_path_factory, write_npz):
    file = write_npz(tmp_path_factory.mktemp("cohort"), per_class=120)
    tree = params.merge(params.load().model_dump(), SMALL)
    yield params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))
    instruments._prepare.cache_clear()


@pytest.fixture(scope="module")
def setup(p):
    return instruments.prepare("npz", p)


def recorded(p, cell):
    """The rows of a cell that the record keeps."""
    return record.keep(ev.run("npz", cells.resolved(p, cell), cell)[0], cell)


ADAPTIVE = {
    "none": {"joint", "generator"},
    "topk": {"known", "smoother", "smoothest", "joint"},
    "dp_sgd": {"smoother", "smoothest", "joint"},
    "shadow_released": {"joint", "purified", "unmasked"},
    "shadow_shuffled": {"joint", "purified"},
    "shadow_hardened": {"joint", "generator", "purified"},
    "public_only": {"joint", "purified"},
}


@pytest.mark.parametrize("variant", ADAPTIVE)
def test_a_cell_has_the_rows_that_it_promises(p, variant):
    table, pictures = ev.attack_cell("npz", p, variant, 0)
    assert np.isfinite(table["value"]).all()
    assert not table.duplicated(["scenario", "metric", *ev.KEYS]).any()
    attacks = {name: set(part["attack"]) - {""} for name, part in table.groupby("scenario")}
    image_space = "purified" in ADAPTIVE[variant]
    expected = {
        "naive": {"ig", "prior", "bn", "bn_without"},
        "adaptive": {"ig", "prior", *ADAPTIVE[variant]},
        "prior_only": set(),
    }
    assert attacks == expected | ({"ceiling": set(), "change": set()} if image_space else {})
    measured = table[table["scenario"] != "change"]
    for attack, part in measured.groupby(measured["attack"] == ""):
        for _, rows in part.groupby(["scenario", "attack"]):
            assert set(rows["metric"]) == (HEADLINE if attack else EACH)
    assert (table.loc[table["metric"] == "failed", "value"] == 0).all()
    assert (table["n_items"] == 3).all()
    rows = table[table["metric"] == "psnr"].set_index(["scenario", "attack"])["value"]
    assert rows["adaptive", ""] >= rows["naive", ""] >= max(rows["naive", "ig"], rows["naive", "prior"]) - 1e-9
    assert set(pictures) == {"original", "sent", "naive", "adaptive"}
    assert all(images.shape == (3, 1, 28, 28) for images in pictures.values())
    assert np.array_equal(pictures["original"], pictures["sent"]) == (not image_space)
    added = {m for m in ev.complete(table)["metric"] if m.endswith("_minus_naive")}
    assert added == {"psnr_minus_naive"}


def test_a_condition_is_a_key(p):
    for change, keys in (
        ({"batch": 2}, {"batch": "2"}),
        ({"steps": 2}, {"steps": "2"}),
        ({"labels": "inferred", "batch": 2}, {"labels": "inferred", "batch": "2"}),
        ({"labels": "inferred", "batch": 1}, {"labels": "inferred", "batch": "1"}),
    ):
        table = ev.sweep_cell("npz", p, "shadow_hardened", 0, **change)
        assert set(table["scenario"]) == {"naive", "adaptive", "ceiling", "prior_only"}
        for key in ev.KEYS:
            assert set(table[key]) == {keys.get(key, "")}, change
        expected = {2 * change.get("batch", 1), 2}
        assert set(table["n_items"]) <= expected


def test_the_same_cell_again(p):
    first, pictures = ev.attack_cell("npz", p, "shadow_described", 1)
    again, pictures_again = ev.attack_cell("npz", p, "shadow_described", 1)
    pd.testing.assert_frame_equal(first, again)
    assert all(np.array_equal(pictures[k], pictures_again[k]) for k in pictures)


def test_all_defences_see_the_same_victims(p):
    first = ev.attack_cell("npz", p, "none", 0)[1]["original"]
    assert np.array_equal(first, ev.attack_cell("npz", p, "gaussian", 0)[1]["original"])
    assert not np.array_equal(first, ev.attack_cell("npz", p, "none", 1)[1]["original"])


@pytest.mark.parametrize("variant", ["none", "image_noise", "random_grouping"])
def test_utility_of_a_federation(p, variant):
    table = ev.federation_cell("npz", p, variant, 0)
    assert set(table["metric"]) == {"auc", "macro_f1", "balanced_accuracy"}
    assert (table["scenario"] == "utility").all()
    assert table["value"].between(0, 1).all()


def test_private_training_says_how_private(p):
    table = ev.federation_cell("npz", p, "dp_sgd", 0).set_index("metric")["value"]
    steps = 3 * 2  # rounds, batches of 6 among 12 images
    noise = p.inversion.defences["dp_sgd"]["noise_multiplier"]
    assert table["epsilon"] == pytest.approx(gradient_defences.epsilon(noise, 0.5, steps, 1e-5))


def test_a_federation_is_attacked_on_the_way(p):
    table = ev.federation_cell("npz", p, "shadow_described", 0, [0.3, 1.0])
    later = table[table["round"] != ""]
    assert set(later["round"]) == {"0.3", "1"}
    assert set(later["scenario"]) == {"naive", "adaptive", "ceiling", "prior_only"}
    plain = ev.federation_cell("npz", p, "shadow_described", 0)
    pd.testing.assert_frame_equal(table[table["round"] == ""].reset_index(drop=True), plain)


def test_every_defence_gives_a_client(setup):
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0)
    plain = instruments.client("none", setup, images[0], labels[0], 0).defend(model, images[0][:4], labels[0][:4], 0)
    for variant in instruments.VARIANTS[1:]:
        own = instruments.client(variant, setup, images[0], labels[0], 0)
        sent = own.defend(model, images[0][:4], labels[0][:4], 0)
        assert [g.shape for g in sent] == [g.shape for g in plain]
        assert any(not torch.equal(a, b) for a, b in zip(sent, plain, strict=True)), variant
        assert (own.perturb is None) == (variant in gradient_defences.DEFENCES)
    with pytest.raises(InputError, match="choose one of none, gradient_noise"):
        instruments.client("magic", setup, images[0], labels[0], 0)


def test_controls_have_the_norm_of_what_they_control(setup):
    images, labels = instruments.deal(setup, 0)
    model, x, y = instruments.network(setup, 0), images[0][:4], labels[0][:4]
    norms = {
        name: (instruments.client(name, setup, images[0], labels[0], 3).perturb(model, x, y, 0) - x)
        .flatten(1)
        .norm(dim=1)
        for name in ("shadow_described", *instruments.CONTROLS)
    }
    for name in instruments.CONTROLS:
        torch.testing.assert_close(norms[name], norms["shadow_described"], rtol=1e-4, atol=1e-5)


def test_what_an_attacker_leaves_out(setup):
    model = instruments.network(setup, 0)
    gradients = [torch.randn(2, *p.shape) for p in model.parameters()]
    gradients[0][0, 0] = 0
    weights = attackers.KNOWN["topk"](View(model, gradients))
    assert (weights[0][0, 0] == 0).all()
    assert sum(int((w == 0).sum()) for w in weights) == gradients[0][0, 0].numel()
    weights = attackers.KNOWN["soteria"](View(model, gradients))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, w in zip(names, weights, strict=True) if (w == 0).all()] == ["head.weight"]
    assert all((w == 1).all() for name, w in zip(names, weights, strict=True) if name != "head.weight")


def test_more_victims_than_images(setup):
    images, _ = instruments.deal(setup, 0)
    assert len(set(attackers.victims(setup, images[0], 6, 2, 0).flatten().tolist())) == 12
    with pytest.raises(InputError, match="7 victims with a batch of 2: a client holds 12 images"):
        attackers.victims(setup, images[0], 7, 2, 0)


def test_the_prior_draws_images_where_the_public_ones_are(setup):
    z = torch.randn(64, setup.prior.latent, generator=torch.Generator().manual_seed(0))
    drawn = setup.prior(z)
    assert drawn.shape == (64, 1, 28, 28)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_the_floor_is_the_public_mean_of_the_class(setup):
    images, labels = setup.splits["public"]
    found = attackers.floor(setup, torch.tensor([[0, 1], [1, 1]]))
    torch.testing.assert_close(found[0, 1], images[labels == 1].mean(0))
    assert torch.equal(found[0, 1], found[1, 0])
    assert found.shape == (2, 2, 1, 28, 28)


def test_the_strongest_is_chosen_victim_by_victim():
    scores = {
        "a": {"psnr": np.array([1.0, 9.0, np.nan, np.nan]), "ssim": np.array([0.9, 0.1, np.nan, np.nan])},
        "b": {"psnr": np.array([2.0, 3.0, 1.0, np.nan]), "ssim": np.array([0.2, 0.8, 0.3, np.nan])},
    }
    best = ev.strongest(scores)
    assert best.tolist()[:3] == [1, 0, 1], "one that failed is never the strongest"
    ssim = ev.chosen(best, [each["ssim"] for each in scores.values()])
    assert ssim[:3].tolist() == [0.2, 0.1, 0.3], "the same attack for all metrics"
    assert np.isnan(ssim[3])


def test_who_is_lost_is_counted_and_not_averaged():
    rows = tables.Rows(ev.KEYS, 0, "none", "naive")
    ev._add(rows, {"psnr": np.array([10.0, np.nan, 30.0]), "ssim": np.array([0.1, np.nan, 0.3])}, attack="ig")
    ev._add(rows, {"psnr": np.array([np.nan, np.nan])}, attack="dlg")
    table = rows.table().set_index(["attack", "metric"])
    assert table.loc[("ig", "psnr"), "value"] == 20
    assert table.loc[("ig", "psnr"), "n_items"] == 2
    assert table.loc[("ig", "failed"), "value"] == pytest.approx(1 / 3)
    assert table.loc[("dlg", "failed"), "value"] == 1
    assert ("dlg", "psnr") not in table.index


def test_several_local_steps_send_what_sgd_would(setup):
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0)
    x, y = images[0][:4].view(2, 2, 1, 28, 28), labels[0][:4].view(2, 2)
    own = instruments.client("none", setup, images[0], labels[0], 0)
    found = attackers.case(own, model, x, y, 0, steps=3, lr=0.1)
    sent = inversion.client_update(model, x[1], y[1], steps=3, lr=0.1)
    for mine, theirs in zip(found.view.gradients, sent, strict=True):
        torch.testing.assert_close(mine[1], theirs, rtol=1e-4, atol=1e-6)
    assert (found.view.steps, found.view.lr) == (3, 0.1)


def test_statistics_are_those_of_what_is_sent(setup):
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0, norm=True)
    x, y = images[0][:2, None], labels[0][:2, None]
    own = instruments.client("shadow_suppressed", setup, images[0], labels[0], 0)
    found = attackers.case(own, model, x, y, 0)
    assert len(found.view.statistics) == 4
    first = model.body[0](convnet.standardise(found.changed[1]))
    torch.testing.assert_close(found.view.statistics[0][1, 0], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not attackers.case(own, instruments.network(setup, 0), x, y, 0).view.statistics


@pytest.mark.parametrize("steps", [1, 3])
def test_labels_are_guessed_from_the_gradients(setup, steps):
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0)
    own = instruments.client("none", setup, images[0], labels[0], 0)
    order = labels[0].argsort()
    pairs = torch.stack([order[:2], order[-2:], order[[0, -1]]])  # two of class 0, two of class 1, one of each
    public = setup.splits["public"][0]
    found = attackers.case(own, model, images[0][pairs], labels[0][pairs], 0, steps=steps, lr=1e-3, public=public)
    assert found.guess.tolist() == [[0, 0], [1, 1], [0, 1]]
    known = attackers.case(own, model, images[0][pairs], labels[0][pairs], 0)
    assert torch.equal(known.guess, labels[0][pairs])


def test_noise_is_drawn_anew_for_every_local_step(setup):
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0)
    x, y = images[0][:1, None], labels[0][:1, None]
    own = instruments.client("gradient_noise", setup, images[0], labels[0], 0)
    once, four = (attackers.case(own, model, x, y, 0, steps=steps, lr=0.0).view.gradients for steps in (1, 4))
    plain = [g[None] for g in convnet.gradients(model, x[0], y[0])]
    alone = convnet.flat([a - b for a, b in zip(once, plain, strict=True)]).norm()
    together = convnet.flat([a - 4 * b for a, b in zip(four, plain, strict=True)]).norm()
    assert float(together / alone) == pytest.approx(2, rel=0.1), "independent noise adds in squares"


def test_a_known_offset_is_taken_off(setup):
    """The mask-aware attacker against a change that is a function of the image: from x′ it gets back to x."""
    images, labels = instruments.deal(setup, 0)
    model = instruments.network(setup, 0)
    x, y = 0.3 + 0.4 * images[0][:2, None], labels[0][:2, None]
    own = instruments.client("offset", setup, images[0], labels[0], 0)
    found = attackers.case(own, model, x, y, 0)

    def copy(images, labels, seed):
        return instruments.client("offset", setup, images, labels, seed).perturb

    back = adaptive.unmask(found.changed, model, found.guess, copy, setup.splits["public"], seed=0)
    before, after = (reconstruction.psnr(a[:, 0].clamp(0, 1).numpy(), x[:, 0].numpy()) for a in (found.changed, back))
    assert (after > before + 20).all()


def test_what_is_added_by_hand(setup):
    images, labels = instruments.deal(setup, 0)
    x = images[0][:2, None]
    delta = torch.zeros_like(x)
    delta[..., :14, :] = 0.2  # half of the image
    view = View(instruments.network(setup, 0), [])
    found = attackers.Case(x, labels[0][:2, None], labels[0][:2, None], x + delta, view)
    run = ev.Run(setup, "gaussian", 0, images, labels, torch.tensor([[0], [1]]))
    rows = ev._change_rows(run, found).set_index("metric")["value"]
    assert rows["rms"] == pytest.approx(0.2 / 2**0.5, rel=1e-5)
    assert rows["offset_share"] == pytest.approx(0.5, rel=1e-5)
    table = ev.spectrum(delta[:, 0])
    assert table["value"].sum() == pytest.approx(1)
    assert table.loc[table["x"] == 0, "value"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("variant", ["shadow_released", "shadow_hardened"])
def test_the_attackers_copy_is_used_as_the_client_uses_its_own(setup, variant):
    """Batches as large as the victims', another seed, and no public image that stands in for itself."""
    sizes, seeds = set(), set()

    def copy(images, labels, seed, public=None):
        own = instruments.client(variant, setup, images, labels, seed, public)
        seeds.add(seed)

        def perturb(model, x, y, round):
            sizes.add(len(x))
            return own.perturb(model, x, y, round)

        return perturb

    options = {"batch": 2, "n": 10, "stand_ins": variant in instruments.STAND_INS, "seed": 0}
    changed, clean = adaptive.public_pairs(copy, instruments.network(setup, 0), setup.splits["public"], **options)
    assert len(changed) == len(clean) == 10
    assert not (changed == clean).flatten(1).all(1).any()
    assert sizes == {2}
    assert derive_seed(0, "defence", 0) not in seeds


@pytest.mark.parametrize("cohort", ["phantom"])
def test_the_record_has_enough_victims_and_seeds(cohort):
    p = params.load("full")
    planned = record.plan(cohort, p)
    assert len({cell.name for cell in planned}) == len(planned)
    for variant in instruments.VARIANTS:
        seeds = {
            arm: {c.seed for c in planned if c.arm == arm and c.variants == (variant,)}
            for arm in ("attack", "federation")
        }
        assert len(seeds["attack"]) * p.inversion.victims >= 64
        if variant in instruments.CONTROLS:
            assert not seeds["federation"]  # controls of privacy: a server would never train with them
            continue
        sweep = p.record.inversion  # those that decide a bar have every seed
        decides = variant in sweep.utility_variants
        assert seeds["federation"] >= set(p.seeds.evaluation[: None if decides else sweep.other_utility_seeds])
    assert p.record.inversion.other_utility_seeds >= 3
    assert set(p.record.inversion.utility_variants) == {"none", "shadow_hardened"}
    trained = {c.seed for c in planned if c.arm == "federation" and c.variants == ("shadow_hardened",)}
    assert len(trained) >= 30
    assert not trained & set(p.seeds.tuning)
    swept = {key for c in planned for key in c.keys}
    assert swept == {"batch", "steps", "labels", "strength"}
    for variant, names in p.record.inversion.strengths.items():
        for name, values in names.items():
            usual = p.inversion.defences[variant][name]
            assert usual not in values, f"{variant}: {name} {usual} is the headline's"


def test_an_unknown_strength_is_named_before_anything_runs():
    p = params.load("full")
    wrong = {"record": {"inversion": {"strengths": {"topk": {"kept": [0.1]}}}}}
    p = params.validate(params.merge(p.model_dump(), wrong))
    with pytest.raises(InputError, match=r"strengths\.topk.*kept"):
        record.plan("phantom", p)


def test_a_stronger_defence_changes_more_and_trains_no_generator_anew(p):
    change = {"inversion": {"defences": {"image_noise": {"rms": 0.4}}}}
    cell = Cell("strength", 0, change, {"strength": 0.4}, group="image_noise", variants=("image_noise",))
    rows = recorded(p, cell)
    assert set(rows["strength"]) == {"0.4"}
    assert {"psnr", "auc"} <= set(rows["metric"])
    usual = recorded(p, dataclasses.replace(cell, change={}))
    psnr = [r[(r["scenario"] == "ceiling") & (r["metric"] == "psnr") & (r["region"] == "")] for r in (rows, usual)]
    assert psnr[0]["value"].item() < psnr[1]["value"].item() - 3
    stronger = params.validate(params.merge(p.model_dump(), change))
    assert instruments.prepare("npz", stronger).autoencoder is instruments.prepare("npz", p).autoencoder


def test_the_record_keeps_of_single_attacks_what_its_tables_show(p):
    p = params.validate(params.merge(p.model_dump(), {"inversion": {"attacks": ["dlg", "ig"]}}))
    whole = [ev.attack_cell("npz", p, variant, 0)[0] for variant in ("none", "soteria")]
    kept = [recorded(p, Cell("attack", 0, group=name, variants=(name,))) for name in ("none", "soteria")]
    assert len(pd.concat(kept)) < 0.8 * len(pd.concat(whole))
    before, after = (ev.summarise(pd.concat(runs, ignore_index=True), p) for runs in (whole, kept))
    pd.testing.assert_frame_equal(inversion_tables.by_attack(before), inversion_tables.by_attack(after))
    headline = [t[t["attack"] == ""].reset_index(drop=True) for t in (before, after)]
    pd.testing.assert_frame_equal(*headline)


def test_a_federation_that_diverges_is_a_row_of_the_record(p, monkeypatch):
    def failing(message):
        def train(*_):
            raise InputError(message)

        monkeypatch.setattr(ev.fedcls, "train", train)

    cell = Cell("federation", 1, group="topk", variants=("topk",), given=record.DIVERGES)
    change = {"inversion": {"defences": {"topk": {"keep": 0.5}}}}
    planned = [
        cell,
        dataclasses.replace(cell, arm="strength", change=change, keys={"strength": 0.5}),
        dataclasses.replace(cell, arm="rounds", given={"shares": [1.0], **record.DIVERGES}),
    ]
    failing("gradient of a holds NaN or infinite values: the model diverged; lower its lr")
    rows = pd.concat([recorded(p, each) for each in planned], ignore_index=True)
    assert rows["metric"].tolist() == ["failed"] * 3
    assert rows["value"].tolist() == [1.0] * 3
    assert rows["strength"].tolist() == ["", "0.5", ""]
    assert rows["round"].tolist() == ["", "", "1"]
    summary = ev.summarise(rows, p)
    assert inversion_tables.diverged(summary, "topk") == 1
    assert inversion_tables.diverged(summary, "topk", "0.5") == 1
    assert inversion_tables.diverged(summary, "none") == 0
    assert inversion_tables.headline(summary)["n"].tolist() == []
    failing("anything else")
    with pytest.raises(InputError, match="anything else"):
        recorded(p, cell)


def test_a_cell_of_the_record_runs(p):
    cell = Cell("attack", 0, keys={"batch": 2}, group="none", variants=("none",))
    assert set(recorded(p, cell)["batch"]) == {"2"}
    cell = Cell("rounds", 0, group="none", variants=("none",), given={"shares": [0.0, 0.4]})
    assert set(recorded(p, cell)["round"]) == {"0", "0.4"}


def test_measures_pair_a_batch_and_find_whose_image_it_is(setup):
    images, labels = instruments.deal(setup, 0)
    index = torch.tensor([[3, 5], [0, 7]])
    truth = images[0][index].numpy()
    measure = ev.measures(setup, images, labels, index)
    found = measure(truth[:, ::-1].copy(), truth)
    assert found["psnr"].tolist() == [100, 100]
    assert found["retrieval"].tolist() == [1, 1]
    assert measure(np.roll(truth, 1, axis=0), truth)["retrieval"].tolist() == [0, 0]
    single = ev.measures(setup, images, labels, index.view(4, 1))
    originals = images[0][index.view(4, 1)].numpy()
    assert single(originals, originals)["retrieval_projected"].tolist() == [1, 1, 1, 1]
    assert single(originals, originals)["retrieval_latent"].tolist() == [1, 1, 1, 1]
    assert single(np.roll(originals, 1, axis=0), originals)["retrieval_projected"].tolist() == [0, 0, 0, 0]
    alike = torch.nonzero(labels[0] == 1)[:3]  # (3, 1): others of one's own class
    originals = images[0][alike].numpy()
    measure = ev.measures(setup, images, labels, alike)
    assert measure(np.roll(originals, 1, axis=0), originals)["retrieval_latent"].tolist() == [0, 0, 0]


def row(variant, scenario, metric, value, seed=0, **keys):
    return tables.run_row(ev.KEYS, seed, variant, scenario, metric, value, 8, **keys)


def test_differences_by_hand():
    runs = pd.DataFrame(
        [
            row("none", "naive", "psnr", 40.0),
            row("none", "naive", "psnr", 30.0, seed=1),
            row("none", "naive", "psnr", 45.0, attack="ig"),
            row("none", "naive", "retrieval", 1.0),
            row("none", "utility", "auc", 0.9),
            row("topk", "naive", "psnr", 10.0),
            row("topk", "naive", "psnr", 15.0, seed=1),
            row("topk", "naive", "psnr", 10.0, attack="ig"),
            row("topk", "adaptive", "psnr", 25.0),  # nothing to compare with
            row("topk", "adaptive", "psnr", 10.0, attack="ig"),
            row("topk", "adaptive", "psnr", 24.0, attack="known"),
            row("topk", "adaptive", "psnr", 9.0, attack="dlg"),
            row("topk", "utility", "auc", 0.7),
            row("shadow_described", "naive", "psnr", 28.0),
            row("shadow_shuffled", "naive", "psnr", 27.0),
        ]
    )
    found = ev.complete(runs)
    found = found[found["metric"].str.contains("_minus_")]
    values = {
        tuple(r[:-1]): r[-1] for r in found[["variant", "scenario", "metric", "seed", "value"]].itertuples(index=False)
    }
    assert values == pytest.approx(
        {
            ("topk", "naive", "psnr_minus_none", 0): -30.0,
            ("topk", "naive", "psnr_minus_none", 1): -15.0,
            ("topk", "utility", "auc_minus_none", 0): -0.2,
            ("shadow_described", "naive", "psnr_minus_none", 0): -12.0,
            ("shadow_shuffled", "naive", "psnr_minus_none", 0): -13.0,
            ("shadow_described", "naive", "psnr_minus_shuffled", 0): 1.0,
            ("topk", "adaptive", "psnr_minus_naive", 0): 14.0,
        }
    )
    assert found.loc[found["metric"] == "psnr_minus_naive", "attack"].tolist() == ["known"]


def test_every_claim_asks_for_a_row_that_can_exist():
    ledger = yaml.safe_load((paths.CLAIMS / "2-shadow.yaml").read_text(encoding="utf-8"))
    assert ledger["table"] == "03_gia_defense"
    for claim in ledger["claims"]:
        where = claim["where"]
        assert set(where) - {"attack", "region", "batch", "strength"} == {"variant", "scenario", "metric"}, claim["id"]
        kind = where["scenario"] if where["scenario"] in ev.QUICK else "attack"
        known = instruments.VARIANTS if "record_only" in claim else ev.QUICK[kind]
        assert where["variant"] in known, claim["id"]
        assert where["scenario"] in {*ev.QUICK, "naive", "adaptive", "ceiling", "utility", "secagg"}, claim["id"]
        assert where["metric"] in tables.metrics(), claim["id"]
        assert where.get("attack", "known") in (*ev.ADAPTIVE, "trap"), claim["id"]


def test_the_attack_that_identifies_most_need_not_be_the_best_by_psnr():
    rows = [("", 0.5), ("joint", 0.9), ("ig", 0.2)]
    columns = {"variant": "gradient_noise", "scenario": "adaptive", "metric": "retrieval", "unit": "share", "n": 5}
    keys = {"batch": "", "strength": ""}
    table = pd.DataFrame([{**columns, "attack": a, "value": v, "low": v, "high": v} | keys for a, v in rows])
    assert inversion_tables.identified(table, "gradient_noise") == "0.90 [0.90, 0.90] (joint)"
    assert inversion_tables.identified(table[table["attack"] != "joint"], "gradient_noise").endswith("(best by PSNR)")
    assert inversion_tables.identified(table, "topk") == ""


def test_views_of_a_summary(p):
    """A small record, through every table and figure of the notebook."""
    runs = [ev.attack_cell("npz", p, variant, 0)[0] for variant in ("none", "shadow_hardened")]
    runs += [ev.federation_cell("npz", p, variant, 0, [0.0, 0.3]) for variant in ("none", "shadow_hardened")]
    sweep = [ev.sweep_cell("npz", p, "none", 0, batch=batch) for batch in (1, 2)]
    sweep.append(ev.strength_cell("npz", p, "shadow_hardened", 0, 8))
    summary = ev.summarise(pd.concat([*runs, *sweep]), p)
    points = inversion_tables.plane(summary, p)
    assert points["variant"].tolist() == ["none", "shadow_hardened", "shadow_hardened"]
    assert points["strength"].tolist() == ["", f"{p.inversion.defences['shadow_hardened']['k']:g}", "8"]
    assert points["usual"].tolist() == [True, True, False]
    cost = tables.row(summary, variant="shadow_hardened", scenario="utility", metric="auc_minus_none")["value"]
    assert points["x"].tolist()[:2] == [0, cost]
    fig, _ = inversion_plots.plane(points, instruments.FAMILIES, 10.0, "")
    named = points[points["usual"]].sort_values("y", ascending=False)
    assert [t.get_text() for t in fig.axes[0].texts] == named["variant"].tolist()
    plt.close(fig)
    assert inversion_tables.standing(points, "shadow_hardened", 10.0)["against shadow_hardened"][1] == ""
    assert inversion_tables.conditions(summary)["images in a batch"].tolist() == ["1", "2"]
    assert list(inversion_tables.headline(summary)["defence"]) == ["none", "shadow_hardened"]
    assert list(inversion_tables.by_attack(summary).columns) == ["defence", "joint", "generator", "purified"]
    told = inversion_tables.headline(summary).set_index("defence")["identified, by the best attack"]
    assert told.str.fullmatch(r"\d\.\d\d( \[.*\])? \(.+\)").all()
    curves = inversion_tables.sweeps(summary, p)
    assert curves["batch"].groupby("name")["x"].apply(list).to_dict() == {"none": [1, 2]}, (
        "not the headline's other design"
    )
    assert curves["round"].groupby("name")["x"].apply(list).to_dict() == {"none": [0, 0.3], "shadow_hardened": [0, 0.3]}
    assert inversion_tables.sweeps(ev.summarise(runs[0], p), p) == {}
    assert set(inversion_tables.paper(summary)["paper"]) == {"-3.73", "-0.2", "not stated", "> -0.01"}


def summary_row(variant, scenario, value, low, high, n=5, n_items=40):
    measured = {"metric": "psnr", "value": value, "low": low, "high": high, "n": n, "n_items": n_items, "unit": "dB"}
    return {"variant": variant, "scenario": scenario, **measured, **dict.fromkeys(("round", "attack", "strength"), "")}


def test_titles_say_what_the_numbers_say():
    rows = [summary_row("none", "adaptive", 50, 49, 51), summary_row("none", "prior_only", 18, 17, 19)]
    rows += [summary_row("topk", "adaptive", 30, 29, 31), summary_row("public_only", "adaptive", 20, 19, 21)]
    quick = pd.DataFrame(rows)
    title = inversion_tables.above_floor(quick, ["none", "topk", "public_only"])
    assert title.startswith("Who knows the defence gets 20 dB under `public_only`, 30 dB or more under the other 1;")
    assert title.endswith("no gradient at all has 18 dB")
    assert inversion_tables.size(quick) == "n = 5 seeds of 8 victims"

    curve = pd.DataFrame({"name": "none", "x": [1.0, 4.0], "value": [40.0, 20.0], "low": [38, 18], "high": [42, 22]})
    assert inversion_tables.trend(curve, "images") == "No defence: the PSNR falls, from 40 dB at 1 to 20 dB at 4 images"
    assert "does not clearly change" in inversion_tables.trend(curve.assign(high=[42, 39]), "images")
    assert "rises" in inversion_tables.trend(curve.assign(x=[4.0, 1.0]), "images")
    longer = pd.DataFrame(
        [{"name": "none, ig, 9 steps", "attack": "ig, 9 steps", "x": 4.0, "value": 30.0, "low": 29, "high": 31}]
    )
    both = pd.concat([curve, longer], ignore_index=True)
    assert inversion_tables.trend(both, "images").endswith("to 20 dB at 4 images;\n9 steps find 30 dB at 4")

    points = pd.DataFrame(
        {"variant": ["none", "a", "b", "c"], "usual": True, "y_low": [40.0, 17, 18, 25], "x_high": [0.0, -0.1, 0.01, 0]}
    )
    assert inversion_tables.reaching(points, 18.0) == (
        "2 of 3 defences leave not clearly more than no gradient has, 1 without a clear loss"
    )
    shown = {
        "original": np.zeros((2, 1, 4, 4)),
        "none, adaptive": np.full((2, 1, 4, 4), 0.01),
        "x, adaptive": np.full((2, 1, 4, 4), 0.1),
    }
    assert inversion_tables.seen(shown, "x") == "One gradient shows the image at 40 dB, that of `x` at 20 dB"


def test_a_figure_has_one_source():
    """The record, unless it lacks a row that the quick run has; a defence of one's own is in no record."""
    quick = pd.DataFrame(
        [summary_row("none", "adaptive", 50, 49, 51, n=3), summary_row("topk", "naive", 20, 19, 21, n=3)]
    )
    full = quick.assign(n=5)
    assert inversion_tables.best(quick, full) is full
    assert inversion_tables.best(quick, full[full["variant"] == "none"]) is quick
    assert inversion_tables.best(quick, None) is quick
    own = pd.concat([quick, pd.DataFrame([summary_row("mine", "naive", 1, 1, 1)])])
    assert inversion_tables.best(own, full) is full


def test_who_is_ahead_of_a_defence():
    """Intervals as (low, high): of the AUC's difference to none, of the PSNR (floor 19 dB), of the retrieval."""
    cases = {
        "itself": ((-0.02, -0.01), (20.0, 21.0), (0.0, 0.2), ""),
        "more private": ((-0.02, -0.01), (19.0, 19.5), (0.0, 0.2), "ahead"),
        "cheaper": ((0.0, 0.01), (20.0, 22.0), (0.0, 0.2), "ahead"),
        "leaks more": ((-0.02, 0.0), (30.0, 31.0), (0.0, 0.2), "behind"),
        "tells whose": ((-0.02, 0.0), (20.0, 21.0), (0.5, 0.9), "behind"),
        "costs more": ((-0.2, -0.1), (20.0, 21.0), (0.0, 0.2), "behind"),
        "none": ((0.0, 0.0), (48.0, 49.0), (1.0, 1.0), "trade"),
        "a little of each": ((-0.03, 0.0), (19.0, 22.0), (0.1, 0.3), "alike"),
        "below the floor": ((-0.03, 0.0), (9.0, 10.0), (0.0, 0.0), "ahead"),
    }
    points = pd.DataFrame(
        {
            "variant": name,
            "strength": "",
            **{
                f"{axis}{end}": value
                for axis, ends in zip("xyz", case[:3], strict=True)
                for end, value in ends_of(ends)
            },
            "n": 5,
            "usual": True,
            "diverged": 1 if name == "cheaper" else 0,
        }
        for name, case in cases.items()
    )
    lines = inversion_tables.standing(points, "itself", 19.0).set_index("defence")
    assert lines["n"]["itself"] == "5"
    assert lines["n"]["cheaper"] == "5 (1 more diverged)"
    found = lines["against itself"]
    assert found.to_dict() == {name: case[3] for name, case in cases.items()}
    at_the_floor = points.assign(y_low=points["y_low"].where(points["variant"] != "itself", 15.0))
    at_the_floor["y_high"] = at_the_floor["y_high"].where(points["variant"] != "itself", 18.0)
    found = inversion_tables.standing(at_the_floor, "itself", 19.0).set_index("defence")["against itself"]
    assert found["below the floor"] == "alike", "below the floor nobody is more private"
    once = points.assign(n=points["n"].where(points["variant"] != "cheaper", 1))
    found = inversion_tables.standing(once, "itself", 19.0).set_index("defence")["against itself"]
    assert found["cheaper"] == "too few runs", "one run has an interval without width"


def ends_of(ends):
    low, high = ends
    return [("", (low + high) / 2), ("_low", low), ("_high", high)]


def test_changes_are_those_of_the_last_class(p, setup):
    found = ev.changes("npz", p, ("image_noise", "shadow_hardened"), 0)
    images, labels = instruments.deal(setup, 0)
    for image in found.images:
        at = (images[0].numpy() == image).reshape(len(images[0]), -1).all(1)
        assert labels[0][at].item() == 1
    assert found.lesions is None
    assert {name: delta.shape for name, delta in found.deltas.items()} == dict.fromkeys(
        found.deltas, found.images.shape
    )
    fig, axes = inversion_plots.changes(found.images, {"a": found.deltas["image_noise"].numpy()}, None, "")
    assert axes.shape == (2, len(found.images))
    plt.close(fig)


def test_difference_to_the_mean_of_the_baselines():
    runs = [row(v, "utility", "macro_f1", 0.5 + 0.1 * i) for i, v in enumerate(ev.BASELINES)]
    found = ev.complete(pd.DataFrame([*runs, row("shadow_released", "utility", "macro_f1", 0.65)]))
    found = found[found["metric"] == "macro_f1_minus_baselines"]
    assert found["variant"].tolist() == ["shadow_released"]
    assert found["value"].item() == pytest.approx(0.65 - 0.7)
    later = [row(v, "utility", "macro_f1", 0.5, seed=1) for v in ("gradient_noise", "shadow_released")]
    both = ev.complete(pd.DataFrame([*runs, *later, row("shadow_released", "utility", "macro_f1", 0.65)]))
    assert both.loc[both["metric"] == "macro_f1_minus_baselines", "seed"].tolist() == [0]
    some = ev.complete(pd.DataFrame([*runs[1:], row("shadow_released", "utility", "macro_f1", 0.65)]))
    assert not some["metric"].str.contains("baselines").any(), "not against the mean of some of them"


def test_a_case_asks_a_defence_with_memory_once(setup):
    images, labels = instruments.deal(setup, 0)
    asked = []

    def perturb(model, x, y, round):
        asked.append(len(x))
        return x + 0.1

    own = instruments.Client(lambda *args: pytest.fail("asked twice"), perturb)
    x, y = images[0][:4].view(2, 2, 1, 28, 28), labels[0][:4].view(2, 2)
    found = attackers.case(own, instruments.network(setup, 0), x, y, 0)
    assert asked == [2, 2]
    torch.testing.assert_close(found.changed, x + 0.1)
    assert torch.equal(found.y, y)


# Whose gradient is it -------------------------------------------------------------------------------------------------

GIVEN = {"victims": 6, "batches": [1, 3], "gallery": None, "copies": 3}
FINGERPRINTED = ("none", "topk", "soteria", "image_noise", "shadow_hardened", "autoencoder_only", "public_only")


@pytest.mark.parametrize("variant", FINGERPRINTED)
def test_a_fingerprint_has_the_rows_that_it_promises(p, variant):
    table, _ = ev.run("npz", p, fingerprints.plan(variant, 0, GIVEN))
    assert set(table["scenario"]) == {"fingerprint"}
    assert not table.duplicated(["metric", *ev.KEYS]).any()
    assert (table["n_items"] == 6).all()
    headline = table[table["attack"].eq("") & table["labels"].eq("")]
    wanted = {"candidates", "identified_top1", "identified_top10", "membership_auc", "membership_tpr"}
    assert all(set(part["metric"]) == wanted for _, part in headline.groupby("batch"))
    assert set(headline["batch"]) == {"", "3"}
    special = {"match"} if variant in fingerprints.SPECIAL else set()
    like = {"like"} if variant in instruments.STAND_INS else set()
    first = table[table["batch"] == ""]
    assert set(first["attack"]) == {"", *special, *like}
    assert set(first["labels"]) == {"", "unknown"}
    found = headline[headline["metric"] == "identified_top1"].set_index("batch")["value"]
    if variant in ("none", "topk", "soteria"):  # (the tiny generator draws everybody alike)
        assert found[""] == 1
    if variant == "none":
        assert found["3"] == 1
    size = headline[headline["metric"] == "candidates"].set_index("batch")["value"]
    own = (
        variant in fingerprints.COPIED
    )  # then all images of the client are known, and nobody else's come into question
    assert size[""] == (6 if own else 12)
    assert size["3"] <= (12 if own else 24)


def test_a_smaller_gallery_holds_the_victims_and_no_victim_is_no_candidate(p):
    run = ev._begin("npz", p, "none", 0, 1)
    whole, small = fingerprints.candidates(run, None), fingerprints.candidates(run, 8)
    index = attackers.victims(run.setup, run.images[0], 4, 1, run.seed)[:, 0]
    assert (len(whole.images), len(small.images), int(small.own.sum())) == (24, 8, 4)
    for found in (whole, small):
        assert torch.equal(found.images[:4], run.images[0][index])
        assert torch.equal(found.labels[:4], run.labels[0][index])
    table, _ = ev.run("npz", p, fingerprints.plan("none", 0, GIVEN | {"gallery": 8, "batches": [1]}))
    assert set(table["n_items"]) == {4}
    with pytest.raises(InputError, match=r"lower fingerprint\.batches"):
        ev.run("npz", p, fingerprints.plan("none", 0, GIVEN | {"gallery": 8, "batches": [5]}))


def test_a_fingerprint_of_a_network_that_has_learnt(p):
    given = GIVEN | {"shares": [1.0], "may_diverge": True}
    table, _ = ev.run("npz", p, fingerprints.plan("none", 0, given))
    assert set(table["round"]) == {"1"}
    assert table.loc[table["metric"] == "identified_top1", "value"].iloc[0] == 1


def test_a_fingerprint_of_a_federation_that_diverges_is_a_row(p, monkeypatch):
    def train(*_):
        raise InputError("gradient of a holds NaN or infinite values: the model diverged; lower its lr")

    monkeypatch.setattr(fingerprints.fedcls, "train", train)
    given = GIVEN | {"shares": [1.0], "may_diverge": True}
    lost, _ = ev.run("npz", p, fingerprints.plan("none", 0, given))
    assert lost[["scenario", "metric", "round"]].to_numpy().tolist() == [["fingerprint", "failed", "1"]]


def test_its_parameters_are_in_no_other_cells_identity(p):
    other = params.validate(params.merge(p.model_dump(), {"fingerprint": {"victims": 9, "batches": [2]}}))
    assert other != p
    for cell in ev.quick(p):
        same = cells.identity(ev.EXPERIMENT, "a cohort", p, cell) == cells.identity(
            ev.EXPERIMENT, "a cohort", other, cell
        )
        assert same, "a cell is given its own, in its plan"
    planned = {cell.name: cell for cell in ev.quick(p)}
    moved = [c for c in ev.quick(other) if c.given != planned[c.name].given]
    assert {cell.arm for cell in moved} == {"fingerprint"}


def compared(variant, value, metric="identified_top1", n=5, **keys):
    """A row of a summary, by default of a fingerprint of one image."""
    fixed = {"variant": variant, "scenario": "fingerprint", "metric": metric, "value": value, "unit": "share"}
    spread = {"low": value - 0.01, "high": value + 0.01, "n": n, "n_items": 320}
    return fixed | spread | dict.fromkeys(ev.KEYS, "") | keys


def test_who_is_named_is_said_from_the_rows():
    built = {"scenario": "adaptive", "metric": "retrieval"}
    rows = [
        compared("topk", 0.0) | built,
        compared("topk", 0.9),
        compared("topk", 0.95, strength="0.1"),
        compared("topk", 0.4, attack="match"),
        compared("none", 1.0),
        compared("none", 1.0, "identified_top10"),
        compared("none", 0.8, batch="4"),
        compared("none", 0.1, batch="4", attack="match"),
        compared("none", 0.7, batch="16"),
        compared("none", 1.0, labels="unknown"),
        compared("none", 1.0, round="1", batch="16"),
        compared("shadow_hardened", 0.25),
        compared("shadow_hardened", 0.9, "identified_top10"),
        compared("public_only", 0.02, "identified_top10"),
        compared("public_only", 0.0),
        compared("dp_sgd", 0.9, "identified_top10", n=2),
        compared("public_only", 0.6, "membership_auc"),
        *(compared(v, 400.0, "candidates") for v in ("none", "topk", "public_only", "dp_sgd")),
        compared("none", 800.0, "candidates", batch="4"),
        compared("none", 800.0, "candidates", batch="16"),
        compared("shadow_hardened", 200.0, "candidates"),
        compared("topk", 400.0, "candidates", strength="0.1"),
    ]
    summary = pd.DataFrame(rows)
    assert inversion_tables.identified(summary, "topk") == "0.90 [0.89, 0.91] (fingerprint)"
    assert inversion_tables.identified(summary.iloc[:1], "topk") == "0.00 [-0.01, 0.01] (best by PSNR)"
    assert inversion_tables.by_chance(summary, 10, variant="shadow_hardened") == 0.05
    assert inversion_tables.by_chance(summary, 1, variant="none", batch="16") == 16 / 800
    expected = {"none": True, "dp_sgd": False, "shadow_hardened": True, "public_only": False}  # two runs show nothing
    assert inversion_tables.exposed(summary) == expected
    said = inversion_tables.told(summary)
    assert "(0.70 [0.69, 0.71] (0.02) in a batch of 16)" in said
    assert "`dp_sgd`, `public_only`" in said
    assert "membership is above chance under `public_only`)" in said
    assert "short list" in said
    hidden = summary.copy()
    hidden.loc[12, ["value", "low"]] = 0.04
    assert "no more than by chance" in inversion_tables.told(hidden)
    shown = inversion_tables.named(summary).set_index(["name", "group"])["value"].to_dict()
    assert shown == {
        ("none", "one"): 1.0,
        ("none", "batch"): 0.7,
        ("topk", "reconstruction"): 0.0,
        ("topk", "one"): 0.9,
        ("shadow_hardened", "one"): 0.25,
        ("public_only", "one"): 0.0,
    }
    # A dishonest server, and the sum of all clients, name others: they are in no figure of this comparison.
    elsewhere = pd.DataFrame([compared("none", 0.3, "identified_top1", batch="16")] * 2).assign(
        scenario=["imprint", "secagg"]
    )
    pd.testing.assert_frame_equal(
        inversion_tables.named(pd.concat([summary, elsewhere], ignore_index=True)), inversion_tables.named(summary)
    )
    lines = inversion_tables.fingerprints(summary).set_index(["defence", "strength"])
    assert lines.loc[("topk", "0.1"), "named"] == "0.95 [0.94, 0.96] (0.0025)"
    assert lines.loc[("none", ""), "named, batch of 4"] == "0.80 [0.79, 0.81] (0.005)"
    fig, ax = inversion_plots.named(inversion_tables.named(summary), "16", 1 / 400, "title")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(dict.fromkeys(name for name, _ in shown))
    plt.close(fig)
