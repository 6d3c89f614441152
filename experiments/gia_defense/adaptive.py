"""The attackers of notebook 03: what the server has of its victims, and what it makes of that, knowing the defence or not.

``naive`` attacks take the gradient for what it seems; ``adaptive`` ones use what their maker knows of the defence.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.gia_defense.clients import DRAWINGS, STAND_INS, Client, Setup, client
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.inversion import attacks as inversion
from medsec.inversion import defences as gradient_defences
from medsec.inversion import purifier
from medsec.inversion.attacks import Found, View
from medsec.inversion.defences import Defence
from medsec.nets import convnet
from medsec.nets.autoencoder import Prior

DETERMINISTIC = ("shadow_released", "offset")  # δ is a function of the image and the client's shadow generator
SMOOTHER = {"smoother": 10, "smoothest": 100}  # times the total variation
UNMASKING = 3  # times that the attacker guesses δ anew


@dataclass(frozen=True)
class Case:
    """Victims of one client in one round, and what the server and the defence have made of them.

    Attributes:
        x, y: (V, B, C, S, S) and (V, B).
        guess: (V, B) the labels that the attacker works with.
        changed: x′, or None for a defence on gradients.
        view: what the server sees.
    """

    x: Tensor
    y: Tensor
    guess: Tensor
    changed: Tensor | None
    view: View


def victims(setup: Setup, images: Tensor, n: int, batch: int, seed: int) -> Tensor:
    """(n, batch) indices of a client's images, none twice.

    Raises:
        InputError: the client holds fewer.
    """
    if n * batch > len(images):
        raise InputError(
            f"{n} victims with a batch of {batch}: a client holds {len(images)} images; lower inversion.victims"
        )
    return torch.randperm(len(images), generator=torch_generator(seed, "victims"))[: n * batch].view(n, batch)


def case(
    own: Client,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    round: int,
    *,
    steps: int = 1,
    lr: float = 0.0,
    public: Tensor | None = None,
) -> Case:
    """The victims' gradients under a defence, each batch sent by itself.

    Args:
        steps, lr: local steps on the batch, and their learning rate.
        public: public images, for an attacker who has to infer the labels; by default it knows them.
    """
    send, used, changed = own.send, x, None
    if own.perturb is not None:  # asked once: a defence may remember what it was asked
        used = changed = torch.stack([own.perturb(model, a, b, round) for a, b in zip(x, y, strict=True)])
        send = gradient_defences.send(lambda model, x, y, round: x)
    sent = [_local(send, model, a, b, round, steps, lr) for a, b in zip(used, y, strict=True)]
    gradients = [torch.stack(part).detach() for part in zip(*sent, strict=True)]
    with torch.no_grad():
        seen = [convnet.logits_and_statistics(model, images)[1] for images in used]
    statistics = [torch.stack(part) for part in zip(*seen, strict=True)]
    guess = y if public is None else _infer(model, gradients, y.shape[1], public, steps)
    return Case(x, y, guess, changed, View(model, gradients, steps=steps, lr=lr, statistics=statistics))


def _local(send: Defence, model: nn.Module, x: Tensor, y: Tensor, round: int, steps: int, lr: float) -> list[Tensor]:
    """What a client sends after some SGD steps on one batch: the sum of its gradients."""
    total, now = send(model, x, y, round), copy.deepcopy(model)
    for step in range(1, steps):
        with torch.no_grad():
            for mine, start, gradient in zip(now.parameters(), model.parameters(), total, strict=True):
                mine.copy_(start - lr * gradient)
        fresh = send(now, x, y, round + step)  # as if of another round: noise is drawn anew
        total = [a + b for a, b in zip(total, fresh, strict=True)]
    return total


@torch.no_grad()
def _infer(model: nn.Module, gradients: list[Tensor], batch: int, public: Tensor, steps: int) -> Tensor:
    probabilities = model(public).softmax(1).mean(0)
    each = zip(*[g / steps for g in gradients], strict=True)
    return torch.stack([inversion.infer_labels(one, batch, probabilities) for one in each])


# Attacks -------------------------------------------------------------------------------------------------------------


def invert(setup: Setup, views: Sequence[View], found: Case, attack: str, seed: int, **more) -> Found:
    """One attack of `medsec.inversion.attacks` on the victims of a case, with the settings of the parameters."""
    if attack == "prior":
        more.setdefault("generator", setup.prior)
    more.setdefault("settings", setup.params.inversion.attack)
    return inversion.invert(
        views,
        found.guess,
        tuple(found.x.shape[2:]),
        attack=attack,
        seed=derive_seed(seed, "attack", attack),
        **more,
    )


def naive(setup: Setup, found: Case, attacks: Sequence[str], seed: int) -> dict[str, Found]:
    """The attacks that take the gradient for what it seems."""
    return {attack: invert(setup, [found.view], found, attack, seed) for attack in attacks}


def adaptive(
    variant: str, setup: Setup, found: Case, later: Sequence[Case], wanted: Sequence[str], seed: int
) -> dict[str, Found]:
    """Attacks by somebody who knows the defence, as far as they make sense for it.

    ``known``: entries or layers that are known to be useless are left out. ``smoother``, ``smoothest``: a gradient that is
    known to be disturbed is matched with ten and a hundred times the total variation. ``joint``: several rounds are matched
    together. ``generator``: search in the defender's own generator. ``purified``: x′ is searched within the bounds that it can
    have, and mapped back by a purifier that was trained on public images. ``unmasked``: where δ is a function of the image,
    the attacker computes it for its reconstruction, takes it off, and again.
    """
    attacks: dict[str, Found] = {}
    view = found.view
    if "known" in wanted and variant in ("topk", "soteria"):
        view = dataclasses.replace(view, weights=known_weights(variant, view))
        attacks["known"] = invert(setup, [view], found, "ig", seed)
    if "smoother" in wanted and found.changed is None and variant != "none":
        for name, factor in SMOOTHER.items():
            settings = setup.params.inversion.attack
            settings = settings.model_copy(update={"tv": factor * settings.tv})
            attacks[name] = invert(setup, [view], found, "ig", seed, settings=settings)
    if "joint" in wanted and later:
        attacks["joint"] = invert(setup, [found.view, *(c.view for c in later)], found, "ig", seed)
    if "generator" in wanted and (variant in DRAWINGS or variant in STAND_INS or variant == "none"):
        own = Prior(setup.autoencoder, setup.splits["public"][0])
        attacks["generator"] = invert(setup, [found.view], found, "prior", seed, generator=own)
    if found.changed is None or not {"purified", "unmasked"} & set(wanted):
        return attacks
    changed, clean = public_pairs(variant, setup, found.view.model, found.x.shape[1], seed)
    bounds = min(0.0, float(changed.min())), max(1.0, float(changed.max()))
    recovered = invert(setup, [found.view], found, "ig", seed, bounds=bounds)
    if "purified" in wanted:
        purify, _ = purifier.fit(changed, clean, setup.params.inversion.purifier, derive_seed(seed, "purifier"))
        images = purify(recovered.images.flatten(0, 1)).view_as(recovered.images)
        attacks["purified"] = dataclasses.replace(recovered, images=images)
    if "unmasked" in wanted and variant in DETERMINISTIC:
        attacks["unmasked"] = dataclasses.replace(recovered, images=unmasked(variant, setup, found, recovered, seed))
    return attacks


def known_weights(variant: str, view: View) -> list[Tensor]:
    """What an attacker leaves out of the comparison: dropped entries (``topk``), the head's weight (``soteria``)."""
    if variant == "topk":
        return [(g != 0).to(g) for g in view.gradients]
    names = [name for name, _ in view.model.named_parameters()]
    return [
        torch.zeros_like(g) if name == "head.weight" else torch.ones_like(g)
        for name, g in zip(names, view.gradients, strict=True)
    ]


