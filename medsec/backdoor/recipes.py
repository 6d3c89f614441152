"""Recipes of federated GANs: networks, losses, what the discriminator sees, and the optimiser.

``dcgan`` is small enough for a lesson, ``projection`` draws, ``wgan_gp`` is the "local training regularisation" of the release
of Jin & Li: every client trains with a gradient penalty, a critic without batch normalisation, and RMSprop.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.settings import DCGAN, GAN, ProjectionGAN, WassersteinGAN
from medsec.nets.models import Critic, Discriminator, Generator, ProjectionDiscriminator, UpGenerator

__all__: list[str] = []  # for the other modules of the package


def cross_entropy_d(d: Discriminator, real: Tensor, fake: Tensor, y: Tensor, *_) -> Tensor:
    """The discriminator's loss on as many real as synthetic images (n, C, S, S) of the labels (n,) (Goodfellow et al. 2014)."""
    return F.softplus(-d(real, y)).mean() + F.softplus(d(fake, y)).mean()


def cross_entropy_g(d: Discriminator, fake: Tensor, y: Tensor) -> Tensor:
    """The generator's, non-saturating."""
    return F.softplus(-d(fake, y)).mean()


def hinge_d(d: ProjectionDiscriminator, real: Tensor, fake: Tensor, y: Tensor, *_) -> Tensor:
    """Hinge loss (Lim & Ye 2017): what is told apart by more than 1 costs nothing. One pass: D has no batch statistics."""
    of_real, of_fake = d(torch.cat([real, fake]), torch.cat([y, y])).chunk(2)
    return F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()


def score_g(d: nn.Module, fake: Tensor, y: Tensor) -> Tensor:
    """The generator's beside the hinge loss and the Wasserstein loss: what D makes of its images, negated."""
    return -d(fake, y).mean()


def wasserstein_d(
    d: Discriminator, real: Tensor, fake: Tensor, y: Tensor, gan: WassersteinGAN, rng: torch.Generator
) -> Tensor:
    """The critic's loss with gradient penalty (Gulrajani et al. 2017), as the release of Jin & Li has it.

    Released, and a slip: points between real and synthetic images are drawn with *normal* weights, so that most lie outside.
    """
    share = torch.randn(len(real), 1, 1, 1, generator=rng).to(real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(d(between, y).sum(), between, create_graph=True)
    slope = slope / 2  # released images, and what our critic works on, lie in [-1, 1]
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return d(fake, y).mean() - d(real, y).mean() + gan.penalty * penalty


def as_they_are(images: Tensor, gan: GAN, rng: torch.Generator) -> Tensor:
    return images


def augmented(images: Tensor, gan: ProjectionGAN, rng: torch.Generator) -> Tensor:
    """DiffAugment (Zhao et al. 2020) without cutout: each image (N, C, S, S) shifted, brighter or darker, of more or less
    contrast. Differentiable; what is shifted in repeats the edge.
    """
    n, size, most, device = len(images), images.shape[-1], gan.shift, images.device
    shift = torch.randint(0, 2 * most + 1, (2, n, 1), generator=rng) + torch.arange(size)
    rows, columns = ((shift - most).clamp(0, size - 1)).to(device)
    brighter, steeper = (torch.rand(2, n, 1, 1, 1, generator=rng) * 2 - 1).to(device)
    which = torch.arange(n, device=device)[:, None, None]
    moved = images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    mean = moved.mean((1, 2, 3), keepdim=True)
    return (moved - mean) * (1 + gan.contrast * steeper) + mean + gan.brightness * brighter


def adam(net: nn.Module, lr: float, gan: DCGAN) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(gan.beta1, 0.999), fused=True)


def rmsprop(net: nn.Module, lr: float, gan: WassersteinGAN) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(net.parameters(), lr=lr)


class Recipe(NamedTuple):
    """Networks and training of a federated GAN.

    Attributes:
        generator, discriminator: their classes.
        of_d, of_g: losses, ``of_d(d, real, fake, y, settings, rng)`` and ``of_g(d, fake, y)``.
        seen: what D sees of images, ``seen(images, settings, rng)``.
        optimizer: ``optimizer(net, lr, settings)``.
    """

    generator: type[Generator]
    discriminator: Callable[..., nn.Module]
    of_d: Callable[..., Tensor]
    of_g: Callable[..., Tensor]
    seen: Callable[..., Tensor] = as_they_are
    optimizer: Callable[..., torch.optim.Optimizer] = adam


RECIPES = {
    "dcgan": Recipe(Generator, Discriminator, cross_entropy_d, cross_entropy_g),
    "projection": Recipe(UpGenerator, ProjectionDiscriminator, hinge_d, score_g, augmented),
    "wgan_gp": Recipe(Generator, Critic, wasserstein_d, score_g, optimizer=rmsprop),
}
