"""What the rows say: are chains better than the best trajectory of as many evaluations, or of as much time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.images.fid.paired import LINEAR

BETTER, WORSE, UNSURE, NARROW = "BETTER", "WORSE", "UNSURE", "NARROWER"
RECALL = 0.02  # how much lower it may be: fixed before any run
TIMING = 0.1  # how much longer "as much time" may be: seeds of one arm differ by as much, and no verdict hangs on it


@dataclass(frozen=True)
class Line:
    """An arm at a budget over its seeds: mean figures, fd without its bias, and the standard error of that mean."""

    tier: str
    title: str
    integrator: str
    choice: str
    budget: int
    seeds: int
    fd: float
    error: float
    figures: dict
    row: dict


@dataclass(frozen=True)
class Comparison:
    """Chains against a trajectory: the difference of fd with its 95 % interval, of recall, and a word."""

    against: Line
    difference: float
    low: float
    high: float
    recall: float
    verdict: str


def lines(rows: Sequence[dict]) -> list[Line]:
    """Return a line per tier, arm and budget, in the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["tier"], row["arm"], row["budget"]), []).append(row)
    return [_line(group) for group in groups.values()]


def _line(rows: Sequence[dict]) -> Line:
    first, all_figures = rows[0], [row["figures"] for row in rows]
    mean = {key: float(np.mean([f[key] for f in all_figures])) for key in all_figures[0]}
    unbiased = np.array([f["fd"] - f["fd_bias"] for f in all_figures])
    within = float(np.mean([f["fd_error"] ** 2 for f in all_figures]))
    between = float(unbiased.var(ddof=1)) if len(rows) > 1 else 0.0
    error = float(np.sqrt(max(within, between) / len(rows)))
    named = {key: first[key] for key in ("tier", "title", "integrator", "choice", "budget")}
    return Line(**named, seeds=len(rows), fd=float(unbiased.mean()), error=error, figures=mean, row=first)


def compare(chains: Line, against: Line) -> Comparison:
    """Compare at 95 %: the noise of two arms cannot be paired. Better at less recall is no better: NARROWER.

    Below LINEAR effective samples per dimension the bias is not known well enough: UNSURE. The best of several
    trajectories is lucky, too: the comparison leans against chains by that much.
    """
    difference, spread = chains.fd - against.fd, 1.96 * float(np.hypot(chains.error, against.error))
    recall = chains.figures["recall"] - against.figures["recall"]
    verdict = BETTER if difference + spread < 0 else WORSE if difference - spread > 0 else UNSURE
    if chains.figures["ess"] < LINEAR * chains.row["dimension"]:
        verdict = UNSURE
    if verdict == BETTER and recall < -RECALL:
        verdict = NARROW
    return Comparison(against, difference, difference - spread, difference + spread, recall, verdict)


def comparisons(found: Sequence[Line]) -> list[dict]:
    """Return for each line of chains its comparisons.

    `evaluations`: with the best trajectory within the budget; `time`: within the CPU time per image that it took,
    and TIMING; `alone`: with its own integrator at the same budget. Each is a Comparison, or None where there is no
    such one.
    """
    out = []
    for line in found:
        if not line.choice:
            continue
        rivals = [other for other in found if other.tier == line.tier and not other.choice]
        out.append({
            "line": line,
            "evaluations": _best(line, [r for r in rivals if r.figures["evaluations"] <= line.budget]),
            "time": _best(line, [r for r in rivals if r.figures["cpu_ms"] <= (1 + TIMING) * line.figures["cpu_ms"]]),
            "alone": _best(line, [r for r in rivals if (r.integrator, r.budget) == (line.integrator, line.budget)]),
        })  # fmt: skip
    return out


def _best(line: Line, rivals: Sequence[Line]) -> Comparison | None:
    return compare(line, min(rivals, key=lambda rival: rival.fd)) if rivals else None


def sentence(found: Sequence[dict]) -> str:
    """Say in one line what came out, whichever way."""
    parts = []
    for key, words in (
        ("evaluations", "the best trajectory of at most as many evaluations"), 
        ("time", "the best of at most as much CPU time"), ("alone", "their own integrator alone"),
    ):  # fmt: skip
        verdicts = [c[key].verdict for c in found if c[key]]
        if verdicts:
            counts = [f"{verdicts.count(word)} {word}" for word in (BETTER, NARROW, UNSURE, WORSE) if word in verdicts]
            parts.append(f"against {words}: {', '.join(counts)}")
    return "chains " + "; ".join(parts) if parts else "no chains were compared"
