"""What a client sends, and the loop of rounds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Update", "rounds_until", "run_round", "scale_update", "screen"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one client sends in one round.

    Attributes:
        client: index of the client.
        state: its model after local training.
        n_samples: number of images that it says it trained on (nobody checks it, and FedAvg weights by it).
        metrics: numbers that it *reports* (nobody checks them), such as its mean generator loss.
    """

    client: int
    state: State
    n_samples: int
    metrics: dict[str, float] = field(default_factory=dict)


Aggregator = Callable[[Sequence[Update], int], tuple[State, dict]]


def screen(updates: Sequence[Update], template: State) -> tuple[list[Update], dict[int, str]]:
    """Separate usable updates from broken ones.

    Args:
        updates: what the clients sent.
        template: the server's state, whose names, shapes and types are expected.

    Returns:
        The usable updates, in order, and for every other client the reason of its rejection.

    >>> sent = [Update(0, {"w": torch.ones(2)}, 10), Update(1, {"w": torch.ones(3)}, 10)]
    >>> screen(sent, {"w": torch.zeros(2)})[1]
    {1: 'w has shape (3,), expected (2,)'}
    """
    reasons = [_flaw(update, template) for update in updates]
    accepted = [update for update, reason in zip(updates, reasons, strict=True) if not reason]
    return accepted, {update.client: reason for update, reason in zip(updates, reasons, strict=True) if reason}


def _flaw(update: Update, template: State) -> str | None:
    state = update.state
    if update.n_samples < 1:
        return f"it reports {update.n_samples} samples"
    if state.keys() != template.keys():
        odd = sorted(state.keys() ^ template.keys())
        return f"parameter names differ: {', '.join(odd[:3])}"
    for name, expected in template.items():
        value = state[name]
        if value.shape != expected.shape:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        if value.dtype != expected.dtype:
            return f"{name} is {value.dtype}, expected {expected.dtype}"
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"{name} holds NaN or infinite values"
    return None


def run_round(
    state: State, clients: Sequence[int], train: Callable[[int, State, int], Update], aggregate: Aggregator, round: int
) -> tuple[State, list[Update], dict]:
    """One round with full participation: every client trains from ``state``, the server screens and aggregates.

    A broken update is left out and named in ``diagnostics["rejected"]``. If none is usable the state stays as it was.

    Returns:
        The new state, the updates that were sent, the aggregator's diagnostics.
    """
    updates = [train(client, state, round) for client in clients]
    accepted, rejected = screen(updates, state)
    new_state, diagnostics = aggregate(accepted, round) if accepted else (state, {})
    return new_state, updates, {**diagnostics, "rejected": rejected}


def rounds_until(share: float, rounds: int) -> int:
    """Number of whole rounds in the first ``share`` of them; also the index, from 0, of the round that follows."""
    return math.floor(round(share * rounds, 9))  # 0.29 * 100 is a little less than 29 to a computer


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
