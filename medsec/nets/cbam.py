"""Attention for the classifier of paper 3: CBAM (Woo et al. 2018) in every residual block."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.nets.models import Residual, SmallResNet

__all__ = ["CBAM", "attend"]


class CBAM(nn.Module):
    """Convolutional block attention module: first a gate for every channel, then one for every pixel.

    ``forward(x)``: (N, C, H, W) -> the same shape. ``pixel_gate(x)`` -> (N, 1, H, W) in (0, 1), where it looks.

    Args:
        channels: C.
        reduction: by which the hidden layer of the channel gate is narrower (section 3.1).
        kernel: pixels a side of the pixel gate's convolution, odd (section 3.2).

    Raises:
        InputError: an even kernel, or a reduction that leaves no channel.
    """

    def __init__(self, channels: int, reduction: int, kernel: int):
        super().__init__()
        if channels // reduction < 1 or kernel % 2 == 0:
            raise InputError(
                f"CBAM of {channels} channels: reduction {reduction} must leave one, kernel {kernel} be odd"
            )
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.detached = False  # set by `gates_detached`

    def channel_gate(self, x: Tensor) -> Tensor:
        pooled = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return pooled.sigmoid()[:, :, None, None]

    def pixel_gate(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.conv(pooled).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        for gate in (self.channel_gate, self.pixel_gate):
            value = gate(x)
            x = x * (value.detach() if self.detached else value)
        return x


def attend(model: SmallResNet, *, reduction: int, kernel: int) -> SmallResNet:
    """Put a `CBAM` into every residual block of a network, after the last normalisation and before the addition.

    Changes and returns ``model``; the new weights come from PyTorch's global random stream.
    """
    for block in model.blocks:
        assert isinstance(block, Residual)
        block.bn2 = nn.Sequential(block.bn2, CBAM(block.bn2.num_features, reduction, kernel))
    return model


def modules(model: nn.Module) -> list[CBAM]:
    """The attention modules of a network, from input to output."""
    return [module for module in model.modules() if isinstance(module, CBAM)]


@contextlib.contextmanager
def gates_detached(model: nn.Module) -> Iterator[nn.Module]:
    """Gates count as constants in the backward pass: an attacker whose gradients the gates would hide (adaptive attack)."""
    gates = modules(model)
    for module in gates:
        module.detached = True
    try:
        yield model
    finally:
        for module in gates:
            module.detached = False


@torch.no_grad()
def maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Where every attention module looks: its pixel gate (N, 1, h, w) for some images.

    Raises:
        InputError: a network without attention.
    """
    seen: list[Tensor] = []

    def look(module: CBAM, args: tuple[Tensor], _) -> None:
        seen.append(module.pixel_gate(args[0] * module.channel_gate(args[0])))

    gates = modules(model)
    if not gates:
        raise InputError("this network has no attention module; build it with medsec.nets.cbam.attend")
    hooks = [module.register_forward_hook(look) for module in gates]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
