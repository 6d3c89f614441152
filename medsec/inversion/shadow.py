"""The shadow defence (Jiang, Ma & Yang 2025), as released and as described; our repair: `medsec.inversion.substitution`.

A client trains a *shadow* generator, its own simulated attacker, and changes its images where that attacker succeeds. All
of it works on images: a ``perturb(model, x, y, round) -> x′``, and what the client sends is the gradient at x′
(`defences.send`). x: (B, C, S, S) in [0, 1]; y: (B,) int64; ``round`` t from 0, of ``rounds`` T in all. x′ may lie
outside [0, 1], as in the released code.

`shadow_released` and `shadow_described` remember masks and a generator: make one for every client, and call it once for
every batch that the client trains on. Images are recognised by their content.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.guards import check_batch, check_norm, check_share, share_of
from medsec.core.seeds import fingerprint, stream, torch_generator
from medsec.core.settings import ShadowParams
from medsec.nets.autoencoder import Autoencoder, new_autoencoder
from medsec.nets.convnet import gradients, logits_and_statistics
from medsec.nets.gradcam import grad_cam

__all__ = ["shadow_described", "shadow_released"]

# Released (client.py and chestXray_config.py). The released images are standardised and of 224 pixels a side.
TEMPERATURE = 20.0
LOSS = {"gradient": 1e-2, "batch_norm": 1e-2, "variation": 1e-5, "norm": 1e2, "pixels": 1.0}
LUMINANCE = (0.299, 0.587, 0.114)
CAM_CLASS = 1  # whatever the image's label is


# The shadow attacker --------------------------------------------------------------------------------------------------


@torch.enable_grad()
def train_shadow(
    model: nn.Module, generator: nn.Module, z: Tensor, x: Tensor, y: Tensor, *, steps: int, lr: float
) -> nn.Module:
    """A copy of the generator after some Adam steps that make G(z) look like the batch, also in its gradient.

    The released loss: Σ ‖∇(G(z)) − ∇(x)‖₂ over the parameters, BatchNorm's input statistics where the model has any, total
    variation, L2 norm and squared pixel error, weighted by `LOSS`. Adam starts afresh every time, as released.

    Args:
        model: in evaluation mode.
        z: (B, latent), fixed.
    """
    target, parameters = gradients(model, x, y), list(model.parameters())
    with torch.no_grad():
        _, statistics = logits_and_statistics(model, x)
    updated = copy.deepcopy(generator).requires_grad_()
    optimizer = torch.optim.Adam(updated.parameters(), lr)
    for _ in range(steps):
        drawn = updated(z)
        logits, seen = logits_and_statistics(model, drawn)
        found = torch.autograd.grad(F.cross_entropy(logits, y), parameters, create_graph=True)
        loss = (
            LOSS["gradient"] * _distance(found, target)
            + LOSS["batch_norm"] * _distance(_apart(seen), _apart(statistics))
            + LOSS["variation"] * _variation(drawn)
            + LOSS["norm"] * drawn.norm() / drawn[0, 0].numel() ** 2
            + LOSS["pixels"] * F.mse_loss(drawn, x)
        )
        optimizer.zero_grad()
        loss.backward(inputs=list(updated.parameters()))
        optimizer.step()
    return updated.requires_grad_(False)


def _apart(statistics: list[Tensor]) -> list[Tensor]:
    """Means and variances one by one: the released loss has a norm for each."""
    return [part for both in statistics for part in both]


def _distance(first: list[Tensor], second: list[Tensor]) -> Tensor | float:
    return sum((a - b).norm() for a, b in zip(first, second, strict=True))


def _variation(x: Tensor) -> Tensor:
    """The released total variation: lengths of the differences to four neighbours, two of them diagonal."""
    right, down = x[..., :-1] - x[..., 1:], x[..., :-1, :] - x[..., 1:, :]
    rising, falling = x[..., 1:, :-1] - x[..., :-1, 1:], x[..., :-1, :-1] - x[..., 1:, 1:]
    return right.norm() + down.norm() + rising.norm() + falling.norm()


# Where to change an image --------------------------------------------------------------------------------------------


def utility_map(model: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """(B, S, S): Grad-CAM++ of class y, stretched to [0, 1] for every image."""
    return torch.stack([stretch(cam) for cam in grad_cam(model, x, y, layer=layer, plus=True)])


def utility_region(cam: Tensor, top: float) -> Tensor:
    """(B, S, S) -> the same, bool: the share ``top`` of pixels of every image where the map is highest."""
    check_share("utility region: top", top)
    flat = cam.flatten(1)
    chosen = flat.topk(share_of(top, flat.shape[1])).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view_as(cam)


def stretch(values: Tensor, top: float = 1.0) -> Tensor:
    """Linearly to [0, ``top``], over the whole tensor; 0 if all values are equal."""
    low, high = values.min(), values.max()
    return (values - low) * top / (high - low) if high > low else torch.zeros_like(values)


def equalise(grey: Tensor) -> Tensor:
    """Histogram equalisation over the whole tensor, [0, 255] -> whole numbers from 0 to 255.

    As released: a value v takes the share of values up to bin ⌊v⌋ of 256, although the bins are a little narrower than 1.
    """
    counts = torch.histc(grey, 256, 0, 255).cumsum(0)
    return stretch(counts, 255).long()[grey.long()].float()


def scramble(mask: Tensor) -> Tensor:
    """(B, S, S) -> (B, 3, S, S): the released reshape that loses the places.

    Three equal copies of the mask are stacked last, (B·S·S, 3), and that is read as (B, 3, S, S) without moving the
    channels first. So every value comes three times in a row; the first channel holds the top third of the mask, every
    row of it spread over three, the second channel the middle third and the last the bottom third.
    """
    n, size = len(mask), mask.shape[-1]
    return mask.flatten().repeat_interleave(3).view(n, 3, size, size)


def released_mask(error: Tensor) -> Tensor:
    """Sensitivity as released: (B, 3, S, S) squared errors of the shadow -> (B, 3, S, S), of sum 1 for every image.

    1 / softmax(e / 20) is large where the shadow comes close; its luminance is equalised over the whole batch, scrambled
    (`scramble`), and goes through softmax(· / 20).
    """
    inverse = 1 / _softmax(error)
    weights = torch.tensor(LUMINANCE, device=error.device)
    grey = (stretch(inverse, 255) * weights[:, None, None]).sum(1).clamp(0, 255)
    return _softmax(scramble(equalise(grey)))


def aligned_mask(error: Tensor) -> Tensor:
    """Our reading: (B, C, S, S) squared errors -> (B, 1, S, S) in (0, 1], 1 where the shadow comes closest.

    The same steps in place and image by image, on the mean error of the channels. 1 / softmax and equalisation only put the
    pixels in an order, so levels from 0 to 255 are given by rank; where most errors are small, as a trained shadow's are,
    the released 256 bins would hold nearly all pixels in one. The last softmax is divided by its maximum.
    """
    flat = error.mean(1).flatten(1)
    rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    level = 255 * rank.to(flat) / (flat.shape[1] - 1)
    return ((level - 255) / TEMPERATURE).exp().view(len(error), 1, *error.shape[2:])


def _softmax(values: Tensor) -> Tensor:
    return (values.flatten(1) / TEMPERATURE).softmax(1).view_as(values)


# The defence as released and as described ----------------------------------------------------------------------------


@dataclass(eq=False)
class Shadow:
    """The memory of one client: the shadow generator and every image's mask (`shadow_released`, `shadow_described`).

    While t / T < ``freeze``: train a copy of the generator on the batch (`train_shadow`), take the mask from its squared
    error, mix it with the image's last one, and move the generator towards the copy. From then on the masks stay. (An image
    that is first seen later gets a mask from the generator as it is: our choice, each released image is seen in round 0.)

    The simulated attacker sees the model in evaluation mode.

    Attributes:
        shape: (C, S, S) of the images.
        generator: z -> images; ``latents``: images -> z; ``mask``: squared errors -> masks.
        noise: ``(model, x, y, round, masks) -> δ``.
        settings: section ``inversion.shadow`` of the parameters: ``steps`` and ``lr`` of Adam on the shadow generator, for
            every batch; ``freeze``: share of the rounds after which shadow and masks stay; ``momentum``: share of an image's
            old mask in its new one; ``ema``: share of the way that the shadow moves towards its trained copy; ``layer`` of
            `utility_map`; ``top``: share of pixels in the utility region; ``alpha``: bounds of t / T as the weight of that
            region; ``scale``: largest noise in round 0, as a share of the brightest pixel.
        rounds: T.
    """

    shape: tuple[int, int, int]
    generator: nn.Module
    latents: Callable[[Tensor], Tensor]
    mask: Callable[[Tensor], Tensor]
    noise: Callable[[nn.Module, Tensor, Tensor, int, Tensor], Tensor]
    settings: ShadowParams
    rounds: int
    masks: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self):
        for name in ("freeze", "ema", "top"):
            check_share(f"shadow: {name}", getattr(self.settings, name))
        if self.rounds < 1 or not 0 <= self.settings.momentum < 1:
            raise InputError(f"shadow: rounds {self.rounds} must be >= 1, momentum {self.settings.momentum} in [0, 1)")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        """x′ = x + δ, not clipped; (B, C, S, S)."""
        check_batch(model, x, y, self.shape)
        check_norm(model, len(x))
        if not 0 <= round <= self.rounds:
            raise InputError(f"shadow: round {round} is not one of 0 to {self.rounds}")
        watched = copy.deepcopy(model).eval()
        masks = self._masks(watched, x, y, round)
        with torch.no_grad():
            return x + self.noise(watched, x, y, round, masks)

    def _masks(self, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        keys, frozen = [fingerprint(image) for image in x], round / self.rounds >= self.settings.freeze
        if not frozen or any(key not in self.masks for key in keys):
            z, updated = self.latents(x), self.generator.to(x.device)
            if not frozen:
                updated = train_shadow(model, updated, z, x, y, steps=self.settings.steps, lr=self.settings.lr)
                with torch.no_grad():
                    for p, q in zip(self.generator.parameters(), updated.parameters(), strict=True):
                        p.lerp_(q, self.settings.ema)
            with torch.no_grad():
                fresh = self.mask((updated(z) - x) ** 2)
            for key, new in zip(keys, fresh, strict=True):
                if key not in self.masks:
                    self.masks[key] = new
                elif not frozen:
                    self.masks[key] = torch.lerp(new, self.masks[key], self.settings.momentum)
        return torch.stack([self.masks[key] for key in keys])


def shadow_released(size: int, channels: int, settings: ShadowParams, *, latent: int, rounds: int, seed: int) -> Shadow:
    """The defence as in the authors' released code, its defects kept.

    (1) The shadow generator is *random*: pretrained weights go into a copy that is not used. (2) The mask is *scrambled*
    (`scramble`). (3) The utility region is nearly *without contrast*: softmax(CAM / 20) of a map in [0, 1], 0 outside the
    top, differs by a factor of 1.05 between pixels, and the map is that of class 1 for every image. (4) δ is *not random*:
    n = m − α sign(m) c, α = clip(t / T, ``alpha``), δ = |max(x) / max(n) · ``scale`` · exp(t / T)| n, image by image.

    Grey images are treated as the release treats them, as three equal channels; our network, which has one, sees the mean
    of the three channels of δ. Released images are standardised (mean 0.533, standard deviation 0.253), so that
    their max(x) is (max(x) − 0.533) / 0.253: in units of [0, 1], where max(x) is 1, the release has 0.467 times our noise, and
    ours is 2.14 times the release's. The latent vector of an image is drawn once, as with the released option
    ``no_pretrained_z``.
    """
    if channels not in (1, 3):
        raise InputError(f"shadow_released: {channels} channels; the released code takes 3, and 1 as three equal ones")

    def latents(x: Tensor) -> Tensor:
        drawn = [torch.randn(latent, generator=torch_generator(seed, "latent", fingerprint(image))) for image in x]
        return torch.stack(drawn).to(x.device)

    def mask(error: Tensor) -> Tensor:
        return released_mask(error.expand(-1, 3, -1, -1))

    def noise(model: nn.Module, x: Tensor, y: Tensor, round: int, masks: Tensor) -> Tensor:
        cam = utility_map(model, x, torch.full_like(y, CAM_CLASS), settings.layer)
        utility = _softmax(cam * utility_region(cam, settings.top))[:, None]
        n = masks - _alpha(settings, round / rounds) * masks.sign() * utility
        delta = _strength(settings, x, n, round / rounds) * n
        return delta if channels == 3 else delta.mean(1, keepdim=True)

    generator = new_autoencoder(size, channels, latent=latent, seed=seed).decode
    return Shadow((channels, size, size), generator, latents, mask, noise, settings, rounds)


def shadow_described(autoencoder: Autoencoder, settings: ShadowParams, *, rounds: int, seed: int) -> Shadow:
    """The defence with its evident intent: noise where a simulated attacker succeeds, less where the task model looks.

    Schedules as in `shadow_released`. Our choices: (1) the shadow generator is the decoder of an autoencoder trained on
    public images, and z what its encoder finds; (2) the mask is in place (`aligned_mask`); (3) the utility map c is
    Grad-CAM++ of the image's own label in [0, 1] within the top share of pixels, 0 outside; with m and c in the same unit,
    n = max(m − α c, 0): less noise, and never its opposite; (4) it is *noise*: every value gets an independent random sign,
    δ = ± |max(x) / max(n) · ``scale`` · exp(t / T)| n, new in every round.
    """
    encoder = copy.deepcopy(autoencoder.encode)

    def latents(x: Tensor) -> Tensor:
        with torch.no_grad():
            return encoder.to(x.device)(x)

    def noise(model: nn.Module, x: Tensor, y: Tensor, round: int, masks: Tensor) -> Tensor:
        cam = utility_map(model, x, y, settings.layer)
        utility = (cam * utility_region(cam, settings.top))[:, None]
        n = (masks - _alpha(settings, round / rounds) * utility).clamp_min(0)
        sign = 2.0 * torch.randint(2, x.shape, generator=stream(seed, "shadow signs", round, x)).to(x) - 1
        return sign * _strength(settings, x, n, round / rounds) * n

    generator = copy.deepcopy(autoencoder.decode)
    return Shadow(autoencoder.shape, generator, latents, aligned_mask, noise, settings, rounds)


def _alpha(settings: ShadowParams, progress: float) -> float:
    low, high = settings.alpha
    return min(high, max(low, progress))


def _strength(settings: ShadowParams, x: Tensor, n: Tensor, progress: float) -> Tensor:
    """(B, 1, 1, 1): what makes the largest noise ``scale`` · e^(t / T) of the brightest pixel."""
    return (x.amax((1, 2, 3), True) / n.amax((1, 2, 3), True) * settings.scale * math.exp(progress)).abs()
