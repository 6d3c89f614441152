"""Federated GANs and the backdoor against them (Jin & Li 2023, Medical Image Analysis 90:102965).

As released: every client trains a generator and a discriminator on its own images, only the generator is averaged,
the discriminators and all optimiser states stay local; a malicious client stamps a trigger on its real images and
otherwise trains honestly. Ours, and labelled so wherever it is used: label-conditional networks small enough for a
CPU, disjoint client data, and the ``boost`` of the malicious update.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medsec.backdoor.recipes import RECIPES
from medsec.backdoor.triggers import Trigger, stamp
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import GAN, FedGANParams
from medsec.federated.aggregators import fedavg
from medsec.federated.rounds import Aggregator, State, Update, run_round, scale_update
from medsec.nets.models import Discriminator, Generator

__all__ = ["FederatedGAN", "branch", "new_federation", "poison", "run", "synthesise", "train_client"]


@dataclass
class GANClient:
    """One hospital: its images, and what it never sends (discriminator, optimiser states).

    Attributes:
        images: (n, C, S, S) float32 in [0, 1]; those of a malicious client are stamped already.
        labels: (n,) int64.
        poisoned: (n,) bool, which images carry the trigger.
        boost: factor on its update, 1 for an honest one; applied from round ``boost_from``.
    """

    index: int
    images: Tensor
    labels: Tensor
    poisoned: Tensor
    generator: Generator
    discriminator: Discriminator
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    boost: float = 1.0
    boost_from: int = 0

    @property
    def malicious(self) -> bool:
        return bool(self.poisoned.any())


@dataclass
class FederatedGAN:
    """A FedGAN between two rounds.

    ``state`` is what the server holds (the averaged generator; names begin with ``generator.``), ``history`` what the
    clients reported or why they were ``rejected`` or ``absent`` (`run_round`), and what ``after_round`` measured, one
    dictionary a client and round.
    """

    seed: int
    gan: GAN
    rounds: int
    average: str
    clients: list[GANClient]
    state: State
    round: int = 0
    history: list[dict] = field(default_factory=list)

    def generator(self, client: int | None = None) -> Generator:
        """The averaged generator, or the one that a client trained last, ready to draw from."""
        if client is not None:
            return copy.deepcopy(self.clients[client].generator).eval()
        model = copy.deepcopy(self.clients[0].generator)
        model.load_state_dict(part_of(self.state, "generator"))
        return model.eval()


# Building ------------------------------------------------------------------------------------------------------------


def poison(
    images: Tensor, labels: Tensor, trigger: Trigger, *, ratio: float, label: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Stamp the trigger on a share of a client's images, all classes or one.

    Args:
        images: (n, C, S, S) in [0, 1].
        labels: (n,) int64.
        trigger: what to stamp.
        ratio: share of the eligible images, rounded up, so that a positive ratio poisons at least one.
        label: the only class that is poisoned, or None for every class (as released).
        seed: chooses the images and the places of a moving trigger.

    Returns:
        A poisoned copy of the images and (n,) bool, which ones carry the trigger.

    Raises:
        InputError: no image of that class.
    """
    everything = torch.arange(len(labels), device=labels.device)
    eligible = everything if label is None else (labels == label).nonzero().flatten()
    if len(eligible) == 0:
        raise InputError(f"poison.label {label}: the malicious client holds no image of that class")
    rng = torch_generator(seed, "poison")
    n = math.ceil(round(ratio * len(eligible), 9))  # 0.07 * 100 is a little more than 7 to a computer
    chosen = eligible[torch.randperm(len(eligible), generator=rng)[:n]]
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[chosen] = True
    out = images.clone()
    out[mask] = stamp(trigger, images[mask], rng)
    return out, mask


