"""Frechet distance between feature sets, and a paired test of whether two samplers are at parity.

FD((m, S), (mu, C)) = |m - mu|^2 + tr S + tr C - 2 tr (C^1/2 S C^1/2)^1/2, in float64 from the covariance on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

PARITY, DIFFERENT, UNSURE = "PARITY", "DIFFERENT", "UNSURE"


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature rows, float64."""

    mean: np.ndarray
    cov: np.ndarray
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """FD(B, reference) - FD(A, reference) on paired samples, with its interval and verdict."""

    fd_a: float
    fd_b: float
    difference: float
    standard_error: float
    degrees: float
    low: float
    high: float
    level: float
    margin: float
    count: int
    verdict: str


def moments(features: np.ndarray) -> Moments:
    """Estimate the mean and the unbiased covariance of feature rows.

    Args: features (N, D), any real dtype, N >= 2.
    Returns: Moments in float64.
    Raises: ValueError naming `features` when the shape is wrong, N < 2 or a value is not finite.
    Cost: 2 N D^2 FLOPs.
    """
    x = _rows(features)
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(sample: Moments, reference: Moments) -> float:
    """Return the Frechet distance between two Gaussians given by their moments.

    tr (C^1/2 S C^1/2)^1/2 is the sum of the square roots of a symmetric matrix's eigenvalues: no `sqrtm`, no
    complex parts, right for singular covariances too.
    Cost: two symmetric eigendecompositions of D x D.
    """
    root = _sqrt(reference.cov)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ sample.cov @ root), 0, None)).sum()
    shift = sample.mean - reference.mean
    return float(shift @ shift + np.trace(sample.cov) + np.trace(reference.cov) - 2 * overlap)


def influence(features: np.ndarray, sample: Moments, reference: Moments) -> np.ndarray:
    """Return each feature row's first-order influence on FD(sample, reference).

    phi(x) = 2 (m - mu).(x - m) + (x - m)' (I - T) (x - m) - its mean, where
    T = C^1/2 (C^1/2 S C^1/2)^(-1/2) C^1/2 transports the sample's Gaussian to the reference's (pseudo-inverse on the
    span of S).
    Args: features (N, D); sample: moments of those rows; reference: the data's moments.
    Returns: (N,) float64 with mean zero; sd(phi) / sqrt(N) estimates the standard error of the distance.
    """
    root = _sqrt(reference.cov)
    values, vectors = np.linalg.eigh(root @ sample.cov @ root)
    kept = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    half = root @ vectors[:, kept] * values[kept] ** -0.25
    centred = _rows(features) - sample.mean
    quadratic = (centred**2).sum(1) - ((centred @ half) ** 2).sum(1)
    phi = 2 * centred @ (sample.mean - reference.mean) + quadratic
    return phi - phi.mean()


def tost(low: float, high: float, margin: float) -> str:
    """Decide by two one-sided tests: the interval inside +-margin, outside it, or across its edge."""
    if not margin > 0:
        raise ValueError(f"margin: expected a positive number, got {margin}")
    if -margin < low and high < margin:
        return PARITY
    return DIFFERENT if low > margin or high < -margin else UNSURE


def paired_difference(
    features_a: np.ndarray, features_b: np.ndarray, reference: Moments, margin: float, level: float = 0.90
) -> PairedDifference:
    """Compare two samplers that drew from the same noise, labels and weights.

    dFD = FD(B) - FD(A); pairing cancels the 1/N bias; SE = sd(delta) / sqrt(N), delta_i = phi_B(x_i^B) - phi_A(x_i^A).
    The interval uses Student's t with 2 N / (kurtosis(delta) - 1) degrees of freedom: when only a few samples carry
    the difference (flipped routings), their sd is itself uncertain, and a normal interval covers 90 instead of 95 %.
    Args: features_a, features_b (N, D): row i of both comes from the same noise and label; reference: the data's
        moments; margin: absolute equivalence margin, fixed before the samples are seen; level: of the interval
        (0.90 makes two one-sided 5 % tests).
    Returns: PairedDifference. Raises: ValueError naming the argument whose shape or value is wrong.
    """
    a, b = _rows(features_a), _rows(features_b)
    if a.shape != b.shape:
        raise ValueError(f"features_b: expected the shape of features_a {a.shape}, got {b.shape}")
    if a.shape[1] != len(reference.mean):
        raise ValueError(f"features_a: expected {len(reference.mean)} columns as in the reference, got {a.shape[1]}")
    moments_a, moments_b = moments(a), moments(b)
    fd_a, fd_b = frechet_distance(moments_a, reference), frechet_distance(moments_b, reference)
    phi = influence(b, moments_b, reference) - influence(a, moments_a, reference)
    error = float(phi.std(ddof=1) / np.sqrt(len(a)))
    degrees = _degrees_of_freedom(phi)
    reach = float(stdtrit(degrees, (1 + level) / 2)) * error
    low, high = fd_b - fd_a - reach, fd_b - fd_a + reach
    verdict = tost(low, high, margin)
    return PairedDifference(fd_a, fd_b, fd_b - fd_a, error, degrees, low, high, level, margin, len(a), verdict)


def save_moments(path: Path, value: Moments) -> None:
    """Write an npz with the keys mu and sigma, which pytorch-fid, clean-fid and the ADM evaluator read."""
    np.savez(path, mu=value.mean, sigma=value.cov, count=value.count)


def load_moments(path: Path) -> Moments:
    """Read an npz with the keys mu and sigma (count is optional); ValueError names the file and what is missing."""
    with np.load(path) as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise ValueError(f"{path}: expected the keys mu and sigma, {sorted(missing)} missing")
        mean, cov = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        count = int(file["count"]) if "count" in file.files else 0
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{path}: expected mu (D,) and sigma (D, D), got {mean.shape} and {cov.shape}")
    return Moments(mean, cov, count)


def _degrees_of_freedom(values: np.ndarray) -> float:
    square = values**2
    spread = square.mean()
    if spread == 0:
        return float(len(values) - 1)
    return float(np.clip(2 * len(values) / ((square**2).mean() / spread**2 - 1 + 1e-9), 1, len(values) - 1))


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _rows(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features: expected (N, D) with N >= 2, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"features: expected finite values, got {np.sum(~np.isfinite(x))} that are not")
    return x
