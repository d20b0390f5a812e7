"""What tables of picks say: load, information with its null, stability, pairs, degrees. Pure numpy.

Bits are estimates from counts, and never 0: two corrections say how far from it they would be without any dependence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 199  # permutations; the smallest p is 1 / (DRAWS + 1)


@dataclass(frozen=True)
class Information:
    """Mutual information of expert and another variable in one layer, in bits.

    plain: plug-in estimate. corrected: less (X - 1)(E - 1) / (2 N ln 2), its bias for N independent picks (Miller,
    Madow). null, null_high: mean and 95 % quantile of the plug-in estimate after permutations that keep together what
    is no independent sample; p: share of permutations that reach `plain`.
    alike: the share of what there is that such a permutation leaves, as some of the samples stay where they belong.
    """

    plain: float
    corrected: float
    null: float
    null_high: float
    p: float
    alike: float

    @property
    def excess(self) -> float:
        return excess(self.plain, self.null, self.alike)


def excess(plain: np.ndarray, null: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Return the bits above chance: null = chance + alike (bits above chance), nearly; 0 where nothing is apart."""
    return (plain - null) / np.maximum(1 - alike, 1e-9) * (alike < 1)


def mutual_information(tables: np.ndarray) -> np.ndarray:
    """Return the mutual information in bits of tables of counts (..., X, E), 0 for an empty one: (...)."""
    total = tables.sum((-2, -1), keepdims=True)
    joint = tables / np.maximum(total, 1)
    product = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    seen = joint > 0
    return (joint * np.log2(np.where(seen, joint, 1) / np.where(seen, product, 1))).sum((-2, -1))


def bias(table: np.ndarray) -> float:
    """Return what mutual_information of a table (X, E) gains by chance, if its counts are independent picks."""
    X, E = (int((table.sum(axis) > 0).sum()) for axis in (1, 0))
    return (X - 1) * (E - 1) / (2 * max(table.sum(), 1) * math.log(2))


def information_by_group(groups: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Information:
    """Judge a variable within groups of images: (G, X, E) counts, of which the sum is judged.

    Null: in each group its own permutation of the X values. Tokens of an image, and steps, stay together.
    """
    rng = np.random.default_rng(seed)
    G, X, _ = groups.shape
    tables = np.empty((draws, *groups.shape[1:]))
    for draw in range(draws):
        order = rng.permuted(np.tile(np.arange(X), (G, 1)), axis=1)
        tables[draw] = np.take_along_axis(groups, order[..., None], axis=1).sum(0)
    return _judge(groups.sum(0), mutual_information(tables), 1 / max(1, int((groups.sum((1, 2)) > 0).sum())))


def information_by_image(images: np.ndarray, labels: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Information:
    """Judge the class: images (N, E) counts and labels (N,). Null: labels permuted among whole images."""
    rng = np.random.default_rng(seed)
    tables = np.stack([by_class(images, rng.permutation(labels)) for _ in range(draws)])
    classes, N = len(np.unique(labels)), len(labels)
    return _judge(by_class(images, labels), mutual_information(tables), min(1.0, (classes - 1) / max(N - 1, 1)))


def by_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum counts (N, ...) over the images of each label (N,): (classes that occur, ...), in ascending order."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
    return np.add.reduceat(images[order].astype(np.float64), starts, axis=0)


def _judge(table: np.ndarray, null: np.ndarray, alike: float) -> Information:
    plain = float(mutual_information(table))
    p = (1 + int((null >= plain - 1e-12).sum())) / (1 + len(null))
    return Information(plain, plain - bias(table), float(null.mean()), float(np.quantile(null, 0.95)), p, alike)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Return the largest expert's load over the fair share: (..., E) -> (...)."""
    return load.max(-1) * load.shape[-1] / np.maximum(load.sum(-1), 1)


def entropy(load: np.ndarray) -> np.ndarray:
    """Return the entropy of the load over experts, as a share of log2 E: 1 is even, 0 one expert: (..., E) -> (...)."""
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    bits = -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)
    return bits / max(math.log2(load.shape[-1]), 1e-9)


@dataclass(frozen=True)
class Variation:
    """Total variation distance of two loads, 0 (alike) to 1, with its 95 % interval over images.

    chance: what equal loads would show for as few images; p: share of resamplings in which they show as much.
    """

    value: float
    low: float
    high: float
    chance: float
    p: float


def total_variation(a: np.ndarray, b: np.ndarray, labels: np.ndarray, seed: int = 0, draws: int = 999) -> Variation:
    """Compare the loads a, b (S, B, E) of B pairs of images with labels (B,): 1/2 sum |a / sum a - b / sum b|.

    Summed over pairs, not over the S parts: with as many picks in each part of both, the mean of the parts' distances
    weighted by their picks. Resampled: the pairs of each label, n - 1 of n with weights n / (n - 1) (Rao and Wu). How
    far resamplings are from what was counted says how far that is from the truth, and by the triangle inequality no
    distance errs by more: the interval is the value give or take their 95 % quantile, and clear of 0 where p < 0.05.
    """
    rng = np.random.default_rng(seed)
    apart = (a / a.sum() - b / b.sum()).transpose(1, 0, 2)  # (B, S, E)
    weights = np.empty((draws, len(labels)))
    for label in np.unique(labels):
        n = int((labels == label).sum())
        if n < 2:
            raise ValueError(f"labels: got {n} image of label {label}, expected at least 2 of each")
        weights[:, labels == label] = rng.multinomial(n - 1, np.full(n, 1 / n), draws) * (n / (n - 1))

    def distance(weights: np.ndarray) -> np.ndarray:
        return np.abs(np.tensordot(weights, apart, 1)).sum((-2, -1)) / 2

    value, by_chance = float(distance(np.ones(len(labels)))), distance(weights - 1)
    reach = float(np.quantile(by_chance, 0.95))
    p = (1 + int((by_chance >= value).sum())) / (1 + draws)
    return Variation(value, max(0.0, value - reach), min(1.0, value + reach), float(by_chance.mean()), p)


def pair_lift(pairs: np.ndarray) -> np.ndarray:
    """Return how many times more often two experts share a token than chance has it: (E, E), its diagonal 1.

    Chance: in proportion to the product of both loads, as many pairs in all. 0 where no pair was seen at all.
    """
    E = len(pairs)
    load, apart = np.diag(pairs).astype(np.float64), ~np.eye(E, dtype=bool)
    expected = np.where(apart, np.outer(load, load), 0)
    expected *= pairs[apart].sum() / max(expected.sum(), 1e-30)
    return np.where(apart, pairs / np.maximum(expected, 1e-30), 1) * np.where(apart, expected > 0, 1)


def gini(histogram: np.ndarray) -> np.ndarray:
    """Return the Gini coefficient of values 0, 1, ... with these counts (..., V): 0 all equal, near 1 all in one."""
    values = np.arange(histogram.shape[-1])
    apart = np.abs(values[:, None] - values)
    n, mean = histogram.sum(-1), (histogram * values).sum(-1)
    spread = np.einsum("...i,ij,...j->...", histogram, apart, histogram)
    return spread / np.maximum(2 * n * mean, 1e-30)


def binomial(E: int, mean: float) -> np.ndarray:
    """Return the degrees (E + 1,) that tokens would have if every expert took each with the same chance."""
    p = mean / E
    return np.array([math.comb(E, k) * p**k * (1 - p) ** (E - k) for k in range(E + 1)])
