"""How much of an image a reconstruction gives away: per image, after pairing a batch with its originals."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medsec.core.errors import InputError

__all__ = ["match", "psnr", "retrieval", "ssim", "st_lpips"]

PERCEPTUAL_SIZE = 64  # pixels a side; AlexNet leaves little of smaller images
LARGEST_PSNR = 100.0  # dB; an exact copy has an infinite one, which no mean survives


def psnr(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB for images in [0, 1], at most `LARGEST_PSNR`.

    Args:
        found, truth: (N, C, S, S). Neither is stretched: brightness and contrast that are wrong count as wrong.

    Returns:
        (N,) float64.

    >>> truth = np.zeros((1, 1, 8, 8))
    >>> psnr(truth + 0.1, truth).round(6)
    array([20.])
    """
    return _decibel(_squares(found, truth).mean((1, 2, 3)))


def region_psnr(found: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """PSNR over the pixels of a mask only: normalised by its area, so that small and large regions compare.

    Args:
        found, truth: (N, C, S, S).
        mask: (N, S, S) bool.

    Returns:
        (N,) float64; NaN where the mask is empty.
    """
    error, area = _squares(found, truth).mean(1), mask.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return _decibel((error * mask).sum((1, 2)) / area)


def ssim(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004), Gaussian window of standard deviation 1.5, mean over channels; (N,)."""
    from skimage.metrics import structural_similarity  # slow to import

    _squares(found, truth)
    return np.array(
        [
            structural_similarity(
                f, t, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            for f, t in zip(found.astype(np.float64), truth.astype(np.float64), strict=True)
        ]
    )


def st_lpips(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Shift-tolerant LPIPS, a learned perceptual distance (Ghildyal & Liu 2022), AlexNet, with the authors' weights.

    It was learned on photographs: of radiographs it says what they look like to a lay eye. Images of less than
    `PERCEPTUAL_SIZE` pixels a side are enlarged to that (bilinear); grey ones are three equal channels.

    Args:
        found, truth: (N, C, S, S), C = 1 or 3.

    Returns:
        (N,) float64, 0 for equal images.

    Raises:
        InputError: other channels, or the package is not installed.
    """
    _squares(found, truth)
    if found.shape[1] not in (1, 3):
        raise InputError(f"st_lpips: images of {found.shape[1]} channels; it knows 1 (grey) and 3 (colour)")
    size = max(PERCEPTUAL_SIZE, found.shape[-1])
    pair = [
        F.interpolate(torch.from_numpy(images).float(), (size, size), mode="bilinear", align_corners=False)
        for images in (found, truth)
    ]
    with torch.no_grad():
        distance = _st_lpips()(*[images.expand(-1, 3, -1, -1) for images in pair], normalize=True)
    return distance.flatten().double().numpy()


@functools.cache
def _st_lpips() -> nn.Module:
    try:
        from stlpips_pytorch import stlpips
    except ImportError as error:
        raise InputError(
            "st_lpips needs ShiftTolerant-LPIPS, which is not installed: pip install -e '.[privacy]'"
        ) from error
    return stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False).requires_grad_(False)


def match(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Reconstructions of one batch in the order of the originals that they fit best.

    A gradient does not tell the order of a batch. One assignment, by total squared error (the Hungarian method), for all
    metrics: each metric with a best match of its own would flatter the attacker.

    Args:
        found, truth: (B, C, S, S).

    Returns:
        ``found`` reordered.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import
    from scipy.spatial.distance import cdist

    _squares(found, truth)
    flat = [images.reshape(len(images), -1).astype(np.float64) for images in (truth, found)]
    return found[linear_sum_assignment(cdist(*flat, "sqeuclidean"))[1]]


def retrieval(found: np.ndarray, gallery: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Whether the nearest image of a gallery is the right one: does a reconstruction tell whose image it is?

    Distances are between images of mean 0 and length 1, so that neither brightness nor contrast decides.

    Args:
        found: (N, C, S, S) reconstructions.
        gallery: (M, C, S, S) what the attacker compares with, such as all clients' images, as they are or projected as the
            defence does.
        index: (N,) which image of the gallery each one is of.

    Returns:
        (N,) bool. A reconstruction without contrast matches nothing.

    >>> gallery = np.eye(4).reshape(4, 1, 2, 2)
    >>> retrieval(0.5 * gallery[:2] + 0.2, gallery, np.array([0, 3]))
    array([ True, False])
    """
    first, second = _standard(found), _standard(gallery)
    nearest = (first @ second.T).argmax(1)
    return (nearest == index) & (np.abs(first).sum(1) > 0)


def _standard(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > 1e-6, flat / np.maximum(length, 1e-6), 0.0)


def _squares(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    if found.shape != truth.shape or found.ndim != 4:
        raise InputError(f"images of shapes {found.shape} and {truth.shape}: need the same (N, C, S, S)")
    return (found.astype(np.float64) - truth.astype(np.float64)) ** 2


def _decibel(error: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(error), LARGEST_PSNR)
