"""The Frechet distance between Gaussians, its influence function, and files of statistics.

FD((m, S), (mu, C)) = |m - mu|^2 + tr S + tr C - 2 tr (C^1/2 S C^1/2)^1/2, in float64 from the covariance on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.instrument.readers import Npz

ROUNDING = 1e-5  # of the largest eigenvalue: how far below zero the least of a covariance kept in float32 may come


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature rows, float64; `extractor` made the rows, where known."""

    mean: np.ndarray
    cov: np.ndarray
    count: int
    extractor: str = ""

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the covariance's eigenvalues (D,), rising, and eigenvectors (D, D)."""
        return np.linalg.eigh(self.cov)

    @cached_property
    def root(self) -> np.ndarray:
        """Return the symmetric square root of the covariance (D, D)."""
        values, vectors = self.spectrum
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


def load_moments(path: Path, argument: str = "") -> Moments:
    """Read an npz with the keys mu and sigma, whoever wrote it; count and extractor are read where they are.

    Args: argument: named in errors, as the user knows the file.
    Raises: ValueError naming the file and the key: unreadable, missing, misshapen, not real, not finite, or no
        covariance (symmetric, positive semi-definite).
    """
    file = Npz(path, argument, "an npz with mu and sigma")
    if missing := {"mu", "sigma"} - file.keys:
        raise ValueError(
            f"{file.where}: expected the keys mu and sigma, {sorted(missing)} missing, got {sorted(file.keys)}"
        )
    mean, cov = (_real(file, key) for key in ("mu", "sigma"))
    if mean.ndim != 1 or not mean.size or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{file.where}: expected mu (D,) and sigma (D, D), got {mean.shape} and {cov.shape}")
    if (off := np.abs(cov - cov.T).max()) > 1e-6 * np.abs(cov).max():
        raise ValueError(f"{file.where}: sigma: expected a symmetric matrix, got one off by {off:.3g}")
    value = Moments(mean, (cov + cov.T) / 2, _count(file), _extractor(file))
    least, largest = value.spectrum[0][[0, -1]]
    if least < -ROUNDING * abs(largest):
        raise ValueError(
            f"{file.where}: sigma: expected a covariance, which is positive semi-definite, got the eigenvalue "
            f"{least:.3g} beside {largest:.3g}"
        )
    return value


def _real(file: Npz, key: str) -> np.ndarray:
    header = file.header(key)
    if header.dtype.kind not in "iuf":
        raise ValueError(f"{file.where}: {key}: expected real numbers, got {header}")
    value = file.read(key).astype(np.float64)
    if wrong := np.sum(~np.isfinite(value)):
        raise ValueError(f"{file.where}: {key}: expected finite values, got {wrong} that are not")
    return value


def _count(file: Npz) -> int:
    value = file.read("count") if "count" in file.keys else np.zeros((), np.int64)
    if value.shape or value.dtype.kind not in "iu" or value < 0:
        raise ValueError(f"{file.where}: count: expected an integer >= 0, got {file.header('count')}")
    return int(value)


def _extractor(file: Npz) -> str:
    value = file.read("extractor") if "extractor" in file.keys else np.array("")
    if value.shape or value.dtype.kind != "U":
        raise ValueError(f"{file.where}: extractor: expected a string, got {file.header('extractor')}")
    return str(value)


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
