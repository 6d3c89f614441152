"""Adversarial examples: small changes of an image that turn a classifier's answer (paper 3, and the attacks that it lacks).

An attack is ``attack(model, x, y, eps, generator) -> x_adv``: x (N, C, S, S) in [0, 1], y (N,) int64 true labels, the result in
[0, 1] and, for the attacks of the maximum norm, nowhere more than ``eps`` from x. Normalisation lives inside the model, so
that eps means what it says. `ATTACKS` holds those of this contract by name; an entry there makes an attack a scenario of
notebook 04. FGSM, BIM, PGD and DeepFool are here because they are the subject. AutoAttack, Square and Carlini–Wagner come
from libraries (`medsec.evasion.libraries`).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.guards import check_images, check_labels

__all__ = ["ATTACKS", "ascend", "bim", "deepfool", "fgsm", "margin", "noise", "pgd"]

Attack = Callable[[nn.Module, Tensor, Tensor, float, torch.Generator], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def check_inputs(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.0) -> None:
    """Refuse what an attack would silently get wrong.

    Raises:
        InputError: images that are not (N, C, S, S) in [0, 1], labels that are not (N,) int64 or not among the model's, a
            module in training mode, or eps outside [0, 1].
    """
    check_images(x)
    check_labels(model, x, y)
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode: its answer would depend on the batch; call model.eval() first")
    if not 0 <= eps <= 1:
        raise InputError(f"eps {eps:g}: must be in [0, 1], in units of the image (4/255 is 0.0157)")


# Losses that an attacker raises ---------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) cross-entropy. It saturates where a model is very sure, which can pass for robustness."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) highest other logit less that of the true class (Carlini & Wagner 2017, with κ = ∞): it does not saturate."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


# Attacks of the maximum norm ------------------------------------------------------------------------------------------


def noise(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """The control that needs no gradient: every pixel up or down by eps, at random."""
    check_inputs(model, x, y, eps)
    signs = 2.0 * torch.randint(0, 2, x.shape, generator=generator).to(x) - 1
    return (x + eps * signs).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """One step of eps along the sign of the gradient (Goodfellow et al. 2015, eq. 1).

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))  # brighter: class 1
    >>> fgsm(model, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), 0.25).item()
    0.75
    """
    return ascend(model, x, y, eps, steps=1, step=1.0)


def bim(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: object = None, **how) -> Tensor:
    """Several small steps from the image itself (Kurakin et al. 2017); further arguments as of `ascend`."""
    return ascend(model, x, y, eps, **how)


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, **how) -> Tensor:
    """Several steps from a random start in the ball (Madry et al. 2018); further arguments as of `ascend`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])
    >>> x_adv = pgd(model, x, y, 8 / 255, torch.Generator().manual_seed(0))
    >>> x_adv.shape, bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
    (torch.Size([3, 1, 4, 4]), True)
    """
    check_inputs(model, x, y, eps)
    return ascend(model, x, y, eps, start=random_start(x, eps, generator), **how)


def random_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Images (N, C, S, S) drawn uniformly from the ball of radius eps around x, in [0, 1]."""
    return (x + eps * (2 * torch.rand(x.shape, generator=generator).to(x) - 1)).clamp(0, 1)


def ascend(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int = 20, step: float = 0.25, **how) -> Tensor:
    """Signed gradient ascent on a loss, projected on the ball of radius eps around x and on [0, 1].

    Args:
        steps: how many.
        step: length of one, in units of eps.
        how: ``start``, ``loss`` and ``stop`` of `climb`.

    Raises:
        InputError: see `check_inputs`; or steps < 1, step <= 0, or not a number.
    """
    check_inputs(model, x, y, eps)
    if steps < 1 or not 0 < step < math.inf:
        raise InputError(f"{steps} steps of {step:g} eps: need at least 1 step, longer than 0")
    return climb(model, x, y, eps, steps=steps, step=step, **how)


