"""A dishonest server: a network that copies images into its gradient, and how a client notices.

The server sends the agreed network with one fully connected layer in front, over the whole image (Fowl et al. 2022, "Robbing the
Fed"). All its K rows measure the brightness h·x, each with another threshold: row k is active where an image is brighter than the
k-th of K levels, quantiles of public images. Every active row gets the same gradient δ x from an image x, its bias δ. So the
difference of two neighbouring rows is Σ δ x over the images between two levels. Of one image alone in its bin the quotient

    (W_k - W_{k+1}) / (b_k - b_{k+1}) = x

is exact, whatever the batch. Bins part images, not clients: the sum of several clients' gradients gives as much away as one of
them, so secure aggregation alone does not help (Zhao et al. 2024, "LOKI"; Pasquini et al. 2022). *Trap weights* (Boenisch et al.
2023, "When the Curious Abandon Honesty") are rows of random numbers, each active for few images: not parallel, harder to notice.

Gradients of the layer: weight (K, D) and bias (K,), D = C·S·S. Images (B, C, S, S) in [0, 1].
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.guards import check_gradient, check_images
from medsec.nets.convnet import ConvNet

__all__: list[str] = []  # for notebook 03

FLOOR = 1e-12  # variance below which a row is constant
LEAST_ROWS = 3  # two rows of a head with two classes are trained to be opposite


class Imprint(nn.Module):
    """x -> x + ``gain`` Σ ReLU(W x + b), brightness to all pixels: the agreed network goes on with an image.

    It stands in the body of a `ConvNet`, which sees 4 x − 2 (`medsec.nets.convnet.standardise`); W and b are those of x.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gain: float):
        super().__init__()
        self.weight, self.bias, self.gain = nn.Parameter(weight), nn.Parameter(bias), gain

    def forward(self, standardised: Tensor) -> Tensor:
        active = F.relu(F.linear((standardised / 4 + 0.5).flatten(1), self.weight, self.bias))
        return standardised + self.gain * active.sum(1)[:, None, None, None]


def in_front(agreed: ConvNet, weight: Tensor, bias: Tensor, gain: float) -> ConvNet:
    """The agreed network with an `Imprint` in front; every defence takes it for a `ConvNet`. ``agreed`` is not changed."""
    if not isinstance(agreed, ConvNet):
        raise InputError(f"the layer is put before a convnet.ConvNet, not before {type(agreed).__name__}")
    sent = copy.deepcopy(agreed)
    sent.body = nn.Sequential(Imprint(weight.clone(), bias.clone(), gain), *sent.body)
    return sent


def brightness(public: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of rows that all measure the mean of an image, their levels quantiles of public images.

    Raises:
        InputError: no public images, values outside [0, 1], or fewer than two bins.
    """
    _check(public, bins)
    levels = public.flatten(1).mean(1).quantile(torch.linspace(0, 1, bins + 1)[:-1])
    levels[0] = 0.0  # whoever is darker than all public images is in the first bin
    d = public[0].numel()
    return torch.full((bins, d), 1 / d), -levels


def traps(public: Tensor, rows: int, active: float, seed: int) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of random rows, each above its threshold for a share ``active`` of the public images.

    After Boenisch et al.; what makes a row rarely active is its threshold, not (as there) that negative weights are longer.

    Raises:
        InputError: as `brightness`.
    """
    _check(public, rows)
    x = public.flatten(1)
    weight = torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(seed)) / x.shape[1] ** 0.5
    return weight, -(x @ weight.T).quantile(1 - active, 0)


def _check(public: Tensor, rows: int) -> None:
    if not len(public):
        raise InputError("no public images to set the levels by; give at least one")
    check_images(public)
    if rows < 2:
        raise InputError(f"imprint layer of {rows} rows: need at least 2 bins")


# What the server reads ------------------------------------------------------------------------------------------------


