"""Our repair of the shadow defence: *suppression* instead of noise. The client sends the gradient at another image.

Noise of any shape leaves the image in place, and who knows its shape removes it. Here the image does not enter the gradient
at all. What stands in for it is chosen by the shadow generator, which tells what an attacker with public images could draw:

* `stand_ins` (``shadow_hardened``): k similar images of a client form a group, and a group's members are replaced by the
  public images that lie nearest to its mean in the generator's latent space. An attacker who recovers x′ exactly holds a
  public image, and knows of x its class and about where its group lies.
* `drawings` (``shadow_suppressed``; with k = 1 ``autoencoder_only``): what the generator draws for the group's mean.
* `public_only`: any public image of the class. It is the control for both: what the federation learns from the public
  images alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.guards import check_batch, check_images
from medsec.core.seeds import fingerprint, stream, torch_generator
from medsec.inversion.defences import Perturbation
from medsec.nets.autoencoder import Autoencoder

__all__ = ["drawings", "public_only", "stand_ins"]

GROUPINGS = ("similar", "random")


def substituted(images: Tensor, labels: Tensor, used: Tensor) -> Perturbation:
    """Of one client: which image is used instead of which.

    It has no randomness of its own: every round sends the same substitutes, so that a second look gives no more.

    Args:
        images: (N, C, S, S) in [0, 1], all of the client.
        labels: (N,) int64.
        used: (N, C, S, S), in the same order.

    Raises:
        InputError: shapes that differ; on use, an image that was not among the client's, or had another label there.
    """
    if used.shape != images.shape:
        raise InputError(f"substitutes of shape {tuple(used.shape)} for images of shape {tuple(images.shape)}")
    keys = [(fingerprint(image), int(label)) for image, label in zip(images, labels, strict=True)]
    place = {key: row for row, key in reversed(list(enumerate(keys)))}  # of equal images the first

    def perturb(model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        check_batch(model, x, y, tuple(used.shape[1:]))
        try:
            return used[[place[fingerprint(image), int(label)] for image, label in zip(x, y, strict=True)]]
        except KeyError as error:
            image, label = error.args[0]
            raise InputError(
                f"suppression: image {image} with label {label} is not in the set that was given at the start; give all "
                "images of the client, unchanged, without augmentation"
            ) from error

    return perturb


# What is used instead of an image ------------------------------------------------------------------------------------


def stand_ins(
    autoencoder: Autoencoder,
    images: Tensor,
    labels: Tensor,
    public: Tensor,
    public_labels: Tensor,
    *,
    k: int,
    grouping: str,
    seed: int,
) -> Tensor:
    """Public images in the places of a client's, class by class: k-same (Newton, Sweeney & Malin 2005) by assignment.

    Of all ways to give every image a public one of its class, the one with the least total squared distance between the
    group's mean and the public image in the latent space (each dimension in units of its standard deviation over the
    public images). No public image is used more often than the numbers make necessary: without that rule a few in the
    middle would stand for nearly all, and the classifier would learn little. Within a group the assignment is blind.

    Args:
        autoencoder: trained on public images.
        images: (N, C, S, S) in [0, 1], all of one client.
        labels: (N,) int64.
        public, public_labels: (M, C, S, S) and (M,), what may stand in.
        k, grouping, seed: see `groups`.

    Returns:
        (N, C, S, S) in [0, 1].

    Raises:
        InputError: images, labels or groups that do not fit, or a class without a public image.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    z, candidates = _latents(autoencoder, images, labels), _latents(autoencoder, public, public_labels)
    scale = candidates.std(0).clamp_min(1e-6)
    z, candidates = z / scale, candidates / scale
    means, group = _group_means(z, labels, k=k, grouping=grouping, seed=seed)
    chosen = torch.empty(len(images), dtype=torch.int64)
    for label in labels.unique().tolist():
        rows, found = torch.nonzero(labels == label)[:, 0], torch.nonzero(public_labels == label)[:, 0]
        if not len(found):
            raise InputError(f"stand_ins: no public image of class {label}; give some, or leave the class out")
        rows = rows[torch.randperm(len(rows), generator=torch_generator(seed, "stand-ins", label))]
        found = found.repeat(-(-len(rows) // len(found)))
        cost = torch.cdist(means[group[rows]].double(), candidates[found].double()).square()
        at, to = linear_sum_assignment(cost.cpu().numpy())
        chosen[rows[at]] = found[to]
    return public[chosen]


def drawings(autoencoder: Autoencoder, images: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int) -> Tensor:
    """The decoded mean of the latent vectors of each image's group: k-same in the generator's latent space.

    Args:
        images: (N, C, S, S) in [0, 1], all of one client.
        labels: (N,) int64.
        k, grouping, seed: see `groups`; k = 1 is the plain projection on the generator's range.

    Returns:
        (N, C, S, S) in [0, 1].

    Raises:
        InputError: images, labels or groups that do not fit, or an autoencoder whose latents are not finite.
    """
    means, group = _group_means(_latents(autoencoder, images, labels), labels, k=k, grouping=grouping, seed=seed)
    with torch.no_grad():
        return autoencoder.decode(means)[group]


def public_only(public: Tensor, public_labels: Tensor, *, seed: int) -> Perturbation:
    """The control: a public image of the same class, drawn anew for every batch and round; only the labels are private.

    Raises:
        InputError: on use, a class without a public image.
    """

    def draw(model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        check_batch(model, x, y, tuple(public.shape[1:]))
        rng, rows = stream(seed, "public_only", round, x), []
        for label in y.tolist():
            found = torch.nonzero(public_labels == label)[:, 0]
            if not len(found):
                raise InputError(f"public_only: no public image of class {label}; give some, or leave the class out")
            rows.append(found[torch.randint(len(found), (), generator=rng)])
        return public[torch.stack(rows)]

    return draw


def _latents(autoencoder: Autoencoder, images: Tensor, labels: Tensor) -> Tensor:
    check_images(images)
    if images.shape[1:] != autoencoder.shape:
        raise InputError(f"images of shape {tuple(images.shape[1:])}, but the autoencoder draws {autoencoder.shape}")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise InputError(f"labels of shape {tuple(labels.shape)}, {labels.dtype}: need ({len(images)},), torch.int64")
    with torch.no_grad():
        z = autoencoder.encode(images)
    if not torch.isfinite(z).all():
        raise InputError("the autoencoder gives NaN or infinite latents: train it with a lower lr")
    return z


def _group_means(z: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The mean of every group (G, d), and each one's group (N,)."""
    group = groups(z, labels, **options).to(z.device)
    member = F.one_hot(group).to(z)
    return (member.T @ z) / member.sum(0)[:, None], group


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
