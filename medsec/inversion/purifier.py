"""What an attacker makes of an image that a defence has changed, if it knows the defence.

The attacker owns public images of the same kind. It applies the defence to them and learns the way back: a linear map
(the Wiener filter) and a small network. Whichever is better on held-out public images cleans the reconstructions. The same
estimators without any gradient are the floor: what an image of this kind looks like anyway.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import PurifierParams
from medsec.nets.fit import train

__all__ = ["fit"]

Purifier = Callable[[Tensor], Tensor]
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance of a pixel
HELD_OUT = 0.25  # share of the public images that chooses


def wiener(changed: Tensor, clean: Tensor, ridge: float) -> Purifier:
    """The affine map of least squared error from changed images to clean ones (Wiener 1949), with a ridge.

    Args:
        changed, clean: (N, C, S, S).
        ridge: added to the covariance's diagonal, in units of its mean.

    Returns:
        (n, C, S, S) -> (n, C, S, S), clipped to [0, 1].
    """
    _same(changed, clean)
    a, b = changed.flatten(1).double(), clean.flatten(1).double()
    at, bt = a.mean(0), b.mean(0)
    covariance = (a - at).T @ (a - at)
    covariance += ridge * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance)).double()
    matrix = torch.linalg.solve(covariance, (a - at).T @ (b - bt))

    def purify(x: Tensor) -> Tensor:
        found = (x.flatten(1).double() - at) @ matrix + bt
        return found.view(len(x), *clean.shape[1:]).float().clamp(0, 1)

    return purify


def network(changed: Tensor, clean: Tensor, params: PurifierParams, seed: int) -> Purifier:
    """A small residual network (after DnCNN, Zhang et al. 2017, without BatchNorm), trained on squared error.

    Args:
        changed, clean: (N, C, S, S).
        params: section ``inversion.purifier`` of the parameters.
        seed: of weights and order.
    """
    _same(changed, clean)
    channels, width = clean.shape[1], params.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "purifier"))
        model = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, channels, 3, 1, 1),
        )
    rng = torch_generator(seed, "purifier batches")
    optimizer = torch.optim.Adam(model.parameters(), lr=params.lr)

    def loss(rows: Tensor) -> Tensor:
        return F.mse_loss(changed[rows] + model(changed[rows]), clean[rows])

    train(loss, len(clean), optimizer, epochs=params.epochs, batch=params.batch, rng=rng)
    model.eval().requires_grad_(False)
    return lambda x: (x + model(x)).clamp(0, 1)


def fit(changed: Tensor, clean: Tensor, params: PurifierParams, seed: int) -> tuple[Purifier, str]:
    """The better of `wiener` (over `RIDGES`), `network` and leaving the image as it is, by held-out squared error.

    Args:
        changed: (N, C, S, S) public images after the defence.
        clean: the same before it.
        params: section ``inversion.purifier``.
        seed: of the network, and of who is held out.

    Returns:
        The purifier, and its name: ``wiener``, ``network`` or ``as it is``.

    Raises:
        InputError: shapes that differ, or fewer than 8 images.
    """
    _same(changed, clean)
    order = torch.randperm(len(clean), generator=torch_generator(seed, "purifier split"))
    held, used = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    candidates: list[tuple[str, Purifier]] = [("as it is", lambda x: x.clamp(0, 1))]
    candidates += [("wiener", wiener(changed[used], clean[used], ridge)) for ridge in RIDGES]
    candidates.append(("network", network(changed[used], clean[used], params, seed)))
    name, best = min(candidates, key=lambda c: float(F.mse_loss(c[1](changed[held]), clean[held])))
    return best, name


def _same(changed: Tensor, clean: Tensor) -> None:
    if changed.shape != clean.shape or clean.ndim != 4 or len(clean) < 8:
        raise InputError(
            f"purifier: changed {tuple(changed.shape)} and clean {tuple(clean.shape)} must be the same (N, C, S, S), N >= 8"
        )
