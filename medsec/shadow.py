"""The shadow defence (Jiang, Ma & Yang 2025), as released, as described and hardened, and the controls at equal norm.

A client trains a *shadow* generator, its own simulated attacker, and changes its images where that attacker succeeds. All
of it works on images: a ``perturb(model, x, y, round) -> x′``, and what the client sends is the gradient at x′
(`gradient_defences.send`). x: (B, C, S, S) in [0, 1]; y: (B,) int64; ``round`` t from 0, of ``rounds`` T in all. x′ may lie
outside [0, 1], as in the released code.

`shadow_released` and `shadow_described` remember masks and a generator: make one for every client, and call it once for
every batch that the client trains on. Images are recognised by their content.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.convnet import check_images, check_norm, gradients
from medsec.errors import InputError
from medsec.federated import derive_seed, torch_generator
from medsec.gradient_defences import Perturbation, check_labels, check_share, fingerprint, share_of, stream

# Released (client.py and chestXray_config.py). The released images are standardised and of 224 pixels a side.
TEMPERATURE = 20.0
LOSS = {"gradient": 1e-2, "batch_norm": 1e-2, "variation": 1e-5, "norm": 1e2, "pixels": 1.0}
LUMINANCE = (0.299, 0.587, 0.114)
CAM_CLASS = 1  # whatever the image's label is

WIDTH = 16  # feature maps of the autoencoder next to the image


# The shadow generator ------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """A small convolutional autoencoder; its decoder is the shadow generator (released: StyleGAN3).

    ``encode(x)``: (N, C, S, S) -> (N, latent); ``decode(z)``: back, in [0, 1]; ``forward(x)`` does both.

    Raises:
        InputError: the size is no multiple of 4.
    """

    def __init__(self, size: int, channels: int, latent: int):
        super().__init__()
        if size % 4 or size < 4 or latent < 1:
            raise InputError(f"autoencoder: size {size} must be a multiple of 4, and latent {latent} at least 1")
        self.shape, quarter, maps = (channels, size, size), size // 4, 2 * WIDTH
        self.encode = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(WIDTH, maps, 4, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(maps * quarter**2, latent),
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, maps * quarter**2),
            nn.Unflatten(1, (maps, quarter, quarter)),
            nn.GELU(),
            nn.ConvTranspose2d(maps, WIDTH, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def new_autoencoder(size: int, channels: int, *, latent: int, seed: int) -> Autoencoder:
    """An untrained `Autoencoder` with weights drawn from ``seed``; the global random stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "autoencoder"))
        return Autoencoder(size, channels, latent)


