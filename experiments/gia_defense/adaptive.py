"""The attackers of notebook 03: what the server has of its victims, and what it makes of that, knowing the defence or not.

``naive`` attacks take the gradient for what it seems; ``adaptive`` ones use what their maker knows of the defence.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.gia_defense.clients import DRAWINGS, STAND_INS, Client, Setup, client
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.inversion import adaptive as freed
from medsec.inversion import attacks, defences
from medsec.inversion.attacks import Reconstructions, View
from medsec.inversion.defences import Defence, Perturbation
from medsec.nets import convnet
from medsec.nets.autoencoder import Prior

DETERMINISTIC = ("shadow_released", "offset")  # δ is a function of the image and the client's shadow generator
KNOWN = {  # what an attacker leaves out of the comparison
    "topk": freed.known_entries,
    "soteria": functools.partial(freed.known_layers, distorted=["head.weight"]),
}


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
    defend, used, changed = own.defend, x, None
    if own.perturb is not None:  # asked once: a defence may remember what it was asked
        used = changed = torch.stack([own.perturb(model, a, b, round) for a, b in zip(x, y, strict=True)])
        defend = defences.send(lambda model, x, y, round: x)
    sent = [_local(defend, model, a, b, round, steps, lr) for a, b in zip(used, y, strict=True)]
    gradients = [torch.stack(part).detach() for part in zip(*sent, strict=True)]
    with torch.no_grad():
        seen = [convnet.logits_and_statistics(model, images)[1] for images in used]
    statistics = [torch.stack(part) for part in zip(*seen, strict=True)]
    guess = y if public is None else _infer(model, gradients, y.shape[1], public, steps)
    return Case(x, y, guess, changed, View(model, gradients, steps=steps, lr=lr, statistics=statistics))


def _local(defend: Defence, model: nn.Module, x: Tensor, y: Tensor, round: int, steps: int, lr: float) -> list[Tensor]:
    """What a client sends after some SGD steps on one batch: the sum of its gradients."""
    total, now = defend(model, x, y, round), copy.deepcopy(model)
    for step in range(1, steps):
        with torch.no_grad():
            for mine, start, gradient in zip(now.parameters(), model.parameters(), total, strict=True):
                mine.copy_(start - lr * gradient)
        fresh = defend(now, x, y, round + step)  # as if of another round: noise is drawn anew
        total = [a + b for a, b in zip(total, fresh, strict=True)]
    return total


@torch.no_grad()
def _infer(model: nn.Module, gradients: list[Tensor], batch: int, public: Tensor, steps: int) -> Tensor:
    probabilities = model(public).softmax(1).mean(0)
    each = zip(*[g / steps for g in gradients], strict=True)
    return torch.stack([attacks.infer_labels(one, batch, probabilities) for one in each])


# Attacks -------------------------------------------------------------------------------------------------------------


def invert(setup: Setup, view: View, found: Case, attack: str, seed: int) -> Reconstructions:
    """One attack of `medsec.inversion.attacks` on the victims of a case, with the settings of the parameters."""
    return attacks.invert(
        [view],
        found.guess,
        tuple(found.x.shape[2:]),
        attack=attack,
        settings=setup.params.inversion.attack,
        seed=derive_seed(seed, "attack", attack),
        generator=setup.prior if attack == "prior" else None,
    )


def naive(setup: Setup, found: Case, names: Sequence[str], seed: int) -> dict[str, Reconstructions]:
    """The attacks that take the gradient for what it seems."""
    return {attack: invert(setup, found.view, found, attack, seed) for attack in names}


def adaptive(
    variant: str, setup: Setup, found: Case, later: Sequence[Case], wanted: Sequence[str], seed: int
) -> dict[str, Reconstructions]:
    """Those attacks of `medsec.inversion.adaptive` that make sense for a defence."""
    p, public, view = setup.params.inversion, setup.splits["public"], found.view
    known, drawn = "known" in wanted and variant in KNOWN, variant in DRAWINGS or variant in STAND_INS
    answers = freed.adaptive(
        view,
        found.guess,
        tuple(found.x.shape[2:]),
        settings=p.attack,
        seed=seed,
        weights=KNOWN[variant](view) if known else (),
        smoother="smoother" in wanted and found.changed is None and variant != "none",
        later=[each.view for each in later] if "joint" in wanted else (),
        generator=Prior(setup.autoencoder, public[0])
        if "generator" in wanted and (drawn or variant == "none")
        else None,
    )
    if found.changed is None or not {"purified", "unmasked"} & set(wanted):
        return answers

    def copy(images: Tensor, labels: Tensor, seed: int, public: tuple[Tensor, Tensor] | None = None) -> Perturbation:
        return client(variant, setup, images, labels, seed, public).perturb

    ways = [
        way for way in ("purified", "unmasked") if way in wanted and (way == "purified" or variant in DETERMINISTIC)
    ]
    stand_ins = variant in STAND_INS or variant == "public_only"
    options = {"settings": p.attack, "purifier": p.purifier, "wanted": ways, "stand_ins": stand_ins}
    return answers | freed.undo(view, found.guess, copy, public, **options, seed=seed)


def floor(setup: Setup, y: Tensor) -> Tensor:
    """(V, B, C, S, S): without a gradient, but with the label, the public mean image of that class."""
    images, labels = setup.splits["public"]
    means = torch.stack([images[labels == k].mean(0) for k in range(setup.cohort.n_classes)])
    return means[y]
