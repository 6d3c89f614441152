"""What a reviewer asks before believing that a model is robust (Carlini et al. 2019; Croce & Hein 2020; Zimmermann et al. 2022).

Every check returns a `Check`: whether it passes, the number that decides it, and the sentence that says what was asked. A
check that fails does not say that a model is weak: it says that the *evaluation* cannot be trusted there.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.evasion import attacks as adversarial

Outcomes = Mapping[tuple[str, float], np.ndarray]  # (scenario, eps) -> which examples are still classified rightly
TOLERANCE = 0.01  # share of the examples that chance may turn
SLOW = ("square", "autoattack")  # attacks that may be run on fewer examples, the first ones


@dataclass(frozen=True)
class Check:
    """One question of a reviewer: ``value`` must be at most ``limit`` (NaN, ``passes`` False: nothing to decide it with)."""

    name: str
    asked: str
    value: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.value <= self.limit


def of_outcomes(outcomes: Outcomes, eps: float) -> list[Check]:
    """The checks that compare attacks on one model, as far as they were run.

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
    swept = sorted(e for scenario, e in outcomes if scenario == "pgd20")
    both = [e for e in swept if ("fgsm", e) in outcomes]
    noisy = [e for e in both if ("noise", e) in outcomes]
    found = [
        Check(
            "iterative_beats_single_step",
            "share by which FGSM leaves fewer right than PGD, at the worst eps",
            _most(outcomes["pgd20", e].mean() - outcomes["fgsm", e].mean() for e in both),
            TOLERANCE,
        ),
        Check(
            "noise_weaker_than_fgsm",
            "share by which noise leaves fewer right than FGSM, at the worst eps",
            _most(outcomes["fgsm", e].mean() - outcomes["noise", e].mean() for e in noisy),
            TOLERANCE,
        ),
        Check(
            "larger_eps_never_weaker",
            "share that is right at an eps and wrong at the next smaller one (PGD), mean at the worst step",
            _most(outcomes["pgd20", b].mean() - outcomes["pgd20", a].mean() for a, b in itertools.pairwise(swept)),
            TOLERANCE,
        ),
    ]
    white = [outcomes[s, eps] for s in ("pgd20", "pgd_margin") if (s, eps) in outcomes]
    survivors = np.logical_and.reduce(white) if white else None
    for name, scenario, other in (
        ("whitebox_beats_transfer", "transfer", "examples made for the undefended model"),
        ("gradient_free_weaker", "square", "Square, which has no gradient"),
    ):
        if survivors is not None and (scenario, eps) in outcomes:
            right = outcomes[scenario, eps]
            value = float((survivors[: len(right)] & ~right).mean())
            found.append(Check(name, f"share that withstands PGD and falls to {other}", value, TOLERANCE))
    return found


def _most(values) -> float:
    values = [float(value) for value in values]
    return max(values) if values else math.nan


def of_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    """Whether the loss has a gradient at every image: a gradient of exactly 0 hides the way."""
    adversarial.check(model, x, y)
    at = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(adversarial.margin(model(at), y).sum(), at)
    lost = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    return Check("no_zero_gradients", "share of images at which the gradient of the margin is exactly 0", lost, 0.0)


def of_steps(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int, more: int, step: float, seed: int
) -> list[Check]:
    """Whether more steps of the same length help (never hurt), and whether they still change much.

    Both begin at the same place, and the last point counts, so that more steps could well do worse.
    """
    right = []
    for n in (steps, more):
        rng = torch.Generator().manual_seed(seed)
        found = adversarial.pgd(model, x, y, eps, rng, steps=n, step=step)
        right.append(_right(model, found, y).mean())
    asked = f"share that {more} steps leave right and {steps} do not"
    return [
        Check("more_steps_never_weaker", asked, float(right[1] - right[0]), TOLERANCE),
        Check("converged", f"share that falls between step {steps} and {more}", float(right[0] - right[1]), 0.02),
    ]


