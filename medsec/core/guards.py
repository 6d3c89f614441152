"""Checks of what is handed in: images, labels, gradients, BatchNorm, shares. They raise `InputError`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medsec.core.errors import InputError

__all__: list[str] = []  # for the other modules of the package


def check_gradient(model: nn.Module, found: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, as a list.

    Raises:
        InputError: not one tensor a parameter, of its shape, or a value that is not finite.
    """
    parameters = list(model.named_parameters())
    if len(found) != len(parameters):
        raise InputError(f"{len(found)} gradients for {len(parameters)} parameters: need one each, in their order")
    for (name, p), g in zip(parameters, found, strict=True):
        if g.shape != p.shape:
            raise InputError(f"gradient of {name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
        if not torch.isfinite(g).all():
            raise InputError(f"gradient of {name} holds NaN or infinite values: the model diverged; lower its lr")
    return list(found)


def check_labels(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raises InputError unless y is (B,) int64 for the B images of x, with classes that the model's head knows."""
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise InputError(
            f"labels of shape {tuple(y.shape)}, {y.dtype}, for {len(x)} images: need ({len(x)},), torch.int64"
        )
    classes = getattr(getattr(model, "head", None), "out_features", math.inf)
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise InputError(f"labels from {low} to {high}, but the model knows the classes 0 to {classes - 1}")


def check_batch(model: nn.Module, x: Tensor, y: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises InputError unless images and labels fit the model, and the images a generator of ``shape`` (C, S, S)."""
    check_images(x)
    check_labels(model, x, y)
    if x.shape[1:] != shape:
        raise InputError(f"images of shape {tuple(x.shape[1:])}, but the shadow generator draws {shape}")


def check_independent(model: nn.Module) -> None:
    """Raises InputError if BatchNorm makes one image's output depend on the others."""
    if normalises_by_batch(model):
        raise InputError(
            "BatchNorm in training mode mixes the images of a batch: use model.eval() or a model without it"
        )


def check_share(name: str, share: float) -> None:
    """Raises InputError unless 0 < share ≤ 1."""
    if not 0 < share <= 1:
        raise InputError(f"{name} {share} must be a share, more than 0 and at most 1")


def share_of(share: float, n: int) -> int:
    """How many of n things a share is: the nearest number, at least one."""
    return max(1, int(share * n + 0.5))


def check_images(x: Tensor) -> None:
    """Raises InputError unless x is (B, C, S, S) with values in [0, 1]."""
    if x.ndim != 4 or not len(x):
        raise InputError(f"images of shape {tuple(x.shape)}: need (B, C, S, S) with B >= 1")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"images range from {low:.3g} to {high:.3g}; scale them to [0, 1]")


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether any BatchNorm is in training mode, so that one image's output depends on the others."""
    return any(isinstance(m, nn.BatchNorm2d) and m.training for m in model.modules())


def check_norm(model: nn.Module, batch: int) -> None:
    """Raises InputError where BatchNorm would have to normalise by one image."""
    if batch == 1 and normalises_by_batch(model):
        raise InputError("BatchNorm in training mode with a batch of 1: use model.eval() or a larger batch")