def bins(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(K, D) and (K,): the gradients of neighbouring rows subtracted, Σ δ x and Σ δ of every bin; the last is a row itself.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.
    """
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not len(bias):
        raise InputError(
            f"gradients of shapes {tuple(weight.shape)} and {tuple(bias.shape)}: need (K, D) and (K,), those of the layer"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise InputError("the layer's gradient holds NaN or infinite values: leave that message out")
    weight, bias = weight.double(), bias.double()
    return torch.cat([weight[:-1] - weight[1:], weight[-1:]]), torch.cat([bias[:-1] - bias[1:], bias[-1:]])


def strongest(parts: Tensor, n: int) -> Tensor:
    """The n bins in which most was received, as many as images were sent; by the sum of a bin: noise is small in a sum.

    Raises:
        InputError: a batch of no image, or of more images than there are bins.
    """
    if not 1 <= n <= len(parts):
        raise InputError(f"a batch of {n} images and {len(parts)} bins: need 1 <= images <= bins")
    return parts.sum(1).abs().topk(n).indices


def images(parts: Tensor, shares: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, C, S, S) in [0, 1]: every row of ``parts`` (N, D) over its ``shares`` (N,), grey where nothing was received.

    Raises:
        InputError: rows that do not have the shape's entries.
    """
    if parts.shape[1] != torch.Size(shape).numel():
        raise InputError(
            f"rows of {parts.shape[1]} entries are no images of shape {shape}: it is another model's gradient"
        )
    return (parts / shares[:, None]).nan_to_num(0.5, 1.0, 0.0).clamp(0, 1).float().view(-1, *shape)


def named(parts: Tensor, gallery: Tensor) -> Tensor:
    """(N,) for rows (N, D) the place of the gallery's image (G, C, S, S) that each is most like, by the cosine."""
    each = F.normalize(gallery.flatten(1).double(), dim=1)
    return (F.normalize(parts, dim=1) @ each.T).abs().argmax(1)


def expected(parts: Tensor, layer: Imprint, gallery: Tensor, n: int) -> Tensor:
    """The places of n images of the gallery of which most is in the bin where each would be: for a gradient under noise.

    A server can compute in which bin a candidate lies; of the noise then counts only that in one direction.
    """
    x = gallery.flatten(1)
    with torch.no_grad():
        own = ((F.linear(x, layer.weight, layer.bias) > 0).sum(1) - 1).clamp_min(0)
    return (parts[own] * F.normalize(x.double(), dim=1)).sum(1).abs().topk(n).indices


# What the client looks at ---------------------------------------------------------------------------------------------


def oddities(model: nn.Module, agreed: nn.Module, bound: float) -> list[str]:
    """Before training: what is odd about a model that came, a line each; none: nothing was found.

    Other parameters than the agreed network's, or a layer whose rows are parallel (`parallel` above ``bound``).
    """
    shapes, expected = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, agreed))
    found = [
        f"{name} has shape {shapes.get(name, 'none')}, agreed was {expected.get(name, 'none')}"
        for name in {**expected, **shapes}
        if shapes.get(name) != expected.get(name)
    ]
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return [*found, "it holds NaN or infinite values"]
    return found + [f"{name}: its rows are parallel" for name, value in parallel(model).items() if value > bound]


def parallel(model: nn.Module) -> dict[str, float]:
    """By a weight's name the share of its rows, all brought to length 1, that lies along one direction: 1 where all are parallel.

    Only weights of at least `LEAST_ROWS` rows.
    """
    found = {}
    for name, p in model.named_parameters():
        if p.ndim >= 2 and len(p) >= LEAST_ROWS:
            rows = F.normalize(p.detach().flatten(1).double(), dim=1)
            small = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
            found[name] = float(torch.linalg.eigvalsh(small)[-1] / rows.square().sum().clamp_min(FLOOR))
    return found


def echoes(model: nn.Module, gradients: list[Tensor], x: Tensor) -> Tensor:
    """Before a gradient leaves: (B,) how much of every image stands in it, the highest |correlation|, 0 to 1.

    Compared are all rows that have as many entries as an image, in the gradient of any layer, and all differences of two of
    them. It sees a copy only: not one behind a layer that changes the image first (a convolution, a permutation of pixels).

    Raises:
        InputError: gradients that are not the model's or not finite, or images outside [0, 1].
    """
    check_images(x)
    own = x.flatten(1).double()
    own = F.normalize(own - own.mean(1, keepdim=True), dim=1)
    highest = torch.zeros(len(x), dtype=torch.float64)
    for g in check_gradient(model, gradients):
        if g.ndim < 2 or g[0].numel() != own.shape[1]:
            continue
        rows = g.flatten(1).double()
        rows = rows - rows.mean(1, keepdim=True)
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])  # a row itself: less nothing
        dots, inner = own @ rows.T, rows @ rows.T
        squares = inner.diagonal()[:, None] + inner.diagonal()[None] - 2 * inner
        floor = 1e-12 * float(inner.diagonal().max()) + 1e-300  # what is left of equal rows is rounding
        lengths = torch.where(squares > floor, squares, torch.inf).sqrt()
        each = [((dot[:, None] - dot[None]).abs() / lengths).max() for dot in dots]
        highest = torch.maximum(highest, torch.stack(each))
    return highest.clamp(max=1).float()
