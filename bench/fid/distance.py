"""The Frechet distance between Gaussians, its influence function, and files of statistics.

FD((m, S), (mu, C)) = |m - mu|^2 + tr S + tr C - 2 tr (C^1/2 S C^1/2)^1/2, in float64 from the covariance on.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature rows, float64; `extractor` made the rows, where known."""

    mean: np.ndarray
    cov: np.ndarray
    count: int
    extractor: str = ""

    @cached_property
    def root(self) -> np.ndarray:
        """Return the symmetric square root of the covariance (D, D)."""
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


@dataclass(frozen=True)
class Transport:
    """The distance of a sample's Gaussian from the reference's, and T = half half' that carries one to the other.

    T = C^1/2 (C^1/2 S C^1/2)^(-1/2) C^1/2, pseudo-inverse on the span of S; half (D, rank).
    """

    sample: Moments
    reference: Moments
    distance: float
    half: np.ndarray
    overlap: float

    def influence(self, features: np.ndarray) -> np.ndarray:
        """Return each row's first-order influence on the distance, had the row been part of the sample.

        phi(x) = 2 (m - mu).(x - m) + (x - m)' (I - T) (x - m), less its mean over the sample.
        Args: features (n, D), the sample's own rows or others.
        Returns: (n,) float64; over the sample's own N rows sd(phi) / sqrt(N) estimates the distance's standard error.
        """
        centred = features - self.sample.mean
        quadratic = (centred**2).sum(1) - ((centred @ self.half) ** 2).sum(1)
        own = (1 - 1 / self.sample.count) * (np.trace(self.sample.cov) - self.overlap)
        return 2 * centred @ (self.sample.mean - self.reference.mean) + quadratic - own


def moments(features: np.ndarray, extractor: str = "") -> Moments:
    """Estimate the mean and the unbiased covariance of feature rows.

    Args: features (N, D), any real dtype, N >= 2; extractor: recorded with the moments.
    Returns: Moments in float64.
    Raises: ValueError naming `features` when the shape is wrong, N < 2 or a value is not finite.
    Cost: 2 N D^2 FLOPs.
    """
    x = as_rows(features)
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1), len(x), extractor)


def frechet_distance(sample: Moments, reference: Moments) -> float:
    """Return the Frechet distance between two Gaussians given by their moments.

    tr (C^1/2 S C^1/2)^1/2 is the sum of the square roots of a symmetric matrix's eigenvalues: no `sqrtm`, no
    complex parts, right for singular covariances too.
    Cost: two symmetric eigendecompositions of D x D, one of them once per reference.
    """
    values = np.linalg.eigvalsh(reference.root @ sample.cov @ reference.root)
    return _distance(sample, reference, np.sqrt(np.clip(values, 0, None)).sum())


def transport(sample: Moments, reference: Moments) -> Transport:
    """Return the distance together with the map that its influence function needs.

    Cost: as `frechet_distance`, with eigenvectors.
    """
    values, vectors = np.linalg.eigh(reference.root @ sample.cov @ reference.root)
    kept = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    half = reference.root @ vectors[:, kept] * values[kept] ** -0.25
    overlap = float(np.sqrt(values[kept]).sum())
    return Transport(sample, reference, _distance(sample, reference, overlap), half, overlap)


def save_moments(path: Path, value: Moments) -> None:
    """Write an npz with the keys mu and sigma, which pytorch-fid, clean-fid and the ADM evaluator read."""
    with open(path, "wb") as file:
        np.savez(file, mu=value.mean, sigma=value.cov, count=value.count, extractor=value.extractor)


def load_moments(path: Path) -> Moments:
    """Read an npz with the keys mu and sigma, whoever wrote it; count and extractor are read where they are.

    Raises: ValueError naming the file and the key: unreadable, missing, misshapen, not finite, not symmetric.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"mu", "sigma"} - set(file.files)
            if missing:
                raise ValueError(f"expected the keys mu and sigma, {sorted(missing)} missing, got {sorted(file.files)}")
            mean, cov = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file.files else 0
            extractor = str(file["extractor"]) if "extractor" in file.files else ""
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{path}: expected mu (D,) and sigma (D, D), got {mean.shape} and {cov.shape}")
    for key, value in (("mu", mean), ("sigma", cov)):
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {key}: expected finite values, got {np.sum(~np.isfinite(value))} that are not")
    if np.abs(cov - cov.T).max() > 1e-6 * np.abs(cov).max():
        raise ValueError(f"{path}: sigma: expected a symmetric matrix, got one off by {np.abs(cov - cov.T).max():.3g}")
    return Moments(mean, (cov + cov.T) / 2, count, extractor)


def as_rows(features: np.ndarray) -> np.ndarray:
    """Check and convert feature rows: (N, D), N >= 2, finite, float64."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features: expected (N, D) with N >= 2, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"features: expected finite values, got {np.sum(~np.isfinite(x))} that are not")
    return x


def _distance(sample: Moments, reference: Moments, overlap: float) -> float:
    shift = sample.mean - reference.mean
    return float(shift @ shift + np.trace(sample.cov) + np.trace(reference.cov) - 2 * overlap)
