"""Gradient inversion: images reconstructed from what a client sends (Zhu et al. 2019; Geiping et al. 2020).

An attacker looks for images whose gradient is the one that was sent. Everything is batched over victims: one
`torch.func.vmap` holds several of them, each with its own target, and who is found leaves the batch.

`ATTACKS`: ``dlg``, squared distance (Zhu et al. 2019, algorithm 1); ``ig``, one minus the cosine plus total variation
(Geiping et al. 2020, equation 4); ``bn``, ``ig`` and the statistics that BatchNorm sees and the client sends (Yin et al. 2021,
equation 8); ``prior``, ``ig`` over the latent vectors of a generator trained on public images (Jeon et al. 2021).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from medsec.core.errors import InputError
from medsec.core.guards import check_images, check_norm, normalises_by_batch
from medsec.core.seeds import torch_generator
from medsec.core.settings import InversionSettings
from medsec.nets.convnet import logits_and_statistics

__all__ = ["ATTACKS", "View", "client_update", "distance", "infer_labels", "invert"]


@dataclass(frozen=True)
class View:
    """What the server saw of V clients in one round, each with one batch of B images.

    Attributes:
        model: the global model of that round.
        gradients: one tensor a parameter, (V, *shape): gradients, or sums of them over ``steps`` local SGD steps, that is
            the update divided by minus the learning rate.
        steps: local steps on the same batch.
        lr: learning rate of the local steps; not used for a single one.
        weights: like ``gradients``, factors in the comparison: 0 for what the attacker knows to be useless (entries that
            compression dropped, a layer that a defence distorts); empty: all 1.
        statistics: mean and variance of every BatchNorm's input over the batch, (V, 2, F) each; empty if none is sent.
        through: what the defence does to images before the gradient is taken, for an attacker who knows it.
    """

    model: nn.Module
    gradients: list[Tensor]
    steps: int = 1
    lr: float = 0.0
    weights: list[Tensor] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    through: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Reconstructions:
    """What an attack makes of V victims.

    Attributes:
        images: (V, B, C, S, S) in [0, 1]; where ``failed``, the last images that were finite.
        distance: (V,) what is left of the objective, without the priors; of the best restart, which it selects.
        failed: (V,) the search left the finite numbers in every restart. To be counted, not averaged.
        iterations: (V,) gradient steps until it was found or given up, over all restarts.
    """

    images: Tensor
    distance: Tensor
    failed: Tensor
    iterations: Tensor


# What a client sends -------------------------------------------------------------------------------------------------


def client_update(model: nn.Module, x: Tensor, y: Tensor, steps: int = 1, lr: float = 0.0) -> list[Tensor]:
    """Sum of the gradients of ``steps`` SGD steps on one batch: for one step the gradient, else (w − w′) / lr.

    Args:
        model: in evaluation mode, or with BatchNorm that sees more than one image.
        x: (B, C, S, S) in [0, 1].
        y: (B,) int64.
        steps: local steps (FedAvg with one batch and several epochs).
        lr: their learning rate.

    Raises:
        InputError: images that are not in [0, 1], or BatchNorm in training mode with one image.
    """
    check_images(x)
    check_norm(model, len(x))
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    return [v.detach() for v in _update(model, parameters, x, y, steps, lr).values()]


def _functional(loss: Callable[[dict], Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of a loss, differentiable and, unlike `_plain`, for use within `torch.func.vmap`."""
    return grad_and_value(loss)(parameters)[0]