@torch.enable_grad()
def climb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int,
    step: float,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
    stop: bool = False,
) -> Tensor:
    """`ascend` in whatever mode the model is, as adversarial training needs it.

    Args:
        start: where to begin; default x.
        loss: what is raised, one value an example.
        stop: leave an example alone as soon as it is misclassified. The same examples fall, in less time; but such an example
            lies just behind the boundary and transfers badly, so that it must not be used against another model.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv, left = (x if start is None else start).clone(), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        at = x_adv[left].requires_grad_()
        logits = model(at)
        (gradient,) = torch.autograd.grad(loss(logits, y[left]).sum(), at)
        moved = (at.detach() + step * eps * gradient.sign()).clamp(low[left], high[left])
        if stop:
            right = logits.detach().argmax(1) == y[left]
            left, moved = left[right], moved[right]
        x_adv[left] = moved
        if not len(left):
            break
    return x_adv


# Made to transfer -----------------------------------------------------------------------------------------------------


@torch.enable_grad()
def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    generator: torch.Generator,
    *,
    steps: int = 10,
    decay: float = 1.0,
    diverse: float = 0.0,
    smallest: float = 0.9,
) -> Tensor:
    """Steps of eps / ``steps`` along a running sum of gradients, so that what is particular to one network averages out.

    Momentum is from Dong et al. (2018), algorithm 1. With ``diverse`` > 0 some gradients are taken at a smaller copy of the
    images in a black frame, at a random place (DI-FGSM, Xie et al. 2019). With several networks the mean of their losses is
    raised (the ensemble "in loss" of Dong et al.).

    Args:
        model: one network, or several as ``nn.ModuleList``.
        steps: how many.
        decay: factor on the sum before each new gradient is added, every gradient divided by its mean absolute value.
        diverse: how often, of all steps, a smaller copy is looked at.
        smallest: side of the smallest copy, in units of the image's.

    Raises:
        InputError: see `check_inputs`; or steps < 1, decay < 0, a share outside [0, 1], or one that is not a number.
    """
    networks = list(model) if isinstance(model, nn.ModuleList) else [model]
    for network in networks:
        check_inputs(network, x, y, eps)
    if steps < 1 or not (0 <= decay < math.inf and 0 <= diverse <= 1 and 0 < smallest <= 1):
        told = f"{steps} steps, decay {decay:g}, diverse {diverse:g}, smallest {smallest:g}"
        raise InputError(f"{told}: need 1 step, a decay of 0 or more, and shares in [0, 1]")
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv, total = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        at = x_adv.clone().requires_grad_()
        seen = framed(at, smallest, generator) if torch.rand((), generator=generator) < diverse else at
        loss = sum(cross_entropy(network(seen), y).sum() for network in networks) / len(networks)
        (gradient,) = torch.autograd.grad(loss, at)
        size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        total = decay * total + gradient / size
        x_adv = (x_adv + eps / steps * total.sign()).clamp(low, high)
    return x_adv


def framed(x: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Images (N, C, S, S), smaller by a random factor of at least ``smallest``, at a random place of a black S × S frame."""
    whole = x.shape[-1]
    side = int(torch.randint(round(smallest * whole), whole + 1, (), generator=generator))
    top, left = torch.randint(0, whole - side + 1, (2,), generator=generator).tolist()
    small = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return F.pad(small, (left, whole - side - left, top, whole - side - top))


# DeepFool -------------------------------------------------------------------------------------------------------------


@torch.enable_grad()
def deepfool(model: nn.Module, x: Tensor, y: Tensor, *, norm: str, steps: int = 50, overshoot: float = 0.02) -> Tensor:
    """The nearest other answer, by repeated linearisation (Moosavi-Dezfooli et al. 2016, algorithm 2). It has no eps.

    It leaves the model's *own* answer, right or wrong; true labels are only checked.

    Args:
        norm: which distance is kept small, "l2" or "linf".
        steps: at most so many linearisations.
        overshoot: share of the change that is added at the end, to get across the boundary.

    Returns:
        (N, C, S, S) in [0, 1]; examples whose answer did not change within ``steps`` are returned as far as they came.

    Raises:
        InputError: see `check_inputs`; or another norm, steps < 1, overshoot < 0 or not a number.
    """
    check_inputs(model, x, y)
    if norm not in ("l2", "linf"):
        raise InputError(f"norm {norm!r}: must be l2 or linf")
    if steps < 1 or not 0 <= overshoot < math.inf:
        raise InputError(f"{steps} steps, overshoot {overshoot:g}: need 1 step, and an overshoot of 0 or more")
    x_adv, left, first = x.clone(), torch.arange(len(x), device=x.device), None
    for _ in range(steps):
        at = x_adv[left].requires_grad_()
        logits = model(at)
        answers = logits.detach().argmax(1)
        first = answers if first is None else first
        same = answers == first[left]
        if not same.any():
            break
        step = _nearest_boundary(logits, at, first[left], norm)
        left = left[same]
        x_adv[left] = (at.detach()[same] + step[same]).clamp(0, 1)
    return (x + (1 + overshoot) * (x_adv - x)).clamp(0, 1)


def _nearest_boundary(logits: Tensor, x: Tensor, own: Tensor, norm: str) -> Tensor:
    """The step to the nearest of the linearised boundaries between each example's own class and the others."""
    n_classes = logits.shape[1]
    gradients = torch.stack(
        [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(n_classes)], 1
    )  # (N, K, C, S, S)
    rows = torch.arange(len(x), device=x.device)
    w = (gradients - gradients[rows, own][:, None]).flatten(2)
    gap = (logits.detach() - logits.detach()[rows, own][:, None]).abs()
    length = w.norm(dim=2) if norm == "l2" else w.abs().sum(2)  # the dual of the maximum norm
    distance = gap / length.clamp_min(1e-7)
    distance[rows, own] = torch.inf
    nearest = distance.argmin(1)
    w, gap, length = w[rows, nearest], gap[rows, nearest], length[rows, nearest].clamp_min(1e-7)
    step = w / length[:, None] if norm == "l2" else w.sign()
    return ((gap / length)[:, None] * step).view_as(x)


def capped(x: Tensor, x_adv: Tensor, eps: float) -> Tensor:
    """An unbounded attack's examples, with every pixel's change cut to at most eps."""
    return x_adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))


# By name, with the settings that are usual: notebook 04 and its parameters know every entry as a scenario -------------

ATTACKS: dict[str, Attack] = {"noise": noise, "fgsm": fgsm, "bim": bim, "pgd": pgd}
