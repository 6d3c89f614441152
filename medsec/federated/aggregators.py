"""A server's rules: how it combines what the clients sent.

A rule is a function ``aggregate(updates, round) -> (state, diagnostics)``. Those here are pure; a method that remembers
clients (FedDetect) is an object with the same call. States are dictionaries of tensors as ``Module.state_dict()``
returns them; integer buffers (BatchNorm's counters) are averaged and rounded. `RULES` lists what notebooks compare.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from medsec.core.errors import InputError
from medsec.federated.rounds import Aggregator, State, Update, scale_update

__all__ = ["RULES", "fedavg", "flatten", "krum", "krum_scores", "median", "multi_krum", "trimmed_mean", "uniform_mean"]


CHUNK = 2**13  # entries at a time: all that is worked on stays in the processor's cache
WIDE = 2**14  # the same for a rule that works on two rows at a time, not on all


def fedavg(updates: Sequence[Update], round: int = 0, *, weights: Sequence[float] | None = None) -> tuple[State, dict]:
    """Weighted mean of the states (McMahan et al. 2017, algorithm 1).

    Args:
        updates: at least one.
        round: not used.
        weights: one non-negative number an update; default: the numbers of samples. Normalised to sum 1.

    Raises:
        InputError: no updates, or weights that are negative or sum to zero.

    >>> sent = [Update(0, {"w": torch.tensor([0.0])}, 30), Update(1, {"w": torch.tensor([1.0])}, 10)]
    >>> fedavg(sent)
    ({'w': tensor([0.2500])}, {'weights': {0: 0.75, 1: 0.25}})
    """
    _need(updates, "fedavg")
    raw = np.array([u.n_samples for u in updates] if weights is None else weights, dtype=np.float64)
    if raw.shape != (len(updates),) or (raw < 0).any() or not 0 < raw.sum() < np.inf:
        raise InputError(
            f"fedavg: weights {raw.tolist()} must be {len(updates)} finite non-negative numbers, not all zero"
        )
    share = raw / raw.sum()

    buffers = np.empty((2, WIDE))  # used again and again: new memory for every product took a quarter of the time

    def mean(rows: list[np.ndarray]) -> np.ndarray:
        total, term = buffers[:, : len(rows[0])]
        np.copyto(total, rows[0])
        total *= share[0]
        for row, weight in zip(rows[1:], share[1:], strict=True):
            np.copyto(term, row)  # into float64 first: numpy multiplies numbers of one kind faster than of two
            term *= weight
            total += term
        return total

    return _combine(updates, mean, WIDE), {"weights": {u.client: float(w) for u, w in zip(updates, share, strict=True)}}


def uniform_mean(updates: Sequence[Update], round: int = 0) -> tuple[State, dict]:
    """No defence: the plain mean, every client alike, whatever it says of its number of samples."""
    return fedavg(updates, weights=[1.0] * len(updates))


def median(updates: Sequence[Update], round: int = 0) -> tuple[State, dict]:
    """Coordinate-wise median; the mean of the middle two for an even number (Yin et al. 2018, definition 1).

    >>> median([Update(i, {"w": torch.tensor([x])}, 1) for i, x in enumerate([1.0, 2.0, 900.0])])[0]
    {'w': tensor([2.])}
    """
    _need(updates, "median")
    low, high = (len(updates) - 1) // 2, len(updates) // 2

    def middle(rows: list[np.ndarray]) -> np.ndarray:
        ranked = np.sort(np.stack(rows, axis=1))
        return (ranked[:, low].astype(np.float64) + ranked[:, high]) / 2

    return _combine(updates, middle), {}


def trimmed_mean(updates: Sequence[Update], round: int = 0, *, trim: int) -> tuple[State, dict]:
    """Coordinate-wise mean without the ``trim`` smallest and largest values (Yin et al. 2018, definition 2).

    Raises:
        InputError: ``trim`` is negative or leaves no value.
    """
    if trim < 0 or 2 * trim >= len(updates):
        raise InputError(f"trimmed_mean: trim {trim} leaves nothing of {len(updates)} updates; use trim < n / 2")

    def inner(rows: list[np.ndarray]) -> np.ndarray:
        ranked = np.sort(np.stack(rows, axis=1))[:, trim : len(rows) - trim]
        return ranked.mean(1, dtype=np.float64)

    return _combine(updates, inner), {}


def krum_scores(updates: Sequence[Update], n_malicious: int, *, strict: bool = True) -> np.ndarray:
    """Sum of squared distances of each update to its n − f − 2 nearest others (Blanchard et al. 2017, section 4).

    Args:
        updates: n of them.
        n_malicious: f, how many attack.
        strict: insist on the paper's condition n ≥ 2 f + 3, without which nothing is guaranteed (four clients with one
            attacker miss it by one); else at least one neighbour is counted.

    Returns:
        (n,) float64, small for an update in the middle of the crowd.

    Raises:
        InputError: f is negative, or the condition does not hold.
    """
    n = len(updates)
    if n_malicious < 0 or (strict and n < 2 * n_malicious + 3):
        raise InputError(f"krum needs n >= 2 f + 3 clients, got n = {n} with f = {n_malicious}")
    distance = _squared_distances([flatten(u.state) for u in updates])
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, : max(1, n - n_malicious - 2)].sum(1)


def _squared_distances(points: Sequence[np.ndarray]) -> np.ndarray:
    """(n, n) float64, between n float32 vectors."""
    gram = np.zeros((len(points), len(points)))
    for start in range(0, len(points[0]), CHUNK):
        part = np.stack([point[start : start + CHUNK] for point in points], dtype=np.float64)
        # States of one round differ by far less than their own length: without centring, the Gram matrix cancels.
        part -= part.mean(0)
        gram += part @ part.T
    return np.maximum(np.diag(gram)[:, None] + np.diag(gram)[None, :] - 2 * gram, 0)


def krum(updates: Sequence[Update], round: int = 0, *, n_malicious: int, strict: bool = True) -> tuple[State, dict]:
    """The single update with the smallest of the `krum_scores` (Blanchard et al. 2017)."""
    return _most_central(updates, krum_scores(updates, n_malicious, strict=strict), 1)


def multi_krum(
    updates: Sequence[Update], round: int = 0, *, n_malicious: int, strict: bool = True
) -> tuple[State, dict]:
    """Plain mean of the n − f updates with the smallest `krum_scores` (Blanchard et al. 2017, section 4)."""
    keep = max(1, len(updates) - n_malicious)  # fewer may have come than were asked
    return _most_central(updates, krum_scores(updates, n_malicious, strict=strict), keep)


def _most_central(updates: Sequence[Update], scores: np.ndarray, keep: int) -> tuple[State, dict]:
    kept = [updates[i] for i in sorted(np.argsort(scores, kind="stable")[:keep])]
    chosen = {u.client for u in kept}
    return uniform_mean(kept)[0], {"weights": {u.client: (u.client in chosen) / keep for u in updates}}


class RootSet:
    """FLTrust (Cao et al. 2021, arXiv:2012.13995, section IV): what the server learns from clean images is the measure.

    In every round the server trains as a client does, on a small *root set* of its own. An update is what a client sends
    minus what it received, over all floating-point entries. Each is brought to the length of the server's own update, and
    weighs as its cosine with that, or nothing if the cosine is negative. If nobody weighs anything, the state stays.

    Args:
        state: what the server holds before the first round.
        train: ``train(state, round) -> state``, the server's own local training on its root set.
    """

    def __init__(self, state: State, train: Callable[[State, int], State]):
        self.state, self.train = state, train

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        _need(updates, "root_set")
        held = flatten(self.state).astype(np.float64)
        own = flatten(self.train(self.state, round)) - held
        wanted = np.linalg.norm(own)
        scaled, trust = [], []
        for u in updates:
            sent = flatten(u.state) - held
            length = np.linalg.norm(sent)
            both = min(length, wanted) > 0
            trust.append(max(0.0, float(sent @ own / (length * wanted))) if both else 0.0)
            factor = float(wanted / length) if both else 1.0
            scaled.append(dataclasses.replace(u, state=scale_update(u.state, self.state, factor)))
        if sum(trust) == 0:
            return self.state, {"weights": {u.client: 0.0 for u in updates}}
        self.state, diagnostics = fedavg(scaled, weights=trust)
        return self.state, diagnostics


def vector(state: State) -> Tensor:
    """All floating-point entries of a state as one float32 vector (d,), in the order of the state's keys."""
    return torch.cat([v.detach().float().flatten() for v in state.values() if v.is_floating_point()])


