"""What makes the networks of notebook 04 robust: attention, pruned weights, and training with adversarial examples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from experiments import params
from medsec.core.errors import InputError
from medsec.evasion import pruning
from medsec.evasion import training as robust
from medsec.nets import cbam as attention
from medsec.nets.cbam import CBAM
from medsec.nets.models import SmallResNet


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return SmallResNet(1, 2).eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return attention.attend(SmallResNet(1, 2), reduction=4, kernel=7).eval()


# Attention ------------------------------------------------------------------------------------------------------------


def test_cbam_by_hand():
    """Section 3 of Woo et al. 2018, written out with loops."""
    torch.manual_seed(0)
    module, x = CBAM(8, 4, 3), torch.randn(2, 8, 5, 6)
    expected = torch.empty_like(x)
    for n in range(2):
        mean = torch.tensor([float(x[n, c].mean()) for c in range(8)])
        most = torch.tensor([float(x[n, c].max()) for c in range(8)])
        gated = x[n] * torch.sigmoid(module.mlp(mean) + module.mlp(most))[:, None, None]
        pooled = torch.stack([gated.mean(0), gated.max(0).values])
        expected[n] = gated * torch.sigmoid(nn.functional.conv2d(pooled[None], module.conv.weight, padding=1)[0])
    torch.testing.assert_close(module(x), expected)


def test_it_sits_after_the_last_normalisation_and_before_the_addition(model):
    plain = SmallResNet(1, 2).eval()
    assert len(attention.modules(model)) == len(plain.blocks) == 3
    block, x = model.blocks[1], torch.randn(2, 16, 8, 8)
    hidden = block.conv2(torch.relu(block.bn1(block.conv1(x))))
    norm, cbam = block.bn2
    torch.testing.assert_close(block(x), torch.relu(cbam(norm(hidden)) + block.skip(x)))


def test_detached_gates_leave_the_answer_and_change_the_gradient(model):
    x = torch.rand(2, 1, 16, 16, requires_grad=True)
    answers, gradients = [], []
    for detached in (False, True, False):
        if detached:
            with attention.gates_detached(model):
                out = model(x)
        else:
            out = model(x)
        answers.append(out.detach())
        gradients.append(torch.autograd.grad(out[:, 0].sum(), x)[0])
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2]), "only within the context"


def test_gates_are_free_again_after_an_error(model):
    with pytest.raises(RuntimeError, match="planned"), attention.gates_detached(model):
        raise RuntimeError("planned")
    assert not any(module.detached for module in attention.modules(model))


def test_maps_are_the_gates_that_were_used(model):
    x = torch.rand(3, 1, 32, 32)
    before = copy.deepcopy(model.state_dict())
    found = attention.maps(model, x)
    assert [tuple(m.shape) for m in found] == [(3, 1, 16, 16), (3, 1, 8, 8), (3, 1, 4, 4)]
    assert all(0 < float(m.min()) <= float(m.max()) < 1 for m in found)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    seen = []
    cbam = attention.modules(model)[0]
    hook = cbam.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
    hook.remove()
    value, out = seen[0]
    torch.testing.assert_close(out, value * cbam.channel_gate(value) * found[0])


def test_bad_attention_is_named():
    with pytest.raises(InputError, match="kernel 4 be odd"):
        CBAM(8, 2, 4)
    with pytest.raises(InputError, match="reduction 16 must leave one"):
        CBAM(8, 16, 3)
    with pytest.raises(InputError, match="no attention module"):
        attention.maps(SmallResNet(1, 2).eval(), torch.rand(1, 1, 16, 16))


# Pruning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_masks_are_those_of_pytorch(plain, ratio):
    keep, other = pruning.masks(plain, ratio), copy.deepcopy(plain)
    layers = [(m, "weight") for m in other.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=ratio)
    for mine, (layer, _) in zip(keep.values(), layers, strict=True):
        assert torch.equal(mine, layer.weight_mask.bool())


def test_what_is_pruned_is_the_smallest_and_stays_zero(plain):
    before = {name: weight.detach().clone() for name, weight in pruning.weights(plain).items()}
    keep = pruning.masks(plain, 0.8)
    pruning.apply(plain, keep)
    gone = torch.cat([before[name][~keep[name]].abs() for name in before])
    left = torch.cat([before[name][keep[name]].abs() for name in before])
    assert gone.max() <= left.min()
    assert pruning.sparsity(plain) == pytest.approx(0.8, abs=1e-4)
    for name, weight in pruning.weights(plain).items():
        assert torch.equal(weight[keep[name]], before[name][keep[name]])


@given(ratio=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_ratio_is_exact_even_among_equal_weights(ratio):
    net = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.ones_(net[0].weight)
    pruning.apply(net, pruning.masks(net, ratio))
    assert (net[0].weight == 0).sum() == round(ratio * 100)


def test_bad_pruning_is_named(plain):
    for ratio in (-0.1, 1.0, 2.0):
        with pytest.raises(InputError, match=f"prune ratio {ratio:g}: must be at least 0 and less than 1"):
            pruning.masks(plain, ratio)
    with pytest.raises(InputError, match="Sequential has no convolution and no linear layer"):
        pruning.masks(nn.Sequential(nn.BatchNorm2d(3)), 0.5)
    with pytest.raises(InputError, match="masks are of another network"):
        pruning.apply(SmallResNet(3, 2), pruning.masks(plain, 0.5))


# Training: adversarial examples, TRADES, mean weights, masks that stay ------------------------------------------------

RECIPE = params.load().evasion.clean.model_copy(update={"epochs": 2, "batch": 16, "finetune_epochs": 1})
ATTENTION = params.load().evasion.attention


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


def test_eps_rises_evenly_over_its_share_of_the_steps_and_then_stays(monkeypatch):
    """50 images in batches of 16 are 4 steps an epoch; over half of 4 epochs eps has risen to 8 after the 8th step."""
    used, real = [], robust._loss

    def watched(model, x, y, recipe, rng, weight):
        used.append(recipe.eps)
        return real(model, x, y, recipe, rng, weight)

    monkeypatch.setattr(robust, "_loss", watched)
    recipe = RECIPE.model_copy(update={"eps": 8.0})
    risen = fit(recipe, epochs=4, ramp=0.5)
    assert used == [0, 1, 2, 3, 4, 5, 6, 7, *[8] * 8]
    used.clear()
    at_once = fit(recipe, epochs=4)
    assert used == [8] * 16
    assert not same(risen, at_once)
    for ramp in (-0.1, 1.5):
        with pytest.raises(InputError, match=rf"ramp {ramp}, hold 0: must be in \[0, 1\]"):
            fit(recipe, ramp=ramp)


def test_eps_waits_until_the_network_is_right_and_never_falls():
    """The running share by hand; a rare class counts as much as it weighs."""
    rising, right, one = robust.Rising(4.0, steps=2, hold=0.8), torch.tensor([True, False]), torch.ones(2)
    rising.saw(right, one)
    assert (rising.right, rising.eps) == (0.5, 0.0)
    rising.saw(right, torch.tensor([3.0, 1.0]))
    assert (rising.right, rising.eps) == (pytest.approx((0.95 * 0.5 + 0.75) / 1.95), 0.0)
    waited = 0
    while not rising.eps:
        rising.saw(right | True, one)
        waited += 1
    assert (waited, rising.eps) == (2, 2.0)  # (0.95³·0.5 + 0.95²·0.75 + 0.95 + 1) / (0.95³ + 0.95² + 0.95 + 1) = 0.827
    for eps in (4.0, 4.0):
        rising.saw(right | True, one)
        assert rising.eps == eps
    for _ in range(20):
        rising.saw(right & False, one)
    assert rising.right < 0.8
    assert rising.eps == 4.0
    assert rising.applied(RECIPE).eps == 4.0
    assert robust.Rising(4.0, steps=0, hold=0.9).eps == 4.0, "no ramp: from the start"


def test_new_networks_differ_by_seed_and_share_what_is_not_attention():
    assert same(robust.new(1, 2, seed=0), robust.new(1, 2, seed=0))
    assert not same(robust.new(1, 2, seed=0), robust.new(1, 2, seed=1))
    plain, attending = robust.new(1, 2, seed=0), robust.new(1, 2, seed=0, cbam=ATTENTION)
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
    loss, _ = robust._loss(model, x, y, recipe, torch.Generator().manual_seed(0))
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
    model = fit(cbam=ATTENTION)
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


def test_bad_training_is_named():
    x, y = data(8)
    model = robust.new(1, 2, seed=0)
    with pytest.raises(InputError, match=r"scale them to \[0, 1\]"):
        robust.fit(model, x + 1, y, RECIPE, seed=0, epochs=1, lr=1e-3)
    with pytest.raises(InputError, match=r"labels of shape \(7,\)"):
        robust.fit(model, x, y[:7], RECIPE, seed=0, epochs=1, lr=1e-3)
    with pytest.raises(InputError, match="prune ratio 1"):
        robust.pruned(model, x, y, RECIPE, ratio=1.0, seed=0)
