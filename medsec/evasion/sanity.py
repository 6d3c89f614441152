"""What a reviewer asks before believing that a model is robust (Carlini et al. 2019; Croce & Hein 2020; Zimmermann et al. 2022).

`reviewed` asks all of it. Every answer is a `Check`: whether it passes, and the number that decides it. A check that fails does
not say that a model is weak: it says that the *evaluation* cannot be trusted there.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.evasion.attacks import check_inputs, margin, pgd

__all__ = ["TOLERANCE", "compare", "planted", "reviewed"]

Outcomes = Mapping[tuple[str, float], np.ndarray]  # (scenario, eps) -> which examples are still classified rightly
TOLERANCE = 0.01  # share of the examples that chance may turn
SLOW = ("square", "autoattack")  # attacks that may be run on fewer examples, the first ones
QUESTIONS = {  # of a check: what is true where it passes
    "iterative_beats_single_step": "PGD leaves no more right than FGSM",
    "noise_weaker_than_fgsm": "noise of the same size leaves more right than FGSM",
    "larger_eps_never_weaker": "a larger eps leaves no more right",
    "whitebox_beats_transfer": "what withstands PGD does not fall to examples made for the plain network",
    "gradient_free_weaker": "nor to Square, which uses no gradient",
    "no_zero_gradients": "the gradient is nowhere exactly 0",
    "more_steps_never_weaker": "many more steps leave no more right",
    "converged": "nor many fewer: the steps are enough",
    "large_eps_breaks_all": "where any image may become grey, nothing is left",
    "undefended_breaks": "the same attack breaks the plain network",
    "attack_unit_test": "an adversarial example that is there is found",
}


@dataclass(frozen=True)
class Check:
    """One question of a reviewer (`QUESTIONS`): ``value``, a share of the examples, must be at most ``limit``.

    NaN, which does not pass, means that there is nothing to decide it with.
    """

    name: str
    value: float
    limit: float = TOLERANCE

    @property
    def passes(self) -> bool:
        return self.value <= self.limit


def compare(outcomes: Outcomes, eps: float) -> list[Check]:
    """The checks that compare attacks on one model, as far as they were run.

    ``iterative_beats_single_step``, ``noise_weaker_than_fgsm``: by how much FGSM leaves fewer right than PGD, and noise than
    FGSM, at the worst eps. ``larger_eps_never_weaker``: by how much PGD leaves more right than at the next smaller eps, at the
    worst. ``whitebox_beats_transfer``, ``gradient_free_weaker``: which share withstands PGD and falls to the other attack.

    Args:
        outcomes: of the attacks ``noise, fgsm, pgd20`` at several eps, of ``pgd_margin``, ``square`` and ``transfer`` at the
            headline's, of ``clean`` at 0; those of `SLOW` attacks may stop early.
        eps: the headline's.

    Raises:
        InputError: outcomes of different numbers of examples.
    """
    sizes = {len(right) for (scenario, _), right in outcomes.items() if scenario not in SLOW}
    if len(sizes) != 1:
        raise InputError(f"outcomes of {sorted(sizes)} examples: all attacks must be run on the same ones")

    def excess(more: tuple[str, float], fewer: tuple[str, float]) -> float:
        return float(outcomes[more].mean() - outcomes[fewer].mean())

    swept = sorted(e for scenario, e in outcomes if scenario == "pgd20")
    both = [e for e in swept if ("fgsm", e) in outcomes]
    noisy = [e for e in both if ("noise", e) in outcomes]
    steps = (excess(("pgd20", b), ("pgd20", a)) for a, b in itertools.pairwise(swept))
    checks = [
        Check("iterative_beats_single_step", _most(excess(("pgd20", e), ("fgsm", e)) for e in both)),
        Check("noise_weaker_than_fgsm", _most(excess(("fgsm", e), ("noise", e)) for e in noisy)),
        Check("larger_eps_never_weaker", _most(steps)),
    ]
    white = [outcomes[s, eps] for s in ("pgd20", "pgd_margin") if (s, eps) in outcomes]
    survivors = np.logical_and.reduce(white) if white else None
    for name, scenario in (("whitebox_beats_transfer", "transfer"), ("gradient_free_weaker", "square")):
        if survivors is not None and (scenario, eps) in outcomes:
            right = outcomes[scenario, eps]
            checks.append(Check(name, float((survivors[: len(right)] & ~right).mean())))
    return checks


def _most(values: Iterable[float]) -> float:
    return max(values, default=math.nan)


# The attack's unit test -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """Among ``n`` images with a planted adversarial example: shares that PGD finds, and that a random corner hits."""

    n: int
    found: float
    by_chance: float


def last_features(model: nn.Module, x: Tensor) -> Tensor:
    """(N, D): what the linear layer sees that a model calls last, its head.

    Raises:
        InputError: a model without a linear layer.
    """
    seen: list[Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise InputError(
            f"{type(model).__name__} has no linear layer that could be replaced by one for a planted example"
        )
    return seen[-1].flatten(1)


class _Readout(nn.Module):
    """A network with another last layer of two classes: 1 where ``w · features > threshold``."""

    def __init__(self, model: nn.Module, w: Tensor, threshold: Tensor):
        super().__init__()
        self.model, self.w, self.threshold = model, w, threshold

    def forward(self, x: Tensor) -> Tensor:
        score = last_features(self.model, x) @ self.w
        return torch.stack([self.threshold.expand_as(score), score], 1)


def planted(model: nn.Module, x: Tensor, eps: float, *, inner: int, steps: int, step: float, seed: int) -> Planted:
    """Binarisation test (Zimmermann et al. 2022): an adversarial example is put into the ball, and the attack must find it.

    Around every image a new last layer tells one random corner of the ball from ``inner`` others and from the image. So it
    is known that the ball holds an example of the other class; an attack that misses it would also miss one of the true
    classifier's. Images whose corners the features cannot tell apart are left out.

    Args:
        model: in evaluation mode, with a linear layer as its head.
        x: (N, C, S, S) in [0, 1].
        eps: radius of the ball.
        inner: other corners; fewer than the model has features.

    Raises:
        InputError: as `medsec.evasion.attacks.check_inputs`; or a model without a linear layer.
    """
    check_inputs(model, x, torch.zeros(len(x), dtype=torch.int64), eps)
    rng, label = torch.Generator().manual_seed(seed), torch.zeros(1, dtype=torch.int64)
    hits, chances = [], []
    for image in x.split(1):
        readout = _readout(model, _corners(image, eps, inner + 1, rng))
        if readout is None:
            continue
        x_adv = pgd(readout, image, label, eps, rng, steps=steps, step=step, loss=margin, stop=True)
        with torch.no_grad():
            hits.append(float(readout(x_adv).argmax(1)))
            chances.append(float(readout(_corners(image, eps, inner, rng)).argmax(1).float().mean()))
    mean = (float(np.mean(values)) if values else math.nan for values in (hits, chances))
    return Planted(len(hits), *mean)


def _corners(image: Tensor, eps: float, n: int, rng: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, (n, *image.shape[1:]), generator=rng) - 1
    return (image + eps * signs).clamp(0, 1)


@torch.no_grad()
def _readout(model: nn.Module, corners: Tensor) -> _Readout | None:
    """Fisher's direction between the first corner and the others, the threshold half way between it and the next."""
    z = last_features(model, corners).double()
    mean = z[1:].mean(0)
    spread = (z[1:] - mean).T @ (z[1:] - mean) / (len(z) - 1)
    ridge = 1e-3 * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
    w = torch.linalg.solve(spread + ridge + 1e-12 * torch.eye(len(spread), dtype=torch.float64), z[0] - mean)
    w = w / w.norm()
    score = z @ w
    if not score[0] > score[1:].max():
        return None
    return _Readout(model, w.float(), (0.5 * (score[0] + score[1:].max())).float()).eval()


