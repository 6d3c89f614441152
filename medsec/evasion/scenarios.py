"""The attacks of the maximum norm that notebook 04 runs, by the name of their scenario."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medsec.core.seeds import derive_seed
from medsec.evasion import libraries
from medsec.evasion.attacks import ATTACKS, Attack, bim, capped, deepfool, margin, pgd
from medsec.nets.cbam import gates_detached

__all__ = ["craft", "names"]


def eps_key(eps: float) -> str:
    """How an eps in [0, 1] stands in a table: 4/255 is 0.0156863."""
    return f"{eps:.6g}"


def _pgd_detached(model: nn.Module, *args, **how) -> Tensor:
    with gates_detached(model):
        return pgd(model, *args, **how)


def _deepfool_capped(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, **how) -> Tensor:
    return capped(x, deepfool(model, x, y, norm="linf", **how), eps)


def _library(attack: Callable, **how) -> Attack:
    return lambda model, x, y, eps, generator: attack(model, x, y, eps, **how)


# (section evasion.attacks, seed, stop) -> the attack, for those whose settings are parameters; of all others see `ATTACKS`
CONFIGURED: dict[str, Callable[[Any, int, bool], Attack]] = {
    "bim": lambda p, seed, stop: partial(bim, steps=p.steps, step=p.bim_step),
    "pgd20": lambda p, seed, stop: partial(pgd, steps=p.steps, step=p.step, stop=stop),
    "pgd20_eps10": lambda p, seed, stop: partial(pgd, steps=p.steps, step=p.small_step, stop=stop),
    "pgd_margin": lambda p, seed, stop: partial(pgd, steps=p.steps, step=p.step, loss=margin, stop=stop),
    "pgd_detached": lambda p, seed, stop: partial(_pgd_detached, steps=p.steps, step=p.step, stop=stop),
    "deepfool_capped": lambda p, *_: partial(_deepfool_capped, steps=p.deepfool_steps, overshoot=p.overshoot),
    "square": lambda p, seed, _: _library(libraries.square, seed=seed, queries=p.square_queries),
    "autoattack": lambda p, seed, _: _library(
        libraries.autoattack,
        seed=seed,
        iterations=p.apgd_iterations,
        queries=p.square_queries,
        restarts=p.restarts,
    ),
}


def names() -> list[str]:
    """What ``evasion.attacks.scenarios`` may name: every attack but the control ``noise``, which is always run."""
    return [name for name in ATTACKS | CONFIGURED if name != "noise"]


def craft(
    scenario: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    p: Any,
    seed: int,
    *,
    stop: bool = True,
) -> Tensor:
    """The examples of one attack, (N, C, S, S).

    Args:
        scenario: ``noise`` or one of `names`.
        p: section ``evasion.attacks`` of the parameters.
        stop: end at the first success (`medsec.evasion.attacks.ascend`); not for examples that shall transfer.
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, scenario, eps_key(eps)))
    attack = CONFIGURED[scenario](p, seed, stop) if scenario in CONFIGURED else ATTACKS[scenario]
    return attack(model, x, y, eps, rng)
