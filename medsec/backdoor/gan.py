"""Federated GANs and the backdoor against them (Jin & Li 2023, Medical Image Analysis 90:102965).

As released: every client trains a generator and a discriminator on its own images, only the generator is averaged,
the discriminators and all optimiser states stay local; a malicious client stamps a trigger on its real images and
otherwise trains honestly. Ours, and labelled so wherever it is used: label-conditional networks small enough for a
CPU, disjoint client data, and the ``boost`` of the malicious update.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsec.backdoor.triggers import Trigger, stamp
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import GAN, FedGANParams
from medsec.federated.aggregators import fedavg
from medsec.federated.rounds import Aggregator, State, Update, run_round
from medsec.nets.models import Discriminator, Generator

VARIANTS = ("clean", "poison", "boost")


@dataclass
class Client:
    """One hospital: its images, and what it never sends (discriminator, optimiser states).

    Attributes:
        images: (n, C, S, S) float32 in [0, 1]; stamped already where the client is malicious.
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
    optimizer_g: torch.optim.Adam
    optimizer_d: torch.optim.Adam
    boost: float = 1.0
    boost_from: int = 0

    @property
    def malicious(self) -> bool:
        return bool(self.poisoned.any())


@dataclass
class Federation:
    """A FedGAN between two rounds.

    ``state`` is what the server holds (the averaged generator; names begin with ``generator.``), ``history`` what the
    clients reported and what ``after_round`` measured, one dictionary a client and round.
    """

    seed: int
    gan: GAN
    rounds: int
    average: str
    clients: list[Client]
    state: State
    round: int = 0
    history: list[dict] = field(default_factory=list)

    def generator(self, client: int | None = None) -> Generator:
        """The averaged generator, or the one that a client trained last, ready to draw from."""
        if client is not None:
            return copy.deepcopy(self.clients[client].generator).eval()
        model = copy.deepcopy(self.clients[0].generator)
        model.load_state_dict(_part(self.state, "generator"))
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
) -> Federation:
    """A federation before its first round.

    Args:
        images, labels: one (n, C, S, S) in [0, 1] and one (n,) int64 tensor a client; everything runs on their device.
        n_classes: classes of the cohort.
        params: section ``fedgan`` of the parameters.
        seed: of the run; two federations with the same seed start from the same networks.
        trigger: what the malicious clients of ``params`` stamp; None for a federation without an attack.

    Raises:
        InputError: a client without images for two in a batch, or a poisoned class that is missing.
    """
    gan = params.gan
    channels, size = images[0].shape[1], images[0].shape[-1]
    shared = [
        net.to(images[0].device) for net in _networks(size, channels, n_classes, gan, seed=derive_seed(seed, "init"))
    ]
    clients = []
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        if len(x) < 2:
            raise InputError(f"client {i} holds {len(x)} images; batch normalisation needs at least 2")
        mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if trigger is not None and i in params.malicious:
            x, mask = poison(
                x, y, trigger, ratio=params.poison.ratio, label=params.poison.label, seed=derive_seed(seed, "poison", i)
            )
        g = copy.deepcopy(shared[0])
        d = copy.deepcopy(shared[1])
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr, betas=(gan.beta1, 0.999), fused=True)
            for net, lr in ((g, gan.lr_g), (d, gan.lr_d))
        ]
        clients.append(Client(i, x, y, mask, g, d, *optimizers))
    state = _shared_state(clients[0], params.average)
    return Federation(seed, gan, params.rounds, params.average, clients, state)


def _networks(size: int, channels: int, n_classes: int, gan: GAN, seed: int) -> tuple[Generator, Discriminator]:
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global stream; leave it untouched
        torch.manual_seed(seed)
        return (
            Generator(size, channels, n_classes, gan.z_dim, gan.width),
            Discriminator(size, channels, n_classes, gan.width),
        )


