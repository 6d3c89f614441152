"""What paper 3 changes in a network: attention, and pruned weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from medsec.core.errors import InputError
from medsec.evasion import pruning
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


def test_bad_input_is_named():
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
