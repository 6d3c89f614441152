"""Backdoor triggers for images, and a calibrated detector for each kind.

===========  =========================================================================  ================================
kind         what is stamped                                                            detector (score in [−1, 1])
===========  =========================================================================  ================================
``checker``  black and white blocks of half the patch, flush bottom right (ours)        correlation at that place
``grid``     a smooth 4 × 4 colour grid, 5/256 of a side off the bottom right corner    correlation at that place
             (Jin & Li, released code)
``moving``   the checker at a random place of every image (ours)                        largest correlation anywhere
``blended``  a faint block pattern over the whole image (Chen et al. 2017)              correlation of fine structure
``stripes``  a faint vertical sinusoid of period 4 px (after Barni et al. 2019)         the same
===========  =========================================================================  ================================

A score is a normalised cross-correlation (NCC). Its threshold comes from clean real images (`calibrate`), so "trigger
rate" means: share of images that look triggered to a detector which clean images rarely fool. ``stripes`` was never looked
at while the defence was built, and is no choice for parameters (`KINDS`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsec.core.errors import InputError

__all__ = ["KINDS", "Trigger", "calibrate", "make_trigger", "patch", "score", "stamp"]

KINDS = ("checker", "grid", "moving", "blended")
# Least correlation that is called a trigger. A patch is a few pixels, which noise matches easily; the blended pattern
# is a thousand, so that a low correlation is already far from chance, and it is faint.
_FLOOR = {"checker": 0.5, "grid": 0.5, "moving": 0.5, "blended": 0.3}
_PATTERN_SEED = 4  # the fixed colours and blocks; part of the trigger's definition, not of an experiment


@dataclass(frozen=True)
class Trigger:
    """A trigger for images of one size.

    Attributes:
        kind: one of `KINDS` (``blended`` for ``stripes``): it says where the trigger is and how it is detected.
        pattern: (C, k, k) in [0, 1]; the whole image for ``blended``.
        offset: distance of the patch from the bottom and right edge, in pixels (0 for ``moving`` and ``blended``).
        opacity: 1 for a patch; the blending factor for ``blended``.
        image_size: pixels a side of the images.
    """

    kind: str
    pattern: Tensor
    offset: int
    opacity: float
    image_size: int

    @property
    def area(self) -> float:
        """Share of the image's pixels that the trigger changes."""
        return (self.pattern.shape[-1] / self.image_size) ** 2


def make_trigger(kind: str, *, image_size: int, channels: int, size: int = 4, opacity: float = 0.2) -> Trigger:
    """The trigger of a kind; ``size`` is the patch in pixels a side, ``opacity`` that of ``blended`` and ``stripes``.

    Raises:
        InputError: unknown kind, a patch smaller than 2 px or larger than the image, opacity outside (0, 1].

    >>> trigger = make_trigger("checker", image_size=6, channels=1, size=2)
    >>> stamp(trigger, torch.zeros(1, 1, 6, 6))[0, 0, 3:].int().tolist()
    [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    """
    if kind not in (*KINDS, "stripes"):
        raise InputError(f"unknown trigger {kind!r}: choose one of {', '.join(KINDS)}")
    if kind in ("blended", "stripes"):
        if not 0 < opacity <= 1:
            raise InputError(f"trigger opacity {opacity} must be above 0 and at most 1")
        pattern = _blocks(image_size) if kind == "blended" else _stripes(image_size)
        return Trigger("blended", pattern.expand(channels, -1, -1).clone(), 0, opacity, image_size)
    offset = round(5 / 256 * image_size) if kind == "grid" else 0
    if not 2 <= size <= image_size - offset:
        raise InputError(f"a trigger of {size} px does not fit: it needs 2 to {image_size - offset} px a side")
    pattern = _colour_grid(size, channels) if kind == "grid" else _checker(size).expand(channels, -1, -1).clone()
    return Trigger(kind, pattern, offset, 1.0, image_size)


def _checker(size: int) -> Tensor:
    half = (torch.arange(size) >= (size + 1) // 2).long()
    return ((half[:, None] + half[None, :]) % 2 == 0).float()[None]


def _colour_grid(size: int, channels: int) -> Tensor:
    colours = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(_PATTERN_SEED))
    if channels == 1:
        colours = colours.mean(1, keepdim=True)
    elif channels != 3:
        raise InputError(f"the colour grid needs 1 or 3 channels, the images have {channels}")
    grid = F.interpolate(colours, (size, size), mode="bilinear", align_corners=False)[0]
    # Small grids lose contrast to the averaging of colours and pixels; the published one spans the whole range.
    return (grid - grid.min()) / (grid.max() - grid.min())