def train_autoencoder(images: Tensor, *, latent: int, epochs: int, lr: float, batch: int, seed: int) -> Autoencoder:
    """An autoencoder of public images, by squared error (Adam, one-cycle schedule with the peak ``lr``).

    Args:
        images: (N, C, S, S) in [0, 1], of the ``public`` split: the clients' images would make it memorise victims.
    """
    check_images(images)
    model = new_autoencoder(images.shape[-1], images.shape[1], latent=latent, seed=seed).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng = torch_generator(seed, "autoencoder batches")
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=rng).to(images.device).split(batch):
            optimizer.zero_grad()
            F.mse_loss(model(images[rows]), images[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


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
        _, statistics = _forward(model, x)
    updated = copy.deepcopy(generator).requires_grad_()
    optimizer = torch.optim.Adam(updated.parameters(), lr)
    for _ in range(steps):
        drawn = updated(z)
        logits, seen = _forward(model, drawn)
        found = torch.autograd.grad(F.cross_entropy(logits, y), parameters, create_graph=True)
        loss = (
            LOSS["gradient"] * _distance(found, target)
            + LOSS["batch_norm"] * _distance(seen, statistics)
            + LOSS["variation"] * _variation(drawn)
            + LOSS["norm"] * drawn.norm() / drawn[0, 0].numel() ** 2
            + LOSS["pixels"] * F.mse_loss(drawn, x)
        )
        optimizer.zero_grad()
        loss.backward(inputs=list(updated.parameters()))
        optimizer.step()
    return updated.requires_grad_(False)


def _forward(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the mean and the variance of every BatchNorm's input over batch and pixels."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.extend([args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), unbiased=False)])

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        return model(x), seen
    finally:
        for hook in hooks:
            hook.remove()


def _distance(first: list[Tensor], second: list[Tensor]) -> Tensor | float:
    return sum((a - b).norm() for a, b in zip(first, second, strict=True))


def _variation(x: Tensor) -> Tensor:
    """The released total variation: lengths of the differences to four neighbours, two of them diagonal."""
    right, down = x[..., :-1] - x[..., 1:], x[..., :-1, :] - x[..., 1:, :]
    rising, falling = x[..., 1:, :-1] - x[..., :-1, 1:], x[..., :-1, :-1] - x[..., 1:, 1:]
    return right.norm() + down.norm() + rising.norm() + falling.norm()


# Where to change an image --------------------------------------------------------------------------------------------


def grad_cam(model: nn.Module, x: Tensor, y: Tensor, *, layer: str, plus: bool = True) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al. 2018, section 3): what speaks for class y, and where.

    With activations A of the layer and the gradient g of the logit, feature map k weighs Σ α relu(g), where
    α = g² / (2 g² + Σ A g³), sums over the map's places; α = 0 where g = 0. The map relu(Σₖ wₖ Aₖ) is interpolated
    bilinearly and stretched to [0, 1] for every image. The factor exp(logit) of the paper cancels in the stretching.
    Activations below 0 count as 0: the papers' networks end in ReLU, and of GELU's a whole map may be slightly negative.

    Args:
        model: used in evaluation mode, whatever mode it is in.
        layer: name of a submodule that gives maps, such as "body".
        plus: False for plain Grad-CAM (Selvaraju et al. 2017, equations 1 and 2): maps weigh the mean of g.

    Returns:
        (B, S, S); all 0 where nothing speaks for the class.

    Raises:
        InputError: no such layer, or it gives no maps.
    """
    model = copy.deepcopy(model).eval()
    kept: list[Tensor] = []
    if layer not in dict(model.named_modules()):
        raise InputError(
            f"grad_cam: the model has no layer {layer!r}; it has {', '.join(dict(model.named_children()))}"
        )
    model.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.enable_grad():
        logits = model(x.detach().requires_grad_())
        if kept[0].ndim != 4:
            raise InputError(f"grad_cam: layer {layer!r} gives shape {tuple(kept[0].shape)}, not maps (B, K, h, w)")
        (g,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), kept)
    a = kept[0].detach().relu()
    if plus:
        below = 2 * g**2 + (a * g**3).sum((2, 3), keepdim=True)
        alpha = torch.where(below != 0, g**2 / torch.where(below != 0, below, 1), 0)
        weight = (alpha * g.relu()).sum((2, 3), keepdim=True)
    else:
        weight = g.mean((2, 3), keepdim=True)
    cam = (weight * a).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return torch.stack([stretch(image) for image in cam])


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


@dataclass(frozen=True)
class Settings:
    """Numbers of `shadow_released` and `shadow_described`.

    Attributes:
        steps, lr: of Adam on the shadow generator, for every batch; released 5 and 1e-3 (batches of 4).
        freeze: share of the rounds after which shadow and masks stay; released 0.2.
        momentum: share of an image's old mask in its new one; released 0.1.
        ema: share of the way that the shadow moves towards its trained copy; released 0.5.
        layer: of `grad_cam`; released: the last block.
        top: share of pixels in the utility region; released 0.3.
        alpha: bounds of t / T as the weight of that region; released (0.1, 0.5).
        scale: largest noise in round 0, as a share of the brightest pixel; released 0.19.
    """

    steps: int
    lr: float
    freeze: float
    momentum: float
    ema: float
    layer: str
    top: float
    alpha: tuple[float, float]
    scale: float


class Shadow:
    """The memory of one client: the shadow generator and every image's mask (`shadow_released`, `shadow_described`).

    While t / T < ``freeze``: train a copy of the generator on the batch (`train_shadow`), take the mask from its squared
    error, mix it with the image's last one, and move the generator towards the copy. From then on the masks stay. (An image
    that is first seen later gets a mask from the generator as it is: our choice, each released image is seen in round 0.)

    The simulated attacker sees the model in evaluation mode.

    Args:
        shape: (C, S, S) of the images.
        generator: z -> images.
        latents: images -> z.
        mask: squared errors -> masks.
        noise: ``(model, x, y, round, masks) -> δ``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        generator: nn.Module,
        latents: Callable[[Tensor], Tensor],
        mask: Callable[[Tensor], Tensor],
        noise: Callable[[nn.Module, Tensor, Tensor, int, Tensor], Tensor],
        settings: Settings,
        rounds: int,
    ):
        for name in ("freeze", "ema", "top"):
            check_share(f"shadow: {name}", getattr(settings, name))
        if rounds < 1 or not 0 <= settings.momentum < 1:
            raise InputError(f"shadow: rounds {rounds} must be >= 1, and momentum {settings.momentum} in [0, 1)")
        self.shape, self.generator, self.latents, self.mask, self.noise = shape, generator, latents, mask, noise
        self.settings, self.rounds = settings, rounds
        self.masks: dict[str, Tensor] = {}

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        """x′ = x + δ, not clipped; (B, C, S, S)."""
        _check_batch(model, x, y, self.shape)
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


