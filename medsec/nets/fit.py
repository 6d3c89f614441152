"""The training loop, and one recipe for a small classifier, used wherever a notebook needs one."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import ClassifierParams
from medsec.nets.models import SmallResNet

__all__ = ["auc", "balanced_accuracy", "features", "fit", "predict", "train"]


def train(
    loss: Callable[[Tensor], Tensor | None],
    n: int,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    rng: torch.Generator,
    schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    after_step: Callable[[], object] | None = None,
) -> Tensor:
    """The training loop: one step of the optimiser a batch, the images in a new order in every epoch.

    The caller puts the model into training mode and back.

    Args:
        loss: (b,) int64, the rows of a batch -> its loss, a scalar; None leaves the batch out.
        n: number of images.
        optimizer: of the parameters that are trained.
        epochs, batch: passes over the images, and images a step; the last batch of an epoch may be smaller.
        rng: of the order; ``loss`` may draw from it as well.
        schedule: ``(optimizer, total_steps=...) -> scheduler`` of the learning rate, which takes one step a batch.
        after_step: called after every step, for example to keep pruned weights at zero.

    Returns:
        (steps,) the losses.

    >>> w, x = torch.zeros(1, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    >>> sgd, rng = torch.optim.SGD([w], lr=0.5), torch.Generator().manual_seed(0)
    >>> losses = train(lambda rows: (x[rows] - w).square().mean(), 3, sgd, epochs=2, batch=3, rng=rng)
    >>> [round(loss, 2) for loss in losses.tolist()], w.item()
    ([4.67, 0.67], 2.0)
    """
    scheduler = schedule(optimizer, total_steps=max(1, epochs * -(-n // batch))) if schedule else None
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=rng).split(batch):
            value = loss(rows)
            if value is None:
                continue
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
            if scheduler is not None:
                scheduler.step()
            if after_step is not None:
                after_step()
    return torch.stack(losses) if losses else torch.empty(0)


def fit(
    images: Tensor, labels: Tensor, n_classes: int, params: ClassifierParams, *, epochs: int, seed: int
) -> SmallResNet:
    """Train a `SmallResNet` with AdamW, a one-cycle learning rate and random shifts.

    Args:
        images: (N, C, H, W) in [0, 1]; the model is trained on their device.
        labels: (N,) int64.
        n_classes: number of classes; every one must occur.
        params: section ``classifier`` of the parameters.
        epochs: passes over the images.
        seed: of initial weights, order and shifts.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: a class without an image.
    """
    if missing := sorted(set(range(n_classes)) - set(labels.tolist())):
        raise InputError(f"cannot train a classifier: no image of class {missing[0]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier"))
        model = SmallResNet(images.shape[1], n_classes).to(images.device)
    rng = torch_generator(seed, "classifier batches")
    batch = min(params.batch, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=params.weight_decay, fused=True)
    schedule = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=params.lr)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(random_shift(images[rows], params.shift, rng)), labels[rows])

    model.train()
    train(loss, len(images), optimizer, epochs=epochs, batch=batch, rng=rng, schedule=schedule)
    return model.eval()


def random_shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """One random shift of up to ``pixels`` in each direction for the whole batch; edges are replicated."""
    dy, dx = torch.randint(0, 2 * pixels + 1, (2,), generator=rng).tolist()
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    return padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


def with_every_class(order: Tensor, labels: Tensor, n: int) -> Tensor:
    """``order`` (N,), indices of all ``labels``, with an image of each class among the first n.

    Only the first image of a class that is not there is brought forward. A measure on some images needs all classes.
    """
    each = [int((labels[order] == k).nonzero()[0]) for k in labels.unique()]
    others = [at for at in range(min(n, len(order))) if at not in each][: max(0, n - len(each))]
    front = torch.tensor(sorted([*each, *others]))
    rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, front, False)
    return torch.cat([order[front], order[rest]])


@torch.no_grad()
def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """(N, n_classes) class probabilities."""
    return torch.cat([model(part).softmax(1) for part in images.split(500)])


@torch.no_grad()
def features(model: SmallResNet, images: Tensor) -> Tensor:
    """(N, 64) features before the last layer."""
    return torch.cat([model.features(part) for part in images.split(500)])


def auc(probabilities: Tensor, labels: Sequence[int] | Tensor) -> float:
    """Area under the ROC curve; for more than two classes the mean over classes, one against the rest."""
    from sklearn.metrics import roc_auc_score  # slow to import

    p, y = probabilities.cpu().double().numpy(), torch.as_tensor(labels).cpu().numpy()
    if p.shape[1] == 2:
        return float(roc_auc_score(y, p[:, 1]))
    one_hot = torch.eye(p.shape[1])[torch.as_tensor(y)].numpy()
    return float(roc_auc_score(one_hot, p, average="macro"))


def balanced_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share that is recognised."""
    hit = probabilities.argmax(1) == labels
    return float(torch.stack([hit[labels == k].float().mean() for k in labels.unique()]).mean())
