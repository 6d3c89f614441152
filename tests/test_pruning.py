import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from medsec.core.errors import InputError
from medsec.evasion import pruning
from medsec.nets.models import SmallResNet


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SmallResNet(1, 2).eval()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_masks_are_those_of_pytorch(model, ratio):
    keep, other = pruning.masks(model, ratio), copy.deepcopy(model)
    layers = [(m, "weight") for m in other.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=ratio)
    for mine, (layer, _) in zip(keep.values(), layers, strict=True):
        assert torch.equal(mine, layer.weight_mask.bool())


def test_what_is_pruned_is_the_smallest_and_stays_zero(model):
    before = {name: weight.detach().clone() for name, weight in pruning.weights(model).items()}
    keep = pruning.masks(model, 0.8)
    pruning.apply(model, keep)
    gone = torch.cat([before[name][~keep[name]].abs() for name in before])
    left = torch.cat([before[name][keep[name]].abs() for name in before])
    assert gone.max() <= left.min()
    assert pruning.sparsity(model) == pytest.approx(0.8, abs=1e-4)
    for name, weight in pruning.weights(model).items():
        assert torch.equal(weight[keep[name]], before[name][keep[name]])


@given(ratio=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_ratio_is_exact_even_among_equal_weights(ratio):
    net = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.ones_(net[0].weight)
    pruning.apply(net, pruning.masks(net, ratio))
    assert (net[0].weight == 0).sum() == round(ratio * 100)


def test_bad_input_is_named(model):
    for ratio in (-0.1, 1.0, 2.0):
        with pytest.raises(InputError, match=f"prune ratio {ratio:g}: must be at least 0 and less than 1"):
            pruning.masks(model, ratio)
    with pytest.raises(InputError, match="Sequential has no convolution and no linear layer"):
        pruning.masks(nn.Sequential(nn.BatchNorm2d(3)), 0.5)
    with pytest.raises(InputError, match="masks are of another network"):
        pruning.apply(SmallResNet(3, 2), pruning.masks(model, 0.5))