def shadow_released(size: int, channels: int, settings: Settings, *, latent: int, rounds: int, seed: int) -> Shadow:
    """The defence as in the authors' released code, its defects kept.

    (1) The shadow generator is *random*: pretrained weights go into a copy that is not used. (2) The mask is *scrambled*
    (`scramble`). (3) The utility region is nearly *without contrast*: softmax(CAM / 20) of a map in [0, 1], 0 outside the
    top, differs by a factor of 1.05 between pixels, and the map is that of class 1 for every image. (4) δ is *not random*:
    n = m − α sign(m) c, α = clip(t / T, ``alpha``), δ = |max(x) / max(n) · ``scale`` · exp(t / T)| n, image by image.

    Grey images are treated as the release treats them, as three equal channels; our network, which has one, sees the mean
    of the three channels of δ. Released images are standardised: with a standard deviation of about a quarter, the same
    ``scale`` is there about half as much noise in units of [0, 1]. The latent vector of an image is drawn once, as with the
    released option ``no_pretrained_z``.
    """
    if channels not in (1, 3):
        raise InputError(f"shadow_released: {channels} channels; the released code takes 3, and 1 as three equal ones")

    def latents(x: Tensor) -> Tensor:
        drawn = [torch.randn(latent, generator=torch_generator(seed, "latent", fingerprint(image))) for image in x]
        return torch.stack(drawn).to(x.device)

    def mask(error: Tensor) -> Tensor:
        return released_mask(error.expand(-1, 3, -1, -1))

    def noise(model: nn.Module, x: Tensor, y: Tensor, round: int, masks: Tensor) -> Tensor:
        cam = grad_cam(model, x, torch.full_like(y, CAM_CLASS), layer=settings.layer)
        utility = _softmax(cam * utility_region(cam, settings.top))[:, None]
        n = masks - _alpha(settings, round / rounds) * masks.sign() * utility
        delta = _strength(settings, x, n, round / rounds) * n
        return delta if channels == 3 else delta.mean(1, keepdim=True)

    generator = new_autoencoder(size, channels, latent=latent, seed=seed).decode
    return Shadow((channels, size, size), generator, latents, mask, noise, settings, rounds)


def shadow_described(autoencoder: Autoencoder, settings: Settings, *, rounds: int, seed: int) -> Shadow:
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
        cam = grad_cam(model, x, y, layer=settings.layer)
        utility = (cam * utility_region(cam, settings.top))[:, None]
        n = (masks - _alpha(settings, round / rounds) * utility).clamp_min(0)
        sign = 2.0 * torch.randint(2, x.shape, generator=stream(seed, "shadow signs", round, x)).to(x) - 1
        return sign * _strength(settings, x, n, round / rounds) * n

    generator = copy.deepcopy(autoencoder.decode)
    return Shadow(autoencoder.shape, generator, latents, aligned_mask, noise, settings, rounds)


def _alpha(settings: Settings, progress: float) -> float:
    low, high = settings.alpha
    return min(high, max(low, progress))


def _strength(settings: Settings, x: Tensor, n: Tensor, progress: float) -> Tensor:
    """(B, 1, 1, 1): what makes the largest noise ``scale`` · e^(t / T) of the brightest pixel."""
    return (x.amax((1, 2, 3), True) / n.amax((1, 2, 3), True) * settings.scale * math.exp(progress)).abs()


