"""Division of a split's images over the clients of a federation: at random, by label skew, or by hospital."""

import numpy as np

from medsec.core.errors import InputError

__all__ = ["partition"]


def partition(
    labels, n_clients: int, scheme: str, *, seed: int, site=None, alpha: float = 0.5, per_client: int | None = None
) -> list[np.ndarray]:
    """Disjoint, sorted, non-empty index arrays, one per client, of the images with ``labels`` (N,) and ``site`` (N,).

    - "iid": a random permutation, dealt evenly.
    - "dirichlet": label skew. Each class is shared out in proportions drawn from a symmetric Dirichlet distribution
      over the clients (Yurochkin et al. 2019, ICML); the smaller ``alpha``, the fewer clients hold most of a class. Hsu
      et al. (2019, arXiv:1909.06335) draw class proportions per client instead, with the same meaning of ``alpha``.
    - "style": hospitals are dealt in turn: client c holds hospital c modulo their number, and clients of one hospital
      divide its images evenly. With fewer clients than hospitals a client holds several hospitals.

    ``per_client`` caps each client's images by a random choice; surplus images are left out. The result depends on the
    arguments only.

    >>> [part.tolist() for part in partition([0, 0, 0, 1, 1, 1], 2, "style", seed=0, site=[0, 1, 0, 1, 0, 1])]
    [[0, 2, 4], [1, 3, 5]]

    Raises:
        InputError: an argument is impossible, ``site`` is missing for "style", or a client would be empty.
    """
    labels = np.asarray(labels)
    _check_partition(labels, n_clients, scheme, seed, site, alpha, per_client)
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        clients = np.array_split(rng.permutation(len(labels)), n_clients)
    elif scheme == "dirichlet":
        clients = _by_dirichlet(labels, n_clients, alpha, rng)
    else:
        clients = _by_site(np.asarray(site), n_clients, rng)
    if per_client:
        clients = [rng.permutation(members)[:per_client] for members in clients]
    return [np.sort(members).astype(np.int64) for members in clients]


def _check_partition(labels, n_clients, scheme, seed, site, alpha, per_client) -> None:
    if scheme not in ("iid", "dirichlet", "style"):
        raise InputError(f"unknown partition {scheme!r}: choose iid, dirichlet or style")
    if labels.ndim != 1:
        raise InputError(f"labels to partition are {labels.shape}; they must be one-dimensional")
    for name, value, least in (("n_clients", n_clients, 1), ("seed", seed, 0), ("per_client", per_client, 1)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise InputError(f"{name} = {value!r} must be an integer, at least {least}")
    if scheme == "dirichlet" and not 0 < alpha < np.inf:
        raise InputError(f"alpha = {alpha} must be a positive number")
    if scheme == "style" and site is None:
        raise InputError("cohort has no sites; use iid or dirichlet")
    if scheme == "style" and np.shape(site) != labels.shape:
        raise InputError(f"site is {np.shape(site)}, labels are {labels.shape}; give one site an image")
    if len(labels) < n_clients:
        raise InputError(f"{len(labels)} images for {n_clients} clients; lower n_clients")


def _by_dirichlet(labels: np.ndarray, n_clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    draws = 100
    for _ in range(draws):
        parts: list[list[np.ndarray]] = [[] for _ in range(n_clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(n_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in zip(parts, np.split(members, cuts), strict=True):
                client.append(part)
        clients = [np.concatenate(part) for part in parts]
        if min(map(len, clients)):
            return clients
    what = f"{len(labels)} images, {n_clients} clients, alpha {alpha}"
    raise InputError(f"a client stayed empty in {draws} Dirichlet draws ({what}); raise alpha or lower n_clients")


def _by_site(site: np.ndarray, n_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    hospitals = np.unique(site)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_clients)]
    for h, hospital in enumerate(hospitals):
        members = rng.permutation(np.flatnonzero(site == hospital))
        sharing = range(h, n_clients, len(hospitals)) or [h % n_clients]
        if len(members) < len(sharing):
            raise InputError(f"site {hospital} has {len(members)} images for {len(sharing)} clients; lower n_clients")
        for client, part in zip(sharing, np.array_split(members, len(sharing)), strict=True):
            parts[client].append(part)
    return [np.concatenate(part) for part in parts]
