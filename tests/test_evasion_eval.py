"""The design of notebook 04: arms, defence rates, reviewer's checks, checkpoints."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells as ev
from experiments.adversarial_pruning_defense import figures as evasion_plots
from experiments.adversarial_pruning_defense import record as evasion_record
from experiments.adversarial_pruning_defense import tables as evasion_tables
from experiments.adversarial_pruning_defense import transfer
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.data import sources
from medsec.evasion import attacks as adversarial
from medsec.evasion import maps as evasion_maps
from medsec.evasion import sanity as evasion_checks
from medsec.evidence import cells, claims, record, tables
from medsec.nets.models import SmallResNet

RECIPE = {"epochs": 1, "batch": 32, "finetune_epochs": 1}
SMALL = {
    "seeds": {"tuning": [9], "evaluation": [0, 1]},
    "at_ramp": RECIPE,
    "evasion": {
        "test_images": 40,
        "sweep": [2, 4, 8],
        "clean": RECIPE,
        "robust": RECIPE,
        "hardened": RECIPE,
        "attacks": {
            "scenarios": params.load("full").evasion.attacks.scenarios,
            "steps": 3,
            "deepfool_steps": 5,
            "deepfool_norms": ["l2", "linf"],
            "square_queries": 5,
            "apgd_iterations": 3,
            "cw": {"variants": ["hardened"], "images": 4, "iterations": 3, "searches": 2},
        },
        "checks": {"images": 10, "more_steps": 6, "planted": 3},
    },
}


def small(file):
    tree = params.merge(params.load().model_dump(), SMALL)
    return params.validate(params.merge(tree, {"cohorts": {"npz": {"path": str(file)}}}))


@pytest.fixture(scope="module")
def p(tmp_path_factory, write_npz):
    return small(write_npz(tmp_path_factory.mktemp("cohort"), per_class=60))


@pytest.fixture(scope="module")
def colour(tmp_path_factory, write_npz):
    return small(write_npz(tmp_path_factory.mktemp("colour"), classes=3, channels=3, per_class=60))


# Defence rates --------------------------------------------------------------------------------------------------------


def test_defence_rates_by_hand():
    f = {"clean": [1, 1, 1, 0], "own": [0, 1, 0, 1], "transfer": [1, 1, 0, 1]}
    f0 = {"clean": [1, 1, 0, 1], "own": [0, 1, 1, 0]}
    f, f0 = ({k: np.array(v, dtype=bool) for k, v in each.items()} for each in (f, f0))
    assert ev.rates(f, f0) == pytest.approx({"dr_whitebox": 1 / 3, "dr_transfer": 2 / 3, "dr_recovered": 1.0})
    assert ev.rates({"clean": np.zeros(3, bool), "own": np.zeros(3, bool)}) == {}, "nothing to divide by"
    untouched = {"clean": f0["clean"], "own": f0["clean"]}
    assert "dr_recovered" not in ev.rates(f, untouched)


def test_a_constant_classifier_has_a_perfect_rate_and_no_balanced_accuracy():
    """Why the rates are never shown alone."""
    y = torch.tensor([0, 0, 1, 1, 1])
    run = ev.Run(None, "base", None, 0)
    right = run.answers("clean", torch.tensor([[0.0, 1.0]]).expand(5, 2), y)
    values = {row["metric"]: row["value"] for row in run.rows}
    assert ev.rates({"clean": right, "own": right}) == {"dr_whitebox": 1.0}
    assert values == pytest.approx({"accuracy": 0.6, "balanced_accuracy": 0.5, "auc": 0.5})


# Arms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "hardened"])
def test_an_arm_has_every_row_once(p, variant):
    table = ev.arm_cell("npz", p, variant, 0)
    assert not table.duplicated(["scenario", "metric", *ev.KEYS]).any()
    assert set(table["variant"]) == {variant}
    found = set(table["scenario"])
    expected = {"clean", "noise", "worst_case", "deepfool", "check", *p.evasion.attacks.scenarios}
    extra = {"cw_l2"} if variant == "hardened" else set()
    assert found == expected - (set() if variant == "hardened" else {"pgd_detached"}) | extra
    eps = tables.select(
        table.assign(n=1), {"variant": variant, "scenario": "pgd20", "metric": "accuracy", "eps": "0.0156863"}
    )
    assert len(eps) == 1
    assert set(table.loc[table["scenario"] == "pgd20", "eps"]) == {"0.00784314", "0.0156863", "0.0313725"}
    assert set(table.loc[table["scenario"] == "autoattack", "eps"]) == {"0.0156863", "0.0313725"}
    assert np.isfinite(table["value"]).all()
    has_transfer = (table["metric"] == "dr_transfer").any()
    assert has_transfer == (variant != "base"), "examples made for the base are no transfer to the base"
    checks = set(table.loc[table["scenario"] == "check", "metric"])
    assert ("undefended_breaks" in checks) == (variant == "base")
    assert ("whitebox_beats_transfer" in checks) == (variant != "base")
    worst = table[(table["scenario"] == "worst_case") & (table["metric"] == "accuracy")]["value"].item()
    at = table[(table["eps"] == "0.0156863") & (table["metric"] == "accuracy") & (table["scenario"] != "noise")]
    assert worst <= at["value"].min() + 1e-9


def test_slow_attacks_on_fewer_images(p):
    few = params.validate(params.merge(p.model_dump(), {"evasion": {"attacks": {"slow_images": 16}}}))
    setup = ev.prepare("npz", few)
    model = evasion_arms.train(setup, "base", 0)
    run = ev.Run(setup, "base", model, 0)
    outcomes, table = ev.attack(run, model, ["pgd20", "square"], []), run.table()
    n = table[table["metric"] == "accuracy"].set_index("scenario")["n_items"]
    assert n.to_dict() == {"clean": 40, "noise": 40, "pgd20": 40, "square": 16, "worst_case": 16}
    eps = few.evasion.eps / 255
    right = outcomes["clean", 0.0][:16]
    rate = table[(table["scenario"] == "square") & (table["metric"] == "dr_whitebox")].iloc[0]
    assert rate["value"] == pytest.approx(outcomes["square", eps][right].mean())
    assert rate["n_items"] == right.sum()
    worst = table[(table["scenario"] == "worst_case") & (table["metric"] == "dr_whitebox")].iloc[0]
    assert worst["value"] == pytest.approx((outcomes["square", eps] & outcomes["pgd20", eps][:16])[right].mean())


def test_three_classes_and_colours(colour):
    table = ev.arm_cell("npz", colour, "prune_cbam", 0)
    assert {"autoattack", "pgd_detached", "deepfool"} <= set(table["scenario"])
    assert np.isfinite(table["value"]).all()


def test_a_cell_is_a_function_of_the_seed(p):
    pd.testing.assert_frame_equal(ev.arm_cell("npz", p, "cbam", 1), ev.arm_cell("npz", p, "cbam", 1))


def test_arms_are_what_they_are_called(p):
    from medsec.evasion import pruning
    from medsec.nets import cbam as attention

    setup = evasion_arms.prepare("npz", p)
    models = {name: evasion_arms.train(setup, name, 0) for name in evasion_arms.VARIANTS}
    attending = {name for name, model in models.items() if attention.modules(model)}
    assert attending == {"cbam", "prune_cbam", "at_cbam", "hardened"}
    sparse = {name: pruning.sparsity(model) for name, model in models.items()}
    for name, value in sparse.items():
        expected = {"prune": 0.8, "prune_cbam": 0.8, "at_prune": 0.8, "hardened": 0.5}.get(name, 0)
        assert value == pytest.approx(expected, abs=0.01), name
    answers = {name: model(setup.splits["test"][0]).detach() for name, model in models.items()}
    assert not torch.allclose(answers["base"], answers["retrain"])
    assert not torch.allclose(answers["base"], answers["finetune"])
    assert not torch.allclose(answers["base"], answers["at"])
    other = ev.prune_cell("npz", p, "prune", 0, 0.5)
    assert set(other["prune"]) == {"0.5"}
    assert other[other["metric"] == "sparsity"]["value"].item() == pytest.approx(0.5, abs=0.01)


def test_training_sees_the_training_splits_only(p):
    setup = evasion_arms.prepare("npz", p)
    sizes = {split: len(part) for split, part in setup.cohort.splits.items()}
    assert len(setup.splits["train"][0]) == sizes["client"] + sizes["public"] + sizes["reference"]
    test = {image.numpy().tobytes() for image in setup.splits["test"][0]}
    assert not test & {image.numpy().tobytes() for image in setup.splits["train"][0]}
    assert len(test) == p.evasion.test_images
    assert set(setup.splits["test"][1].tolist()) == {0, 1}, "shuffled: the split is sorted by class"


# Examples made for other networks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transferred(p):
    """Two seeds of two arms, with an f₀ of another architecture."""
    more = params.validate(params.merge(p.model_dump(), {"transfer": {"other_width": 4, "steps": 3}}))
    plan = transfer.plan(more, ("base", "prune_cbam"), ("hardened",))
    return more, plan, pd.concat([ev.run("npz", more, cell)[0] for cell in plan], ignore_index=True)


def test_f0_is_of_another_seed_and_no_arm_meets_itself(p):
    assert [transfer.others(p, seed) for seed in p.seeds.evaluation] == [[1, 9], [0, 9]], "then the tuning seeds"
    full = params.load("full")
    assert [transfer.others(full, seed) for seed in (0, 3, 4)] == [[1, 2], [4, 0], [0, 1]]
    plan = {cell.seed: cell.variants for cell in transfer.plan(full, ("base",), ("hardened",))}
    assert plan == {
        0: ("base", "hardened"),
        1: ("base", "hardened"),
        2: ("base", "hardened"),
        3: ("base",),
        4: ("base",),
    }


def test_every_f0_has_its_rows(transferred):
    _, _, runs = transferred
    assert not runs.duplicated(["seed", "variant", "scenario", "metric", "f0"]).any()
    assert set(runs["f0"]) == set(transfer.F0)
    found = runs[(runs["metric"] == "dr_transfer") & (runs["variant"] == "base")].groupby("f0")["scenario"].agg(set)
    whole = {"pgd20", "deepfool_capped", "mi_di_fgsm"}
    of_one = {"other_seeds": whole, "other_architecture": whole}
    assert found.to_dict() == of_one | {"same_seed": {"mi_di_fgsm"}, "ensemble": {"mi_di_fgsm"}}
    assert set(runs.loc[runs["variant"] == "surrogate", "metric"]) == {"dr_whitebox"}
    assert not ((runs["f0"] == "ensemble") & (runs["metric"] == "dr_recovered")).any(), "whose errors would these be?"
    rates = runs[(runs["f0"] == "same_seed") & runs["metric"].isin(["dr_transfer", "dr_whitebox"])]
    same = rates.set_index(["seed", "variant"])["value"]
    assert same[0, "surrogate"] == same[0, "base"], "an arm that is its own f₀ is attacked white-box"


def test_rates_by_f0_are_those_of_the_attack_itself(transferred):
    """PGD's examples for one f₀, made and counted once more."""
    p, plan, runs = transferred
    setup, cell = evasion_arms.prepare("npz", p), plan[0]
    x, y = setup.splits["test"]
    arm = evasion_arms.network(setup, "prune_cbam", 0)
    shares = []
    for seed in cell.given["others"]:
        f0 = evasion_arms.network(setup, "base", seed)
        x_adv = ev.craft("pgd20", f0, x, y, p.evasion.eps / 255, p.evasion.attacks, 0, stop=False)
        right = arm(x).argmax(1) == y
        shares.append(float((arm(x_adv).argmax(1) == y)[right].float().mean()))
    where = {
        "variant": "prune_cbam",
        "scenario": "pgd20",
        "metric": "dr_transfer",
        "f0": "other_seeds",
        "eps": "0.0156863",
    }
    row = tables.select(runs[runs["seed"] == 0].drop(columns="unit"), where)
    assert row["value"].item() == pytest.approx(np.mean(shares))
    assert row["n_items"].item() == len(y)


