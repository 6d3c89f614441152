"""`fingerprint`: whose gradient is it? Identification and membership by comparing gradients, without a reconstruction.

A server that has a gallery of candidates, the patient's image among them, need not rebuild anything: it computes the gradient of
every candidate and compares it with the one that it received. What a reconstruction misses, because a search got stuck or the
picture is poor, stays in the gradient.

Received gradients: (V, P), one row a batch, all parameters in one vector (`received`). Galleries: (N, P), one row a candidate
(`each_gradient`). Scores: (V, N), higher means more alike.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medsec.core.errors import InputError
from medsec.core.guards import check_independent, check_labels

__all__: list[str] = []  # for notebook 03

TOGETHER = 128  # gradients in one vmap
FLOOR = 1e-7  # of the largest eigenvalue: below it is rounding, the gradients being float32
ROUNDING = 6  # digits to which scores, as shares of the largest, count as different


def each_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, P) gradient of every image's own cross-entropy; x (N, C, S, S) may lie outside [0, 1], as changed images do.

    Raises:
        InputError: no images, labels that do not fit, BatchNorm in training mode, or a gradient that is not finite.
    """
    if x.ndim != 4 or not len(x):
        raise InputError(f"candidates of shape {tuple(x.shape)}: need (N, C, S, S) with N >= 1")
    check_labels(model, x, y)
    check_independent(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    rows = torch.empty(len(x), sum(p.numel() for p in parameters.values()))
    for at in torch.arange(len(x)).split(TOGETHER):
        found = vmap(grad(loss), (None, 0, 0))(parameters, x[at], y[at])
        rows[at] = torch.cat([part.flatten(1) for part in found.values()], 1)
    if not torch.isfinite(rows).all():
        raise InputError("a candidate's gradient holds NaN or infinite values: the model diverged; lower its lr")
    return rows


def received(model: nn.Module, gradients: Sequence[Tensor]) -> Tensor:
    """What a server received of V batches, one tensor (V, *shape) a parameter, as (V, P).

    Raises:
        InputError: not one tensor a parameter, of its shape, or a value that is not finite.
    """
    named = list(model.named_parameters())
    if len(gradients) != len(named):
        raise InputError(f"{len(gradients)} gradients for {len(named)} parameters: need one each, in their order")
    for (name, p), g in zip(named, gradients, strict=True):
        if g.shape[1:] != p.shape or not len(g):
            raise InputError(
                f"received gradient of {name}: shape {tuple(g.shape)}, need (V, {', '.join(map(str, p.shape))})"
            )
        if not torch.isfinite(g).all():
            raise InputError(f"received gradient of {name} holds NaN or infinite values: leave that message out")
    return torch.cat([g.flatten(1) for g in gradients], 1)


# Scores --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gallery:
    """The candidates' gradients, ``rows`` (N, P), and how alike a received gradient is to each of them."""

    rows: Tensor

    def match(self, received: Tensor, sent_only: bool = False) -> Tensor:
        """(V, N) cosines: the matched filter, the best there is for one image under white noise of unknown size.

        Args:
            received: (V, P).
            sent_only: compare only at the entries that are not 0, for a defence that is known to leave entries out.
        """
        self._check(received)
        sizes = torch.sqrt((received != 0).float() @ self.rows.square().T) if sent_only else self.rows.norm(dim=1)
        return received @ self.rows.T / sizes.clamp_min(1e-24) / received.norm(dim=1, keepdim=True).clamp_min(1e-24)

    def joint(self, received: Tensor, batch: int, sent_only: bool = False) -> Tensor:
        """(V, N) the share that each candidate has in a batch's gradient, all candidates fitted together.

        A batch's gradient is the mean of its members'. Alike as all gradients of a network are, a member is masked by the
        others where each candidate is compared by itself; as a linear model of all candidates it is not. This is the linear
        estimate of least mean square error: a ridge regression whose penalty is the noise's variance over that of a share
        (1/B with a chance of B/N). The noise's variance is what lies outside the span of all candidates, where P > N.

        Args:
            received: (V, P).
            batch: B, images in a batch.
            sent_only: as in `match`.

        Raises:
            InputError: a batch that is larger than the gallery.
        """
        self._check(received)
        if not 1 <= batch <= len(self.rows):
            raise InputError(f"a batch of {batch} images, but a gallery of {len(self.rows)}: give more candidates")
        if sent_only:
            kept = [row != 0 for row in received]
            parts = [Gallery(self.rows[:, k]).joint(r[None, k], batch) for r, k in zip(received, kept, strict=True)]
            return torch.cat(parts)
        n, entries = self.rows.shape
        values, vectors = self.parts if entries else (torch.zeros(0), None)
        if not (values > 0).any():  # nothing was sent, or nobody has anything there
            return torch.zeros(len(received), n)
        seen = vectors.T @ (self.rows @ received.T).double()
        span = values > FLOOR * values.max()
        outside = received.double().square().sum(1) - (seen[span].square() / values[span, None]).sum(0)
        noise = outside.clamp_min(0) / max(1, entries - int(span.sum()))
        penalty = (noise * batch * n).clamp_min(FLOOR * float(values.max()))
        return (vectors @ (seen / (values[:, None].clamp_min(0) + penalty))).T.float()

    @functools.cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (R,) and eigenvectors (N, R) of the gradients' inner products, R at most N and P, in double precision."""
        if self.rows.shape[1] >= len(self.rows):
            return torch.linalg.eigh((self.rows @ self.rows.T).double())
        values, right = torch.linalg.eigh(self.rows.double().T @ self.rows.double())
        kept = values > FLOOR * values.max()
        return values[kept], self.rows.double() @ right[:, kept] / values[kept].sqrt()

    def _check(self, received: Tensor) -> None:
        if received.ndim != 2 or received.shape[1] != self.rows.shape[1]:
            raise InputError(
                f"received gradients of shape {tuple(received.shape)}, the candidates' have {self.rows.shape[1]} entries"
            )


# What they tell ------------------------------------------------------------------------------------------------------


def identified(scores: Tensor, members: Tensor, possible: Tensor, most: int) -> np.ndarray:
    """(V,) the share of a batch's members that are among the first ``most`` · B candidates.

    At most = 1 the server names as many candidates as the batch has images. Equal scores count as in random order. Chance:
    most · B over the number of possible candidates.

    Args:
        scores: (V, N).
        members: (V, B) places of the batch's images in the gallery.
        possible: (V, N) bool, candidates that the server takes into account.
        most: see above.

    Raises:
        InputError: shapes that do not fit, a victim that is not in the gallery, or fewer candidates than images in a batch.
    """
    above, equal = _order(scores, members, possible)
    first = most * members.shape[1]
    return ((first - above) / equal).clip(0, 1).mean(1)


def membership(scores: Tensor, members: Tensor, possible: Tensor, fpr: float) -> tuple[np.ndarray, np.ndarray]:
    """Is a candidate in the batch? (V,) area under the curve, and true positives at a rate of false ones of ``fpr``.

    Members against all other possible candidates, batch by batch. Arguments as in `identified`.

    Raises:
        InputError: as `identified`, or nobody but the members is possible.
    """
    above, equal = _order(scores, members, possible, others=True)
    n = (possible.sum(1) - members.shape[1]).numpy()[:, None]
    if n.min() < 1:
        raise InputError("membership: no candidate but the members; give a larger gallery")
    allowed = np.floor(fpr * n)  # false alarms
    rate = ((allowed + 1 - above) / (equal + 1)).clip(0, 1)
    return (1 - (above + 0.5 * equal) / n).mean(1), rate.mean(1)


def _order(scores: Tensor, members: Tensor, possible: Tensor, others: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(V, B) twice: how many candidates score higher than a member, and as high (itself too); of ``others``: no members."""
    if scores.shape != possible.shape or len(members) != len(scores) or members.ndim != 2:
        shapes = f"{tuple(scores.shape)}, {tuple(members.shape)} and {tuple(possible.shape)}"
        raise InputError(f"scores, members and possible of shapes {shapes}: need (V, N), (V, B) and (V, N)")
    n, batch = scores.shape[1], members.shape[1]
    if batch > n:
        raise InputError(f"a batch of {batch} images, but a gallery of {n}: give more candidates")
    if int(members.min()) < 0 or int(members.max()) >= n or not possible.gather(1, members).all():
        raise InputError("a victim is not in the gallery: nobody can be found who is not a candidate; add its image")
    if not torch.isfinite(scores).all():
        raise InputError("scores hold NaN or infinite values: compare finite gradients")
    sizes = scores.abs().amax(1, keepdim=True).double().clamp_min(1e-300)
    ranked = (scores / sizes).mul(10**ROUNDING).round()
    counted = possible.scatter(1, members, False) if others else possible
    own = ranked.gather(1, members)
    above, equal = ([], [])
    for one, mine, may in zip(ranked, own, counted, strict=True):
        alive = one[may]
        above.append((alive[None] > mine[:, None]).sum(1))
        equal.append((alive[None] == mine[:, None]).sum(1))
    return torch.stack(above).double().numpy(), torch.stack(equal).double().numpy()


def chance(possible: Tensor, batch: int, most: int) -> float:
    """What `identified` gives who guesses, the mean over the batches."""
    return float((most * batch / possible.sum(1).double()).clamp_max(1).mean())
