"""Federated learning: what a client sends, how a server combines it, and the loop of rounds.

An aggregator is a function ``aggregate(updates, round) -> (state, diagnostics)``. Those here are pure; a method that
remembers clients (FedDetect) is an object with the same call. States are dictionaries of tensors as
``Module.state_dict()`` returns them; integer buffers (BatchNorm's counters) are averaged and rounded.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from medsec.core.errors import InputError
from medsec.federated.rounds import State, Update


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
