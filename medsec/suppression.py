"""Our repair of the shadow defence: *suppression* by its generator instead of noise, shared by k images (k-same)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.autoencoder import Autoencoder
from medsec.convnet import check_images
from medsec.errors import InputError
from medsec.federated import torch_generator
from medsec.gradient_defences import check_batch, fingerprint

GROUPINGS = ("similar", "random")


class Hardened:
    """Our repair: *suppression* instead of noise. The client sends the gradient at another image, `substitutes`.

    Noise of any shape leaves the image in place, and who knows its shape removes it. Here what the shadow generator cannot
    draw never enters the gradient, and what it can draw is shared by k images of the client: an attacker who recovers x′
    exactly has the mean of k images.

    It needs the client's whole local set once, and has no randomness of its own: every round sends the same substitutes,
    so that a second look gives no more. With k = 1 it is the plain projection on the generator's range
    (``autoencoder_only``).

    Args:
        autoencoder: trained on public images.
        images, labels, k, grouping, seed: see `substitutes`.
    """

    def __init__(self, autoencoder: Autoencoder, images: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int):
        self.images = substitutes(autoencoder, images, labels, k=k, grouping=grouping, seed=seed)
        keys = [(fingerprint(image), int(label)) for image, label in zip(images, labels, strict=True)]
        self.row = {key: row for row, key in reversed(list(enumerate(keys)))}  # of equal images the first

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        """The substitutes of a batch, (B, C, S, S) in [0, 1].

        Raises:
            InputError: an image that was not among the client's, or had another label there.
        """
        check_batch(model, x, y, tuple(self.images.shape[1:]))
        try:
            rows = [self.row[fingerprint(image), int(label)] for image, label in zip(x, y, strict=True)]
        except KeyError as error:
            raise InputError(
                f"shadow_hardened: image {error.args[0][0]} with label {error.args[0][1]} is not in the set that was given "
                "at the start; give all images of the client, unchanged, without augmentation"
            ) from error
        return self.images[rows]


def substitutes(
    autoencoder: Autoencoder, images: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int
) -> Tensor:
    """What is used instead of a client's images: the decoded mean of the latent vectors of each image's group.

    k-same anonymisation (Newton, Sweeney & Malin 2005) in the latent space of a generator, within every class.

    Args:
        images: (N, C, S, S) in [0, 1], all of one client.
        labels: (N,) int64.
        k, grouping, seed: see `groups`.

    Returns:
        (N, C, S, S) in [0, 1].
    """
    check_images(images)
    if images.shape[1:] != autoencoder.shape:
        raise InputError(f"images of shape {tuple(images.shape[1:])}, but the autoencoder draws {autoencoder.shape}")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise InputError(f"labels of shape {tuple(labels.shape)}, {labels.dtype}: need ({len(images)},), torch.int64")
    with torch.no_grad():
        z = autoencoder.encode(images)
        if not torch.isfinite(z).all():
            raise InputError("the autoencoder gives NaN or infinite latents: train it with a lower lr")
        group = groups(z, labels, k=k, grouping=grouping, seed=seed).to(z.device)
        member = F.one_hot(group).to(z)
        means = (member.T @ z) / member.sum(0)[:, None]
        return autoencoder.decode(means)[group]


def groups(latents: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int) -> Tensor:
    """Divide each class into groups of k; the last one has k to 2 k − 1. A class of fewer than k is one group.

    "similar": as long as 2 k are left, the one that is farthest from the mean of those left and its k − 1 nearest make a
    group (the choice of the first as in microaggregation, Domingo-Ferrer & Torra 2005). "random": drawn from the seed,
    the control.

    Args:
        latents: (N, d).
        labels: (N,) int64.

    Returns:
        (N,) int64, the number of each one's group.

    Raises:
        InputError: k < 1, or with k > 1 a class of a single image, which no group can hide.
    """
    if k < 1 or grouping not in GROUPINGS:
        raise InputError(f"groups: k {k} must be at least 1, and grouping {grouping!r} one of {', '.join(GROUPINGS)}")
    z = latents.detach().cpu().double().numpy()
    found, n = np.full(len(z), -1), 0
    for label in np.unique(labels.cpu().numpy()):
        left = np.flatnonzero(labels.cpu().numpy() == label)
        if k > 1 and len(left) == 1:
            raise InputError(
                f"groups: class {label} has a single image; leave it out, or use k = 1, which hides nobody"
            )
        if grouping == "random":
            left = left[torch.randperm(len(left), generator=torch_generator(seed, "groups", int(label))).numpy()]
        while len(left):
            size = k if len(left) >= 2 * k else len(left)
            if grouping == "similar":
                first = z[left[_distances(z[left], z[left].mean(0)).argmax()]]
                left = left[_distances(z[left], first).argsort(kind="stable")]
            found[left[:size]], left, n = n, left[size:], n + 1
    return torch.from_numpy(found)


def _distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return ((points - centre) ** 2).sum(1)
