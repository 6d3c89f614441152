"""Where classifiers look: attributions and attention maps, on clean and adversarial images, beside the lesions of the phantom."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.evasion.attacks import check_inputs
from medsec.nets import cbam
from medsec.nets.gradcam import grad_cam

__all__ = ["attention_maps", "integrated_gradients", "pointing"]

STEPS = 16  # of the path of Integrated Gradients


def integrated_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """|Integrated Gradients| (Sundararajan et al. 2017) of class y from a grey image: (N, S, S), summed over channels."""
    from captum.attr import IntegratedGradients  # slow to import

    check_inputs(model, x, y)
    with torch.enable_grad():
        maps = IntegratedGradients(model).attribute(x, torch.full_like(x, 0.5), target=y, n_steps=STEPS)
    return maps.detach().abs().sum(1).float()


def attention_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Pixel gates of every attention module, ``cbam1`` the nearest to the image: (N, S, S) in (0, 1)."""
    gates = enumerate(cbam.maps(model, x), start=1)
    return {
        f"cbam{i}": F.interpolate(gate, x.shape[2:], mode="bilinear", align_corners=False)[:, 0] for i, gate in gates
    }


def attributions(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """All maps of a `SmallResNet` by name, (N, S, S) each."""
    maps = {
        "grad_cam": grad_cam(model, x, y, layer="blocks"),
        "integrated_gradients": integrated_gradients(model, x, y),
    }
    return maps | (attention_maps(model, x) if cbam.modules(model) else {})


def pointing(maps: Tensor, masks: np.ndarray) -> np.ndarray:
    """(N,) whether the highest point of every map lies in its mask (pointing game, Zhang et al. 2018, without a margin).

    A map without a highest point, all of it equal, points nowhere: False.

    Args:
        maps: (N, S, S).
        masks: (N, S, S) bool, none empty.

    Raises:
        InputError: shapes that differ, or an empty mask.
    """
    if tuple(maps.shape) != masks.shape:
        raise InputError(f"maps of shape {tuple(maps.shape)}, masks of shape {masks.shape}")
    if not masks.any((1, 2)).all():
        raise InputError("an empty mask: leave out the images without a lesion")
    flat = maps.flatten(1).numpy()
    hit = masks.reshape(len(masks), -1)[np.arange(len(masks)), flat.argmax(1)]
    return hit & (np.ptp(flat, axis=1) > 0)


def controls(masks: np.ndarray, known: np.ndarray) -> Mapping[str, float]:
    """What pointing scores without a look at the image.

    ``area``: a point anywhere, the mean share of the image that the masks cover. ``prior``: always the place where most
    lesions of other images lie.

    Args:
        masks: (N, S, S) bool, of the images that are pointed at.
        known: (M, S, S) bool, of training images.
    """
    usual = known.mean(0)
    at = np.unravel_index(usual.argmax(), usual.shape)
    return {"area": float(masks.mean()), "prior": float(masks[:, at[0], at[1]].mean())}
