"""The classifier of notebook 03: small and smooth, so that a gradient says much about an image.

GELU instead of ReLU: an inversion differentiates twice (Zhu et al. 2019, section 3), and where it stalls at kinks a weak
attack would pass for privacy.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.guards import check_images, check_norm
from medsec.core.seeds import derive_seed

__all__ = ["ConvNet", "gradients", "new"]

STRIDES = (1, 2, 1, 2)


def standardise(x: Tensor) -> Tensor:
    """[0, 1] -> [−2, 2], about mean 0 and standard deviation 1 for a radiograph."""
    return 4 * x - 2


class ConvNet(nn.Module):
    """Four 3 × 3 convolutions with GELU and a linear head.

    ``forward(x)``: x (N, C, S, S) in [0, 1] -> logits (N, K); ``features(x)``: what the head sees, (N, D).

    Args:
        size: pixels a side.
        channels: of the images.
        n_classes: K.
        width: feature maps of every convolution.
        norm: BatchNorm after every convolution.
    """

    def __init__(self, size: int, channels: int, n_classes: int, width: int, norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for stride in STRIDES:
            layers.append(nn.Conv2d(before, width, 3, stride, 1))
            layers += [nn.BatchNorm2d(width), nn.GELU()] if norm else [nn.GELU()]
            before, size = width, -(-size // stride)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width * size**2, n_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(standardise(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def new(size: int, channels: int, n_classes: int, *, width: int, seed: int, norm: bool = False) -> ConvNet:
    """A `ConvNet` with weights drawn from ``seed``, in evaluation mode; the global random stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "convnet"))
        return ConvNet(size, channels, n_classes, width, norm).eval()


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradient of the mean cross-entropy of a batch, one tensor a parameter, in the order of ``model.parameters()``.

    Args:
        model: as it is: in training mode, BatchNorm normalises by the batch.
        x: (B, C, S, S) in [0, 1].
        y: (B,) int64.

    Raises:
        InputError: images that are not in [0, 1], or BatchNorm in training mode with a batch of one.
    """
    check_images(x)
    check_norm(model, len(x))
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def logits_and_statistics(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and of every BatchNorm's input (2, F) mean and variance over batch and pixels; its buffers give them away.

    Normalisation itself is the model's: with frozen running statistics (evaluation mode) a batch of one will do.
    """
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(torch.stack([args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), unbiased=False)]))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        return model(x), seen
    finally:
        for hook in hooks:
            hook.remove()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of some tensors as one vector."""
    return torch.cat([t.flatten() for t in tensors])
