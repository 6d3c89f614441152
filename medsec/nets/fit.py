"""One recipe for training a small classifier, used wherever a notebook needs one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import ClassifierParams
from medsec.nets.models import SmallResNet


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
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=params.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, params.lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=rng).split(batch):
            x = random_shift(images[index], params.shift, rng)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def random_shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """One random shift of up to ``pixels`` in each direction for the whole batch; edges are replicated."""
    dy, dx = torch.randint(0, 2 * pixels + 1, (2,), generator=rng).tolist()
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    return padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


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
    p, y = probabilities.cpu().double().numpy(), torch.as_tensor(labels).cpu().numpy()
    if p.shape[1] == 2:
        return float(roc_auc_score(y, p[:, 1]))
    one_hot = torch.eye(p.shape[1])[torch.as_tensor(y)].numpy()
    return float(roc_auc_score(one_hot, p, average="macro"))


def balanced_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share that is recognised."""
    hit = probabilities.argmax(1) == labels
    return float(torch.stack([hit[labels == k].float().mean() for k in labels.unique()]).mean())
