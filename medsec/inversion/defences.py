"""Baseline defences against gradient inversion: what a client may do to its gradient before it sends it.

Each is a function ``defend(model, x, y, round, *, <its numbers>) -> list[Tensor]``: what the client sends for one batch,
in the order of ``model.parameters()``. `functools.partial` fixes the numbers, and what is left is a defence like any
other. x: (B, C, S, S) in [0, 1]; y: (B,) int64; ``round``: from 0. All raise `InputError` for images that are not in
[0, 1], labels that do not fit, a gradient that is not finite, and BatchNorm in training mode with a batch of one.

What is drawn depends on (seed, method, round, the batch): two batches of a round get different noise, the same batch gets
new noise in the next round, and a batch that is sent twice in a round gets the same, so that nobody can average it away.
Give every client its own seed.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from medsec.core.errors import InputError
from medsec.core.guards import (
    check_gradient,
    check_images,
    check_independent,
    check_labels,
    check_norm,
    check_share,
    share_of,
)
from medsec.core.seeds import stream
from medsec.nets.convnet import ConvNet, flat

__all__ = ["DEFENCES", "epsilon", "gradient_noise", "noisy_image", "send", "topk"]

Defence = Callable[[nn.Module, Tensor, Tensor, int], list[Tensor]]
Perturbation = Callable[[nn.Module, Tensor, Tensor, int], Tensor]  # the same arguments -> the image x′ that is used

DIRECTIONS = 256  # derivatives that are taken at once, over all images of the batch


def none(model: nn.Module, x: Tensor, y: Tensor, round: int) -> list[Tensor]:
    """No defence: the gradient as it is."""
    check_images(x)
    return gradients_at(model, x, y)


def gradient_noise(model: nn.Module, x: Tensor, y: Tensor, round: int, *, ratio: float, seed: int) -> list[Tensor]:
    """Independent Gaussian noise on every entry (Zhu et al. 2019, section 5.1).

    Over all P parameters together its standard deviation is ``ratio`` ‖g‖₂ / √P: the expected *squared* norm of the noise
    is (``ratio`` ‖g‖₂)². At ratio 1 there is as much noise as gradient, whatever the gradient's length.
    """
    if not 0 <= ratio < math.inf:
        raise InputError(f"gradient_noise: ratio {ratio} must be a finite number >= 0")
    found = none(model, x, y, round)
    whole = flat(found)
    noise = torch.randn(len(whole), generator=stream(seed, "gradient_noise", round, x)).to(whole)
    return unflat(whole + ratio * whole.norm() / len(whole) ** 0.5 * noise, found)


def dp_sgd(
    model: nn.Module, x: Tensor, y: Tensor, round: int, *, clip: float, noise_multiplier: float, seed: int
) -> list[Tensor]:
    """Differentially private gradient (Abadi et al. 2016, algorithm 1).

    Every example's gradient is shortened to ``clip`` if it is longer, over all parameters together; to their sum is added
    Gaussian noise of standard deviation ``noise_multiplier`` · ``clip``; the whole is divided by B. What privacy that
    gives: `epsilon`.

    Raises:
        InputError: besides the above, BatchNorm in training mode: there an example has no gradient of its own.
    """
    if not 0 < clip < math.inf or not 0 <= noise_multiplier < math.inf:
        raise InputError(f"dp_sgd: clip {clip} must be positive and noise_multiplier {noise_multiplier} not negative")
    each = per_example_gradients(model, x, y)
    norms = torch.cat([g.flatten(1) for g in each], 1).norm(dim=1)
    factor = (clip / norms.clamp_min(clip)).to(norms)  # 1 for those that are short enough
    total = check_gradient(model, [torch.einsum("b,b...->...", factor, g) for g in each])
    whole = flat(total)
    noise = torch.randn(len(whole), generator=stream(seed, "dp_sgd", round, x)).to(whole)
    return unflat((whole + noise_multiplier * clip * noise) / len(x), total)


def per_example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradient of each example's own cross-entropy: one tensor (B, *shape) a parameter.

    Raises:
        InputError: BatchNorm in training mode.
    """
    check_images(x)
    check_labels(model, x, y)
    check_independent(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    return list(vmap(grad(loss), (None, 0, 0))(parameters, x, y).values())


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of (ε, δ)-differential privacy after ``steps`` of `dp_sgd`, by Opacus' Rényi accountant.

    For one example that is added or removed (Mironov et al. 2019), if every example enters every batch independently with
    probability ``sample_rate`` and the division is by the expected batch size. Other ways to draw batches, such as going
    through shuffled images, are covered only at sample_rate 1. Infinite without noise.

    Raises:
        InputError: numbers out of range, or Opacus is not installed.
    """
    if noise_multiplier < 0 or not 0 < sample_rate <= 1 or steps < 1 or not 0 < delta < 1:
        raise InputError(
            f"epsilon: need noise_multiplier >= 0, 0 < sample_rate <= 1, steps >= 1 and 0 < delta < 1, got "
            f"{noise_multiplier}, {sample_rate}, {steps}, {delta}"
        )
    if noise_multiplier == 0:
        return math.inf
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise InputError("epsilon needs Opacus, which is not installed: pip install -e '.[privacy]'") from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return float(accountant.get_epsilon(delta))


def topk(model: nn.Module, x: Tensor, y: Tensor, round: int, *, keep: float) -> list[Tensor]:
    """Only the share ``keep`` of entries that are largest in size, over all parameters together; the others become 0.

    Gradient compression (Lin et al. 2018) *without its memory*: what is not sent is lost, not added to the next
    gradient. With memory the server would get it later; so this is the variant that gives less away.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> sent = topk(model, torch.rand(1, 1, 2, 2), torch.tensor([1]), 0, keep=0.2)
    >>> [int((g != 0).sum()) for g in sent], sum(g.numel() for g in sent)
    ([0, 2], 10)
    """
    check_share("topk: keep", keep)
    found = none(model, x, y, round)
    whole = flat(found)
    kept = whole.abs().topk(share_of(keep, len(whole))).indices
    return unflat(torch.zeros_like(whole).index_copy(0, kept, whole[kept]), found)


def soteria(model: nn.Module, x: Tensor, y: Tensor, round: int, *, prune: float) -> list[Tensor]:
    """The share ``prune`` of the features is hidden in the gradient of the head's weight (Sun et al. 2021, section 4).

    Those with the largest |rᵢ| / ‖∂rᵢ/∂x‖₂, r being what the head sees: their columns become 0. All other gradients,
    those of the convolutions too, are sent as they are, as in the paper.

    *Batches.* The paper has one image. Here a feature's score is the mean over the batch and one set of columns is
    hidden for all, so that a hidden column is 0 and not a sum over some of the images. ‖∂rᵢ/∂x‖₂ is exact for one image,
    and estimated for more, with as much work for the batch as for one image.

    Raises:
        InputError: besides the above, a model that is no `ConvNet`, or BatchNorm in training mode.
    """
    check_share("soteria: prune", prune)
    if not isinstance(model, ConvNet):
        raise InputError(
            f"soteria needs a convnet.ConvNet, with features(x) and a linear head, not {type(model).__name__}"
        )
    found = none(model, x, y, round)
    with torch.no_grad():
        size = model.features(x).abs()
    probes = None if len(x) == 1 else -(-x.shape[1] * min(x.shape[2], receptive_field(model)) ** 2 // len(x))
    norms = feature_gradient_norms(model, x, probes, torch.Generator().manual_seed(round))
    score = (size / norms.clamp_min(1e-12)).mean(0)
    hidden = score.topk(share_of(prune, len(score))).indices
    at = next(i for i, p in enumerate(model.parameters()) if p is model.head.weight)
    found[at] = found[at].index_fill(1, hidden, 0.0)
    return found


def feature_gradient_norms(
    model: nn.Module, x: Tensor, probes: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """(B, D) ‖∂rᵢ/∂x‖₂ of every feature of every image, from derivatives along few directions v of the image.

    Exact without ``probes``: a feature sees a field of f × f pixels. Where v is 1 at pixels that lie f apart and 0 elsewhere,
    every feature sees at most one of them, so that (∂rᵢ/∂x · v)² is the square of one partial derivative; the C f² shifts of v
    give all of them. With ``probes`` an estimate, the mean square along so many random v of signs (Hutchinson 1990). Its
    square has no bias and a relative standard deviation of at most √(2 / probes), independent between images: the mean over a
    batch, which is what Soteria ranks, is far more exact than that.

    Raises:
        InputError: BatchNorm in training mode, where a feature depends on all images.
    """
    check_images(x)
    check_independent(model)
    channels, size = x.shape[1:3]
    apart = min(size, receptive_field(model))
    total, together = 0.0, max(1, DIRECTIONS // len(x))
    for part in torch.arange(channels * apart**2 if probes is None else probes).split(together):
        if probes is None:
            directions = torch.zeros(len(part), channels, size, size)
            for v, shift in zip(directions, part.tolist(), strict=True):
                v[shift // apart**2, shift // apart % apart :: apart, shift % apart :: apart] = 1
            directions = directions[:, None].expand(-1, *x.shape)
        else:
            directions = 2.0 * torch.randint(0, 2, (len(part), *x.shape), generator=generator) - 1
        total = total + _along(model, x, directions).square().sum(0)
    return (total / (probes or 1)).sqrt()


def _along(model: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """(V, B, D) derivatives of the features along directions (V, B, C, S, S)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, when it first loads forward differentiation
        return vmap(lambda v: jvp(model.features, (x,), (v,))[1])(directions.to(x))


def receptive_field(model: nn.Module) -> float:
    """Pixels a side that a feature of ``model.body`` depends on; infinite where a layer is not known to be local."""
    field, step = 1, 1
    for layer in model.body:
        if isinstance(layer, nn.Conv2d):
            field += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
            step *= layer.stride[0]
        elif not isinstance(layer, nn.BatchNorm2d | nn.GELU | nn.ReLU):
            return math.inf
    return field


def noisy_image(model: nn.Module, x: Tensor, y: Tensor, round: int, *, rms: float, kind: str, seed: int) -> Tensor:
    """x + independent noise of mean 0 and standard deviation ``rms`` in every value.

    It is *not* clipped to [0, 1]: clipping would take away up to half of the noise where an image is black or white, and
    with it the comparison at equal norm; the network takes any value.

    Args:
        kind: "gaussian", or "uniform" in ±√3 ``rms``.
    """
    check_images(x)
    if kind not in ("gaussian", "uniform") or not 0 <= rms < math.inf:
        raise InputError(f"image_noise: kind {kind!r} must be gaussian or uniform, and rms {rms} a finite number >= 0")
    rng = stream(seed, f"image_noise {kind}", round, x)
    uniform = kind == "uniform"
    noise = 3**0.5 * (2 * torch.rand(x.shape, generator=rng) - 1) if uniform else torch.randn(x.shape, generator=rng)
    return x + rms * noise.to(x)


# What the defences share ---------------------------------------------------------------------------------------------
def send(perturb: Perturbation) -> Defence:
    """The defence that sends the gradient at the image ``perturb(model, x, y, round)`` instead of x."""

    def defend(model: nn.Module, x: Tensor, y: Tensor, round: int) -> list[Tensor]:
        return gradients_at(model, perturb(model, x, y, round), y)

    return defend


def gradients_at(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """`medsec.nets.convnet.gradients` for an image that a defence has changed: its values may lie outside [0, 1]."""
    check_labels(model, x, y)
    check_norm(model, len(x))
    with torch.enable_grad():
        found = torch.autograd.grad(F.cross_entropy(model(x.detach()), y), list(model.parameters()))
    return check_gradient(model, list(found))


def unflat(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """One vector as tensors of the shapes of ``like``: the inverse of `medsec.nets.convnet.flat`."""
    parts = whole.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


DEFENCES: dict[str, Callable] = {
    "none": none,
    "gradient_noise": gradient_noise,
    "dp_sgd": dp_sgd,
    "topk": topk,
    "soteria": soteria,
}


def configured(name: str, parameters: Mapping[str, float], seed: int) -> Defence:
    """One of `DEFENCES` with its parameters (``inversion.defences`` of ``params.yaml``), and a seed where it draws.

    Raises:
        InputError: parameters that it does not have, or not all of them.
    """
    function = DEFENCES[name]
    takes = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    wanted = [parameter for parameter in takes if parameter != "seed"]
    if sorted(parameters) != sorted(wanted):
        raise InputError(
            f"inversion.defences.{name} has {', '.join(parameters) or 'nothing'}; it takes {', '.join(wanted) or 'nothing'}"
        )
    return functools.partial(function, **parameters, **({"seed": seed} if "seed" in takes else {}))