def branch(federation: Federation, boost: float | None = None, boost_from: int = 0) -> Federation:
    """An independent copy, to continue one warm-up in two ways; ``boost`` sets the factor of the malicious clients."""
    copied = copy.deepcopy(federation)
    for original, client in zip(federation.clients, copied.clients, strict=True):
        # deepcopy keeps an optimiser tied to parameters only if it copies both in one go; rebuild to be certain.
        client.optimizer_g = _rebind(original.optimizer_g, client.generator)
        client.optimizer_d = _rebind(original.optimizer_d, client.discriminator)
        if boost is not None and client.malicious:
            client.boost, client.boost_from = boost, boost_from
    return copied


def _rebind(optimizer: torch.optim.Adam, model: torch.nn.Module) -> torch.optim.Adam:
    group = optimizer.param_groups[0]
    bound = torch.optim.Adam(model.parameters(), lr=group["lr"], betas=group["betas"], fused=True)
    bound.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return bound


# Training ------------------------------------------------------------------------------------------------------------

LocalTraining = Callable[[Client, State, Federation, int], Update]


def run(
    federation: Federation,
    until: int | None = None,
    *,
    train: LocalTraining | None = None,
    aggregate: Aggregator = fedavg,
    checkpoint: Path | None = None,
    after_round=None,
) -> Federation:
    """Run rounds in place until ``until`` (default: all), and return the federation.

    Args:
        federation: where to start; its ``round`` says how far it is.
        until: number of rounds that shall have been run.
        train: what a client does in a round (default: `train_client`); an attacker that does more than to poison its
            images and to scale its update brings a function of its own.
        aggregate: the server's rule. Plain FedAvg equals the released uniform mean while clients hold equally many
            images.
        checkpoint: file that holds the federation after every round; an existing one of the same run is resumed,
            and the result is the same to the bit as without the interruption. It does not hold what an aggregator
            with memory remembers.
        after_round: called with the federation after every round, before the checkpoint is written; what it appends
            to ``history`` (numbers and strings) is resumed too.
    """
    until, train = federation.rounds if until is None else until, train or train_client
    if checkpoint is not None and checkpoint.is_file():
        _restore(federation, checkpoint)
    by_index = {c.index: c for c in federation.clients}
    while federation.round < until:
        t = federation.round

        def local(index: int, state: State, round: int) -> Update:
            return train(by_index[index], state, federation, round)

        federation.state, updates, diagnostics = run_round(federation.state, list(by_index), local, aggregate, t)
        federation.round = t + 1
        federation.history += [{"round": t + 1, "client": u.client, **u.metrics} for u in updates]
        federation.history += [
            {"round": t + 1, "client": client, "rejected": reason} for client, reason in diagnostics["rejected"].items()
        ]
        if after_round is not None:
            after_round(federation)
        if checkpoint is not None:
            save(federation, checkpoint)
    return federation


def train_client(client: Client, state: State, federation: Federation, round: int) -> Update:
    """One local epoch from the server's state; the client's networks change, the update is returned.

    Non-saturating cross-entropy (Goodfellow et al. 2014), one D step and one G step a batch, as released.
    ``metrics``: mean losses over the epoch (``loss_g``, ``loss_d``) and of the last batch (``last_loss_g``), which is
    what the released FedDetect looks at.
    """
    gan = federation.gan
    _load_shared(client, state)
    fade = _fade(round, rounds_until(gan.decay_after, federation.rounds), federation.rounds)
    client.optimizer_g.param_groups[0]["lr"] = gan.lr_g * fade
    client.optimizer_d.param_groups[0]["lr"] = gan.lr_d * fade
    losses_g, losses_d = (
        losses.tolist()
        for losses in _epoch(client, gan, torch_generator(federation.seed, "train", client.index, round))
    )
    sent = _shared_state(client, federation.average)
    if client.boost != 1.0 and round >= client.boost_from:
        sent = scale_update(sent, state, client.boost)
    metrics = {"loss_g": float(np.mean(losses_g)), "loss_d": float(np.mean(losses_d)), "last_loss_g": losses_g[-1]}
    return Update(client.index, sent, len(client.images), metrics)