def new_federation(
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    n_classes: int,
    params: FedGANParams,
    seed: int,
    trigger: Trigger | None = None,
    indices: Sequence[int] | None = None,
) -> FederatedGAN:
    """A federation before its first round.

    Args:
        images, labels: one (n, C, S, S) in [0, 1] and one (n,) int64 tensor a client; everything runs on their device.
        n_classes: classes of the cohort.
        params: section ``fedgan`` of the parameters.
        seed: of the run; two federations with the same seed start from the same networks.
        trigger: what the malicious clients of ``params`` stamp; None for a federation without an attack.
        indices: which clients of the federation these are, where it is spread over several hosts; default: all, in order.

    Raises:
        InputError: a client without images for two in a batch, or a poisoned class that is missing.
    """
    gan = params.gan
    channels, size = images[0].shape[1], images[0].shape[-1]
    recipe = RECIPES[gan.recipe]
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global stream; leave it untouched
        torch.manual_seed(derive_seed(seed, "init"))
        networks = (
            recipe.generator(size, channels, n_classes, gan.z_dim, gan.width),
            recipe.discriminator(size, channels, n_classes, gan.width),
        )
    shared = [net.to(images[0].device) for net in networks]
    clients = []
    for i, x, y in zip(range(len(images)) if indices is None else indices, images, labels, strict=True):
        if len(x) < 2:
            raise InputError(f"client {i} holds {len(x)} images; batch normalisation needs at least 2")
        mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if trigger is not None and i in params.malicious:
            x, mask = poison(
                x, y, trigger, ratio=params.poison.ratio, label=params.poison.label, seed=derive_seed(seed, "poison", i)
            )
        g, d = copy.deepcopy(shared)
        optimizers = [recipe.optimizer(net, lr, gan) for net, lr in ((g, gan.lr_g), (d, gan.lr_d))]
        clients.append(GANClient(i, x, y, mask, g, d, *optimizers))
    return FederatedGAN(seed, gan, params.rounds, params.average, clients, _shared_state(clients[0], params.average))


def branch(federation: FederatedGAN, boost: float | None = None, boost_from: int = 0) -> FederatedGAN:
    """An independent copy, to continue one warm-up in two ways; ``boost`` sets the factor of the malicious clients."""
    copied = copy.deepcopy(federation)  # in one go, so that every optimiser holds the copied parameters
    for client in copied.clients:
        if boost is not None and client.malicious:
            client.boost, client.boost_from = boost, boost_from
    return copied


# Training ------------------------------------------------------------------------------------------------------------


def run(
    federation: FederatedGAN,
    until: int | None = None,
    *,
    train: Callable[[GANClient, State, FederatedGAN, int], Update] | None = None,
    aggregate: Aggregator = fedavg,
    after_round=None,
    quorum: int | None = None,
    strict: bool = False,
) -> FederatedGAN:
    """Run rounds in place until ``until`` (default: all), and return the federation.

    Args:
        federation: where to start; its ``round`` says how far it is.
        until: number of rounds that shall have been run.
        train: what a client does in a round (default: `train_client`); an attacker that does more than to poison its
            images and to scale its update brings a function of its own.
        aggregate: the server's rule. Plain FedAvg equals the released uniform mean while clients hold equally many
            images.
        after_round: called with the federation after every round; it may append to ``history``.
        quorum, strict: of `run_round`. Without a quorum the run stops, and the federation is as it was after the last round.
    """
    until, train = federation.rounds if until is None else until, train or train_client
    by_index = {c.index: c for c in federation.clients}
    while federation.round < until:
        t = federation.round

        def local(index: int, state: State, round: int) -> Update:
            return train(by_index[index], state, federation, round)

        federation.state, updates, diagnostics = run_round(
            federation.state, list(by_index), local, aggregate, t, quorum=quorum, strict=strict
        )
        federation.round = t + 1
        federation.history += [{**u.metrics, "round": t + 1, "client": u.client} for u in updates]
        federation.history += [
            {"round": t + 1, "client": client, why: reason}
            for why in ("rejected", "absent")
            for client, reason in diagnostics[why].items()
        ]
        if after_round is not None:
            after_round(federation)
    return federation


