"""What a client sends, and the loop of rounds."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from medsec.core.errors import InputError

__all__ = ["NoQuorum", "Update", "run_round", "scale_update", "screen"]

State = dict[str, Tensor]

# How much larger than the server's a value may be, and how large a number of images. This only stops overflow: updates of
# the golden cells, honest or boosted, stay below 2, and 24 steps. A fixed bound would let an attacker drive the server's
# values up to it and so lock out the others.
LARGEST_VALUE = 1e6
LARGEST_COUNT = 10**9
MOST_METRICS, LONGEST_NAME = 32, 64  # that a client may report: the history is kept


@dataclass(frozen=True)
class Update:
    """What one client sends in one round.

    Attributes:
        client: index of the client.
        state: its model after local training.
        n_samples: number of images that it says it trained on (nobody checks that, and FedAvg weights by it).
        metrics: numbers that it *reports* (nobody checks whether they are true), such as its mean generator loss.
    """

    client: int
    state: State
    n_samples: int
    metrics: dict[str, float] = field(default_factory=dict)


Aggregator = Callable[[Sequence[Update], int], tuple[State, dict]]


class NoQuorum(InputError):
    """Too few updates of a round are usable. ``state`` is what the server held before it."""

    state: State


def screen(
    updates: Sequence[Update], template: State, senders: Sequence[int] | None = None
) -> tuple[list[Update], dict[int, str]]:
    """Separate usable updates from broken ones.

    Usable: a state of dense, detached tensors with the names, shapes, types and device of the server's; finite, nowhere
    larger than the server's by more than `LARGEST_VALUE` (integers: `LARGEST_COUNT`); no negative variance or counter; 1 to
    `LARGEST_COUNT` samples; finite metrics. Of a client that sends twice nothing is taken: the server cannot know which one
    is its own, and the first may be the forgery.

    Args:
        updates: what the clients sent.
        template: the server's state, whose names, shapes and types are expected.
        senders: who sent each update, where the server knows it; nobody can then speak for another.

    Returns:
        The usable updates, in order, each state in the order of the server's; and for every other client the reason of its
        rejection (under ``update 3`` if the fourth update does not say who sent it).

    >>> sent = [Update(0, {"w": torch.ones(2)}, 10), Update(1, {"w": torch.ones(3)}, 10)]
    >>> screen(sent, {"w": torch.zeros(2)})[1]
    {1: 'w has shape (3,), expected (2,)'}
    """
    if senders is None:
        senders = [u.client if type(u) is Update and _whole(u.client) else f"update {i}" for i, u in enumerate(updates)]
    accepted, rejected, times = [], {}, Counter(senders)
    for sender, update in zip(senders, updates, strict=True):
        try:
            if times[sender] > 1:
                raise InputError(f"{times[sender]} updates came from it")
            accepted.append(_usable(update, sender, template))
        except Exception as error:  # whatever a hostile object does when it is read
            rejected[sender] = in_a_line(error)
    return accepted, rejected


def _usable(update: Update, sender: int, template: State) -> Update:
    """The update as plain dictionaries, its state in the template's order. Raises InputError: what is wrong with it."""
    # Types are compared exactly: a subclass may answer differently when it is read again.
    if type(update) is not Update:
        raise InputError(f"it sent {type(update).__name__}, not an Update")
    if not _whole(update.client) or update.client != sender:
        raise InputError(f"it calls itself client {update.client}")
    if not _whole(update.n_samples) or not 1 <= update.n_samples <= LARGEST_COUNT:
        raise InputError(f"its n_samples is no whole number from 1 to {LARGEST_COUNT}")
    for name, given in (("state", update.state), ("metrics", update.metrics)):
        if type(given) not in (dict, OrderedDict):
            raise InputError(f"its {name} is of type {type(given).__name__}, expected a dict")
    if len(update.metrics) > MOST_METRICS:
        raise InputError(f"it reports {len(update.metrics)} metrics, at most {MOST_METRICS} are kept")
    metrics = {name: _number(value) for name, value in update.metrics.items()}
    for name, value in metrics.items():
        if type(name) is not str or not math.isfinite(value):
            raise InputError(f"metric {name} is no finite number")
        if len(name) > LONGEST_NAME:
            raise InputError(f"a metric's name has more than {LONGEST_NAME} signs")
    if update.state.keys() != template.keys():
        odd = sorted(map(str, update.state.keys() ^ template.keys()))
        raise InputError(f"parameter names differ: {', '.join(odd[:3])}")
    state = {name: update.state[name] for name in template}
    for name, expected in template.items():
        if flaw := _flaw(state[name], expected, name.endswith("running_var")):
            raise InputError(f"{name} {flaw}")
    return replace(update, state=state, n_samples=int(update.n_samples), metrics=metrics)