def test_old_cells_are_as_they_were():
    """New parameters and arms change the identity of no cell that a record has: the committed ones are found again."""
    full = params.load("full")
    plan = evasion_record.plan("phantom", full)
    fingerprint = record.about("04_adversarial_pruning_defense", "phantom")["cohort_fingerprint"]
    names = cells.names_of(ev.EXPERIMENT, fingerprint, full, plan)
    kept = record.committed(paths.ROOT / "records" / "phantom", "04_adversarial_pruning_defense")
    known = kept.groupby("cell")["identity"].first()
    assert known.equals(pd.Series(names)[known.index].rename_axis("cell").rename("identity"))
    other = params.validate(
        params.merge(full.model_dump(), {"transfer": {"steps": 5}, "review": {"one_step_gap": 0.1}})
    )
    changed = cells.names_of(ev.EXPERIMENT, fingerprint, other, evasion_record.plan("phantom", other))
    assert {name for name in names if names[name] != changed[name]} == {c.name for c in plan if c.arm == "transfer"}


def gap_rows(variant, gaps, seed=0):
    """Runs of an arm: at each eps in 255ths FGSM leaves 0.9 right, PGD less by the gap."""
    rows = []
    for eps, gap in gaps.items():
        for scenario, value in (("fgsm", 0.9), ("pgd20", 0.9 - gap)):
            rows.append(
                tables.run_row(ev.KEYS, seed, variant, scenario, "accuracy", value, 10, eps=ev.eps_key(eps / 255))
            )
    return rows


