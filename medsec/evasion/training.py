"""Training a classifier for notebook 04: plainly, or against adversarial examples, with or without attention and pruning."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medsec.core.errors import InputError
from medsec.core.guards import check_images, check_labels
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import AttentionParams, Recipe
from medsec.evasion import pruning
from medsec.evasion.attacks import climb, random_start
from medsec.evasion.pruning import Masks
from medsec.nets.cbam import attend
from medsec.nets.fit import random_shift, train
from medsec.nets.models import SmallResNet

__all__ = ["fit", "new", "pruned"]


def new(channels: int, n_classes: int, *, seed: int, cbam: AttentionParams | None = None) -> SmallResNet:
    """An untrained network in evaluation mode, with CBAM in every block if ``cbam`` says how."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "evasion network"))
        model = SmallResNet(channels, n_classes)
        if cbam is not None:
            attend(model, reduction=cbam.reduction, kernel=cbam.kernel)
    return model.eval()


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    epochs: int,
    lr: float,
    ramp: float = 0.0,
    hold: float = 0.0,
    keep: Masks | None = None,
) -> nn.Module:
    """Train a copy of a network with AdamW, a one-cycle learning rate and random shifts.

    With ``recipe.eps`` > 0 on adversarial examples that are made anew for every batch: a random start and ``steps`` signed
    steps of ``step`` eps. One step of 1.25 eps is FGSM-RS (Wong et al. 2020), several are PGD training (Madry et al. 2018).
    With ``recipe.beta`` > 0 the loss is that of TRADES (Zhang et al. 2019, eq. 5): cross-entropy on the clean images, and beta
    times the divergence between the answers to clean and changed ones, which is also what the steps raise.

    Args:
        images: (N, C, S, S) in [0, 1].
        labels: (N,) int64.
        recipe: see `medsec.core.settings.Recipe`.
        seed: of the order, the shifts and the random starts.
        epochs, lr: passes over the images, and the peak learning rate.
        ramp: share of the steps in which eps rises from 0 to ``recipe.eps``, if it never waits; 0: it is that from the start.
        hold: eps rises only while at least this share of the training examples is answered rightly (`Rising`).
        keep: weights that may be other than zero (`medsec.evasion.pruning.masks`).

    Returns:
        The trained copy in evaluation mode; with ``recipe.ema`` the running mean of its weights.

    Raises:
        InputError: images or labels that do not fit, a share outside [0, 1].
    """
    if not (0 <= ramp <= 1 and 0 <= hold <= 1):
        raise InputError(f"ramp {ramp:g}, hold {hold:g}: must be in [0, 1], shares of the steps and of the examples")
    check_images(images)
    check_labels(model, images, labels)
    model, rng = copy.deepcopy(model).train(), torch_generator(seed, "robust training")
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
    batch = min(recipe.batch, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=recipe.weight_decay, fused=True)
    weight = class_weights(labels) if recipe.balanced else None
    rising = Rising(recipe.eps, round(ramp * epochs * -(-len(images) // batch)), hold) if ramp else None

    def loss(rows: Tensor) -> Tensor | None:
        if len(rows) == 1:  # BatchNorm cannot normalise one image
            return None
        x, y = random_shift(images[rows], recipe.shift, rng), labels[rows]
        value, answers = _loss(model, x, y, rising.applied(recipe) if rising else recipe, rng, weight)
        if rising:
            right = answers.detach().argmax(1) == y
            rising.saw(right, torch.ones_like(right, dtype=answers.dtype) if weight is None else weight[y])
        return value

    def after_step() -> None:
        if keep is not None:
            pruning.apply(model, keep)
        if mean is not None:
            mean.update_parameters(model)

    if keep is not None:
        pruning.apply(model, keep)
    schedule = functools.partial(OneCycleLR, max_lr=lr)
    run = {"epochs": epochs, "batch": batch, "rng": rng, "schedule": schedule, "after_step": after_step}
    train(loss, len(images), optimizer, **run)
    return (model if mean is None else mean.module).eval()


def class_weights(labels: Tensor) -> Tensor:
    """(K,) weights under which every class counts alike, mean 1 over the images; 0 for a class without an image."""
    counts = labels.bincount().float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)


class Rising:
    """The eps of training: it rises from 0 while the network answers most of the examples made with it rightly.

    If the attack turns nearly every answer of a young network, its examples teach nothing, and the network ends with one answer
    for all images. So eps waits until the network has learnt enough, and stays where the network cannot follow. The rule is ours.
    Curricula are known from Cai et al. 2018 (IJCAI; the attack's steps grow in number), an eps adapted to each image from Balaji
    et al. 2019 (arXiv 1910.08051).

    Attributes:
        eps: in 255ths, of the next step.
        right: running share of the examples that were answered rightly, mostly of the last twenty steps; every class counts
            alike where it does in the loss.
    """

    MEMORY = 0.95

    def __init__(self, most: float, steps: int, hold: float):
        self.most, self.steps, self.hold = most, steps, hold
        self.eps, self.right = (0.0, 0.0) if steps else (most, 0.0)
        self._sum = self._weights = 0.0

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with today's eps."""
        return recipe.model_copy(update={"eps": self.eps})

    def saw(self, right: Tensor, weight: Tensor) -> None:
        """(b,) which answers of a step were right, and how much each counts."""
        share = float((weight * right).sum() / weight.sum())
        self._sum, self._weights = self.MEMORY * self._sum + share, self.MEMORY * self._weights + 1
        self.right = self._sum / self._weights
        if self.steps and self.right >= self.hold:
            self.eps = min(self.most, self.eps + self.most / self.steps)


def _loss(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, rng: torch.Generator, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the answers (b, K) that it is made of: to the changed images where there are any."""
    if recipe.eps == 0:
        answers = model(x)
        return _cross_entropy(answers, y, weight), answers
    clean = model(x) if recipe.beta else None
    answers = model(_adversarial(model, x, y, clean, recipe, rng))
    if clean is None:
        return _cross_entropy(answers, y, weight), answers
    return _cross_entropy(clean, y, weight) + recipe.beta * _divergence(clean, answers), answers


def _cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the batch of the weighted losses: with the weights of `class_weights` a batch without a class is no louder."""
    each = F.cross_entropy(logits, y, reduction="none")
    return each.mean() if weight is None else (weight[y] * each).mean()


def _adversarial(
    model: nn.Module, x: Tensor, y: Tensor, clean: Tensor | None, recipe: Recipe, rng: torch.Generator
) -> Tensor:
    """In training mode, as the network is being trained."""
    loss = F.cross_entropy if clean is None else lambda logits, _: _divergence(clean.detach(), logits)
    eps = recipe.eps / 255
    start = random_start(x, eps, rng)
    return climb(model, x, y, eps, start=start, steps=recipe.steps, step=recipe.step, loss=loss)


def _divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """KL(clean ‖ changed) of the answers, mean over the batch."""
    return F.kl_div(changed.log_softmax(1), clean.softmax(1), reduction="batchmean")


def pruned(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, *, ratio: float, seed: int) -> nn.Module:
    """Prune a trained copy by magnitude, and train it on with the masks fixed (``recipe.finetune_epochs``).

    A ratio of 0 is the control: the same further training, and nothing pruned.
    """
    keep, seed = pruning.masks(model, ratio), derive_seed(seed, "finetune")
    how = {"epochs": recipe.finetune_epochs, "lr": recipe.finetune_lr, "keep": keep}
    return fit(model, images, labels, recipe, seed=seed, **how)