def _flaw(value: Tensor, expected: Tensor, variance: bool) -> str | None:
    if type(value) is not Tensor:
        return f"is of type {type(value).__name__}, expected Tensor"
    if value.shape != expected.shape:
        return f"has shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    for what in ("dtype", "layout", "device"):
        if getattr(value, what) != getattr(expected, what):
            return f"is {getattr(value, what)}, expected {getattr(expected, what)}"
    last = value.storage_offset() + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    if value.numel() and value.untyped_storage().nbytes() < (last + 1) * value.element_size():
        return "has no memory of its size"  # to read it would end the process
    if value.requires_grad:
        return "carries a gradient; send it detached"
    if not torch.isfinite(value).all():
        return "holds NaN or infinite values"
    room = LARGEST_VALUE if value.is_floating_point() else LARGEST_COUNT
    if (value.double().abs() > expected.double().abs() + room).any():
        return "holds values that are too large"
    if (variance or not value.is_floating_point()) and (value < 0).any():
        return "holds negative values"
    return None


def _whole(value: object) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def _number(value: object) -> float:
    """NaN for what is no real number, or an integer beyond all floats."""
    try:
        return float(value) if type(value) is float or isinstance(value, np.floating) or _whole(value) else math.nan
    except OverflowError:
        return math.nan


def in_a_line(error: BaseException) -> str:
    """An error's name and text, at most 200 characters; of an `InputError` the text alone."""
    name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    try:
        return " ".join(f"{name}{error}".split())[:200]
    except Exception:  # an error of a client may have any text
        return f"{name}without a text"


def run_round(
    state: State,
    clients: Sequence[int],
    train: Callable[[int, State, int], Update],
    aggregate: Aggregator,
    round: int,
    *,
    quorum: int | None = None,
    strict: bool = False,
) -> tuple[State, list[Update], dict]:
    """One round: every client trains from a copy of ``state``, the server screens and aggregates.

    Args:
        quorum: smallest number of usable updates; default: more than half of the clients. With 0 the state stays as it was
            if none is usable.
        strict: a client that raises or sends nothing ends the run: for experiments, where that is a mistake in our own
            code. Broken updates do not: an attacker may send them.

    Returns:
        The new state, the usable updates, and the aggregator's diagnostics with the reasons of two kinds of clients:
        ``rejected``, whose update was broken, and ``absent``, which raised or sent nothing.

    Raises:
        NoQuorum: too few usable updates; it is raised from the first client's error, if any.
    """
    sent, absent, causes = {}, {}, []
    for client in clients:
        try:
            update = train(client, {name: value.clone() for name, value in state.items()}, round)
            if update is None:
                raise InputError("it sent nothing")
            sent[client] = update
        except (Exception, SystemExit) as error:
            if strict:
                raise
            absent[client] = in_a_line(error)
            causes.append(error)
    accepted, rejected = screen(list(sent.values()), state, list(sent))
    needed = len(clients) // 2 + 1 if quorum is None else quorum
    if len(accepted) < needed:
        why = "; ".join(f"client {client}: {reason}" for client, reason in [*absent.items(), *rejected.items()][:3])
        error = NoQuorum(f"round {round}: {len(accepted)} of {len(clients)} updates usable, need {needed}; {why}")
        error.state = state
        raise error from next(iter(causes), None)
    new_state, diagnostics = aggregate(accepted, round) if accepted else (state, {})
    rejected |= diagnostics.get("rejected", {})  # by a rule that screens what attackers changed after their training
    return new_state, accepted, {**diagnostics, "rejected": rejected, "absent": absent}


def scale_update(sent: State, received: State, factor: float) -> State:
    """``received + factor · (sent − received)``: the boosted update (model replacement, Bagdasaryan et al. 2020).

    Variances of BatchNorm are kept non-negative, and integer buffers as they were sent.
    """
    scaled = {}
    for name, value in sent.items():
        scaled[name] = received[name] + factor * (value - received[name]) if value.is_floating_point() else value
        if name.endswith("running_var"):
            scaled[name] = scaled[name].clamp_min(0)
    return scaled