@pytest.mark.parametrize(
    ("gaps", "passes"),
    [
        ({2: 0.0, 4: 0.1, 8: 0.1, 16: 0.5}, 1),  # trained at 3/255: asked up to 8/255
        ({2: 0.0, 4: 0.1, 8: 0.35, 16: 0.3}, 0),
        ({2: 0.25, 4: 0.0, 8: 0.0, 16: 0.0}, 0),
        ({2: 0.0, 4: 0.3}, 0),
    ],
)
def test_one_step_overfitting_is_found_up_to_twice_the_eps_of_training(gaps, passes):
    p = params.load()
    assert (p.evasion.hardened.eps, p.review.times_training, p.review.one_step_gap) == (3, 2, 0.2)
    summary = ev.summarise(pd.DataFrame(gap_rows("hardened", gaps) + gap_rows("base", dict.fromkeys(gaps, 0.6))), p)
    row = tables.row(summary, variant="hardened", scenario="check", metric="no_one_step_overfitting")
    assert row["value"] == passes
    asked = summary[summary["metric"] == "no_one_step_overfitting"]
    assert set(asked["variant"]) == {"hardened"}, "a network that was trained on no step cannot have overfitted to it"
    table = evasion_tables.gaps(pd.concat([summary, clean_row("base"), clean_row("hardened")])).set_index("arm")
    assert [float(cell) for cell in table.loc["hardened"]] == pytest.approx(list(gaps.values()))


def clean_row(variant):
    row = {"variant": variant, "scenario": "clean", "metric": "accuracy", "value": 0.9, "low": 0.9, "high": 0.9, "n": 1}
    return pd.DataFrame(
        [row | {"n_items": 10, "unit": "share", "eps": "", "norm": "", "prune": "", "map": "", "f0": ""}]
    )


def test_what_a_method_adds_is_paired_with_the_same_training_without_it():
    def row(variant, seed, value):
        return tables.run_row(ev.KEYS, seed, variant, "clean", "auc", value, 10)

    rows = [row(v, s, x + s / 100) for v, x in (("base", 0.5), ("finetune", 0.9), ("prune", 0.8)) for s in (0, 1)]
    rows += [row(v, s, x) for v, x in (("hardened", 0.7), ("hardened_plain", 0.75)) for s in (0, 1)]
    p = params.load("full")
    summary = evasion_record.summarise(pd.DataFrame(rows), p)
    table = evasion_tables.added(summary, p.evasion).set_index("measure")
    assert table.loc["AUC, clean", "prune − finetune"] == "-0.100 [-0.100, -0.100]"
    assert table.loc["AUC, clean", "hardened − hardened_plain"] == "-0.050 [-0.050, -0.050]"
    assert table.loc["AUC, clean", "prune_cbam − finetune"] == "", "not in this table"


def test_the_bound_that_only_drawings_give():
    one = np.zeros((3, 1, 4, 4), np.uint8)
    other = one.copy()
    other[0, 0, 1, 1], other[1, 0, 2, 2] = 10, 30
    assert [evasion_checks.ceiling(one, other, eps) for eps in (0, 4.9, 5, 14, 15)] == pytest.approx(
        [5 / 6, 5 / 6, 4 / 6, 4 / 6, 0.5]
    ), "the last pair is one image: half of it is lost without any attack"
    middle = (one.astype(int) + other) // 2  # within eps of both, so one answer for two classes
    assert np.abs(middle - one).max() <= 15
    assert np.abs(middle - other).max() <= 15