def of_large_eps(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int, step: float, seed: int) -> Check:
    """Whether nothing is left where everything is allowed: at an eps that can turn any image grey."""
    rng = torch.Generator().manual_seed(seed)
    found = adversarial.pgd(model, x, y, eps, rng, steps=steps, step=step, loss=adversarial.margin, stop=True)
    left = float(_right(model, found, y).mean())
    return Check("large_eps_breaks_all", f"share that is still right at eps {round(255 * eps)}/255", left, TOLERANCE)


def of_undefended(outcomes: Outcomes, eps: float) -> Check:
    """Whether the same attack breaks the model without a defence: it leaves less than half."""
    left = float(outcomes["pgd20", eps].mean())
    return Check(
        "undefended_breaks", f"share of the undefended model's examples right at eps {round(255 * eps)}/255", left, 0.5
    )


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    return (model(x).argmax(1) == y).numpy()


# The attack's unit test -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """Among ``n`` images with a planted adversarial example: shares that PGD finds, and that a random corner hits."""

    n: int
    found: float
    by_chance: float


class _Readout(nn.Module):
    """A network's features with another last layer of two classes: 1 where ``w · features > threshold``."""

    def __init__(self, model: nn.Module, w: Tensor, threshold: Tensor):
        super().__init__()
        self.model, self.w, self.threshold = model, w, threshold

    def forward(self, x: Tensor) -> Tensor:
        score = self.model.features(x) @ self.w
        return torch.stack([self.threshold.expand_as(score), score], 1)


def planted(model: nn.Module, x: Tensor, eps: float, *, inner: int, steps: int, step: float, seed: int) -> Planted:
    """Binarisation test (Zimmermann et al. 2022): an adversarial example is put into the ball, and the attack must find it.

    Around every image a new last layer tells one random corner of the ball from ``inner`` others and from the image. So it
    is known that the ball holds an example of the other class; an attack that misses it would also miss one of the true
    classifier's. Images whose corners the features cannot tell apart are left out.

    Args:
        model: with ``features(x)``, in evaluation mode.
        x: (N, C, S, S) in [0, 1].
        eps: radius of the ball.
        inner: other corners; fewer than the model has features.

    Raises:
        InputError: as `medsec.evasion.attacks.check`.
    """
    adversarial.check(model, x, torch.zeros(len(x), dtype=torch.int64), eps)
    rng, label = torch.Generator().manual_seed(seed), torch.zeros(1, dtype=torch.int64)
    hits, chances = [], []
    for image in x.split(1):
        readout = _readout(model, _corners(image, eps, inner + 1, rng))
        if readout is None:
            continue
        found = adversarial.pgd(
            readout, image, label, eps, rng, steps=steps, step=step, loss=adversarial.margin, stop=True
        )
        with torch.no_grad():
            hits.append(float(readout(found).argmax(1)))
            chances.append(float(readout(_corners(image, eps, inner, rng)).argmax(1).float().mean()))
    mean = (float(np.mean(values)) if values else math.nan for values in (hits, chances))
    return Planted(len(hits), *mean)


def _corners(image: Tensor, eps: float, n: int, rng: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, (n, *image.shape[1:]), generator=rng) - 1
    return (image + eps * signs).clamp(0, 1)


@torch.no_grad()
def _readout(model: nn.Module, corners: Tensor) -> _Readout | None:
    """Fisher's direction between the first corner and the others, the threshold half way between it and the next."""
    z = model.features(corners).double()
    mean = z[1:].mean(0)
    spread = (z[1:] - mean).T @ (z[1:] - mean) / (len(z) - 1)
    ridge = 1e-3 * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
    w = torch.linalg.solve(spread + ridge + 1e-12 * torch.eye(len(spread), dtype=torch.float64), z[0] - mean)
    w = w / w.norm()
    score = z @ w
    if not score[0] > score[1:].max():
        return None
    return _Readout(model, w.float(), (0.5 * (score[0] + score[1:].max())).float()).eval()


def of_planted(result: Planted) -> Check:
    """Whether the attack finds nearly all that is known to be there."""
    return Check("attack_unit_test", "share of planted adversarial examples that PGD misses", 1 - result.found, 0.05)