def flatten(state: State) -> np.ndarray:
    """`vector` as an array."""
    return vector(state).cpu().numpy()


def _combine(updates: Sequence[Update], reduce: Callable[[list[np.ndarray]], np.ndarray], chunk: int = CHUNK) -> State:
    """The state whose entries are ``reduce(rows)``: float64 (m,) from the same m <= chunk entries of every update, each (m,)."""
    state = {}
    for name, like in updates[0].state.items():
        rows = [u.state[name].detach().cpu().numpy().reshape(-1) for u in updates]
        found = np.empty_like(rows[0])
        for start in range(0, len(found), chunk):
            value = reduce([row[start : start + chunk] for row in rows])
            found[start : start + chunk] = value if like.is_floating_point() else value.round()
        state[name] = torch.from_numpy(found).reshape(like.shape).to(like.device)
    return state


def _need(updates: Sequence[Update], name: str) -> None:
    if not updates:
        raise InputError(f"{name}: no updates, at least 1 needed")


# Rules without a memory. One that has a parameter ``n_malicious`` is told how many attack (`rule`).
RULES: dict[str, Callable] = {
    "none": uniform_mean,
    "median": median,
    "trimmed_mean": lambda updates, round=0, *, n_malicious: trimmed_mean(
        updates, round, trim=min(n_malicious, (len(updates) - 1) // 2)
    ),
    "krum": functools.partial(krum, strict=False),
    "multi_krum": functools.partial(multi_krum, strict=False),
}


def rule(name: str, n_malicious: int) -> Aggregator:
    """The rule of that name in `RULES`, ready for ``aggregate(updates, round)``."""
    if name not in RULES:
        raise InputError(f"server rule {name!r}: choose one of {', '.join(RULES)}")
    asks = "n_malicious" in inspect.signature(RULES[name]).parameters
    return functools.partial(RULES[name], n_malicious=n_malicious) if asks else RULES[name]