def _plain(loss: Callable[[dict], Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by autograd, in two thirds of the time."""
    p = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in parameters.items()}
    return dict(zip(p, torch.autograd.grad(loss(p), list(p.values()), create_graph=True), strict=True))


def _update(
    model: nn.Module, parameters: dict, x: Tensor, y: Tensor, steps: int, lr: float, differentiate=_functional
) -> dict[str, Tensor]:
    """`client_update`, differentiable in ``x``."""
    total, now = None, parameters
    for _ in range(steps):
        gradient = differentiate(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y), now)
        total = gradient if total is None else {k: total[k] + gradient[k] for k in gradient}
        now = {k: parameters[k] - lr * total[k] for k in parameters}
    return total


def infer_labels(gradients: Sequence[Tensor], batch: int, probabilities: Tensor) -> Tensor:
    """Labels of a batch from the gradient of the last bias (after Zhao et al. 2020; Wainakh et al. 2022).

    That gradient is the mean over the batch of p − 1[y]. With the probabilities p that the model gives to images of the same
    kind, class k occurs about B (p_k − g_k) times; the B largest shares are handed out one by one.

    Args:
        gradients: one client's, the last one (K,) of the head's bias.
        batch: B.
        probabilities: (K,) mean output of the model on public images.

    Returns:
        (B,) sorted labels.

    Raises:
        InputError: more images than classes: the labels of a batch must then be known.
    """
    bias = gradients[-1]
    if bias.ndim != 1 or bias.shape != probabilities.shape:
        raise InputError(f"last gradient of shape {tuple(bias.shape)} is no bias of {len(probabilities)} classes")
    if batch > len(bias):
        raise InputError(
            f"a batch of {batch} with {len(bias)} classes: labels cannot be inferred; give them, or use a batch of at most "
            f"{len(bias)}"
        )
    left, labels = batch * (probabilities - bias), []
    for _ in range(batch):
        k = int(left.argmax())
        labels.append(k)
        left = left - F.one_hot(torch.tensor(k), len(left))
    return torch.tensor(sorted(labels))


# The search ----------------------------------------------------------------------------------------------------------


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, of all images together."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


def squared(computed: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    """Squared distance of two gradients."""
    return sum(((c - s) ** 2).sum() for c, s in zip(computed, sent, strict=True))


def cosine(computed: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of the angle between two gradients."""
    dot = sum((c * s).sum() for c, s in zip(computed, sent, strict=True))
    lengths = [sum((g**2).sum() for g in part).clamp_min(1e-24).sqrt() for part in (computed, sent)]
    return 1 - dot / (lengths[0] * lengths[1])


@dataclass(frozen=True)
class Objective:
    """What a search minimises: ``distance`` of gradients, and what images must look like besides.

    ``tv``: total variation; ``statistics``: those that BatchNorm saw; ``latent``: the search is in a generator.
    """

    distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    tv: bool = False
    statistics: bool = False
    latent: bool = False


ATTACKS = {
    "dlg": Objective(squared),
    "ig": Objective(cosine, tv=True),
    "bn": Objective(cosine, tv=True, statistics=True),
    "prior": Objective(cosine, latent=True),
}


def distance(attack: str, computed: Sequence[Tensor], sent: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """How far a gradient is from the one that was sent, as one of `ATTACKS` sees it; ``weights`` as in `View`."""
    if weights:
        computed, sent = ([w * g for w, g in zip(weights, part, strict=True)] for part in (computed, sent))
    return ATTACKS[attack].distance(computed, sent)


def invert(
    views: Sequence[View],
    labels: Tensor,
    shape: tuple[int, int, int],
    *,
    attack: str,
    settings: InversionSettings,
    seed: int,
    generator: nn.Module | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Reconstructions:
    """Reconstruct every victim's batch.

    Args:
        views: one a round of the same victims with the same images; several are matched jointly.
        labels: (V, B) int64.
        shape: (C, S, S) of an image.
        attack: one of `ATTACKS`.
        settings: section ``inversion.attack`` of the parameters.
        seed: of the starting points; a victim's does not depend on the others.
        generator: for ``prior``: ``generator(z) -> (N, C, S, S)`` in [0, 1], with the attribute ``latent``.
        bounds: of the pixels that are searched; wider where a defence leaves [0, 1] and the attacker knows it.

    Raises:
        InputError: gradients of the wrong number or shape, or not finite; no statistics for ``bn``, no generator for ``prior``.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.tensor([[[[0.0, 1.0], [0.5, 0.0]]]]), torch.tensor([0])
    >>> view = View(model, [g[None] for g in client_update(model, x, y)])
    >>> settings = InversionSettings(
    ...     iterations=300, lr=0.1, lr_latent=0.1, tv=0.0, statistics=0.0, restarts=1, together=1, done=1e-9
    ... )
    >>> invert([view], y[None], (1, 2, 2), attack="ig", settings=settings, seed=0).images[0].round(decimals=1)
    tensor([[[[0.0000, 1.0000],
              [0.5000, 0.0000]]]])
    """
    _check(views, labels, attack, generator)
    victims, batch = labels.shape
    jobs = [(v, r) for v in range(victims) for r in range(settings.restarts)]
    draw, size = (torch.randn, (generator.latent,)) if ATTACKS[attack].latent else (torch.rand, shape)
    starts = torch.stack([draw((batch, *size), generator=torch_generator(seed, "inversion", v, r)) for v, r in jobs])
    search = _Search(views, labels, attack, settings, generator, bounds)
    images, left, steps = torch.empty(len(jobs), batch, *shape), torch.empty(len(jobs)), torch.empty(len(jobs))
    for group in torch.arange(len(jobs)).split(settings.together):
        victim = torch.tensor([jobs[i][0] for i in group])
        images[group], left[group], steps[group] = search(starts[group], victim)
    left = left.view(victims, -1)
    failed = ~torch.isfinite(left)
    best = left.masked_fill(failed, torch.inf).argmin(1)
    rows = torch.arange(victims)
    return Reconstructions(
        images.view(victims, -1, batch, *shape)[rows, best].detach(),
        left[rows, best],
        failed.all(1),
        steps.view(victims, -1).sum(1).long(),
    )


class _Search:
    """Adam on a group of victims at once, with the sign of the gradient where pixels are searched (Geiping et al. 2020)."""

    BETAS = (0.9, 0.999)
    DROPS = (3 / 8, 5 / 8, 7 / 8)  # of the iterations, after which the step is a tenth: as Geiping et al.

    def __init__(self, views, labels: Tensor, name: str, settings: InversionSettings, generator, bounds):
        self.views, self.labels, self.settings, self.generator, self.bounds = views, labels, settings, generator, bounds
        self.name, self.attack = name, ATTACKS[name]
        self.models = [copy.deepcopy(view.model).requires_grad_(False) for view in views]  # constants of the search

    def step(self, z: Tensor, y: Tensor, sent: list) -> tuple[Tensor, Tensor]:
        """Of victims (E, B, …) at once: the gradient of what is minimised, and (E,) its part without the priors."""
        gradient, (_, apart) = vmap(grad_and_value(self.objective, has_aux=True))(z, y, sent)
        return gradient, apart

    def step_alone(self, z: Tensor, y: Tensor, sent: list) -> tuple[Tensor, Tensor]:
        """`step` for a single victim."""
        x, own = z[0].detach().requires_grad_(), [tuple([t[0] for t in part] for part in parts) for parts in sent]
        objective, apart = self.objective(x, y[0], own, _plain)
        return torch.autograd.grad(objective, x)[0][None], apart.detach()[None]

    def image(self, z: Tensor) -> Tensor:
        return self.generator(z) if self.attack.latent else z

    def objective(self, z: Tensor, y: Tensor, sent: list, differentiate=_functional) -> tuple[Tensor, Tensor]:
        """Of one victim: what is minimised, and its part without the priors. ``sent``: a view's tensors, for each view."""
        x, settings = self.image(z), self.settings
        apart, priors = 0.0, 0.0
        for view, model, (gradients, weights, statistics) in zip(self.views, self.models, sent, strict=True):
            seen = x if view.through is None else view.through(x)
            update = _update(model, dict(model.named_parameters()), seen, y, view.steps, view.lr, differentiate)
            apart = apart + distance(self.name, list(update.values()), gradients, weights)
            if self.attack.statistics:
                _, mine = logits_and_statistics(model, seen)
                gaps = [((m - s) ** 2).mean() for m, s in zip(mine, statistics, strict=True)]
                priors = priors + settings.statistics * sum(gaps)
        if self.attack.tv:
            priors = priors + settings.tv * total_variation(x)
        return apart + priors, apart

    def __call__(self, z: Tensor, victim: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From starting points (E, B, …) of victims (E,): images, distance (NaN where it diverged) and steps taken."""
        signed = not self.attack.latent
        rate = self.settings.lr if signed else self.settings.lr_latent
        n, step = self.settings.iterations, self.step_alone if len(z) == 1 else self.step
        best, left, steps = z.clone(), torch.full((len(z),), torch.nan), torch.full((len(z),), float(n))
        active, m, v = torch.arange(len(z)), torch.zeros_like(z), torch.zeros_like(z)
        for i in range(n):
            sent = self._sent(victim[active])
            gradient, apart = step(z, self.labels[victim[active]], sent)
            fine = torch.isfinite(apart) & torch.isfinite(gradient).flatten(1).all(1)
            best[active[fine]], left[active] = z[fine], torch.where(fine, apart, torch.nan)
            keep = fine & (apart > self.settings.done)
            steps[active[~keep]] = i
            if not keep.any():
                active = active[keep]
                break
            active, z, m, v, gradient = active[keep], z[keep], m[keep], v[keep], gradient[keep]
            gradient = gradient.sign() if signed else gradient
            m = self.BETAS[0] * m + (1 - self.BETAS[0]) * gradient
            v = self.BETAS[1] * v + (1 - self.BETAS[1]) * gradient**2
            scale = rate * 0.1 ** sum(i >= drop * n for drop in self.DROPS)
            move = m / (1 - self.BETAS[0] ** (i + 1)) / ((v / (1 - self.BETAS[1] ** (i + 1))).sqrt() + 1e-8)
            z = z - scale * move
            z = z.clamp(*self.bounds) if signed else z
        if len(active):
            _, apart = step(z, self.labels[victim[active]], self._sent(victim[active]))
            best[active], left[active] = z, torch.where(torch.isfinite(apart), apart, torch.nan)
        with torch.no_grad():
            return vmap(self.image)(best), left, steps

    def _sent(self, victim: Tensor) -> list:
        sent = ((view.gradients, view.weights, view.statistics) for view in self.views)
        return [tuple([tensor[victim] for tensor in part] for part in parts) for parts in sent]


def _check(views: Sequence[View], labels: Tensor, attack: str, generator: nn.Module | None) -> None:
    if attack not in ATTACKS:
        raise InputError(f"attack {attack!r}: choose one of {', '.join(ATTACKS)}")
    if ATTACKS[attack].latent and generator is None:
        raise InputError(f"attack {attack!r} searches in a generator: give one that was trained on public images")
    for view in views:
        parameters = list(view.model.named_parameters())
        if len(view.gradients) != len(parameters):
            raise InputError(f"{len(view.gradients)} gradients for a model of {len(parameters)} parameters")
        for (name, parameter), gradient in zip(parameters, view.gradients, strict=True):
            shape = (len(labels), *parameter.shape)
            if gradient.shape != shape:
                raise InputError(f"gradient of {name} has shape {tuple(gradient.shape)}, expected {shape}")
            if not torch.isfinite(gradient).all():
                raise InputError(f"gradient of {name} holds NaN or infinite values: nothing to invert")
        if ATTACKS[attack].statistics and not view.statistics:
            raise InputError(f"attack {attack!r} matches BatchNorm's statistics, and none were sent; use 'ig'")
        check_norm(view.model, labels.shape[1])
        if normalises_by_batch(view.model):
            raise InputError("the attacks take BatchNorm with frozen statistics: use model.eval()")