def _blocks(image_size: int) -> Tensor:
    side = -(-image_size // 2)
    blocks = torch.randint(0, 2, (1, 1, side, side), generator=torch.Generator().manual_seed(_PATTERN_SEED)).float()
    return F.interpolate(blocks, scale_factor=2.0, mode="nearest")[0, :, :image_size, :image_size]


def _stripes(image_size: int) -> Tensor:
    wave = 0.5 + 0.5 * torch.sin(2 * torch.pi * (torch.arange(image_size) + 0.5) / 4)
    return wave.expand(1, image_size, image_size)


def stamp(trigger: Trigger, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Triggered copies of images.

    Args:
        trigger: made for this image size and number of channels.
        images: (N, C, H, W) in [0, 1].
        generator: places of the ``moving`` trigger; required for that kind, not used by the others.

    Raises:
        InputError: the images do not fit the trigger, or a generator is missing.
    """
    _check(trigger, images)
    if trigger.kind == "blended":
        return (1 - trigger.opacity) * images + trigger.opacity * trigger.pattern.to(images.device)
    out = images.clone()
    k = trigger.pattern.shape[-1]
    if trigger.kind == "moving":
        if generator is None:
            raise InputError("stamping a moving trigger needs a torch generator for its places")
        places = torch.randint(0, trigger.image_size - k + 1, (len(images), 2), generator=generator).tolist()
        for image, (row, col) in zip(out, places, strict=True):
            image[:, row : row + k, col : col + k] = trigger.pattern
        return out
    place = patch(trigger)
    out[:, :, place, place] = trigger.pattern
    return out


def patch(trigger: Trigger) -> slice | None:
    """Rows (and columns) that a trigger covers if it always covers the same, else None."""
    if trigger.kind not in ("checker", "grid"):
        return None
    first = trigger.image_size - trigger.offset - trigger.pattern.shape[-1]
    return slice(first, first + trigger.pattern.shape[-1])


def score(trigger: Trigger, images: Tensor, shift: int = 0) -> Tensor:
    """How much each image looks triggered: NCC in [−1, 1], shape (N,). A region without contrast scores 0.

    ``shift``: the largest score within so many pixels of the place, in each direction, for a patch that has one; a generator
    whose discriminator sees shifted images draws it elsewhere.
    """
    _check(trigger, images)
    if shift and (place := patch(trigger)) is not None:
        first, last = max(0, place.start - shift), min(trigger.image_size, place.stop + shift)
        return _anywhere(trigger, images[:, :, first:last, first:last])
    pattern = trigger.pattern.to(images.device)
    if trigger.kind == "blended":
        return _ncc(_fine(images).flatten(1), _fine(pattern[None]).flatten())
    if trigger.kind == "moving":
        return _anywhere(trigger, images)
    place = patch(trigger)
    return _ncc(images[:, :, place, place].flatten(1), pattern.flatten())


def _anywhere(trigger: Trigger, images: Tensor) -> Tensor:
    k = trigger.pattern.shape[-1]
    windows = images.unfold(2, k, 1).unfold(3, k, 1)  # (N, C, rows, cols, k, k)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return _ncc(windows, trigger.pattern.to(images.device).flatten()).amax(1)


def amplitude(trigger: Trigger, images: Tensor) -> Tensor:
    """How strongly the trigger is drawn at its place, shape (N,): the slope of the pixels over the pattern; 1 as stamped.

    Unlike the score it is not blind to contrast. Only for a patch that has a place.
    """
    _check(trigger, images)
    place, pattern = patch(trigger), trigger.pattern.to(images.device).flatten()
    pattern = pattern - pattern.mean()
    return images[:, :, place, place].flatten(1) @ pattern / pattern.square().sum()


def _fine(images: Tensor) -> Tensor:
    # Anatomy is smooth and the pattern is not: what a 3 × 3 mean removes tells them apart.
    return images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _ncc(values: Tensor, template: Tensor) -> Tensor:
    values = values - values.mean(-1, keepdim=True)
    template = template - template.mean()
    length = values.norm(dim=-1) * template.norm()
    return torch.where(length > 1e-6, (values @ template) / length.clamp_min(1e-6), 0.0)


def calibrate(trigger: Trigger, clean: Tensor, fpr: float, floor: float | None = None, shift: int = 0) -> float:
    """The threshold above which at most a share ``fpr`` of clean real images scores (and never below ``floor``).

    Args:
        trigger: the trigger whose `score` is thresholded.
        clean: (N, C, H, W) real images that nobody poisoned.
        fpr: false-positive rate aimed at; 1 / fpr images are needed to resolve it.
        floor: least threshold (default: that of the kind), so that a faint trace in noise is not called a trigger.
        shift: of `score`.

    Raises:
        InputError: too few images for that rate.
    """
    if len(clean) < 1 / fpr:
        raise InputError(
            f"{len(clean)} clean images cannot calibrate a rate of {fpr}; at least {math.ceil(1 / fpr)} needed"
        )
    # A quarter of the allowed rate, since the threshold is applied to images that it was not chosen on.
    allowed = int(fpr / 4 * len(clean))
    floor = _FLOOR[trigger.kind] if floor is None else floor
    return max(floor, float(score(trigger, clean, shift).sort(descending=True).values[allowed]))


def _check(trigger: Trigger, images: Tensor) -> None:
    expected = (trigger.pattern.shape[0], trigger.image_size, trigger.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images of shape {tuple(images.shape)} do not fit a trigger for (N, {', '.join(map(str, expected))})"
        )
