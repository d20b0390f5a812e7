"""The paired test: the distance's 1/N bias, an interval that few flipped samples do not fool, and the verdict.

Chosen and checked by simulation (`python -m bench fid-coverage`), which also shows what was wrong with less:
- Pairing does not cancel the 1/N bias once the covariances differ: with 500 samples of 128 features and a smooth
  change of 2 % it is three standard errors, and a 95 % interval around the plain difference covers 15 %. The
  jackknife removes it.
- Influences of the rows that the moments came from are too small, those of held-out rows too large; the mean of the
  two is what deleting a row does, to second order.
- A normal interval covers 75 to 92 instead of 95 % when 3 to 5 pairs carry the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv, ndtri, stdtrit

from bench.images.fid.distance import Moments, as_rows, moments, transport

PARITY, DIFFERENT, UNSURE = "PARITY", "DIFFERENT", "UNSURE"
FOLDS = 10
LEAST = 2 * FOLDS  # samples
LINEAR = 1.5  # N / D from which the bias follows 1/N; below, the interval is left conservative


@dataclass(frozen=True)
class Estimate:
    """The distance of N rows from a reference, its 1/N bias and each row's influence (N,)."""

    distance: float
    bias: float
    influence: np.ndarray

    @property
    def standard_error(self) -> float:
        return float(self.influence.std(ddof=1) / np.sqrt(len(self.influence)))


@dataclass(frozen=True)
class PairedDifference:
    """FD(B, reference) - FD(A, reference) on paired samples without 1/N bias, with its interval and verdict.

    fd_a, fd_b: at N samples, bias included, as published figures are. effective: how many pairs carry the variance.
    correlation: what pairing took from the difference's variance. unseen: the difference that three pairs would make
    if they were drawn anew; when no such flip is among N pairs, three of them per N cannot be ruled out at 95 %.
    """

    fd_a: float
    fd_b: float
    bias_a: float
    bias_b: float
    difference: float
    standard_error: float
    effective: float
    low: float
    high: float
    level: float
    margin: float
    count: int
    correlation: float
    unseen: float
    verdict: str


def estimate(features: np.ndarray, reference: Moments) -> Estimate:
    """Estimate the distance, and by a jackknife over ten random tenths its bias and the rows' influences.

    bias = (mean_j FD_(-j) - FD) / (N mean_j 1/n_j - 1), n_j rows without tenth j; FD - bias extrapolates to N = inf.
    The influence of a row is the mean of what it is with and without its tenth in the moments; below 1.5 samples per
    dimension the latter alone, which is too large, where the former would be too small.
    Args: features (N, D), N >= 20; rows are assigned to tenths alike in every call with the same N.
    Returns: Estimate. Cost: 11 symmetric eigendecompositions of D x D and 8 N D^2 FLOPs.
    """
    x = as_rows(features)
    N, D = x.shape
    if N < LEAST:
        raise ValueError(f"features: expected at least {LEAST} samples, got {N}")
    whole = transport(moments(x), reference)
    centred = x - whole.sample.mean
    scatter = centred.T @ centred
    tenth = np.random.default_rng(0).permutation(N) % FOLDS
    distances, inverses, outside = [], [], np.empty(N)
    for j in range(FOLDS):
        left_out = tenth == j
        rest = transport(_without(whole.sample.mean, scatter, centred[left_out], N), reference)
        outside[left_out] = rest.influence(x[left_out])
        distances.append(rest.distance)
        inverses.append(1 / rest.sample.count)
    bias = (np.mean(distances) - whole.distance) / (N * np.mean(inverses) - 1)
    phi = (outside + whole.influence(x)) / 2 if N >= LINEAR * D else outside
    return Estimate(whole.distance, float(bias), phi - phi.mean())


