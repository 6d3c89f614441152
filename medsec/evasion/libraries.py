"""Adversarial attacks of libraries, behind the contract of `medsec.evasion.attacks`: AutoAttack, Square, Carlini–Wagner.

They need the extra ``evasion`` (pyautoattack, adversarial-robustness-toolbox). All seed PyTorch's or NumPy's global random
stream; here its state is restored afterwards.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.evasion.attacks import check


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, seed: int, iterations: int, queries: int, restarts: int = 1
) -> Tensor:
    """The ensemble of Croce & Hein (2020), maximum norm: APGD on the cross-entropy, FAB, Square; from
    four classes on targeted APGD as well.

    Its loss DLR is undefined for two classes and its targeted one for three, and the targeted attacks have fewer classes to
    aim at than nine: hence a list of our own instead of the "standard" one.

    Args:
        iterations: of APGD and of FAB, each restart.
        queries: of Square, an example.

    Returns:
        Examples that fool the model, and the images where none was found, (N, C, S, S) in [0, 1].

    Raises:
        InputError: as `medsec.evasion.attacks.check`.
    """
    check(model, x, y, eps)
    others = _classes(model, x, y) - 1
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"] if others >= 3 else ["apgd-ce", "fab-t", "square"]
    ensemble = _ensemble(model, eps, attacks, seed)
    for attack in (ensemble.apgd, ensemble.apgd_targeted, ensemble.fab):
        attack.n_restarts, attack.n_iter = restarts, iterations
    ensemble.square.n_queries = queries
    ensemble.fab.n_target_classes = ensemble.apgd_targeted.n_target_classes = min(others, 9)
    with _random_streams_kept():
        found, _ = ensemble.run_standard_evaluation(x, y, batch_size=len(x))
    return found.detach()


def square(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, seed: int, queries: int) -> Tensor:
    """Random search without any gradient (Andriushchenko et al. 2020), maximum norm; returns as `autoattack`."""
    check(model, x, y, eps)
    _classes(model, x, y)
    ensemble = _ensemble(model, eps, ["square"], seed)
    ensemble.square.n_queries = queries
    with _random_streams_kept():
        found, _ = ensemble.run_standard_evaluation(x, y, batch_size=len(x))
    return found.detach()


def cw_l2(model: nn.Module, x: Tensor, y: Tensor, *, iterations: int, searches: int, lr: float) -> Tensor:
    """The smallest Euclidean change that flips the answer (Carlini & Wagner 2017, section VI); it has no eps.

    Args:
        iterations: of Adam, each search.
        searches: steps of the binary search for the weight of the loss.
        lr: of Adam.

    Returns:
        As `autoattack`.
    """
    from art.attacks.evasion import CarliniL2Method

    check(model, x, y)
    classes = _classes(model, x, y)
    with _random_streams_kept():
        attack = CarliniL2Method(
            oracle(model, tuple(x.shape[1:]), classes),
            learning_rate=lr,
            binary_search_steps=searches,
            max_iter=iterations,
            batch_size=len(x),
            verbose=False,
        )
        found = attack.generate(x.numpy(), np.eye(classes, dtype=np.float32)[y.numpy()])
    return torch.from_numpy(found).clamp(0, 1)


def oracle(model: nn.Module, shape: tuple[int, ...], classes: int):
    """A model as the adversarial-robustness-toolbox sees it, for its attacks and for comparisons."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def _ensemble(model: nn.Module, eps: float, attacks: list[str], seed: int):
    from pyautoattack import AutoAttack

    return AutoAttack(model, attacks=attacks, eps=eps, norm="Linf", seed=seed, version="custom")


@torch.no_grad()
def _classes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    classes = model(x[:1]).shape[1]
    if int(y.max()) >= classes:
        raise InputError(f"label {int(y.max())}, but the model has {classes} classes (labels start at 0)")
    return classes


@contextlib.contextmanager
def _random_streams_kept() -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002 - the libraries use the global stream
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
