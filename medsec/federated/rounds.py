"""What a client sends, and the loop of rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
        The usable updates, in order, and the reason of rejection of each other client.
    """
    accepted, rejected = [], {}
    for update in updates:
        reason = _flaw(update, template)
        if reason:
            rejected[update.client] = reason
        else:
            accepted.append(update)
    return accepted, rejected


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

    A broken update is left out and named in ``diagnostics["rejected"]``; if none is usable the state stays as it was.

    Returns:
        The new state, the updates that were sent, the aggregator's diagnostics.
    """
    updates = [train(client, state, round) for client in clients]
    accepted, rejected = screen(updates, state)
    new_state, diagnostics = aggregate(accepted, round) if accepted else (state, {})
    return new_state, updates, {**diagnostics, "rejected": rejected}
