"""Training a classifier for notebook 04: plainly, or against adversarial examples, with or without attention and pruning."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medsec.core.errors import InputError
from medsec.core.guards import check_images
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import AttentionParams, Recipe
from medsec.evasion import pruning
from medsec.evasion.pruning import Masks
from medsec.nets import cbam as attention
from medsec.nets.fit import random_shift
from medsec.nets.models import SmallResNet


def new(channels: int, n_classes: int, *, seed: int, cbam: AttentionParams | None = None) -> SmallResNet:
    """An untrained network in evaluation mode, with CBAM in every block if ``cbam`` says how."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "evasion network"))
        model = SmallResNet(channels, n_classes)
        if cbam is not None:
            attention.attend(model, reduction=cbam.reduction, kernel=cbam.kernel)
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
        keep: weights that may be other than zero (`medsec.evasion.pruning.masks`).

    Returns:
        The trained copy in evaluation mode; with ``recipe.ema`` the running mean of its weights.

    Raises:
        InputError: images or labels that do not fit.
    """
    check_images(images)
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise InputError(f"labels of shape {tuple(labels.shape)}, {labels.dtype}: need ({len(images)},), torch.int64")
    model, rng = copy.deepcopy(model).train(), torch_generator(seed, "robust training")
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
    batch = min(recipe.batch, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=recipe.weight_decay, fused=True)
    steps = max(1, epochs * -(-len(images) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    weight = class_weights(labels) if recipe.balanced else None
    if keep is not None:
        pruning.apply(model, keep)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=rng).split(batch):
            if len(index) == 1:  # BatchNorm cannot normalise one image
                continue
            x = random_shift(images[index], recipe.shift, rng)
            loss = _loss(model, x, labels[index], recipe, rng, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if keep is not None:
                pruning.apply(model, keep)
            if mean is not None:
                mean.update_parameters(model)
    return (model if mean is None else mean.module).eval()


def class_weights(labels: Tensor) -> Tensor:
    """(K,) weights under which every class counts alike, mean 1 over the images; 0 for a class without an image."""
    counts = labels.bincount().float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)


def _loss(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, rng: torch.Generator, weight: Tensor | None = None
) -> Tensor:
    if recipe.eps == 0:
        return _cross_entropy(model(x), y, weight)
    clean = model(x) if recipe.beta else None
    found = _adversarial(model, x, y, clean, recipe, rng)
    if clean is None:
        return _cross_entropy(model(found), y, weight)
    return _cross_entropy(clean, y, weight) + recipe.beta * _divergence(clean, model(found))


def _cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the batch of the weighted losses: with the weights of `class_weights` a batch without a class is no louder."""
    each = F.cross_entropy(logits, y, reduction="none")
    return each.mean() if weight is None else (weight[y] * each).mean()


def _adversarial(
    model: nn.Module, x: Tensor, y: Tensor, clean: Tensor | None, recipe: Recipe, rng: torch.Generator
) -> Tensor:
    """In training mode, as the network is being trained; hence not `medsec.evasion.attacks`, which refuses that."""
    eps = recipe.eps / 255
    found = (x + eps * (2 * torch.rand(x.shape, generator=rng).to(x) - 1)).clamp(0, 1)
    for _ in range(recipe.steps):
        found.requires_grad_()
        logits = model(found)
        loss = F.cross_entropy(logits, y) if clean is None else _divergence(clean.detach(), logits)
        (gradient,) = torch.autograd.grad(loss, found)
        found = (found.detach() + recipe.step * eps * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return found


def _divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """KL(clean ‖ changed) of the answers, mean over the batch."""
    return F.kl_div(changed.log_softmax(1), clean.softmax(1), reduction="batchmean")


def pruned(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, *, ratio: float, seed: int) -> nn.Module:
    """Prune a trained copy by magnitude, and train it on with the masks fixed (``recipe.finetune_epochs``).

    A ratio of 0 is the control: the same further training, and nothing pruned.
    """
    keep = pruning.masks(model, ratio)
    return fit(
        model,
        images,
        labels,
        recipe,
        seed=derive_seed(seed, "finetune"),
        epochs=recipe.finetune_epochs,
        lr=recipe.finetune_lr,
        keep=keep,
    )
