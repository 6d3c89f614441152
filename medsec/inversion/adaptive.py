"""Attackers who know the defence, for any model, defence and public images.

`adaptive` attacks a gradient; `undo` takes back what a defence has done to images. Its arguments: ``copy(images, labels, seed,
public=None)`` makes the attacker's own copy of the defence, ``perturb(model, x, y, round) -> x′``, as a client with these
images has it, where ``public`` may stand in for them (default: all); ``public``: images (M, C, S, S) and labels (M,).
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import InversionSettings, PurifierParams
from medsec.inversion import purifier as purifiers
from medsec.inversion.attacks import Reconstructions, View, invert
from medsec.inversion.defences import Perturbation

__all__ = ["adaptive", "undo"]

SMOOTHER = {"smoother": 10, "smoothest": 100}  # times the total variation
UNMASKING = 3  # times that the attacker guesses δ anew


def adaptive(
    view: View,
    labels: Tensor,
    shape: tuple[int, int, int],
    *,
    settings: InversionSettings,
    seed: int,
    weights: Sequence[Tensor] = (),
    smoother: bool = False,
    later: Sequence[View] = (),
    generator: nn.Module | None = None,
) -> dict[str, Reconstructions]:
    """Attacks by what the attacker knows, each only where its argument is given.

    Args:
        view, labels, shape, settings: see `medsec.inversion.attacks.invert`.
        seed: of all attacks.
        weights: ``known``: of the comparison, 0 for what is known to be useless (`known_entries`, `known_layers`).
        smoother: ``smoother``, ``smoothest``: a gradient that is known to be disturbed is matched with ten and a hundred
            times the total variation.
        later: ``joint``: views of the same victims in later rounds, matched together with the first.
        generator: ``generator``: the defender's own, in which is searched.
    """
    known = dataclasses.replace(view, weights=list(weights)) if weights else view
    attacks, ig = {}, {"attack": "ig", "seed": derive_seed(seed, "attack", "ig")}
    if weights:
        attacks["known"] = invert([known], labels, shape, settings=settings, **ig)
    for name, factor in SMOOTHER.items() if smoother else ():
        smooth = settings.model_copy(update={"tv": factor * settings.tv})
        attacks[name] = invert([known], labels, shape, settings=smooth, **ig)
    if later:
        attacks["joint"] = invert([view, *later], labels, shape, settings=settings, **ig)
    if generator is not None:
        prior = {"attack": "prior", "seed": derive_seed(seed, "attack", "prior"), "generator": generator}
        attacks["generator"] = invert([view], labels, shape, settings=settings, **prior)
    return attacks


def known_entries(view: View) -> list[Tensor]:
    """Weights of the comparison without the entries that are 0: compression dropped them."""
    return [(g != 0).to(g) for g in view.gradients]


def known_layers(view: View, distorted: Sequence[str]) -> list[Tensor]:
    """Weights of the comparison without the parameters that are named: a defence distorts them."""
    names = [name for name, _ in view.model.named_parameters()]
    return [
        torch.zeros_like(g) if name in distorted else torch.ones_like(g)
        for name, g in zip(names, view.gradients, strict=True)
    ]


def undo(
    view: View,
    labels: Tensor,
    copy: Callable[..., Perturbation],
    public: tuple[Tensor, Tensor],
    *,
    settings: InversionSettings,
    purifier: PurifierParams,
    seed: int,
    wanted: Sequence[str] = ("purified", "unmasked"),
    stand_ins: bool = False,
) -> dict[str, Reconstructions]:
    """Search x′ within the bounds that it can have, and go back from it to x in one or two ways (``wanted``).

    ``purified``: by a purifier that is trained on public images (`public_pairs`). ``unmasked``: by `unmask`, which makes
    sense where δ is a function of the image. Further arguments as in `medsec.inversion.attacks.invert`.
    """
    size = {"batch": labels.shape[1], "n": purifier.images, "stand_ins": stand_ins}
    changed, clean = public_pairs(copy, view.model, public, **size, seed=seed)
    bounds = min(0.0, float(changed.min())), max(1.0, float(changed.max()))
    options = {"settings": settings, "seed": derive_seed(seed, "attack", "ig"), "bounds": bounds}
    recovered = invert([view], labels, tuple(clean.shape[1:]), attack="ig", **options)
    images = {}
    if "purified" in wanted:
        purify, _ = purifiers.fit(changed, clean, purifier, derive_seed(seed, "purifier"))
        images["purified"] = purify(recovered.images.flatten(0, 1)).view_as(recovered.images)
    if "unmasked" in wanted:
        images["unmasked"] = unmask(recovered.images, view.model, labels, copy, public, seed=seed)
    return {name: dataclasses.replace(recovered, images=each) for name, each in images.items()}


def public_pairs(
    copy: Callable[..., Perturbation],
    model: nn.Module,
    public: tuple[Tensor, Tensor],
    *,
    batch: int,
    n: int,
    stand_ins: bool = False,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) twice: at most n public images after and before the first round of a defence that the attacker runs.

    They go through it in batches as large as the victims', since a defence may look at a whole batch. Where it uses public
    images (``stand_ins``), each of these would stand in for itself: there a third is protected by the rest.
    """
    images, labels = public
    order, rest = torch.randperm(len(images), generator=torch_generator(seed, "public pairs")), None
    if stand_ins:
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[::3] = False
        rest, order = (images[order[kept]], labels[order[kept]]), order[::3]
    order = order[:n]
    held = torch.bincount(labels[order])[labels[order]] > 1  # a single image of a class hides in no group
    if rest is not None:
        held &= torch.isin(labels[order], rest[1])
    images, labels = images[order[held]], labels[order[held]]
    perturb = copy(images, labels, derive_seed(seed, "attacker's copy"), rest)
    changed = [perturb(model, a, b, 0) for a, b in zip(images.split(batch), labels.split(batch), strict=True)]
    return torch.cat(changed), images


def unmask(
    changed: Tensor,
    model: nn.Module,
    labels: Tensor,
    copy: Callable[..., Perturbation],
    public: tuple[Tensor, Tensor],
    *,
    seed: int,
) -> Tensor:
    """Reconstructions of x′ (V, B, C, S, S) less the δ that a fresh copy of the defence adds to the last guess of x.

    The fixed point x̂ = x′ − δ(x̂) is x itself where the copy has the client's shadow generator. That of ``shadow_released``
    starts at random: an attacker has to do with another one.
    """
    guess = changed.clamp(0, 1)
    for _ in range(UNMASKING):
        copies = [copy(*public, derive_seed(seed, "copy", v)) for v in range(len(guess))]
        deltas = [perturb(model, x, y, 0) - x for perturb, x, y in zip(copies, guess, labels, strict=True)]
        guess = torch.stack([image - delta for image, delta in zip(changed, deltas, strict=True)]).clamp(0, 1)
    return guess