def _epoch(client: Client, gan: GAN, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One pass over the client's images; the generator's and the discriminator's loss of every batch.

    Whatever is random is drawn on the CPU, so that the draws are the same on every device.
    """
    device = client.images.device
    g, d = client.generator.train(), client.discriminator.train()
    order = torch.randperm(len(client.images), generator=rng)
    losses_g, losses_d = [], []
    for batch in order.split(min(gan.batch, len(order))):
        if len(batch) < 2:
            continue  # a batch of one has no batch statistics
        real, y = client.images[batch], client.labels[batch]
        fake = g(torch.randn(len(batch), gan.z_dim, generator=rng).to(device), y)
        loss_d = F.softplus(-d(real, y)).mean() + F.softplus(d(fake.detach(), y)).mean()
        client.optimizer_d.zero_grad()
        loss_d.backward()
        client.optimizer_d.step()
        d.requires_grad_(False)  # the generator's step needs no gradient of D's weights
        loss_g = F.softplus(-d(fake, y)).mean()
        client.optimizer_g.zero_grad()
        loss_g.backward()
        client.optimizer_g.step()
        d.requires_grad_(True)
        losses_g.append(loss_g.detach())
        losses_d.append(loss_d.detach())
    return torch.stack(losses_g), torch.stack(losses_d)


def scale_update(sent: State, received: State, factor: float) -> State:
    """``received + factor · (sent − received)``: the boosted update (model replacement, Bagdasaryan et al. 2020).

    Variances of BatchNorm are kept non-negative, and integer buffers as they were sent.
    """
    scaled = {}
    for name, value in sent.items():
        if not value.is_floating_point():
            scaled[name] = value
            continue
        scaled[name] = received[name] + factor * (value - received[name])
        if name.endswith("running_var"):
            scaled[name] = scaled[name].clamp_min(0)
    return scaled


def rounds_until(share: float, rounds: int) -> int:
    """Number of whole rounds in the first ``share`` of them."""
    return math.floor(round(share * rounds, 9))


def _fade(round: int, decay_from: int, rounds: int) -> float:
    """1 until ``decay_from``, then linearly towards 0 after the last round."""
    return 1.0 if round < decay_from else (rounds - round) / (rounds - decay_from)


def _shared_state(client: Client, average: str) -> State:
    parts = {"generator": client.generator}
    if average == "both":
        parts["discriminator"] = client.discriminator
    return {
        f"{part}.{name}": value.detach().clone()
        for part, net in parts.items()
        for name, value in net.state_dict().items()
    }


def _load_shared(client: Client, state: State) -> None:
    client.generator.load_state_dict(_part(state, "generator"))
    if shared_d := _part(state, "discriminator"):
        client.discriminator.load_state_dict(shared_d)


def _part(state: State, part: str) -> State:
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def save(federation: Federation, file: Path) -> None:
    """Write everything that changes during a run; a kill while writing leaves the file of the round before."""
    content = {
        "identity": _identity(federation),
        "round": federation.round,
        "state": federation.state,
        "history": federation.history,
        "clients": [
            {
                name: getattr(c, name).state_dict()
                for name in ("generator", "discriminator", "optimizer_g", "optimizer_d")
            }
            for c in federation.clients
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(file)


def _identity(federation: Federation) -> str:
    """Hash of what makes two federations the same run: seed, settings, every client's images and boost."""
    digest = hashlib.sha256(repr((federation.seed, federation.rounds, federation.average, federation.gan)).encode())
    for c in federation.clients:
        digest.update(repr((c.index, tuple(c.images.shape), c.boost, c.boost_from)).encode())
        digest.update(c.images.cpu().numpy().tobytes() + c.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def _restore(federation: Federation, file: Path) -> None:
    try:
        content = torch.load(file, weights_only=True, map_location=federation.clients[0].images.device)
        same = content["identity"] == _identity(federation)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"checkpoint {file.name} cannot be read ({type(error).__name__}); delete it") from None
    if not same:
        raise InputError(f"checkpoint {file.name} belongs to another run; delete it or use another folder")
    if content["round"] < federation.round:
        return
    for client, saved in zip(federation.clients, content["clients"], strict=True):
        for name, value in saved.items():
            getattr(client, name).load_state_dict(value)
    federation.round, federation.state, federation.history = content["round"], content["state"], content["history"]


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
