"""Statistics of times: summaries, the ratio of two medians with its interval, and verdicts that do not cry wolf.

Times of one program on a shared machine are autocorrelated and heavy-tailed. So everything rests on medians and
ranks, and both the bootstrap's interval and Mann-Whitney's variance are widened by the autocorrelation time found in
the ranks. Pure numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

ALPHA = 0.01  # family-wise, after Holm
EFFECT = 0.02  # a change of the median below 2 % is no change
LEVEL = 0.95
MIN_EFFECTIVE = 6  # independent samples on each side; fewer decide nothing
RESAMPLES = 1000
VERDICTS = ("SAME", "FASTER", "SLOWER", "UNSURE")


@dataclass(frozen=True)
class Summary:
    n: int
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """`value` = median(base) / median(head): how many times faster head is, with its bootstrap interval [low, high].

    n counts the samples of the smaller set, effective what they are worth as independent ones.
    """

    value: float
    low: float
    high: float
    n: int
    effective: float

    def relative_to(self, other: Ratio) -> Ratio:
        """Return self / other; the distances to the ends of the two intervals add in quadrature, on the log scale."""
        value = self.value / other.value
        below = math.hypot(math.log(self.value / self.low), math.log(other.high / other.value))
        above = math.hypot(math.log(self.high / self.value), math.log(other.value / other.low))
        return replace(self, value=value, low=value * math.exp(-below), high=value * math.exp(above))

    def __str__(self) -> str:
        return f"{self.value:.3f}x [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    """SAME, FASTER, SLOWER or UNSURE for one case, with the evidence."""

    case: str
    verdict: str
    speedup: Ratio
    p: float


def as_samples(values: Sequence[float], name: str = "samples") -> np.ndarray:
    """Check and convert samples: one-dimensional, not empty, finite, positive."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name} must be a non-empty flat list of times, got shape {x.shape}")
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise ValueError(f"{name} must be finite and positive, got {x[~(np.isfinite(x) & (x > 0))][0]}")
    return x