# What no network can reach --------------------------------------------------------------------------------------------


def ceiling(one: np.ndarray, other: np.ndarray, eps: float) -> float:
    """Upper bound of robust accuracy over pairs of images of different classes, each pair equally likely to show either.

    Where two images lie at most 2 eps apart, the one half way between them lies within eps of both. A classifier gives it one
    answer, which is wrong for one of the two: half of each such pair is lost to an attacker, whatever the network.

    Args:
        one, other: (N, C, S, S) uint8, pair by pair.
        eps: radius of the ball (maximum norm), in 255ths.

    >>> one, other = np.zeros((2, 1, 1, 1), np.uint8), np.array([8, 9], np.uint8).reshape(2, 1, 1, 1)
    >>> ceiling(one, other, 4), ceiling(one, other, 3), ceiling(one, other, 4.5)
    (0.75, 1.0, 0.5)
    """
    return float(1 - 0.5 * (largest_change(one, other) <= 2 * eps).mean())


def largest_change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) largest difference at a pixel, in 255ths, of (N, C, S, S) uint8 images."""
    return np.abs(one.astype(int) - other).max((1, 2, 3))


# All of it ------------------------------------------------------------------------------------------------------------


def reviewed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    outcomes: Outcomes,
    *,
    steps: int = 20,
    more: int = 100,
    step: float = 0.25,
    grey: float = 128 / 255,
    images: int = 16,
    inner: int = 40,
    seed: int = 0,
    undefended: bool = False,
) -> tuple[list[Check], Planted]:
    """All checks of one model: those of `compare` on its outcomes, and those that need a few more runs of PGD.

    Args:
        model: any classifier in evaluation mode, (N, C, S, S) in [0, 1] -> logits, with a linear layer as its head.
        x, y: (N, C, S, S) in [0, 1] and (N,) int64, images on which PGD is run; few will do.
        eps: radius of the ball.
        outcomes: of the attacks that were run, on these or other images.
        steps, step: of the PGD that is reviewed; a step in units of eps.
        more: steps with which that is compared: from the same start, and the last point counts.
        grey: an eps that can turn any image grey.
        images, inner: of the unit test (`planted`): on the first so many images, with so many other corners.
        seed: of random starts and corners.
        undefended: the model is the one without a defence, which must break: less than half may be left.

    Returns:
        The checks, and what the unit test found.

    Raises:
        InputError: see `compare` and `planted`.
    """

    def left(steps: int, eps: float, **how) -> float:
        x_adv = pgd(model, x, y, eps, torch.Generator().manual_seed(seed), steps=steps, step=step, **how)
        with torch.no_grad():
            return float((model(x_adv).argmax(1) == y).numpy().mean())

    unit = planted(model, x[:images], eps, inner=inner, steps=steps, step=step, seed=seed)
    checks = compare(outcomes, eps)
    at = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(margin(model(at), y).sum(), at)
    checks.append(Check("no_zero_gradients", float((gradient.flatten(1).abs().amax(1) == 0).float().mean()), 0.0))
    few, many = left(steps, eps), left(more, eps)
    checks += [Check("more_steps_never_weaker", many - few), Check("converged", few - many, 0.02)]
    checks.append(Check("large_eps_breaks_all", left(more, grey, loss=margin, stop=True)))
    checks.append(Check("attack_unit_test", 1 - unit.found, 0.05))
    if undefended:
        checks.append(Check("undefended_breaks", float(outcomes["pgd20", eps].mean()), 0.5))
    return checks, unit
