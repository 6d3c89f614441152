"""Training for notebook 04: adversarial examples in training, TRADES, mean weights, masks that stay."""

import pytest
import torch
import torch.nn.functional as F

from experiments import params
from medsec.core.errors import InputError
from medsec.evasion import pruning
from medsec.evasion import training as robust
from medsec.nets import cbam as attention

RECIPE = params.load().evasion.clean.model_copy(update={"epochs": 2, "batch": 16, "finetune_epochs": 1})
CBAM = params.load().evasion.attention


def data(n=50):
    rng = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 2
    return (0.4 + 0.2 * y[:, None, None, None] + 0.05 * torch.randn(n, 1, 16, 16, generator=rng)).clamp(0, 1), y


def fit(recipe=RECIPE, seed=0, epochs=2, cbam=None, **more):
    x, y = data()
    model = robust.new(1, 2, seed=seed, cbam=cbam)
    return robust.fit(model, x, y, recipe, seed=seed, epochs=epochs, lr=2e-3, **more)


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_is_a_function_of_the_seed_and_leaves_the_start_alone():
    x, y = data()
    start = robust.new(1, 2, seed=0)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    torch.manual_seed(1)
    first = robust.fit(start, x, y, RECIPE, seed=3, epochs=1, lr=2e-3)
    torch.manual_seed(2)
    second = robust.fit(start, x, y, RECIPE, seed=3, epochs=1, lr=2e-3)
    assert same(first, second)
    assert not first.training
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
    assert not same(first, robust.fit(start, x, y, RECIPE, seed=4, epochs=1, lr=2e-3))


def test_new_networks_differ_by_seed_and_share_what_is_not_attention():
    assert same(robust.new(1, 2, seed=0), robust.new(1, 2, seed=0))
    assert not same(robust.new(1, 2, seed=0), robust.new(1, 2, seed=1))
    plain, attending = robust.new(1, 2, seed=0), robust.new(1, 2, seed=0, cbam=CBAM)
    assert len(attention.modules(attending)) == 3
    assert torch.equal(plain.stem[0].weight, attending.stem[0].weight)


def test_examples_in_training_lie_in_the_ball_and_raise_the_loss():
    x, y = data()
    model = fit(epochs=4)
    for recipe in ({"eps": 8.0}, {"eps": 8.0, "steps": 3, "step": 0.5}, {"eps": 8.0, "beta": 6.0, "steps": 2}):
        recipe = RECIPE.model_copy(update=recipe)
        clean = model(x) if recipe.beta else None
        found = robust._adversarial(model, x, y, clean, recipe, torch.Generator().manual_seed(0))
        assert float((found - x).abs().max()) <= 8 / 255 + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        assert F.cross_entropy(model(found), y) > F.cross_entropy(model(x), y)


def test_trades_by_hand():
    """Equation 5 of Zhang et al. 2019 on given answers."""
    clean, changed = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 3.0]])
    p, q = clean.softmax(1), changed.softmax(1)
    by_hand = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i in range(2) for k in range(2)) / 2
    assert float(robust._divergence(clean, changed)) == pytest.approx(by_hand, abs=1e-6)
    recipe = RECIPE.model_copy(update={"eps": 4.0, "beta": 6.0})
    model, (x, y) = robust.new(1, 2, seed=0).train(), data(8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss = robust._loss(model, x, y, recipe, torch.Generator().manual_seed(0))
    model.load_state_dict(state)
    clean = model(x)
    found = robust._adversarial(model, x, y, clean, recipe, torch.Generator().manual_seed(0))
    expected = F.cross_entropy(clean, y) + 6 * F.kl_div(
        model(found).log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_mean_weights_differ_from_the_last_and_keep_their_zeros():
    recipe = RECIPE.model_copy(update={"ema": 0.5})
    averaged, last = fit(recipe, epochs=1), fit(epochs=1)
    assert not same(averaged, last)
    keep = pruning.masks(last, 0.5)
    sparse = fit(recipe, keep=keep)
    assert pruning.sparsity(sparse) == pytest.approx(0.5, abs=1e-3), "a mean of zeros is zero"


def test_pruned_weights_stay_zero_and_the_control_prunes_nothing():
    x, y = data()
    model = fit(cbam=CBAM)
    found = robust.pruned(model, x, y, RECIPE, ratio=0.8, seed=0)
    keep = pruning.masks(model, 0.8)
    for name, weight in pruning.weights(found).items():
        assert not weight[~keep[name]].any()
    assert pruning.sparsity(found) >= 0.799
    control = robust.pruned(model, x, y, RECIPE, ratio=0.0, seed=0)
    assert pruning.sparsity(control) < 0.01
    assert not same(control, model)


def test_every_class_counts_alike():
    labels = torch.tensor([0, 1, 1, 1])
    weight = robust.class_weights(labels)
    assert weight.tolist() == pytest.approx([2, 2 / 3])
    assert weight[labels].mean().item() == pytest.approx(1)
    assert robust.class_weights(torch.tensor([0, 0, 2])).tolist() == pytest.approx([0.75, 0, 1.5])
    logits = torch.tensor([[0.0, 0.0]] * 4)
    assert robust._cross_entropy(logits, labels, weight).item() == pytest.approx(F.cross_entropy(logits, labels).item())
    wrong_once = torch.tensor([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]])
    by_hand = F.cross_entropy(wrong_once, labels, weight=weight).item()
    assert robust._cross_entropy(wrong_once, labels, weight).item() == pytest.approx(by_hand)


def test_a_last_batch_of_one_is_left_out():
    x, y = data(17)
    model = robust.fit(robust.new(1, 2, seed=0), x, y, RECIPE, seed=0, epochs=1, lr=1e-3)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())


def test_bad_input_is_named():
    x, y = data(8)
    model = robust.new(1, 2, seed=0)
    with pytest.raises(InputError, match=r"scale them to \[0, 1\]"):
        robust.fit(model, x + 1, y, RECIPE, seed=0, epochs=1, lr=1e-3)
    with pytest.raises(InputError, match=r"labels of shape \(7,\)"):
        robust.fit(model, x, y[:7], RECIPE, seed=0, epochs=1, lr=1e-3)
    with pytest.raises(InputError, match="prune ratio 1"):
        robust.pruned(model, x, y, RECIPE, ratio=1.0, seed=0)
