"""A federation that trains a classifier, in which every client defends the gradients that it computes (paper 2)."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.seeds import torch_generator
from medsec.core.settings import FedClsParams
from medsec.federated.aggregators import fedavg
from medsec.federated.rounds import State, Update, run_round
from medsec.nets import fit as classifier

__all__ = ["train", "utility"]

Defend = Callable[[nn.Module, Tensor, Tensor, int], Sequence[Tensor]]  # ``defend(model, x, y, round) -> gradients``


def train(
    model: nn.Module,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    defences: Sequence[Defend],
    params: FedClsParams,
    seed: int,
) -> list[State]:
    """FedAvg over clients that each take one local epoch of SGD a round, with gradients as ``defend`` gives them.

    Momentum starts anew every round, as a client's optimiser does in the released code. BatchNorm, if the model has any,
    stays frozen.

    Args:
        model: where to start; not changed.
        images, labels: one (n, C, S, S) in [0, 1] and one (n,) int64 tensor a client.
        defences: one a client; what has a memory belongs to one client.
        params: section ``inversion.federation`` of the parameters.
        seed: of the order of the images.

    Returns:
        The states of the global model before the first round and after every one.

    Raises:
        InputError: not as many defences as clients.
    """
    if not len(images) == len(labels) == len(defences):
        raise InputError(f"{len(images)} clients' images, {len(labels)} labels, {len(defences)} defences: one each")
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    local = copy.deepcopy(model).eval()  # of whichever client's turn it is

    def train_local(i: int, state: State, round: int) -> Update:
        return local_epoch(local, state, images[i], labels[i], defences[i], params, seed, i, round)

    for t in range(params.rounds):
        state, _, _ = run_round(states[-1], range(len(images)), train_local, fedavg, t, strict=True)
        states.append(state)
    return states


def local_epoch(
    model: nn.Module,
    state: State,
    images: Tensor,
    labels: Tensor,
    defend: Defend,
    params: FedClsParams,
    seed: int,
    client: int,
    round: int,
) -> Update:
    """What one client of `train` does in a round: one epoch of SGD from the server's state. ``model`` is overwritten."""
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.lr, momentum=params.momentum)
    order = torch.randperm(len(images), generator=torch_generator(seed, "local", client, round))
    for batch in order.split(params.batch):
        gradients = defend(model, images[batch], labels[batch], round)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return Update(client, {k: v.detach().clone() for k, v in model.state_dict().items()}, len(images))


def utility(model: nn.Module, val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How good a classifier is: ``auc``, ``macro_f1`` and ``balanced_accuracy`` on ``test``, images and labels.

    With two classes, the threshold of the latter two is that of the highest macro F1 on ``val``; with more, the most
    probable class is taken.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score  # slow to import

    probabilities, truth = classifier.predict(model, test[0]), test[1].numpy()
    if probabilities.shape[1] == 2:
        threshold = best_threshold(classifier.predict(model, val[0])[:, 1].numpy(), val[1].numpy())
        predictions = (probabilities[:, 1].numpy() > threshold).astype(int)
    else:
        predictions = probabilities.argmax(1).numpy()
    return {
        "auc": classifier.auc(probabilities, test[1]),
        "macro_f1": float(f1_score(truth, predictions, average="macro")),
        "balanced_accuracy": float(balanced_accuracy_score(truth, predictions)),
    }


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Threshold on (n,) probabilities of class 1 with the highest macro F1: half way between two scores that occur."""
    from sklearn.metrics import f1_score  # slow to import

    values = np.unique(scores)
    between = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2])
    between = between[:: max(1, len(between) // 200)]
    return float(max(between, key=lambda t: f1_score(labels, scores > t, average="macro")))
