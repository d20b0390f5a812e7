"""How good are samples, if those of a chain resemble each other? Distance, precision and recall, classes, and ESS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from bench.images.fid.distance import Moments, moments, transport

NEIGHBOURS = 3
GROUPS = 10  # of chains, left out in turn


@dataclass(frozen=True)
class Reference:
    """What samples are held against: moments, feature rows (N, D), and the share that each class should have."""

    moments: Moments
    features: np.ndarray
    shares: np.ndarray


def figures(features: np.ndarray, classes: np.ndarray, labels: np.ndarray, correlated: bool, data: Reference) -> dict:
    """Judge samples (windows, chains, D) with the classes (windows, chains) that they were taken for.

    fd: Frechet distance as it is; fd_bias: what the number of samples adds (jackknife over GROUPS of chains); fd_error:
    standard error of fd; ess: how many independent samples would have it. precision, recall: shares of samples near the
    data, and of the data near samples (arXiv 1904.06991). class_tv: total variation of classes from `shares`. lag1:
    correlation of a chain's consecutive features about their label's mean.
    Args: labels (chains,): asked for, one per chain. correlated: whether a column is a chain, or its samples are
        independent.
    """
    W, B, D = features.shape
    flat = features.reshape(W * B, D)
    found = transport(moments(flat), data.moments)
    influence = _about_labels(found.influence(flat).reshape(W, B, 1), labels)
    ess = effective(influence[..., 0], len(np.unique(labels))) if correlated else float(W * B)
    precision, recall = precision_recall(flat, data.features)
    shares = np.bincount(classes.ravel(), minlength=len(data.shares)) / classes.size
    return {
        "fd": found.distance, "fd_bias": jackknife_bias(features, labels, found.distance, data.moments), 
        "fd_error": float(influence.std() / ess**0.5), "ess": ess, "precision": precision, "recall": recall,
        "class_tv": float(np.abs(shares - data.shares).sum() / 2),
        "lag1": lag1(_about_labels(features, labels)) if correlated and W > 1 else 0.0,
    }  # fmt: skip


def effective(values: np.ndarray, labels: int) -> float:
    """Return how many independent values (windows, chains), of mean 0 by label, have a mean of the same variance.

    N var / (W var of chain means), W windows: N where chains do not persist, the number of chains where all they do
    is repeat themselves.
    """
    W, B = values.shape
    means = values.mean(0)
    between = W * (means**2).sum() / max(B - labels, 1)
    within = (values**2).sum() / (W * B - labels)
    return float(np.clip(W * B * within / between, 1, W * B)) if between > 0 else float(B)


def jackknife_bias(features: np.ndarray, labels: np.ndarray, distance: float, data: Moments) -> float:
    """Return (G - 1) (mean of the distances without a group - distance), every label alike in all G groups of chains.

    With unlike groups the distances would tell of labels that are missing, not of samples.
    """
    found, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(f"labels: got {counts.min()} chains of a label, expected at least 2 of each")
    G = min(GROUPS, counts.min())
    group = np.empty(len(labels), int)
    for label, count in zip(found, counts, strict=True):
        group[labels == label] = np.arange(count) % G
    rest = [features[:, group != g].reshape(-1, features.shape[-1]) for g in range(G)]
    return float((G - 1) * (np.mean([transport(moments(r), data).distance for r in rest]) - distance))


def precision_recall(samples: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Return the shares of samples near the data and of the data near samples; the larger set is thinned first."""
    count = min(len(samples), len(real))
    a, b = (x[np.arange(count) * len(x) // count] for x in (samples, real))
    return _covered(a, b), _covered(b, a)


def lag1(values: np.ndarray) -> float:
    """Return the correlation of consecutive rows of (windows, chains, D), of mean 0."""
    return float((values[1:] * values[:-1]).sum() / np.sqrt((values[1:] ** 2).sum() * (values[:-1] ** 2).sum()))


def _covered(points: np.ndarray, support: np.ndarray) -> float:
    """Return the share of points nearer to some row of the support than that row's NEIGHBOURS-th neighbour is."""
    radius = cKDTree(support).query(support, NEIGHBOURS + 1)[0][:, -1]
    distance = np.sqrt(np.maximum(0, (points**2).sum(1)[:, None] + (support**2).sum(1) - 2 * points @ support.T))
    return float((distance <= radius).any(1).mean())


def _about_labels(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return values (windows, chains, D) less the mean of those with the same label."""
    out = values.copy()
    for label in np.unique(labels):
        out[:, labels == label] -= values[:, labels == label].mean((0, 1))
    return out