def public_pairs(variant: str, setup: Setup, model: nn.Module, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Public images after and before an image-space defence (of the first round) that the attacker runs itself.

    In batches as large as the victims', since a defence may look at a whole batch. A public image would stand in for itself:
    there a third of them is protected by the rest.

    Args:
        batch: images that are sent together.
    """
    images, labels = setup.splits["public"]
    order = torch.randperm(len(images), generator=torch_generator(seed, "public pairs"))
    bank = None
    if variant in STAND_INS or variant == "public_only":
        rest = torch.ones(len(order), dtype=torch.bool)
        rest[::3] = False
        bank, order = (images[order[rest]], labels[order[rest]]), order[::3]
    order = order[: setup.params.inversion.purifier.images]
    images, labels = images[order], labels[order]
    own = client(variant, setup, images, labels, derive_seed(seed, "attacker's copy"), bank)
    changed = [own.perturb(model, a, b, 0) for a, b in zip(images.split(batch), labels.split(batch), strict=True)]
    return torch.cat(changed), images


def unmasked(variant: str, setup: Setup, found: Case, recovered: Found, seed: int) -> Tensor:
    """Reconstructions of x′ less the δ that the attacker's own copy of the defence adds to its last guess of x.

    The fixed point x̂ = x′ − δ(x̂) is x itself where the copy has the client's shadow generator. That of ``shadow_released``
    starts at random: an attacker has to do with another one.
    """
    images, labels = setup.splits["public"]
    guess = recovered.images.clamp(0, 1)
    for _ in range(UNMASKING):
        guess = torch.stack(
            [
                (image - _delta(client(variant, setup, images, labels, derive_seed(seed, "copy", v)), found, now, y))
                for v, (image, now, y) in enumerate(zip(recovered.images, guess, found.guess, strict=True))
            ]
        ).clamp(0, 1)
    return guess


def _delta(copied: Client, found: Case, x: Tensor, y: Tensor) -> Tensor:
    return copied.perturb(found.view.model, x, y, 0) - x


def floor(setup: Setup, y: Tensor) -> Tensor:
    """(V, B, C, S, S): without a gradient, but with the label, the public mean image of that class."""
    images, labels = setup.splits["public"]
    means = torch.stack([images[labels == k].mean(0) for k in range(setup.cohort.n_classes)])
    return means[y]
