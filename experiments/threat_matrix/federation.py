"""The federation of notebook 05: clients train one classifier, and one of them may plant a backdoor (BadNets, Gu et al. 2017).

The malicious client stamps a trigger on some of its images and labels them with the target class. In scenario ``boost_liar``
it also scales its update and reports the loss of the honest clients, as the threat model of notebook 02 allows.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.params.threat_matrix import MatrixParams
from experiments.threat_matrix import arms
from experiments.threat_matrix.arms import Row
from medsec.backdoor import triggers
from medsec.backdoor.attackers import falsified
from medsec.backdoor.triggers import Trigger
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import FedClsParams
from medsec.core.threats import ThreatModel
from medsec.evasion import pruning
from medsec.evasion.pruning import Masks
from medsec.federated.rounds import State, Update, run_round, scale_update, screen
from medsec.nets import fit

ATTACKER = 0
STATELESS = ("none", "shadow_hardened", "public_only")  # image defences that remember nothing from batch to batch
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
        complies: it runs the defence that clients are to run; otherwise it leaves it out.
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
class Member:
    """One client of a federation: images and labels, the row that it really follows, what it does to images and gradients."""

    images: Tensor
    labels: Tensor
    row: Row
    perturb: Callable | None
    defend: Callable | None = None


@dataclass(frozen=True)
class Federation:
    """A finished federation.

    Attributes:
        model: the global classifier, in evaluation mode.
        states: of that classifier, before the first round and after every round.
        keep: masks of the weights that were not pruned, or None.
        diagnostics: of the aggregator, one for every round.
        perturbations: what each client does to its images, or None; defences: and to its gradients.
    """

    model: nn.Module
    states: list[State]
    keep: Masks | None
    diagnostics: list[dict]
    perturbations: list[Callable | None]
    defences: list[Callable | None]


def train(
    setup: Setup, row: Row, scenario: str, p: MatrixParams, seed: int, memo: dict[str, tuple] | None = None
) -> Federation:
    """One federation of a row under one attack, from the first round to the last.

    Args:
        memo: of local epochs; give several federations the same dictionary, and epochs that they share run once.

    Raises:
        InputError: an unknown scenario, or a target class that the cohort does not have.
    """
    if scenario not in ATTACKS:
        raise InputError(f"scenario {scenario!r}: choose one of {', '.join(ATTACKS)}")
    if p.target >= setup.cohort.n_classes:
        raise InputError(f"matrix.target {p.target}: {setup.cohort.name} has classes 0 to {setup.cohort.n_classes - 1}")
    attack, rounds = ATTACKS[scenario], p.federation.rounds
    members = clients(setup, row, attack, p, seed)
    model = arms.network(setup, row, seed)
    train_client = trainer(setup, row, members, model, p, seed, {} if memo is None else memo)
    aggregate = arms.aggregator(setup, row, p, model, seed)
    boost_from, prune_at = (rounds_until(share, rounds) for share in (p.warm_up, p.prune_after))
    states, keep, diagnostics = [_snapshot(model)], None, []

    def client(i: int, state: State, round_idx: int) -> Update:
        return train_client(i, state, round_idx, keep)

    def server(updates: Sequence[Update], round_idx: int) -> tuple[State, dict]:
        boost = p.boost if round_idx >= boost_from else 1.0
        arrived, rejected = screen(tampered(updates, states[-1], attack, boost), states[-1])
        state, said = aggregate(arrived, round_idx)
        return state, {**said, "rejected": rejected}

    for round_idx in range(rounds):
        state, _, said = run_round(states[-1], range(len(members)), client, server, round_idx, strict=True)
        diagnostics.append(said)
        model.load_state_dict(state)
        if round_idx + 1 == prune_at:
            keep = arms.masks(model, row, setup.params.evasion, seed)
        if keep is not None:  # the server prunes, so a client that ignores the masks gains nothing
            pruning.apply(model, keep)
        states.append(_snapshot(model))
    perturbations, defences = [member.perturb for member in members], [member.defend for member in members]
    return Federation(model, states, keep, diagnostics, perturbations, defences)


def clients(setup: Setup, row: Row, attack: Attack, p: MatrixParams, seed: int) -> list[Member]:
    """The clients of one run. The malicious one already has its stamped copies."""
    members = []
    for i, (images, labels) in enumerate(zip(*inversion_clients.deal(setup, seed), strict=True)):
        own = row
        if i == ATTACKER and attack.poisons != "no":
            ratio = {"few": p.poison_few, "many": p.poison_many}[attack.poisons]
            rng = derive_seed(seed, "attacker")
            images, labels = poisoned(new_trigger(setup), images, labels, p.target, ratio, rng)
        if i == ATTACKER and not attack.complies:
            own = arms.undefended(row)
        run = derive_seed(seed, "client", i)
        perturb, defend = arms.perturbation(setup, own, images, labels, run), arms.gradient_defence(setup, own, run)
        members.append(Member(images, labels, own, perturb, defend))
    return members


def new_trigger(setup: Setup) -> Trigger:
    """The trigger of notebook 01 for this cohort's images."""
    c, p = setup.cohort, setup.params.fedgan.trigger
    return triggers.make_trigger(p.kind, image_size=c.size, channels=c.channels, size=p.size, opacity=p.opacity)


