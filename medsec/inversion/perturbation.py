"""Controls for a perturbation δ of images, of the same ‖δ‖₂ but another shape, and what a perturbation is made of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medsec.core.seeds import derive_seed, fingerprint, torch_generator
from medsec.inversion.defences import Perturbation

__all__ = ["gaussian", "inverted", "offset", "shuffled"]

Control = Callable[[Tensor, int], Tensor]


def shuffled(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: every image's pixels at random places; the channels of a pixel stay together."""
    pixels, rng = delta.flatten(2), torch_generator(seed, "shuffled")
    order = torch.stack([torch.randperm(pixels.shape[2], generator=rng) for _ in pixels]).to(delta.device)
    return pixels.gather(2, order[:, None].expand_as(pixels)).view_as(delta)


def inverted(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: the pixel with the most noise changes places with that with the least, and so on.

    Ranks are reversed, not values: a reversed mask of a few strong places would be little but an offset, which is another
    control. Equal pixels count in the order of their places; the seed is not used.
    """
    pixels = delta.flatten(2)
    order = pixels.norm(dim=1).argsort(dim=1, stable=True)
    source = torch.zeros_like(order).scatter(1, order, order.flip(1))
    return pixels.gather(2, source[:, None].expand_as(pixels)).view_as(delta)


def offset(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: every image brighter by one number; the seed is not used."""
    return _of_norm(torch.ones_like(delta), delta)


def gaussian(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: independent Gaussian noise, scaled to exactly the norm of each image's δ."""
    return _of_norm(torch.randn(delta.shape, generator=torch_generator(seed, "gaussian")).to(delta), delta)


def _of_norm(noise: Tensor, delta: Tensor) -> Tensor:
    wanted, norm = (each.flatten(1).norm(dim=1)[:, None, None, None] for each in (delta, noise))
    return noise * (wanted / norm)


def controlled(perturb: Perturbation, control: Control, *, seed: int) -> Perturbation:
    """The perturbation whose δ is a control of another one's; what is drawn differs between rounds and batches."""

    def changed(model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        delta = perturb(model, x, y, round) - x
        return x + control(delta, derive_seed(seed, "control", round, fingerprint(x)))

    return changed


# What a perturbation is made of --------------------------------------------------------------------------------------


def offset_share(delta: Tensor) -> Tensor:
    """(B, C, S, S) -> (B,): share of ‖δ‖² that is one constant, the mean over all pixels and channels; 0 for δ = 0."""
    flat = delta.flatten(1).double()
    energy = flat.square().sum(1)
    return torch.where(energy > 0, flat.shape[1] * flat.mean(1) ** 2 / energy.clamp_min(1e-300), 0)


def radial_spectrum(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of δ by spatial frequency: the mean and the sum of the squared Fourier coefficients in rings.

    Ring r holds the frequencies whose length, in cycles an image side, rounds to r = 0, 1, …; ring 0 is the mean alone. The
    transform is orthonormal: the sums add up to ‖δ‖².

    Args:
        delta: (B, C, S, S).

    Returns:
        (B, R) the mean over a ring and the channels, and (B, R) the sum.
    """
    energy = torch.fft.fft2(delta.double(), norm="ortho").abs().square().sum(1).flatten(1)
    size = delta.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    ring = torch.hypot(frequency[:, None], frequency[None]).round().long().flatten().to(delta.device)
    total = torch.zeros(len(delta), int(ring.max()) + 1, dtype=torch.float64, device=delta.device)
    total.index_add_(1, ring, energy)
    return total / (torch.bincount(ring) * delta.shape[1]), total
