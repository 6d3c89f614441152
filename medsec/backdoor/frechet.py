"""The Fréchet distance of two sets of features."""

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