def summarise(values: Sequence[float]) -> Summary:
    """Return n, median, 20th and 80th percentile."""
    x = as_samples(values)
    p20, median, p80 = np.quantile(x, (0.2, 0.5, 0.8))
    return Summary(len(x), float(median), float(p20), float(p80))


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank from 1, ties sharing their average rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def autocorrelation_time(values: Sequence[float]) -> float:
    """Estimate how many consecutive samples are worth one independent sample (>= 1, at most n/2).

    tau = 1 + 2 sum_k rho_k over the ranks, summed in pairs while they stay positive (Geyer's initial positive
    sequence). Subtracting the series' own mean lowers every rho_k by about tau/n, which in short series hides most of
    tau: that is added back, iterating.
    """
    n = len(values)
    x = ranks(np.asarray(values, dtype=np.float64))
    x = x - x.mean()
    power = float(x @ x)
    if n < 4 or power == 0.0:
        return 1.0
    size = 1 << (2 * n - 1).bit_length()
    rho = np.fft.irfft(np.abs(np.fft.rfft(x, size)) ** 2, size)[: n // 2 * 2] / power
    tau = 1.0
    for _ in range(5):
        pairs = (rho + tau / n).reshape(-1, 2).sum(axis=1)
        positive = len(pairs) if (pairs > 0).all() else int(np.argmax(pairs <= 0))
        tau = min(max(1.0, 2.0 * float(pairs[:positive].sum()) - 1.0), n / 2)
    return tau


def ratio(
    base: Sequence[float],
    head: Sequence[float],
    *,
    paired: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """Compare medians: median(base) / median(head), > 1 when head is faster, with a bootstrap interval.

    Deviations of the resampled log medians are widened by sqrt(tau), tau the autocorrelation time. (Resampling blocks
    instead gives intervals of width 0 when a short series holds one or two blocks.)

    Args:
        base, head: times in the order in which they were taken.
        paired: base[i] and head[i] come from the same round (interleaved), so both are resampled by the same rounds and
            what disturbed both cancels; needs equal lengths.
        level: coverage of the interval.
    Raises:
        ValueError: empty, non-positive or non-finite times; paired with different lengths.
    Cost: O(resamples x n); no torch.
    """
    a, b = (np.log(as_samples(x, name)) for x, name in ((base, "base"), (head, "head")))
    if paired and len(a) != len(b):
        raise ValueError(f"paired samples must have equal length, got {len(a)} and {len(b)}")
    taus = [autocorrelation_time(a - b)] * 2 if paired else [autocorrelation_time(x) for x in (a, b)]
    rng = np.random.default_rng(seed)
    rounds = [rng.integers(0, len(x), (resamples, len(x))) for x in (a, b)]
    if paired:
        rounds[1] = rounds[0]
    deviations = [
        math.sqrt(tau) * (np.median(x[picks], axis=1) - np.median(x))
        for x, picks, tau in zip((a, b), rounds, taus, strict=True)
    ]
    value = float(np.median(a) - np.median(b))
    low, high = np.quantile(deviations[0] - deviations[1], ((1 - level) / 2, (1 + level) / 2))
    effective = min(len(x) / tau for x, tau in zip((a, b), taus, strict=True))
    low, high = (math.exp(value + d) for d in (min(low, 0.0), max(high, 0.0)))
    return Ratio(math.exp(value), low, high, min(len(a), len(b)), effective)


def mann_whitney(base: Sequence[float], head: Sequence[float]) -> float:
    """Two-sided p of "neither tends to be larger", the normal approximation with ties and autocorrelation in its
    variance.

    z = (U - mn/2) / sqrt(var_ties * tau), tau the autocorrelation time of the two series' own ranks (1 when the
    samples are independent).
    """
    a, b = as_samples(base, "base"), as_samples(head, "head")
    m, n = len(a), len(b)
    pooled = np.concatenate([a, b])
    _, counts = np.unique(pooled, return_counts=True)
    u = ranks(pooled)[:m].sum() - m * (m + 1) / 2
    ties = float((counts**3 - counts).sum()) / ((m + n) * (m + n - 1))
    variance = m * n / 12 * (m + n + 1 - ties)
    if variance <= 0:
        return 1.0
    # Each mean rank has variance ~ tau / size: the mixture weighs each series' tau by the other's share.
    tau = (autocorrelation_time(a) * n + autocorrelation_time(b) * m) / (m + n)
    z = max(0.0, abs(u - m * n / 2) - 0.5) / math.sqrt(variance * tau)
    return math.erfc(z / math.sqrt(2))


def by_round(
    base: Sequence[float], head: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Ratio:
    """Compare times of the same rounds: the median over rounds of base[i] / head[i], with a bootstrap interval.

    What slowed down a whole round cancels before a median is taken. `ratio` with paired=True takes the medians first;
    its intervals are 13 % wider on tests/bench/data/paired_processes.npz, and jump where a machine changes its speed.
    Widened by sqrt(tau) like `ratio`; the series may be visits of several processes one after another, whose own
    speeds then count as autocorrelation.
    """
    logs = _round_logs(base, head)
    value, tau = float(np.median(logs)), autocorrelation_time(logs)
    picks = np.random.default_rng(seed).integers(0, len(logs), (resamples, len(logs)))
    deviations = math.sqrt(tau) * (np.median(logs[picks], axis=1) - value)
    low, high = np.quantile(deviations, ((1 - level) / 2, (1 + level) / 2))
    low, high = (math.exp(value + d) for d in (min(low, 0.0), max(high, 0.0)))
    return Ratio(math.exp(value), low, high, len(logs), len(logs) / tau)


def _round_logs(base: Sequence[float], head: Sequence[float]) -> np.ndarray:
    a, b = as_samples(base, "base"), as_samples(head, "head")
    if len(a) != len(b):
        raise ValueError(f"samples of the same rounds must have equal length, got {len(a)} and {len(b)}")
    return np.log(a / b)


def signed_rank(base: Sequence[float], head: Sequence[float]) -> float:
    """Two-sided p of "neither is slower in the same round": Mann-Whitney's question for paired rounds (Wilcoxon).

    z = (W - n(n+1)/4) / sqrt(var_ties * tau) over the ranks of |log base[i] / head[i]|, tau as in `mann_whitney`.
    """
    logs = _round_logs(base, head)
    n, size = len(logs), ranks(np.abs(logs))
    excess = abs(float((np.sign(logs) * size).sum())) / 2
    variance = float((size[logs != 0] ** 2).sum()) / 4
    if variance <= 0:
        return 1.0
    z = max(0.0, excess - 0.5) / math.sqrt(variance * autocorrelation_time(logs))
    return math.erfc(z / math.sqrt(2)) if n >= MIN_EFFECTIVE else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm's step-down): of families with no true effect at most alpha show one."""
    m = len(p_values)
    adjusted, running = [0.0] * m, 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def decide(speedup: Ratio, p: float, alpha: float = ALPHA, effect: float = EFFECT) -> str:
    """Name the verdict: a change needs significance, an interval clear of 1 and a median beyond the effect threshold.

    SAME needs an interval inside the threshold. All else, and fewer than MIN_EFFECTIVE independent samples, is UNSURE.
    """
    if speedup.effective < MIN_EFFECTIVE:
        return "UNSURE"
    if p <= alpha and speedup.low > 1 and speedup.value >= 1 + effect:
        return "FASTER"
    if p <= alpha and speedup.high < 1 and speedup.value <= 1 / (1 + effect):
        return "SLOWER"
    if speedup.low >= 1 / (1 + effect) and speedup.high <= 1 + effect:
        return "SAME"
    return "UNSURE"


def verdicts(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    controls: Mapping[str, Sequence[str]] | None = None,
    *,
    resamples: int = RESAMPLES,
) -> list[Verdict]:
    """Judge every case {case: (base times, head times)}, p values adjusted over all of them.

    Args:
        controls: case -> other cases of `pairs`, raced with it, whose code did not change: how they moved is how the
            machine moved between base and head. FASTER and SLOWER must hold relative to each of them, or are UNSURE.
    """
    adjusted = holm([mann_whitney(base, head) for base, head in pairs.values()])
    speedups = {case: ratio(base, head, resamples=resamples) for case, (base, head) in pairs.items()}
    out = []
    for (case, speedup), p in zip(speedups.items(), adjusted, strict=True):
        verdict = decide(speedup, p)
        drifts = [speedup.relative_to(speedups[control]) for control in (controls or {}).get(case, ())]
        if verdict in ("FASTER", "SLOWER") and any(decide(relative, p) != verdict for relative in drifts):
            verdict = "UNSURE"
        out.append(Verdict(case, verdict, speedup, p))
    return out
