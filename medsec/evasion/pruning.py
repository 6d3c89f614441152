"""Unstructured magnitude pruning (paper 3; Han et al. 2015): the smallest weights of all layers together become zero."""

import torch
from torch import Tensor, nn

from medsec.core.errors import InputError

__all__ = ["apply", "masks", "sparsity", "weights"]

Masks = dict[str, Tensor]  # name of a weight -> bool of its shape, True where it stays
PRUNABLE = (nn.Conv2d, nn.Linear)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What may be pruned: the weights of convolutions and linear layers, without biases and normalisation.

    Raises:
        InputError: there is none.
    """
    prunable = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, PRUNABLE)}
    if not prunable:
        raise InputError(f"{type(model).__name__} has no convolution and no linear layer: nothing to prune")
    return prunable


def masks(model: nn.Module, ratio: float) -> Masks:
    """Which weights stay when the ``ratio`` that is smallest in absolute value goes, all layers compared together (L1).

    As `torch.nn.utils.prune.global_unstructured`, but of equal weights the first go, so that every computer gets the same.

    >>> layer = nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -3.0, 2.0, -0.2]]))
    >>> masks(nn.Sequential(layer), ratio=0.5)
    {'0.weight': tensor([[False,  True,  True, False]])}

    Raises:
        InputError: a ratio outside [0, 1), or a model without prunable layers.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"prune ratio {ratio:g}: must be at least 0 and less than 1")
    prunable = weights(model)
    sizes = torch.cat([weight.detach().abs().flatten() for weight in prunable.values()])
    keep = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    keep[sizes.argsort(stable=True)[: round(ratio * len(sizes))]] = False
    parts = keep.split([weight.numel() for weight in prunable.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(prunable.items(), parts, strict=True)}


@torch.no_grad()
def apply(model: nn.Module, keep: Masks) -> nn.Module:
    """Set the pruned weights to zero, in place; to be called again after every step of an optimiser.

    Raises:
        InputError: masks of another network.
    """
    prunable = weights(model)
    shapes = {name: weight.shape for name, weight in prunable.items()}
    if {name: mask.shape for name, mask in keep.items()} != shapes:
        raise InputError("these masks are of another network: names or shapes of the weights differ")
    for name, weight in prunable.items():
        weight.mul_(keep[name])
    return model


def sparsity(model: nn.Module) -> float:
    """Share of the prunable weights that are zero."""
    values = torch.cat([weight.detach().flatten() for weight in weights(model).values()])
    return float((values == 0).float().mean())