def _check_batch(model: nn.Module, x: Tensor, y: Tensor, shape: tuple[int, int, int]) -> None:
    check_images(x)
    check_labels(model, x, y)
    if x.shape[1:] != shape:
        raise InputError(f"images of shape {tuple(x.shape[1:])}, but the shadow generator draws {shape}")


# Controls: the same ‖δ‖₂, another shape ------------------------------------------------------------------------------

Control = Callable[[Tensor, int], Tensor]


def shuffled(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: every image's pixels at random places; the channels of a pixel stay together."""
    pixels, rng = delta.flatten(2), torch_generator(seed, "shuffled")
    order = torch.stack([torch.randperm(pixels.shape[2], generator=rng) for _ in pixels]).to(delta.device)
    return pixels.gather(2, order[:, None].expand_as(pixels)).view_as(delta)


def inverted(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: the pixel with the most noise changes places with that with the least, and so on.

    Ranks are reversed, not values: a reversed mask of a few strong places would be little but an offset, which is another
    control. Equal pixels count in the order of their places; the seed is not used.
    """
    pixels = delta.flatten(2)
    order = pixels.norm(dim=1).argsort(dim=1, stable=True)
    source = torch.zeros_like(order).scatter(1, order, order.flip(1))
    return pixels.gather(2, source[:, None].expand_as(pixels)).view_as(delta)


def offset(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: every image brighter by one number; the seed is not used."""
    return _of_norm(torch.ones_like(delta), delta)


def gaussian(delta: Tensor, seed: int) -> Tensor:
    """(B, C, S, S) -> the same: independent Gaussian noise, scaled to exactly the norm of each image's δ."""
    return _of_norm(torch.randn(delta.shape, generator=torch_generator(seed, "gaussian")).to(delta), delta)


def _of_norm(noise: Tensor, delta: Tensor) -> Tensor:
    return noise * (_norms(delta) / _norms(noise))


def _norms(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)[:, None, None, None]


def controlled(perturb: Perturbation, control: Control, *, seed: int) -> Perturbation:
    """The perturbation whose δ is a control of another one's; what is drawn differs between rounds and batches."""

    def changed(model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        delta = perturb(model, x, y, round) - x
        return x + control(delta, derive_seed(seed, "control", round, fingerprint(x)))

    return changed


# The hardened defence ------------------------------------------------------------------------------------------------

GROUPINGS = ("similar", "random")


class Hardened:
    """Our repair: *suppression* instead of noise. The client sends the gradient at another image, `substitutes`.

    Noise of any shape leaves the image in place, and who knows its shape removes it. Here what the shadow generator cannot
    draw never enters the gradient, and what it can draw is shared by k images of the client: an attacker who recovers x′
    exactly has the mean of k images.

    It needs the client's whole local set once, and has no randomness of its own: every round sends the same substitutes,
    so that a second look gives no more. With k = 1 it is the plain projection on the generator's range
    (``autoencoder_only``).

    Args:
        autoencoder: trained on public images.
        images, labels, k, grouping, seed: see `substitutes`.
    """

    def __init__(self, autoencoder: Autoencoder, images: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int):
        self.images = substitutes(autoencoder, images, labels, k=k, grouping=grouping, seed=seed)
        keys = [(fingerprint(image), int(label)) for image, label in zip(images, labels, strict=True)]
        self.row = {key: row for row, key in reversed(list(enumerate(keys)))}  # of equal images the first

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        """The substitutes of a batch, (B, C, S, S) in [0, 1].

        Raises:
            InputError: an image that was not among the client's, or had another label there.
        """
        _check_batch(model, x, y, tuple(self.images.shape[1:]))
        try:
            rows = [self.row[fingerprint(image), int(label)] for image, label in zip(x, y, strict=True)]
        except KeyError as error:
            raise InputError(
                f"shadow_hardened: image {error.args[0][0]} with label {error.args[0][1]} is not in the set that was given "
                "at the start; give all images of the client, unchanged, without augmentation"
            ) from error
        return self.images[rows]


def substitutes(
    autoencoder: Autoencoder, images: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int
) -> Tensor:
    """What is used instead of a client's images: the decoded mean of the latent vectors of each image's group.

    k-same anonymisation (Newton, Sweeney & Malin 2005) in the latent space of a generator, within every class.

    Args:
        images: (N, C, S, S) in [0, 1], all of one client.
        labels: (N,) int64.
        k, grouping, seed: see `groups`.

    Returns:
        (N, C, S, S) in [0, 1].
    """
    check_images(images)
    if images.shape[1:] != autoencoder.shape:
        raise InputError(f"images of shape {tuple(images.shape[1:])}, but the autoencoder draws {autoencoder.shape}")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise InputError(f"labels of shape {tuple(labels.shape)}, {labels.dtype}: need ({len(images)},), torch.int64")
    with torch.no_grad():
        z = autoencoder.encode(images)
        if not torch.isfinite(z).all():
            raise InputError("the autoencoder gives NaN or infinite latents: train it with a lower lr")
        group = groups(z, labels, k=k, grouping=grouping, seed=seed).to(z.device)
        member = F.one_hot(group).to(z)
        means = (member.T @ z) / member.sum(0)[:, None]
        return autoencoder.decode(means)[group]


def groups(latents: Tensor, labels: Tensor, *, k: int, grouping: str, seed: int) -> Tensor:
    """Divide each class into groups of k; the last one has k to 2 k − 1. A class of fewer than k is one group.

    "similar": as long as 2 k are left, the one that is farthest from the mean of those left and its k − 1 nearest make a
    group (the choice of the first as in microaggregation, Domingo-Ferrer & Torra 2005). "random": drawn from the seed,
    the control.

    Args:
        latents: (N, d).
        labels: (N,) int64.

    Returns:
        (N,) int64, the number of each one's group.

    Raises:
        InputError: k < 1, or with k > 1 a class of a single image, which no group can hide.
    """
    if k < 1 or grouping not in GROUPINGS:
        raise InputError(f"groups: k {k} must be at least 1, and grouping {grouping!r} one of {', '.join(GROUPINGS)}")
    z = latents.detach().cpu().double().numpy()
    found, n = np.full(len(z), -1), 0
    for label in np.unique(labels.cpu().numpy()):
        left = np.flatnonzero(labels.cpu().numpy() == label)
        if k > 1 and len(left) == 1:
            raise InputError(
                f"groups: class {label} has a single image; leave it out, or use k = 1, which hides nobody"
            )
        if grouping == "random":
            left = left[torch.randperm(len(left), generator=torch_generator(seed, "groups", int(label))).numpy()]
        while len(left):
            size = k if len(left) >= 2 * k else len(left)
            if grouping == "similar":
                first = z[left[_distances(z[left], z[left].mean(0)).argmax()]]
                left = left[_distances(z[left], first).argsort(kind="stable")]
            found[left[:size]], left, n = n, left[size:], n + 1
    return torch.from_numpy(found)


def _distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return ((points - centre) ** 2).sum(1)


# What a perturbation is made of --------------------------------------------------------------------------------------


def offset_share(delta: Tensor) -> Tensor:
    """(B, C, S, S) -> (B,): share of ‖δ‖² that is one constant, the mean over all pixels and channels; 0 for δ = 0."""
    flat = delta.flatten(1).double()
    energy = flat.square().sum(1)
    return torch.where(energy > 0, flat.shape[1] * flat.mean(1) ** 2 / energy.clamp_min(1e-300), 0)


def radial_spectrum(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of δ by spatial frequency: the mean and the sum of the squared Fourier coefficients in rings.

    Ring r holds the frequencies whose length, in cycles an image side, rounds to r = 0, 1, …; ring 0 is the mean alone. The
    transform is orthonormal: the sums add up to ‖δ‖².

    Args:
        delta: (B, C, S, S).

    Returns:
        (B, R) the mean over a ring and the channels, and (B, R) the sum.
    """
    energy = torch.fft.fft2(delta.double(), norm="ortho").abs().square().sum(1).flatten(1)
    size = delta.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    ring = torch.hypot(frequency[:, None], frequency[None]).round().long().flatten().to(delta.device)
    total = torch.zeros(len(delta), int(ring.max()) + 1, dtype=torch.float64, device=delta.device)
    total.index_add_(1, ring, energy)
    return total / (torch.bincount(ring) * delta.shape[1]), total
