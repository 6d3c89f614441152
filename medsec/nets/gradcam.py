"""Which places of an image speak for a class: Grad-CAM and Grad-CAM++."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError

__all__ = ["grad_cam"]


def grad_cam(model: nn.Module, x: Tensor, y: Tensor, *, layer: str, plus: bool = False) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) or Grad-CAM++ (Chattopadhyay et al. 2018, section 3).

    With activations A of the layer and the gradient g of the logit of class y, the map is relu(Σₖ wₖ Aₖ), interpolated
    bilinearly. Grad-CAM weighs feature map k by the mean of g. Grad-CAM++ weighs it by Σ α relu(g), where
    α = g² / (2 g² + Σ A g³), summed over the places of the map; α = 0 where g = 0. The paper's factor exp(logit) is left
    out: it scales a whole map. Activations below 0 count as 0: the papers' networks end in ReLU, and of GELU's a whole map
    may be slightly negative.

    Args:
        model: used in evaluation mode, whatever mode it is in; (B, C, S, S) -> logits (B, K).
        x: (B, C, S, S).
        y: (B,) int64.
        layer: name of a submodule that gives maps, such as "blocks".
        plus: Grad-CAM++.

    Returns:
        (B, S, S), at least 0, in no unit; all 0 where nothing speaks for the class.

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
    return F.interpolate(cam, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
