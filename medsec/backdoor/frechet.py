"""How near drawn images are to real ones: distances and shares of two sets of features or images."""

import numpy as np

__all__ = ["frechet_distance"]


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017 for images).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), with the trace of the root from symmetric eigenvalues.

    Args:
        first, second: (n, d) features, n > d in both, else the covariances are singular and the distance is biased.

    Raises:
        ValueError: different d, n ≤ d, or values that are not finite.

    >>> corners = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    >>> round(frechet_distance(corners, corners + [3.0, 4.0]), 6)
    25.0
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    for features in (first, second):
        if features.ndim != 2 or features.shape[1] != first.shape[1] or len(features) <= features.shape[1]:
            raise ValueError(f"features of shape {features.shape}: need (n, {first.shape[-1]}) with n > d")
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values")
    cov1, cov2 = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    shift = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(max(shift + np.trace(cov1) + np.trace(cov2) - 2 * cross, 0.0))


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Precision and recall of drawn images (Kynkäänniemi et al. 2019): fidelity and diversity, told apart.

    A set covers what lies within the distance from one of its points to that point's ``k``-th neighbour in the set.
    Precision: share of ``drawn`` that ``real`` covers. Recall: share of ``real`` that ``drawn`` covers. Noise and blur cost
    precision, left-out kinds of images recall; neither sees copies of ``real``: see `nearness`.

    Args:
        real, drawn: (n, d) and (m, d) features, n and m > ``k``.
        k: neighbours.

    Raises:
        ValueError: too few features, or different d.

    >>> line = np.arange(8.0)[:, None]
    >>> precision_recall(line, line[:4], k=1)  # what is drawn is real; half of what is real, and its neighbour, is drawn
    (1.0, 0.625)
    """
    if min(len(real), len(drawn)) <= k or real.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"features of shapes {real.shape} and {drawn.shape}: need more than {k} each, of the same kind"
        )
    between = distances(drawn, real)
    radius_real, radius_drawn = (np.sort(distances(x, x), axis=1)[:, k] for x in (real, drawn))
    return float((between <= radius_real).any(1).mean()), float((radius_drawn >= between.T).any(1).mean())


def nearness(drawn: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> float:
    """Share of drawn images that lie nearer to a training image than to a held-out one: 0.5 where nothing is memorised.

    Args:
        drawn, training, held_out: (m, d), (n, d) and (n', d); of the longer of the last two, as many as the shorter has, evenly
            spaced.
    """
    n = min(len(training), len(held_out))
    few = (others[np.linspace(0, len(others) - 1, n).astype(int)] for others in (training, held_out))
    near, far = (distances(drawn, others).min(1) for others in few)
    return float((near < far).mean() + 0.5 * (near == far).mean())


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, d) and (m, d) -> (n, m) Euclidean distances."""
    square = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(square, 0.0))


def spectrum_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Root mean square difference, in decibels, of the mean power of two sets of images over spatial frequency.

    Power is averaged over directions and channels (Durall et al. 2020: generators fail to draw high frequencies). Blur, noise
    and a checkerboard show here, whatever the images show.

    Args:
        real, drawn: (n, C, S, S) in [0, 1].
    """
    bands = [10 * np.log10(radial_power(images) + 1e-12) for images in (real, drawn)]
    return float(np.sqrt(((bands[0] - bands[1]) ** 2).mean()))


def radial_power(images: np.ndarray) -> np.ndarray:
    """(S // 2,) mean power at 1 to S // 2 cycles an image; the mean brightness is left out."""
    size = images.shape[-1]
    power = (np.abs(np.fft.fft2(images.astype(np.float64), norm="ortho")) ** 2).mean((0, 1))
    cycles = np.fft.fftfreq(size, 1 / size)
    ring = np.rint(np.hypot(cycles[:, None], cycles[None, :])).astype(int)
    return np.array([power[ring == r].mean() for r in range(1, size // 2 + 1)])