def interval(difference: float, delta: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return low, high and the effective number of pairs for a difference whose pairs contribute delta / N.

    Rare flips are a Poisson sum of unequal jumps. Garwood's exact limits of a count, generalised, are quantiles of
    sum_i delta_i G_i, G_i exponential, with one jump w more on the side of the limit. Here that sum is a gamma
    distribution of its variance V and third moment, moved to mean zero:
        V = sum delta^2 + w^2, skewness 2 (sum delta^3 +- w^3) / V^(3/2), w = (1 + 3/n^2) max |delta|;
    widened by t_n / z, as the jumps' sizes are known from n = N / (kurtosis(delta) - 1) of them only.
    With many small contributions all this is the normal interval.
    Args: delta (N,), mean zero; level in (0, 1). Returns: (low, high, n).
    """
    N = len(delta)
    square = float((delta**2).mean())
    if square == 0:
        return difference, difference, float(N - 1)
    kurtosis = float((delta**4).mean()) / square**2
    effective = float(np.clip(N / max(kurtosis - 1, 1e-9), 1, N - 1))
    jump = (1 + 3 / effective**2) * float(np.abs(delta).max())
    variance = N * square * N / (N - 1) + jump**2
    third = float((delta**3).sum())
    p = (1 + level) / 2
    wide = float(stdtrit(effective, p) / ndtri(p)) * np.sqrt(variance) / N
    low, high = (_gamma_quantile(q, 2 * (third + sign * jump**3) / variance**1.5) for q, sign in ((1 - p, -1), (p, 1)))
    return float(difference + wide * low), float(difference + wide * high), effective


def tost(low: float, high: float, margin: float) -> str:
    """Decide by two one-sided tests: the interval inside +-margin, outside it, or across its edge."""
    if not margin > 0:
        raise ValueError(f"margin: expected a positive number, got {margin}")
    if -margin < low and high < margin:
        return PARITY
    return DIFFERENT if low > margin or high < -margin else UNSURE


def compare(a: Estimate, b: Estimate, margin: float, level: float = 0.90) -> PairedDifference:
    """Compare two samplers that drew from the same noise, labels and weights.

    Args: a, b: estimates against the same reference, taken as exact; row i of both comes from the same noise and label.
        margin: absolute equivalence margin, fixed before the samples are seen; level: of the interval (0.90 makes two
        one-sided 5 % tests).
    Raises: ValueError for another number of rows, or a margin or level that is none.
    """
    if len(a.influence) != len(b.influence):
        raise ValueError(f"b: expected {len(a.influence)} rows as in a, got {len(b.influence)}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    N = len(a.influence)
    delta = b.influence - a.influence
    difference = (b.distance - b.bias) - (a.distance - a.bias)
    low, high, effective = interval(difference, delta, level)
    unpaired = float(a.influence.var() + b.influence.var())
    return PairedDifference(
        fd_a=a.distance, fd_b=b.distance, bias_a=a.bias, bias_b=b.bias, difference=difference,
        standard_error=float(delta.std(ddof=1) / np.sqrt(N)), effective=effective, low=low, high=high, level=level,
        margin=margin, count=N, correlation=1 - float(delta.var()) / unpaired if unpaired else 1.0,
        unseen=3 * unpaired**0.5 / N, verdict=tost(low, high, margin),
    )  # fmt: skip


def _without(mean: np.ndarray, scatter: np.ndarray, rows: np.ndarray, count: int) -> Moments:
    """Take centred rows out of the moments: mean (D,), scatter (D, D) about it, of `count` rows."""
    n = count - len(rows)
    shift = -rows.sum(0) / n
    return Moments(mean + shift, (scatter - rows.T @ rows - n * np.outer(shift, shift)) / (n - 1), n)


def _gamma_quantile(q: float, skewness: float) -> float:
    """Return the q-quantile of a gamma distribution of mean 0 and variance 1, mirrored when skewness < 0."""
    if abs(skewness) < 1e-3:
        return float(ndtri(q))
    if skewness < 0:
        return -_gamma_quantile(1 - q, -skewness)
    shape = 4 / skewness**2
    return float((gammaincinv(shape, q) - shape) / np.sqrt(shape))