def train_client(client: GANClient, state: State, federation: FederatedGAN, round: int) -> Update:
    """One local epoch from the server's state; the client's networks change, the update is returned.

    One D step and one G step a batch, as released; networks and losses are those of the recipe (`RECIPES`).
    ``metrics``: mean losses over the epoch (``loss_g``, ``loss_d``) and of the last batch (``last_loss_g``), which is
    what the released FedDetect looks at.
    """
    gan = federation.gan
    _load_shared(client, state)
    fade = _fade(round, rounds_until(gan.decay_after, federation.rounds), federation.rounds)
    client.optimizer_g.param_groups[0]["lr"] = gan.lr_g * fade
    client.optimizer_d.param_groups[0]["lr"] = gan.lr_d * fade
    losses = _epoch(client, gan, torch_generator(federation.seed, "train", client.index, round))
    losses_g, losses_d = (each.tolist() for each in losses)
    sent = _shared_state(client, federation.average)
    if client.boost != 1.0 and round >= client.boost_from:
        sent = scale_update(sent, state, client.boost)
    metrics = {"loss_g": float(np.mean(losses_g)), "loss_d": float(np.mean(losses_d)), "last_loss_g": losses_g[-1]}
    return Update(client.index, sent, len(client.images), metrics)


def _epoch(client: GANClient, gan: GAN, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One pass over the client's images; the generator's and the discriminator's loss of every batch.

    Whatever is random is drawn on the CPU, so that the draws are the same on every device.
    """
    device = client.images.device
    g, d = client.generator.train(), client.discriminator.train()
    recipe = RECIPES[gan.recipe]
    d.requires_grad_(True)  # if an error cut the last epoch short
    order = torch.randperm(len(client.images), generator=rng)
    losses_g, losses_d = [], []
    for batch in order.split(min(gan.batch, len(order))):
        if len(batch) < 2:
            continue  # a batch of one has no batch statistics
        real, y = client.images[batch], client.labels[batch]
        fake = g(torch.randn(len(batch), gan.z_dim, generator=rng).to(device), y)
        shown = recipe.seen(real, gan, rng), recipe.seen(fake.detach(), gan, rng)
        loss_d = recipe.of_d(d, *shown, y, gan, rng)
        client.optimizer_d.zero_grad()
        loss_d.backward()
        client.optimizer_d.step()
        d.requires_grad_(False)  # the generator's step needs no gradient of D's weights
        loss_g = recipe.of_g(d, recipe.seen(fake, gan, rng), y)
        client.optimizer_g.zero_grad()
        loss_g.backward()
        client.optimizer_g.step()
        d.requires_grad_(True)
        losses_g.append(loss_g.detach())
        losses_d.append(loss_d.detach())
    return torch.stack(losses_g), torch.stack(losses_d)


def _fade(round: int, decay_from: int, rounds: int) -> float:
    """1 until ``decay_from``, then linearly towards 0 after the last round."""
    return 1.0 if round < decay_from else (rounds - round) / (rounds - decay_from)


def _shared_state(client: GANClient, average: str) -> State:
    parts = ["generator"] if average == "generator" else ["generator", "discriminator"]
    states = {part: getattr(client, part).state_dict() for part in parts}
    return {f"{part}.{name}": v.detach().clone() for part, state in states.items() for name, v in state.items()}


def _load_shared(client: GANClient, state: State) -> None:
    client.generator.load_state_dict(part_of(state, "generator"))
    if shared_d := part_of(state, "discriminator"):
        client.discriminator.load_state_dict(shared_d)


def part_of(state: State, part: str) -> State:
    """The entries of ``generator`` or ``discriminator``, under their names in that network."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


# Drawing -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def synthesise(generator: Generator, n: int, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw labelled images from a generator in evaluation mode.

    Args:
        generator: in ``eval`` mode: what a user of the published model would run.
        n: number of images.
        seed: of the latent vectors.
        labels: (n,) int64; default: classes in turn.

    Returns:
        (n, C, S, S) images in [0, 1] and their (n,) labels.
    """
    device = next(generator.parameters()).device
    y = (torch.arange(n) % generator.n_classes if labels is None else labels).to(device)
    z = torch.randn(n, generator.z_dim, generator=torch_generator(seed, "synthesise")).to(device)
    return torch.cat([generator(zb, yb) for zb, yb in zip(z.split(250), y.split(250), strict=True)]), y
