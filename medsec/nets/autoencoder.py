"""A small autoencoder of public images: the shadow generator of paper 2's defence, and an attacker's prior."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.guards import check_images
from medsec.core.seeds import derive_seed, torch_generator
from medsec.nets.fit import train

__all__ = ["Autoencoder", "Prior"]

WIDTH = 16  # feature maps next to the image


class Autoencoder(nn.Module):
    """A small convolutional autoencoder; its decoder is the shadow generator (released: StyleGAN3).

    ``encode(x)``: (N, C, S, S) -> (N, latent); ``decode(z)``: back, in [0, 1]; ``forward(x)`` does both.

    Raises:
        InputError: the size is no multiple of 4.
    """

    def __init__(self, size: int, channels: int, latent: int):
        super().__init__()
        if size % 4 or size < 4 or latent < 1:
            raise InputError(f"autoencoder: size {size} must be a multiple of 4, and latent {latent} at least 1")
        self.shape, quarter, maps = (channels, size, size), size // 4, 2 * WIDTH
        self.encode = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(WIDTH, maps, 4, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(maps * quarter**2, latent),
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, maps * quarter**2),
            nn.Unflatten(1, (maps, quarter, quarter)),
            nn.GELU(),
            nn.ConvTranspose2d(maps, WIDTH, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def new_autoencoder(size: int, channels: int, *, latent: int, seed: int) -> Autoencoder:
    """An untrained `Autoencoder` with weights drawn from ``seed``; the global random stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "autoencoder"))
        return Autoencoder(size, channels, latent)


def train_autoencoder(images: Tensor, *, latent: int, epochs: int, lr: float, batch: int, seed: int) -> Autoencoder:
    """An autoencoder of public images, by squared error (Adam, one-cycle schedule with the peak ``lr``).

    Args:
        images: (N, C, S, S) in [0, 1], of the ``public`` split: the clients' images would make it memorise victims.
    """
    check_images(images)
    model = new_autoencoder(images.shape[-1], images.shape[1], latent=latent, seed=seed).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=lr, pct_start=0.1)
    rng = torch_generator(seed, "autoencoder batches")

    def loss(rows: Tensor) -> Tensor:
        return F.mse_loss(model(images[rows]), images[rows])

    train(loss, len(images), optimizer, epochs=epochs, batch=batch, rng=rng, schedule=schedule)
    return model.eval().requires_grad_(False)


class Prior(nn.Module):
    """A decoder whose latent vectors are about standard normal where ``images`` are.

    ``forward(z)``: (N, latent) -> (N, C, S, S) in [0, 1]; ``latent`` is the number of dimensions.
    """

    def __init__(self, autoencoder: Autoencoder, images: Tensor):
        super().__init__()
        self.decode = autoencoder.decode
        with torch.no_grad():
            z = autoencoder.encode(images)
        self.latent, self.mean, self.scale = z.shape[1], z.mean(0), z.std(0)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(self.mean + self.scale * z)
