"""Cells of notebook 03 end to end on random images, and the bookkeeping behind its tables by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from medsec import inversion_eval as ev
from medsec import metrics, params, paths, tables
from medsec.errors import InputError
from medsec.inversion import View

SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "inversion": {
        "federation": {"width": 4, "n_clients": 2, "images_per_client": 12, "rounds": 3, "batch": 6},
        "victims": 3,
        "joint_rounds": 2,
        "attacks": ["ig", "prior"],
        "adaptive": ["known", "joint", "generator", "purified"],
        "attack": {"iterations": 3, "together": 2},
        "purifier": {"width": 4, "epochs": 1},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
        "defences": {"k": 2},
        "shadow": {"steps": 1},
    },
}
HEADLINE = {"psnr", "ssim", "retrieval", "retrieval_projected"}


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    file = tmp_path_factory.mktemp("cohort") / "tiny.npz"
    draw, content = np.random.default_rng(0), {}
    for split in ("train", "val", "test"):
        content[f"{split}_images"] = draw.integers(0, 256, (120, 28, 28), dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(120) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(file, **content)
    tree = params.merge(params.load().model_dump(), SMALL)
    yield params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))
    ev._prepare.cache_clear()


@pytest.fixture(scope="module")
def setup(p):
    return ev.prepare("npz", p)


ADAPTIVE = {
    "none": {"joint"},
    "topk": {"known", "joint"},
    "soteria": {"known", "joint"},
    "shadow_released": {"joint", "purified"},
    "shadow_shuffled": {"joint", "purified"},
    "shadow_hardened": {"joint", "generator", "purified"},
}


@pytest.mark.parametrize("variant", ADAPTIVE)
def test_a_cell_has_the_rows_that_it_promises(p, variant):
    table, pictures = ev.attack_cell("npz", p, variant, 0)
    assert np.isfinite(table["value"]).all()
    assert not table.duplicated(["scenario", "metric", *ev.KEYS]).any()
    attacks = {name: set(part["attack"]) - {""} for name, part in table.groupby("scenario")}
    image_space = "purified" in ADAPTIVE[variant]
    expected = {"naive": {"ig", "prior"}, "adaptive": {"ig", "prior", *ADAPTIVE[variant]}, "prior_only": set()}
    assert attacks == expected | ({"ceiling": set()} if image_space else {})
    for _, part in table[table["attack"] == ""].groupby("scenario"):
        assert set(part["metric"]) == HEADLINE
    assert (table.loc[table["metric"] == "failed", "value"] == 0).all()
    assert (table["n_items"] == 3).all()
    rows = table[table["metric"] == "psnr"].set_index(["scenario", "attack"])["value"]
    assert rows["adaptive", ""] >= rows["naive", ""] >= max(rows["naive", "ig"], rows["naive", "prior"]) - 1e-9
    assert set(pictures) == {"original", "sent", "naive", "adaptive"}
    assert all(images.shape == (3, 1, 28, 28) for images in pictures.values())
    assert np.array_equal(pictures["original"], pictures["sent"]) == (not image_space)
    assert len(metrics.summarise(ev.complete(table), ev.KEYS)) == len(table)


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
    table = ev.utility_cell("npz", p, variant, 0)
    assert set(table["metric"]) == {"auc", "macro_f1", "balanced_accuracy"}
    assert (table["scenario"] == "utility").all()
    assert table["value"].between(0, 1).all()


def test_every_defence_gives_a_client(setup):
    images, labels = ev.deal(setup, 0)
    model = ev.network(setup, 0)
    plain = ev.client("none", setup, images[0], labels[0], 0).send(model, images[0][:4], labels[0][:4], 0)
    for variant in ev.VARIANTS[1:]:
        own = ev.client(variant, setup, images[0], labels[0], 0)
        sent = own.send(model, images[0][:4], labels[0][:4], 0)
        assert [g.shape for g in sent] == [g.shape for g in plain]
        assert any(not torch.equal(a, b) for a, b in zip(sent, plain, strict=True)), variant
        assert (own.perturb is None) == (variant in ("gradient_noise", "dp_sgd", "topk", "soteria"))
    with pytest.raises(InputError, match="choose one of none, gradient_noise"):
        ev.client("magic", setup, images[0], labels[0], 0)


def test_controls_have_the_norm_of_what_they_control(setup):
    images, labels = ev.deal(setup, 0)
    model, x, y = ev.network(setup, 0), images[0][:4], labels[0][:4]
    norms = {
        name: (ev.client(name, setup, images[0], labels[0], 3).perturb(model, x, y, 0) - x).flatten(1).norm(dim=1)
        for name in ("shadow_described", *ev.CONTROLS)
    }
    for name in ev.CONTROLS:
        torch.testing.assert_close(norms[name], norms["shadow_described"], rtol=1e-4, atol=1e-5)


def test_what_an_attacker_leaves_out(setup):
    model = ev.network(setup, 0)
    gradients = [torch.randn(2, *p.shape) for p in model.parameters()]
    gradients[0][0, 0] = 0
    weights = ev.known_weights("topk", View(model, gradients))
    assert (weights[0][0, 0] == 0).all()
    assert sum(int((w == 0).sum()) for w in weights) == gradients[0][0, 0].numel()
    weights = ev.known_weights("soteria", View(model, gradients))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, w in zip(names, weights, strict=True) if (w == 0).all()] == ["head.weight"]
    assert all((w == 1).all() for name, w in zip(names, weights, strict=True) if name != "head.weight")


def test_more_victims_than_images(setup):
    images, _ = ev.deal(setup, 0)
    assert len(set(ev.victims(setup, images[0], 6, 2, 0).flatten().tolist())) == 12
    with pytest.raises(InputError, match="7 victims with a batch of 2: a client holds 12 images"):
        ev.victims(setup, images[0], 7, 2, 0)


def test_the_prior_draws_images_where_the_public_ones_are(setup):
    z = torch.randn(64, setup.prior.latent, generator=torch.Generator().manual_seed(0))
    drawn = setup.prior(z)
    assert drawn.shape == (64, 1, 28, 28)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_the_floor_is_the_public_mean_of_the_class(setup):
    images, labels = setup.splits["public"]
    found = ev.floor(setup, torch.tensor([[0, 1], [1, 1]]))
    torch.testing.assert_close(found[0, 1], images[labels == 1].mean(0))
    assert torch.equal(found[0, 1], found[1, 0])
    assert found.shape == (2, 2, 1, 28, 28)


def test_the_strongest_is_chosen_victim_by_victim():
    scores = {
        "a": {"psnr": np.array([1.0, 9.0]), "ssim": np.array([0.9, 0.1])},
        "b": {"psnr": np.array([2.0, 3.0]), "ssim": np.array([0.2, 0.8])},
    }
    found = ev.strongest(scores)
    assert found["psnr"].tolist() == [2.0, 9.0]
    assert found["ssim"].tolist() == [0.2, 0.1], "the same attack for all metrics"


def test_measures_pair_a_batch_and_find_whose_image_it_is(setup):
    images, _ = ev.deal(setup, 0)
    index = torch.tensor([[3, 5], [0, 7]])
    truth = images[0][index].numpy()
    measure = ev.measures(setup, images, index)
    found = measure(truth[:, ::-1].copy(), truth)
    assert found["psnr"].tolist() == [100, 100]
    assert found["retrieval"].tolist() == [1, 1]
    assert measure(np.roll(truth, 1, axis=0), truth)["retrieval"].tolist() == [0, 0]
    single = ev.measures(setup, images, index.view(4, 1))
    projected = setup.autoencoder(images[0][index.flatten()]).detach()[:, None].numpy()
    assert single(projected, images[0][index.view(4, 1)].numpy())["retrieval_projected"].tolist() == [1, 1, 1, 1]


def row(variant, scenario, metric, value, seed=0, **keys):
    return tables.run_row(ev.KEYS, seed, variant, scenario, metric, value, 8, ev.UNITS[metric], **keys)


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
        }
    )
    assert (found["attack"] == "").all()


def test_every_claim_asks_for_a_row_that_can_exist():
    ledger = yaml.safe_load((paths.CLAIMS / "2-shadow.yaml").read_text(encoding="utf-8"))
    assert ledger["table"] == "03_gia_defense"
    for claim in ledger["claims"]:
        where = claim["where"]
        assert set(where) == {"variant", "scenario", "metric"}, claim["id"]
        kind = "utility" if where["scenario"] == "utility" else "attack"
        assert where["variant"] in ev.QUICK[kind], claim["id"]
        assert where["scenario"] in {"naive", "adaptive", "utility"}, claim["id"]
        assert where["metric"] in ev.UNITS, claim["id"]


def test_a_case_asks_a_defence_with_memory_once(setup):
    images, labels = ev.deal(setup, 0)
    asked = []

    def perturb(model, x, y, round):
        asked.append(len(x))
        return x + 0.1

    own = ev.Client(lambda *args: pytest.fail("asked twice"), perturb)
    x, y = images[0][:4].view(2, 2, 1, 28, 28), labels[0][:4].view(2, 2)
    found = ev.case(own, ev.network(setup, 0), x, y, 0)
    assert asked == [2, 2]
    torch.testing.assert_close(found.changed, x + 0.1)
    assert torch.equal(found.y, y)
