"""The federation of notebook 05: clients that train one classifier, one of whom may plant a backdoor (BadNets, Gu et al. 2017).

The malicious client stamps a trigger on some of its images and calls them by the target class. It has all that the threat
model of notebook 02 gives it: it also scales what it sends, and reports the loss that honest clients have (``boost_liar``).
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data_and_threats.threats import ThreatModel
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.threat_matrix import arms as matrix_arms
from experiments.threat_matrix.arms import Row
from experiments.threat_matrix.params import MatrixParams
from medsec.backdoor import triggers
from medsec.backdoor.triggers import Trigger
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import FedClsParams
from medsec.evasion import pruning
from medsec.evasion.pruning import Masks
from medsec.federated.rounds import State, Update, run_round

ATTACKER = 0
FORGETFUL = ("none", "shadow_hardened", "public_only")  # image defences whose epochs depend on nothing that was before
BACKDOOR = ThreatModel(
    name="Backdoor in a federated classifier",
    goal="Images that carry the trigger are taken for the target class; all others are called as before.",
    knowledge="Its own images, the model it receives every round, the recipe, the defences, the honest clients' losses.",
    capability="Adds stamped images with a wrong label, scales its update, reports what it likes. One client, number 0. It "
    "leaves out the clients' defence, unless the software is not its to change (scenario compliant).",
    defender_sees="The server sees every client's classifier and the losses that it reports, and has public images.",
    out_of_scope="Colluding clients, secure aggregation, an attacker who hides from the server's look at gradients.",
)


@dataclass(frozen=True)
class Attack:
    """What the malicious client does.

    Attributes:
        poisons: "no", "few" or "many" of its images get a stamped copy.
        boosts: it scales its update (`params.yaml`: ``matrix.boost``).
        lies: it reports the median of the honest losses.
        complies: it runs the defence that clients are to run; else it leaves it out.
    """

    poisons: str = "few"
    boosts: bool = False
    lies: bool = False
    complies: bool = False


ATTACKS = {
    "no_attack": Attack(poisons="no", complies=True),
    "backdoor": Attack(),
    "boost_liar": Attack(poisons="many", boosts=True, lies=True),
    "compliant": Attack(complies=True),
}


@dataclass(frozen=True)
class Federation:
    """A finished federation.

    Attributes:
        model: the global classifier, in evaluation mode.
        states: of that classifier before the first round and after every one.
        keep: which of its weights may be other than zero, or None.
        diagnostics: what the aggregator said after every round.
        perturbations: what every client does to its images.
    """

    model: nn.Module
    states: list[State]
    keep: Masks | None
    diagnostics: list[dict]
    perturbations: list[Callable | None]


def new_trigger(setup: Setup) -> Trigger:
    """The trigger of notebook 01 for this cohort's images."""
    c, p = setup.cohort, setup.params.fedgan.trigger
    return triggers.make_trigger(p.kind, image_size=c.size, channels=c.channels, size=p.size, opacity=p.opacity)


def poisoned(
    trigger: Trigger, images: Tensor, labels: Tensor, target: int, ratio: float, seed: int
) -> tuple[Tensor, Tensor]:
    """A client's images and labels, and stamped copies, called ``target``, of a share ``ratio`` of its other classes'."""
    others = torch.nonzero(labels != target)[:, 0]
    rng = torch_generator(seed, "poison")
    chosen = others[torch.randperm(len(others), generator=rng)[: round(ratio * len(others))]]
    stamped = triggers.stamp(trigger, images[chosen], rng)
    return torch.cat([images, stamped]), torch.cat([labels, torch.full_like(labels[chosen], target)])


@dataclass(frozen=True)
class Clients:
    """What the clients of a federation have, by their number: images, labels, the row that they really follow, ``perturb``."""

    images: list[Tensor]
    labels: list[Tensor]
    rows: list[Row]
    perturb: list[Callable | None]


def clients(setup: Setup, row: Row, attack: Attack, p: MatrixParams, seed: int) -> Clients:
    """The clients of one run; the malicious one has its stamped copies already."""
    images, labels = inversion_clients.deal(setup, seed)
    if attack.poisons != "no":
        ratio, rng = {"few": p.poison_few, "many": p.poison_many}[attack.poisons], derive_seed(seed, "attacker")
        own = images[ATTACKER], labels[ATTACKER]
        images[ATTACKER], labels[ATTACKER] = poisoned(new_trigger(setup), *own, p.target, ratio, rng)
    rows = [row] * len(images)
    if not attack.complies:
        rows[ATTACKER] = matrix_arms.undefended(row)
    perturb = [
        matrix_arms.perturbation(setup, each, x, y, derive_seed(seed, "client", i))
        for i, (each, x, y) in enumerate(zip(rows, images, labels, strict=True))
    ]
    return Clients(images, labels, rows, perturb)


