"""Federated learning: what a client sends, how a server combines it, and the loop of rounds.

An aggregator is a function ``aggregate(updates, round) -> (state, diagnostics)``. Those here are pure; a method that
remembers clients (FedDetect) is an object with the same call. States are dictionaries of tensors as
``Module.state_dict()`` returns them; integer buffers (BatchNorm's counters) are averaged and rounded.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medsec.errors import InputError

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


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for one purpose, such as ``derive_seed(seed, "train", client, round)``.

    Every (seed, keys) has its own stream, so a resumed run draws what an uninterrupted one would have drawn.
    """
    plain = [key if isinstance(key, str) else int(key) for key in (seed, *keys)]  # numpy integers have another repr
    digest = hashlib.sha256(repr(tuple(plain)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


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


# Aggregators ---------------------------------------------------------------------------------------------------------


def fedavg(updates: Sequence[Update], round: int = 0, *, weights: Sequence[float] | None = None) -> tuple[State, dict]:
    """Weighted mean of the states (McMahan et al. 2017, algorithm 1).

    Args:
        updates: at least one.
        round: not used.
        weights: one non-negative number an update; default: the numbers of samples. Normalised to sum 1.

    Raises:
        InputError: no updates, or weights that are negative or sum to zero.
    """
    _need(updates, 1, "fedavg")
    raw = np.array([u.n_samples for u in updates] if weights is None else weights, dtype=np.float64)
    if raw.shape != (len(updates),) or (raw < 0).any() or not 0 < raw.sum() < np.inf:
        raise InputError(
            f"fedavg: weights {raw.tolist()} must be {len(updates)} finite non-negative numbers, not all zero"
        )
    share = raw / raw.sum()
    state = _combine(
        updates, lambda stack: torch.einsum("k...,k->...", stack.double(), torch.tensor(share, device=stack.device))
    )
    return state, {"weights": {u.client: float(w) for u, w in zip(updates, share, strict=True)}}


def median(updates: Sequence[Update], round: int = 0) -> tuple[State, dict]:
    """Coordinate-wise median; the mean of the middle two for an even number (Yin et al. 2018, definition 1)."""
    _need(updates, 1, "median")
    low, high = (len(updates) - 1) // 2, len(updates) // 2

    def middle(stack: Tensor) -> Tensor:
        ranked = stack.double().sort(dim=0).values
        return (ranked[low] + ranked[high]) / 2

    return _combine(updates, middle), {}


def trimmed_mean(updates: Sequence[Update], round: int = 0, *, trim: int) -> tuple[State, dict]:
    """Coordinate-wise mean without the ``trim`` smallest and largest values (Yin et al. 2018, definition 2).

    Raises:
        InputError: ``trim`` is negative or leaves no value.
    """
    if trim < 0 or 2 * trim >= len(updates):
        raise InputError(f"trimmed_mean: trim {trim} leaves nothing of {len(updates)} updates; use trim < n / 2")
    keep = slice(trim, len(updates) - trim)
    return _combine(updates, lambda stack: stack.double().sort(dim=0).values[keep].mean(0)), {}


def krum_scores(updates: Sequence[Update], n_malicious: int) -> np.ndarray:
    """Sum of squared distances of each update to its n − f − 2 nearest others (Blanchard et al. 2017, section 4).

    Returns:
        (n,) float64, small for an update in the middle of the crowd.

    Raises:
        InputError: unless n ≥ 2 f + 3, the paper's condition.
    """
    n = len(updates)
    if n_malicious < 0 or n < 2 * n_malicious + 3:
        raise InputError(f"krum needs n >= 2 f + 3 clients, got n = {n} with f = {n_malicious}")
    return _krum_scores(updates, n - n_malicious - 2)


def _krum_scores(updates: Sequence[Update], n_nearest: int) -> np.ndarray:
    flat = np.stack([flatten(u.state) for u in updates]).astype(np.float64)
    # States of one round differ by far less than their own length: without centring, the Gram matrix cancels.
    flat -= flat.mean(0)
    gram = flat @ flat.T
    square = np.diag(gram)
    distance = np.maximum(square[:, None] + square[None, :] - 2 * gram, 0)
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, :n_nearest].sum(1)


def krum(updates: Sequence[Update], round: int = 0, *, n_malicious: int) -> tuple[State, dict]:
    """The single update with the smallest `krum_scores` (Blanchard et al. 2017)."""
    scores = krum_scores(updates, n_malicious)
    chosen = updates[int(scores.argmin())]
    return {k: v.clone() for k, v in chosen.state.items()}, {"selected": [chosen.client]}


def multi_krum(updates: Sequence[Update], round: int = 0, *, n_malicious: int) -> tuple[State, dict]:
    """Mean of the n − f updates with the smallest `krum_scores` (Blanchard et al. 2017, section 4)."""
    scores = krum_scores(updates, n_malicious)
    best = sorted(np.argsort(scores, kind="stable")[: len(updates) - n_malicious])
    chosen = [updates[i] for i in best]
    state, _ = fedavg(chosen, weights=[1.0] * len(chosen))
    return state, {"selected": [u.client for u in chosen]}


def flatten(state: State) -> np.ndarray:
    """All floating-point entries of a state as one float32 vector, in the order of the state's keys."""
    return torch.cat([v.detach().float().flatten() for v in state.values() if v.is_floating_point()]).cpu().numpy()


def _combine(updates: Sequence[Update], rule: Callable[[Tensor], Tensor]) -> State:
    state = {}
    for name, like in updates[0].state.items():
        value = rule(torch.stack([u.state[name].detach() for u in updates]))
        state[name] = (value if like.is_floating_point() else value.round()).to(like.dtype)
    return state


def _need(updates: Sequence[Update], n: int, name: str) -> None:
    if len(updates) < n:
        raise InputError(f"{name}: {len(updates)} updates, at least {n} needed")


# The round loop ------------------------------------------------------------------------------------------------------


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
