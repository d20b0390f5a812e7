"""Where a series of medians jumped: the best partition into stretches of one level each. Pure numpy.

The cost of a stretch is the sum of absolute distances to its median, in units of the noise that successive differences
show, each distance capped: however slow one or two measurements were, they are no change, and neither is the newest
commit alone. Every further stretch costs a penalty. The best partition is found exactly (optimal partitioning, as PELT
finds it with pruning; Fearnhead and Rigaill 2019 for the cap), which for a history of hundreds of commits is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bench.instrument.stats import EFFECT

LEAST = 2  # points of a stretch
CAP = 3.0  # of a distance: PENALTY is more than two of them
PENALTY = 7.0  # per stretch
FLOOR = 0.01  # noise of a median that nobody believes to be smaller


def change_points(values: Sequence[float]) -> list[int]:
    """Return the indices at which a new level begins, ascending.

    Args:
        values: positive, in the order of the commits: times, or times relative to something that did not change.
    Raises: ValueError for values that are not positive and finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not (np.isfinite(x).all() and (x > 0).all()):
        raise ValueError(f"values: got {x[~(np.isfinite(x) & (x > 0))][:1]}, expected positive finite numbers")
    if len(x) < 2 * LEAST:
        return []
    logs = np.log(x)
    noise = max(FLOOR, 1.4826 * float(np.median(np.abs(np.diff(logs)))) / np.sqrt(2))
    starts = _partition(logs / noise)
    levels = [float(np.median(part)) for part in np.split(logs, starts)]
    return [start for start, (a, b) in zip(starts, pairwise(levels), strict=True) if abs(b - a) >= np.log(1 + EFFECT)]


def _partition(x: np.ndarray) -> list[int]:
    """Return the starts of all stretches but the first in the partition of least cost."""
    n = len(x)
    best, last = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
    best[0] = -PENALTY
    for end in range(LEAST, n + 1):
        for start in (0, *range(LEAST, end - LEAST + 1)):
            part = x[start:end]
            cost = best[start] + np.minimum(CAP, np.abs(part - np.median(part))).sum() + PENALTY
            if cost < best[end]:
                best[end], last[end] = cost, start
    starts, end = [], n
    while last[end] > 0:
        end = int(last[end])
        starts.append(end)
    return starts[::-1]