def poisoned(
    trigger: Trigger, images: Tensor, labels: Tensor, target: int, ratio: float, seed: int
) -> tuple[Tensor, Tensor]:
    """A client's images (N, C, S, S) and labels (N,), followed by stamped copies labelled ``target``.

    The copies are of a random share ``ratio`` of its images of other classes.
    """
    others = torch.nonzero(labels != target)[:, 0]
    rng = torch_generator(seed, "poison")
    chosen = others[torch.randperm(len(others), generator=rng)[: round(ratio * len(others))]]
    stamped = triggers.stamp(trigger, images[chosen], rng)
    return torch.cat([images, stamped]), torch.cat([labels, torch.full_like(labels[chosen], target)])


def trainer(
    setup: Setup, row: Row, members: Sequence[Member], model: nn.Module, p: MatrixParams, seed: int, memo: dict
) -> Callable[[int, State, int, Masks | None], Update]:
    """``(client, state, round, keep) -> Update``: one local epoch of a copy of ``model``.

    Federations share epochs, such as the honest clients' first. ``memo`` keeps them under a hash of all that decides them.
    """
    order, local = derive_seed(seed, "again") if row.again else seed, copy.deepcopy(model)
    settings = setup.cohort.name, setup.params.model_dump_json(), p.model_dump_json(), seed, order

    def train_client(i: int, state: State, round_idx: int, keep: Masks | None) -> Update:
        m = members[i]
        decides = [m.images, m.labels, *state.values(), *(keep or {}).values()]
        key = joblib.hash(
            (settings, i, m.row.images, m.row.gradient, m.row.trained_against, round_idx, [t.numpy() for t in decides])
        )
        if key not in memo or m.row.images not in STATELESS or m.defend is not None:
            local.load_state_dict(state)
            rng = torch_generator(order, "local", i, round_idx)
            memo[key] = local_epoch(m, local, p.federation, round_idx, rng, keep)
        sent, losses = memo[key]
        return Update(i, dict(sent), len(m.images), {"loss_g": float(np.mean(losses)), "last_loss_g": losses[-1]})

    return train_client


def local_epoch(
    member: Member, model: nn.Module, p: FedClsParams, round_idx: int, rng: torch.Generator, keep: Masks | None
) -> tuple[State, list[float]]:
    """The state after one epoch of SGD with momentum, and the loss of every batch. ``model`` itself is trained."""

    def loss(rows: Tensor) -> Tensor:
        x, y = member.images[rows], member.labels[rows]
        x = x if member.perturb is None else member.perturb(model, x, y, round_idx)
        return F.cross_entropy(model(x), y)

    optimizer = torch.optim.SGD(model.parameters(), lr=p.lr, momentum=p.momentum, fused=True)
    if member.defend is not None:
        return defended_epoch(member, model, optimizer, p.batch, round_idx, rng)
    prune = functools.partial(pruning.apply, model, keep) if keep else None
    n = len(member.images)
    losses = fit.train(loss, n, optimizer, epochs=1, batch=p.batch, rng=rng, after_step=prune)
    return _snapshot(model), losses.tolist()


def defended_epoch(
    member: Member, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, round_idx: int, rng: torch.Generator
) -> tuple[State, list[float]]:
    """Like `local_epoch`, with every gradient as the client's defence gives it. (No such row prunes.)"""
    losses = []
    for rows in torch.randperm(len(member.images), generator=rng).split(batch):
        x, y = member.images[rows], member.labels[rows]
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(x), y)))
        for parameter, gradient in zip(model.parameters(), member.defend(model, x, y, round_idx), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return _snapshot(model), losses


def tampered(updates: Sequence[Update], received: State, attack: Attack, boost: float) -> list[Update]:
    """The updates as they reach the server: the attacker's is scaled about ``received``, and its losses are invented."""
    honest = [u for u in updates if u.client != ATTACKER]

    def forged(u: Update) -> Update:
        if attack.boosts:
            u = replace(u, state=scale_update(u.state, received, boost))
        if attack.lies and honest:
            u = replace(u, metrics={k: falsified([h.metrics[k] for h in honest], "median") for k in u.metrics})
        return u

    return [forged(u) if u.client == ATTACKER else u for u in updates]


def _snapshot(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}
