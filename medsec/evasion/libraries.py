"""Adversarial attacks of libraries, behind the contract of `medsec.evasion.attacks`: AutoAttack, Square, Carlini–Wagner.

They need the extra ``evasion`` (pyautoattack, adversarial-robustness-toolbox). All seed PyTorch's or NumPy's global random
stream; here its state is restored afterwards.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from medsec.evasion.attacks import check_inputs

__all__ = ["autoattack", "cw_l2", "square"]


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
        InputError: as `medsec.evasion.attacks.check_inputs`.
    """
    check_inputs(model, x, y, eps)
    classes = _classes(model, x)
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"] if classes > 3 else ["apgd-ce", "fab-t", "square"]
    ensemble = _ensemble(model, eps, attacks, seed, queries)
    for attack in (ensemble.apgd, ensemble.apgd_targeted, ensemble.fab):
        attack.n_restarts, attack.n_iter = restarts, iterations
    ensemble.fab.n_target_classes = ensemble.apgd_targeted.n_target_classes = min(classes - 1, 9)
    return _run(ensemble, x, y)


def square(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, seed: int, queries: int) -> Tensor:
    """Random search without any gradient (Andriushchenko et al. 2020), maximum norm; returns as `autoattack`."""
    check_inputs(model, x, y, eps)
    return _run(_ensemble(model, eps, ["square"], seed, queries), x, y)


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

    check_inputs(model, x, y)
    classes = _classes(model, x)
    with _random_streams_kept():
        attack = CarliniL2Method(
            oracle(model, tuple(x.shape[1:]), classes),
            learning_rate=lr,
            binary_search_steps=searches,
            max_iter=iterations,
            batch_size=len(x),
            verbose=False,
        )
        x_adv = attack.generate(x.numpy(), np.eye(classes, dtype=np.float32)[y.numpy()])
    return torch.from_numpy(x_adv).clamp(0, 1)


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


@torch.no_grad()
def _classes(model: nn.Module, x: Tensor) -> int:
    return model(x[:1]).shape[1]


def _ensemble(model: nn.Module, eps: float, attacks: list[str], seed: int, queries: int):
    from pyautoattack import AutoAttack

    ensemble = AutoAttack(model, attacks=attacks, eps=eps, norm="Linf", seed=seed, version="custom")
    ensemble.square.n_queries = queries
    return ensemble


def _run(ensemble, x: Tensor, y: Tensor) -> Tensor:
    with _random_streams_kept():
        x_adv, _ = ensemble.run_standard_evaluation(x, y, batch_size=len(x))
    return x_adv.detach()


@contextlib.contextmanager
def _random_streams_kept() -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002 - the libraries use the global stream
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