def trainer(setup: Setup, row: Row, them: Clients, model: nn.Module, p: MatrixParams, seed: int) -> Callable:
    """``(client, state, round, keep) -> Update``: one local epoch, done once where several federations have it in common.

    Args:
        model: which network it is; a copy is trained.
    """
    order, local = derive_seed(seed, "again") if row.again else seed, copy.deepcopy(model)
    settings = setup.params.model_dump_json() + p.model_dump_json()
    fixed = [
        _digest(settings, i, each.images, each.trained_against, seed, order, them.images[i], them.labels[i])
        for i, each in enumerate(them.rows)
    ]

    def train_client(i: int, state: State, round: int, keep: Masks | None) -> Update:
        def epoch() -> tuple[State, list[float]]:
            local.load_state_dict(state)
            rng, images, labels = torch_generator(order, "local", i, round), them.images[i], them.labels[i]
            return local_epoch(local, images, labels, them.perturb[i], p.federation, round, rng, keep)

        if them.rows[i].images in FORGETFUL:
            sent, losses = _once(_digest(fixed[i], round, *state.values(), *(keep or {}).values()), epoch)
        else:
            sent, losses = epoch()
        return Update(i, dict(sent), len(them.images[i]), {"loss_g": float(np.mean(losses)), "last_loss_g": losses[-1]})

    return train_client


def train(setup: Setup, row: Row, scenario: str, p: MatrixParams, seed: int) -> Federation:
    """One federation of a row under one attack, from the first round to the last.

    Raises:
        InputError: no such scenario, or a target class that the cohort has not.
    """
    if scenario not in ATTACKS:
        raise InputError(f"scenario {scenario!r}: choose one of {', '.join(ATTACKS)}")
    if p.target >= setup.cohort.n_classes:
        raise InputError(f"matrix.target {p.target}: {setup.cohort.name} has classes 0 to {setup.cohort.n_classes - 1}")
    attack, rounds = ATTACKS[scenario], p.federation.rounds
    them = clients(setup, row, attack, p, seed)
    model = matrix_arms.network(setup, row, seed)
    train_client = trainer(setup, row, them, model, p, seed)
    aggregate = matrix_arms.aggregator(setup, row, p, model, seed)
    boost_from, prune_at = (matrix_arms.first_round(share, rounds) for share in (p.warm_up, p.prune_after))
    states, keep, found = [{k: v.clone() for k, v in model.state_dict().items()}], None, []

    def client(i: int, state: State, round: int) -> Update:
        return train_client(i, state, round, keep)

    def server(updates: Sequence[Update], round: int) -> tuple[State, dict]:
        return aggregate(tampered(updates, states[-1], attack, p.boost if round >= boost_from else 1.0), round)

    for round in range(rounds):
        state, _, diagnostics = run_round(states[-1], range(len(them.rows)), client, server, round)
        found.append(diagnostics)
        model.load_state_dict(state)
        if round + 1 == prune_at:
            keep = matrix_arms.masks(model, row, matrix_arms.ratio(row, setup.params.evasion), seed)
        if keep is not None:  # a client that does not keep to the masks gains nothing
            pruning.apply(model, keep)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return Federation(model, states, keep, found, them.perturb)


# Several attacks, and several rows, have local epochs in common: the first round of the honest clients, the rounds in which
# the server does nothing yet or nothing to anybody. They are done once in a process; the numbers are the same.
_done: dict[str, tuple[State, list[float]]] = {}
KEPT = 2000  # of them, of some 30 kB each


def _once(what: str, epoch: Callable) -> tuple[State, list[float]]:
    if what not in _done:
        while len(_done) >= KEPT:
            del _done[next(iter(_done))]
        _done[what] = epoch()
    return _done[what]


def _digest(*parts: object) -> str:
    """Hash of tensors and of what has a representation, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        content = part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        found.update(f"{len(content)}:".encode() + content)
    return found.hexdigest()


def tampered(updates: Sequence[Update], received: State, attack: Attack, boost: float) -> list[Update]:
    """The updates as they reach the server: the attacker's scaled about what it received, and its losses invented."""
    honest, changed = [u for u in updates if u.client != ATTACKER], []
    for u in updates:
        if u.client == ATTACKER and attack.boosts:
            state = {k: received[k] + boost * (v - received[k]) for k, v in u.state.items()}
            u = Update(u.client, state, u.n_samples, u.metrics)
        if u.client == ATTACKER and attack.lies and honest:
            invented = {name: float(np.median([h.metrics[name] for h in honest])) for name in u.metrics}
            u = Update(u.client, u.state, u.n_samples, invented)
        changed.append(u)
    return changed


def local_epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    perturb: Callable | None,
    p: FedClsParams,
    round: int,
    rng: torch.Generator,
    keep: Masks | None,
) -> tuple[State, list[float]]:
    """The state after one client's epoch of SGD, and the loss of every batch; ``model`` itself is trained."""
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=p.lr, momentum=p.momentum, fused=True)
    for batch in torch.randperm(len(images), generator=rng).split(p.batch):
        x, y = images[batch], labels[batch]
        x = x if perturb is None else perturb(model, x, y, round)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if keep is not None:
            pruning.apply(model, keep)
        losses.append(loss.item())
    return {k: v.detach().clone() for k, v in model.state_dict().items()}, losses