@pytest.mark.parametrize("name", ["phantom", "fundus"])
def test_twins_are_the_test_images_and_differ_by_the_lesion_alone(cohorts, name):
    cohorts = params.load().cohorts if name == "phantom" else cohorts  # the stored one, or a small one
    healthy, ill = sources.twins(name, cohorts)
    test = sources.SOURCES[name](cohorts)["test"]
    drawn = {0: {i.tobytes() for i in healthy}, 1: {i.tobytes() for i in ill}}
    assert all(image.tobytes() in drawn[int(label)] for image, label in zip(test.images, test.labels, strict=True))
    assert healthy.shape == ill.shape == test.images.shape
    assert evasion_checks.ceiling(healthy, ill, 255) == 0.5
    assert evasion_checks.ceiling(healthy, ill, 0) == 1
    assert sources.twins("pneumoniamnist", cohorts) is None


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_used_as_long_as_nothing_has_changed(p, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    setup = evasion_arms.prepare("npz", p)
    assert evasion_arms.load(setup, "at_cbam", 0) is None
    model = evasion_arms.train(setup, "at_cbam", 0)
    file = evasion_arms.save(model, setup, "at_cbam", 0)
    assert file.is_relative_to(tmp_path)
    monkeypatch.setattr(evasion_arms, "train", lambda *_: pytest.fail("trained again"))
    found, x = evasion_arms.network(setup, "at_cbam", 0), setup.splits["test"][0]
    assert torch.equal(found(x), model(x))
    assert evasion_arms.seeds_with_checkpoints(setup, ["at", "at_cbam"], [0, 1]) == {"at": [], "at_cbam": [0]}
    changed = params.merge(p.model_dump(), {"evasion": {"robust": {"eps": 8.0}}})
    other = evasion_arms.Setup(params.validate(changed), setup.cohort, setup.splits)
    assert evasion_arms.load(other, "at_cbam", 0) is None, "another recipe"
    trained = []
    monkeypatch.setattr(evasion_arms, "train", lambda *_: trained.append(1) or model)
    for _ in range(2):  # the second time it lies beside the finished cells
        assert torch.equal(evasion_arms.network(other, "at_cbam", 0)(x), model(x))
    assert trained == [1]
    assert file.stat().st_size < 2.3 * sum(v.numel() for v in model.state_dict().values()), "two bytes a weight"


def test_unknown_arms_are_named(p):
    setup = evasion_arms.prepare("npz", p)
    with pytest.raises(InputError, match="arm 'bse': choose one of base, finetune"):
        evasion_arms.train(setup, "bse", 0)
    with pytest.raises(InputError, match="base prunes nothing"):
        evasion_arms.train(setup, "base", 0, prune=0.5)


# Reviewer's checks: each must be able to fail -------------------------------------------------------------------------


def outcomes(**changes):
    """By attack how many of 100 examples stay right."""
    counts = {
        ("clean", 0.0): 95,
        ("noise", 0.1): 94,
        ("fgsm", 0.1): 60,
        ("pgd20", 0.1): 40,
        ("pgd_margin", 0.1): 40,
        ("square", 0.1): 70,
        ("transfer", 0.1): 80,
        ("pgd20", 0.2): 5,
        ("fgsm", 0.2): 30,
    } | {tuple(key): n for key, n in changes.pop("counts", {}).items()}
    return {key: np.arange(100) < n for key, n in counts.items()}


def verdicts(found):
    return {check.name: check.passes for check in evasion_checks.compare(found, 0.1)}


def test_a_sound_evaluation_passes():
    assert verdicts(outcomes()) == dict.fromkeys(
        [
            "iterative_beats_single_step",
            "noise_weaker_than_fgsm",
            "larger_eps_never_weaker",
            "whitebox_beats_transfer",
            "gradient_free_weaker",
        ],
        True,
    )


@pytest.mark.parametrize(
    ("counts", "name"),
    [
        ({("pgd20", 0.1): 65, ("pgd_margin", 0.1): 65}, "iterative_beats_single_step"),
        ({("noise", 0.1): 50}, "noise_weaker_than_fgsm"),
        ({("pgd20", 0.2): 45, ("fgsm", 0.2): 50}, "larger_eps_never_weaker"),
        ({("transfer", 0.1): 30}, "whitebox_beats_transfer"),
        ({("square", 0.1): 30}, "gradient_free_weaker"),
    ],
)
def test_an_evaluation_that_cannot_be_trusted_is_found(counts, name):
    found = verdicts(outcomes(counts=counts))
    assert not found.pop(name)
    assert all(found.values())


def test_checks_need_the_same_examples():
    with pytest.raises(InputError, match=r"outcomes of \[50, 100\] examples"):
        evasion_checks.compare(outcomes() | {("pgd_margin", 0.1): np.ones(50, bool)}, 0.1)


def test_slow_attacks_may_stop_early_and_are_compared_on_the_same_examples():
    found = outcomes() | {("square", 0.1): np.arange(50) < 30}  # of the first 50, of which 40 withstand PGD
    square = {check.name: check.value for check in evasion_checks.compare(found, 0.1)}["gradient_free_weaker"]
    assert square == pytest.approx(10 / 50)


class Masked(nn.Module):
    """A model whose gradient says nothing: its image is rounded first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def features(self, x):
        return self.inner.features((x * 8).round() / 8)

    def forward(self, x):
        return self.inner((x * 8).round() / 8)


@pytest.fixture(scope="module")
def trained(p):
    setup = evasion_arms.prepare("npz", p)
    return evasion_arms.train(setup, "base", 0), *setup.splits["test"]


def review(model, x, y, eps=4 / 255, **options):
    options = {"steps": 3, "more": 6, "images": 3, "inner": 20} | options
    right = np.ones(len(x), bool)
    checks, unit = evasion_checks.reviewed(model, x, y, eps, {("clean", 0.0): right, ("pgd20", eps): right}, **options)
    return {check.name: check for check in checks}, unit


def test_masked_gradients_are_found_out(trained):
    model, x, y = trained
    masked = Masked(model).eval()
    options = {"steps": 5, "step": 0.5, "images": 12}
    usual, unit = review(model, x, y, 8 / 255, **options)
    assert usual["no_zero_gradients"].passes
    assert unit.n >= 10
    assert unit.found > 0.9
    assert unit.by_chance < 0.5
    assert usual["attack_unit_test"].passes
    hidden, unit = review(masked, x, y, 40 / 255, **options)
    assert not hidden["no_zero_gradients"].passes
    assert hidden["no_zero_gradients"].value == 1
    assert unit.n > 0
    assert not hidden["attack_unit_test"].passes


def test_steps_and_large_eps(trained):
    model, x, y = trained
    checks, _ = review(model, x, y, more=30, grey=0.5)
    assert checks["more_steps_never_weaker"].value == -checks["converged"].value
    assert checks["large_eps_breaks_all"].passes
    assert "undefended_breaks" not in checks
    checks, _ = review(Masked(model).eval(), x, y, grey=1e-6, undefended=True)
    assert not checks["large_eps_breaks_all"].passes
    assert not checks["undefended_breaks"].passes
    assert set(checks) <= set(evasion_checks.QUESTIONS)


def test_any_classifier_with_a_linear_head_can_be_reviewed(trained):
    """Its planted example is told apart by what its last linear layer sees, whatever the model calls that."""
    model, x, _ = trained
    seen = evasion_checks.last_features(model, x)
    torch.testing.assert_close(seen, model.features(x), rtol=0, atol=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 60), nn.ReLU(), nn.Linear(60, 2)).eval()
    assert review(net, x, torch.zeros(len(x), dtype=torch.int64))[1].n > 0
    with pytest.raises(InputError, match="Sequential has no linear layer"):
        evasion_checks.planted(
            nn.Sequential(nn.AvgPool2d(28), nn.Flatten()).eval(), x, 0.1, inner=5, steps=2, step=1, seed=0
        )


def test_nothing_to_decide_with_is_no_pass():
    assert not evasion_checks.Check("attack_unit_test", math.nan).passes


# Where a network looks ------------------------------------------------------------------------------------------------


def test_pointing_by_hand():
    maps, masks = torch.zeros(3, 4, 4), np.zeros((3, 4, 4), bool)
    masks[:, 1, 2] = True
    maps[0, 1, 2] = 1  # in the lesion
    maps[1, 0, 0] = 1  # beside it
    assert evasion_maps.pointing(maps, masks).tolist() == [True, False, False], "a flat map points nowhere"
    masks[2, 0, 0] = True
    assert not evasion_maps.pointing(maps, masks)[2]
    known = np.zeros((5, 4, 4), bool)
    known[:3, 1, 2] = True
    known[:, 3, 3] = [True, False, False, False, True]
    controls = evasion_maps.controls(masks, known)
    assert controls == pytest.approx({"area": 4 / 48, "prior": 1.0})
    with pytest.raises(InputError, match="empty mask"):
        evasion_maps.pointing(maps, np.zeros((3, 4, 4), bool))
    with pytest.raises(InputError, match=r"maps of shape \(3, 4, 4\)"):
        evasion_maps.pointing(maps, masks[:2])


def test_maps_show_the_pixels_that_decide():
    """A network that only sees one corner: every attribution lies there."""

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            seen = torch.zeros_like(x)
            seen[:, :, :4, :4] = 1
            return self.blocks(x * seen).mean((2, 3))

    torch.manual_seed(0)
    model, x, y = Corner().eval(), torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    found = evasion_maps.integrated_gradients(model, x, y)
    assert found.shape == (2, 16, 16)
    assert not found[:, 4:].any()
    assert not found[:, :, 4:].any()
    assert found[:, :4, :4].any()
    maps = evasion_maps.attributions(SmallResNet(1, 2).eval(), x, y)
    assert {name: tuple(m.shape) for name, m in maps.items()} == dict.fromkeys(
        ["grad_cam", "integrated_gradients"], (2, 16, 16)
    )
    assert maps["grad_cam"].min() >= 0


def test_an_arm_is_measured_beside_the_lesions_of_the_phantom(p):
    setup = evasion_arms.prepare("phantom", p)
    masks = evasion_arms.test_lesions(setup)
    y = setup.splits["test"][1]
    assert masks.shape == (p.evasion.test_images, *setup.splits["test"][0].shape[2:])
    assert not masks[(y == 0).numpy()].any(), "masks are in the order of the images"
    run = ev.Run(setup, "cbam", evasion_arms.train(setup, "cbam", 0), 0)
    ev.measure_attribution(run)
    rows = run.table()
    assert set(rows["map"]) == {"area", "prior", "grad_cam", "integrated_gradients", "cbam1", "cbam2", "cbam3"}
    assert not rows.duplicated(["map", "eps"]).any()
    without = ev.Run(evasion_arms.prepare("npz", p), "base", None, 0)
    ev.measure_attribution(without)
    assert not without.rows


# The record -----------------------------------------------------------------------------------------------------------


def test_the_record_has_every_arm_on_five_seeds_and_the_whole_test_set():
    full = params.load("full")
    cells = evasion_record.plan("phantom", full)
    assert len({cell.name for cell in cells}) == len(cells)
    for variant in set(evasion_arms.VARIANTS) - {"longer"}:
        assert len({c.seed for c in cells if c.arm in ("arm", "ramp") and c.variants == (variant,)}) >= 5
    costs = [(variant, c.seed) for c in cells if c.arm in ("arm", "ramp", "costs") for variant in c.variants]
    assert len(costs) == len(set(costs)), "each network's answers without an attack once"
    for variant in ("base", "at_ramp", "longer"):
        assert len([seed for name, seed in costs if name == variant]) >= 10, "what costs are told from"
    assert full.evasion.test_images is None
    attacks = full.evasion.attacks
    assert {"pgd20", "pgd20_eps10", "pgd_margin", "pgd_detached", "deepfool_capped", "square"} <= set(attacks.scenarios)
    assert {full.evasion.eps, *attacks.autoattack_more} >= {4, 8}
    assert attacks.cw.images == 128
    assert attacks.slow_images >= 128
    assert len(attacks.cw.variants) == 4
    assert min(full.evasion.sweep) == 0.5
    assert max(full.evasion.sweep) == 16
    assert not set(full.seeds.evaluation) & set(full.seeds.tuning)
    shares = {c.keys["prune"] for c in cells if c.arm == "prune"} | {full.evasion.prune}
    assert min(shares) == 0
    assert max(shares) == 0.95


def test_a_cell_of_the_record_runs_and_leaves_the_network_of_the_notebook(p, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    cell = cells.Cell("prune", 0, keys={"prune": 0.5}, group="prune", variants=("prune",))
    assert set(ev.run("npz", p, cell)[0]["prune"]) == {"0.5"}
    for variant, left in (("hardened", True), ("finetune", False)):
        cell = cells.Cell("arm", 0, group=variant, variants=(variant,), given={"retrained": True})
        ev.run("npz", p, cell)
        assert evasion_arms.checkpoint("npz", variant, 0).is_file() == left, "the notebook does not attack it"


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x10" + bytes(40)])
def test_a_damaged_network_is_said_and_trained_anew(p, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    setup, file = evasion_arms.prepare("npz", p), evasion_arms.checkpoint("npz", "base", 0)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert evasion_arms.load(setup, "base", 0) is None
    assert "base-seed0.safetensors cannot be read" in capsys.readouterr().err
    assert file.read_bytes() == content, "nothing is overwritten"


def test_every_claim_asks_for_a_row_that_can_exist():
    ledger, p = claims.load("3-pruning"), params.load("full").evasion
    assert ledger["table"] == "04_adversarial_pruning_defense"
    at, attacked = ev.eps_key(p.eps / 255), {ev.eps_key(eps / 255) for eps in p.sweep}
    for claim in ledger["claims"]:
        where = claim["where"]
        known = evasion_arms.VARIANTS if "record_only" in claim else evasion_arms.QUICK
        assert where["variant"] in known, claim["id"]
        assert where["scenario"] in {"clean", "check", transfer.MADE, *p.attacks.scenarios}, claim["id"]
        assert where["metric"] in tables.metrics(), claim["id"]
        assert where.get("f0", "other_seeds") in transfer.F0, claim["id"]
        elsewhere = attacked if "record_only" in claim else {at}
        assert where.get("eps", "") in ({""} if where["scenario"] in ("clean", "check") else elsewhere), claim["id"]


def test_costs_have_more_seeds_than_attacks_and_their_controls(p):
    """Rows of the same network in two kinds of cells agree; paired differences rest on every seed that has both."""
    cell = cells.Cell("costs", 5, variants=evasion_record.COSTS)
    more, _ = ev.run("npz", p, cell)
    assert set(more["scenario"]) == {"clean"}
    assert set(more["variant"]) == {"base", "at_ramp", "longer"}
    attacked, _ = ev.run("npz", p, ev.arm_of("at_ramp", 5))
    clean = [part[(part["variant"] == "at_ramp") & (part["scenario"] == "clean")] for part in (more, attacked)]
    values = [part.set_index("metric")["value"].drop("sparsity", errors="ignore") for part in clean]
    assert values[0].equals(values[1])
    others = [
        ev.run("npz", p, each)[0] for each in (ev.arm_of("base", 0), cells.Cell("costs", 0, variants=("longer",)))
    ]
    summary = evasion_record.summarise(pd.concat([more, *others], ignore_index=True), p)
    of = {"scenario": "clean", "metric": "auc"}
    assert tables.row(summary, variant="base", **of)["n"] == 2
    assert tables.row(summary, variant="longer", **of | {"metric": "auc_minus_base"})["n"] == 2
    assert tables.row(summary, variant="at_ramp", **of | {"metric": "auc_minus_finetune"})["n"] == 1
    images = len(ev.prepare("npz", p).splits["test"][1])
    assert evasion_tables.size(summary).startswith(f"1 seeds of {images} images"), "of attacks, not of costs"
    assert evasion_tables.headline(summary, p.evasion)["arm"].tolist() == ["base", "longer", "at_ramp"]
    assert list(evasion_tables.whitebox(summary, p.evasion).columns) == ["attack", "base"]
    assert evasion_tables.gaps(summary)["arm"].tolist() == ["base"]


def test_cells_that_train_at_ramp_depend_on_its_section_and_no_others_do(p):
    """Also transferred examples and attacks of one's own, where it is among the arms; the arms' own networks do not."""
    tree = params.merge(
        p.model_dump(), {"own": {"attacks": ["bim"]}, "evasion": {"attacks": {"scenarios": ["fgsm", "pgd20"]}}}
    )
    before, after = (params.validate(params.merge(tree, change)) for change in ({}, {"at_ramp": {"hold": 0.5}}))
    planned = {
        name: [ev.quick(q, ("base", *more)) for q in (before, after)]
        for name, more in (("it", ["at_ramp"]), ("not", []))
    }
    for name, (old, new) in planned.items():
        moved = {
            a.name
            for a, b in zip(old, new, strict=True)
            if cells.identity(ev.EXPERIMENT, "", before, a) != cells.identity(ev.EXPERIMENT, "", after, b)
        }
        touched = {cell.name for cell in old if "at_ramp" in cell.variants}
        assert moved == touched
        assert bool(touched) == (name == "it")
    assert {cell.arm for cell in planned["it"][0] if "at_ramp" in cell.variants} == {"ramp", "transfer", "own"}


def test_a_profile_may_name_more_seeds_or_fewer_arms_elsewhere():
    full = params.load("full")
    more = params.validate(params.merge(full.model_dump(), {"seeds": {"evaluation": list(range(8))}}))
    names = [cell.name for cell in evasion_record.plan("phantom", more)]
    assert len(names) == len(set(names))
    fewer = {"record": {"other_modality": {"evasion": ["base", "hardened"]}}, "evasion": {"eps": 1, "sweep": [4, 8]}}
    fewer = params.validate(params.merge(full.model_dump(), fewer))
    plan = evasion_record.plan("fundus", fewer)
    assert {cell.variants for cell in plan} == {("base",), ("hardened",)}
    assert all(cells.resolved(fewer, cell).evasion.eps == 1 for cell in plan)
    wrong = params.validate(
        params.merge(full.model_dump(), {"record": {"other_modality": {"near": {"arms": ["bse"]}}}})
    )
    with pytest.raises(InputError, match=r"near\.arms"):
        evasion_record.plan("phantom", wrong)


def test_a_longer_network_is_trained_like_at_ramp_without_its_attack(p):
    setup = evasion_arms.prepare("npz", p)
    recipes = [evasion_arms.recipe_of(p, evasion_arms.ARMS[name]).model_dump() for name in ("longer", "at_ramp")]
    assert {key for key in recipes[0] if recipes[0][key] != recipes[1][key]} == {"eps"}
    assert recipes[0]["eps"] == 0
    names = {evasion_arms.identity(setup, name) for name in ("base", "longer", "at_ramp", "hardened_plain")}
    assert len(names) == 4
    other = params.validate(params.merge(p.model_dump(), {"at_ramp": {"hold": 0.5}}))
    changed = evasion_arms.Setup(other, setup.cohort, setup.splits)
    assert evasion_arms.identity(changed, "at_ramp") != evasion_arms.identity(setup, "at_ramp")
    assert evasion_arms.identity(changed, "base") == evasion_arms.identity(setup, "base")


def test_views_of_a_summary(p, transferred):
    """A small record, through every table and figure of the notebook."""
    p = params.validate(params.merge(p.model_dump(), {"evasion": {"attacks": {"slow_images": 20}}}))
    runs = [ev.arm_cell("npz", p, variant, seed) for variant in ("base", "prune_cbam") for seed in (0, 1)]
    runs += [transferred[2][lambda t: t["variant"] != "hardened"]]
    runs += [ev.prune_cell("npz", p, "prune", 0, ratio) for ratio in (0.0, 0.5)]
    summary = ev.summarise(pd.concat(runs), p)
    e = p.evasion
    told_eps = ev.eps_key(e.eps / 255)
    rates = evasion_tables.rates(summary, e)
    assert rates["variant"].unique().tolist() == ["base", "prune_cbam"]
    assert set(rates.loc[rates["variant"] == "base", "group"]) == set(evasion_tables.READINGS) - {
        "transfer, related f₀"
    }
    assert not rates.duplicated(["variant", "group"]).any()
    made = evasion_tables.transferred(summary, e)
    assert list(made.columns) == ["f₀", "attack", "f₀ itself", "base", "prune_cbam"]
    assert len(made) == 3 + 3 + 3 + 1, "of the same seed, other seeds, another architecture, several"
    assert (made["f₀ itself"] != "").all()
    kin = made.set_index(["f₀", "attack"]).loc[("same seed", "PGD")]
    where = {"variant": "prune_cbam", "scenario": "pgd20", "metric": "dr_transfer", "eps": told_eps}
    assert kin["base"] == "", "an arm's own cell has no transfer from itself"
    assert kin["prune_cbam"] == tables.cell(summary, 2, **where)
    paired = tables.row(summary, **where | {"metric": "dr_transfer_minus_base", "f0": "other_seeds"})
    values = [
        tables.row(summary, **where | {"variant": v, "f0": "other_seeds"})["value"] for v in ("prune_cbam", "base")
    ]
    assert paired["value"] == pytest.approx(values[0] - values[1])
    fig, _ = evasion_plots.rates(rates, {"a": 0.5}, "")
    plt.close(fig)
    table = evasion_tables.headline(summary, e)
    assert table["arm"].tolist() == ["base", "prune_cbam"]
    worst = {"variant": "base", "scenario": "worst_case", "eps": told_eps}
    assert table.loc[0, "worst case, rate"] == tables.cell(summary, 2, **worst, metric="dr_whitebox")
    assert table.loc[0, "worst case, of all images"] == tables.cell(summary, 2, **worst, metric="accuracy")
    known = evasion_tables.whitebox(summary, e)
    assert list(known.columns) == ["attack", "base", "prune_cbam"]
    assert {"noise", "pgd20", "autoattack", "worst case"} <= set(known["attack"])
    assert known.loc[(known == "").any(axis=1), "attack"].tolist() == ["pgd detached"], "the plain network has no gates"
    curve = evasion_tables.over_eps(summary, ["base"])
    assert curve["x"].tolist() == pytest.approx([0, 4, 2, 8], abs=1e-3)
    pair = np.zeros((2, 1, 4, 4), np.uint8), np.full((2, 1, 4, 4), 8, np.uint8)
    bound = evasion_tables.over_eps(summary, ["base"], pair)
    bound = bound[bound["name"] == evasion_tables.BOUND]
    assert dict(zip(bound["x"], bound["value"], strict=True)) == {0: 1, 2: 1, 4: 0.5, 8: 0.5}
    assert {k: v["x"].tolist() for k, v in evasion_tables.over_pruning(summary, e, ["prune"]).items()} == {
        "accuracy, clean": [0, 0.5],
        "accuracy, PGD 4/255": [0, 0.5],
    }
    assert evasion_tables.over_pruning(summary, e, ["base"]) == {}
    shown = evasion_tables.paper(summary, e, {"PGD (7 %)": 0.07, "DeepFool (6 %)": 0.06}, ["prune_cbam", "retrain"])
    assert shown["published"].unique().tolist() == ["PGD, 0.0700", "DeepFool, 0.0600"]
    told = shown.set_index(["published", "read as", "eps"])
    expected = tables.cell(summary, 2, variant="prune_cbam", scenario="pgd20", metric="dr_whitebox", eps="0.0313725")
    assert told.loc[("PGD, 0.0700", "white-box", "8/255"), "prune_cbam"] == expected
    assert {r for r, _ in told.loc["DeepFool, 0.0600"].index} == set(evasion_tables.READINGS)
    assert {eps for _, eps in told.loc["DeepFool, 0.0600"].index} == {"4/255, cut to it"}
    assert (shown["retrain"] == "").all(), "no such arm in this table"
    checks = evasion_tables.checks(summary, p.review)
    assert list(checks.columns) == ["check", "it passes where", "passed", "arms in which it failed"]
    assert set(checks["check"]) == {name.replace("_", " ") for name in evasion_checks.QUESTIONS}
    checks = checks.set_index("check")
    assert checks.loc["undefended breaks", "passed"].endswith("of 2 runs"), "asked of the plain network only"
    assert checks.loc["no zero gradients"].tolist()[1:] == ["4 of 4 runs", ""]
    clean = tables.row(summary, variant="base", scenario="clean", metric="accuracy")
    slow = tables.row(summary, variant="base", scenario="autoattack", metric="accuracy", eps=told_eps)
    images, fewer = clean["n_items"] // 2, slow["n_items"] // 2
    assert fewer < images, "or the next line shows nothing"
    assert evasion_tables.size(summary) == f"2 seeds of {images} images (Square and AutoAttack: {fewer})"
    kept = evasion_tables.contributions(summary).set_index("arm")
    whole = {"variant": "base", "scenario": "autoattack", "metric": "dr_whitebox"}
    assert kept.loc["base", "AutoAttack, 4/255: rate"] == tables.cell(summary, 3, **whole, eps=told_eps)
    right = {**whole, "metric": "accuracy"}
    assert kept.loc["base", "AutoAttack, 4/255: accuracy"] == tables.cell(summary, 3, **right, eps=told_eps)
    assert kept.loc["at", "AUC"] == "", "no such arm in this table"
    far = evasion_tables.distances(summary).set_index("arm")
    length = {"variant": "base", "scenario": "deepfool", "metric": "median_norm"}
    pixels = tables.row(summary, **length, norm="linf")
    assert far.loc["base", "DeepFool, L2"].startswith(tables.cell(summary, 2, **length, norm="l2"))
    assert far.loc["base", "DeepFool, largest change (255ths)"].startswith(f"{255 * pixels['value']:.2f} [")
    assert list(far.index) == ["base", "prune_cbam"]
    epochs = [recipe.epochs for recipe in (e.clean, e.robust, e.hardened, p.at_ramp)]
    assert evasion_tables.recipes(e, p.at_ramp)["epochs"].tolist() == epochs
    assert evasion_tables.pointing(summary)[0].empty
    setup = evasion_arms.prepare("npz", p)
    x, y = (part[:3] for part in setup.splits["test"])
    fig, axes = evasion_plots.examples(x, {"base": x}, "", times=10, answers={"base": 1 - y}, y=y)
    assert axes.shape == (3, 3)
    plt.close(fig)
    fig, axes = evasion_plots.looks(x, {"a": x[:, 0], "flat\nb": torch.zeros(3, 28, 28)}, None, "")
    assert axes.shape == (3, 3)
    plt.close(fig)


def test_a_check_that_fails_names_its_arm():
    rows = [("base", 1.0), ("cbam", 0.6), ("prune", 0.0)]
    summary = pd.DataFrame([{"variant": v, "value": x, "n": 5} for v, x in rows])
    told = evasion_tables.checks(
        summary.assign(scenario="check", metric="converged", unit="passes"), params.load().review
    )
    assert told["passed"].tolist() == ["8 of 15 runs"]
    assert told["arms in which it failed"].tolist() == ["`cbam`, 3 of 5; `prune`, 0 of 5"]


def test_pointing_in_the_order_of_the_arms_with_its_controls_apart():
    rows = [
        {"variant": variant, "map": name, "value": value, "low": value, "high": value}
        for variant in ("hardened", "base")
        for name, value in (("area", 0.1), ("prior", 0.5), ("grad_cam", 0.3), ("cbam1", 0.2))
    ]
    summary = pd.DataFrame(rows).assign(scenario="attribution", metric="pointing_game", eps="")
    table, controls = evasion_tables.pointing(pd.concat([summary, summary.assign(eps="0.0156863", value=0.9)]))
    assert table["variant"].tolist() == ["base", "base", "hardened", "hardened"]
    assert controls == {"a point at random": 0.1, "always where most lesions are": 0.5}
    fig, ax = evasion_plots.pointing(table, controls, "title")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", "hardened"]
    assert [t.get_text() for t in fig.legends[0].get_texts()][-2:] == list(controls)
    plt.close(fig)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_differences_are_paired_with_the_base_of_the_same_seed(p):
    def row(variant, seed, value, metric="accuracy", **keys):
        return tables.run_row(ev.KEYS, seed, variant, "clean", metric, value, 10, **keys)

    runs = pd.DataFrame(
        [row("base", 0, 0.9), row("base", 1, 0.8), row("at", 0, 0.85), row("at", 1, 0.83), row("at", 2, 0.1)]
    )
    summary = ev.summarise(runs, p)
    paired = tables.row(summary, variant="at", scenario="clean", metric="accuracy_minus_base")
    assert paired["n"] == 2
    assert paired["value"] == pytest.approx((-0.05 + 0.03) / 2)
    assert not summary["metric"][summary["variant"] == "base"].str.contains("minus").any()


def test_an_attack_that_fails_has_no_short_way():
    """Examples that are not turned are infinitely far: a failing DeepFool cannot look like a fragile model."""
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    sure = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(sure[1].weight)
    sure[1].bias.data = torch.tensor([1.0, 0.0])
    found = adversarial.deepfool(sure.eval(), x, y, norm="l2", steps=2)
    run = ev.Run(None, "base", sure, 0)
    ev.median_norm(run, "deepfool", x, y, found, "l2")
    assert [(row["metric"], row["value"]) for row in run.rows] == [("accuracy", 1)]
