"""The page on Denoising MCMC: every arm's figures, what chains gained or lost, their levels, their experts' load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.images.dmcmc import verdicts
from bench.images.dmcmc.command import FILE
from bench.instrument import store
from bench.page.drawings import band
from bench.page.render import render
from bench.page.words import figure, plural, signed

NAME = "dmcmc.html"
WIDTH, HEIGHT = 420.0, 200.0
DECADES = 3  # of distances in a chart
AGAINST = {
    "evaluations": "the best of as many evaluations", "time": "the best of as much CPU time",
    "alone": "its integrator alone",
}  # fmt: skip


def write(folder: Path) -> Path | None:
    """Write the folder's page from its rows (FILE) and return its path; None where there are no rows of it."""
    if not (folder / FILE).exists():
        return None
    (folder / NAME).write_text(page(store.read(folder / FILE)), encoding="utf-8")
    return folder / NAME


def page(rows: Sequence[dict]) -> str:
    """Return the page of a run's rows."""
    found = verdicts.lines([row for row in rows if row["kind"] == "dmcmc"])
    facts = {row["tier"]: row for row in rows if row["kind"] == "dmcmc_tier"}
    along = [row for row in rows if row["kind"] == "dmcmc_load"]
    tiers = [_tier(name, facts[name], [line for line in found if line.tier == name], along) for name in facts]
    return render(
        "dmcmc.html.j2", tiers=[tier for tier in tiers if tier["lines"]], last=rows[-1], against=AGAINST, figure=figure,
        signed=signed, size=(WIDTH, HEIGHT), recall=verdicts.RECALL, timing=verdicts.TIMING,
        decades=DECADES,
    )  # fmt: skip


def _tier(name: str, facts: dict, lines: list[verdicts.Line], along: Sequence[dict]) -> dict:
    compared = verdicts.comparisons(lines)
    return {
        "name": name, "facts": facts, "lines": lines, "compared": compared, "sentence": verdicts.sentence(compared),
        "what": _what(facts, lines), "chart": chart(lines), "traces": traces(lines),
        "along": [{**row, "where": where(row)} for row in along if row["tier"] == name],
        "loads": [line for line in lines if line.row["loads"] and line.budget == max(x.budget for x in lines)],
    }  # fmt: skip


def _what(facts: dict, lines: Sequence[verdicts.Line]) -> str:
    amount = ""
    if lines:
        chains = max(line.row["chains"] for line in lines)
        samples, seeds = lines[0].row["samples"], max(line.seeds for line in lines)
        amount = f" {samples} samples of {plural(seeds, 'seed')}"
        amount += f"; of chains {chains}, {samples // chains} samples each." if chains else "."
    if "modes" in facts:
        return (
            f"A mixture of {facts['modes']} Gaussians of standard deviation {figure(facts['bandwidth'])} at real "
            f"images, whose denoiser and levels are exact.{amount}"
        )
    return (
        f"The digits' DiT-MoE ({facts['model']}), guidance {facts['guidance']:g}. Its classifier of levels errs by "
        f"{100 * facts['level_error']:.0f} % in the median on held-out images.{amount}"
    )


def chart(lines: Sequence[verdicts.Line]) -> dict:
    """Place distances, as they are, over evaluations, both axes logarithmic: points, joined for each arm.

    Distances beyond DECADES above the least lie on the upper edge, as marks that say how much they are: the others keep
    their room.
    """
    if not lines:
        return {}
    at = np.array([(line.figures["evaluations"], max(line.figures["fd"], 1e-9)) for line in lines])
    low, high = at.min(0), at.max(0) * (1 + 1e-9)
    high[1] = min(high[1], low[1] * 10**DECADES)
    size = np.array((WIDTH, HEIGHT))

    def place(points: np.ndarray) -> np.ndarray:
        share = np.log(np.minimum(points, high) / low) / np.log(high / low)
        return np.abs((0, 1) - share) * size  # y from the top

    arms: dict[str, list[dict]] = {}
    for line, (x, y), (_, value) in zip(lines, place(at), at, strict=True):
        over = figure(float(value)) if value > high[1] else ""
        arms.setdefault(line.title, []).append({"x": round(x, 1), "y": round(y, 1), "over": over})
    chains = {line.title for line in lines if line.choice}
    budgets = sorted({*(line.budget for line in lines), at[:, 0].max()})
    at_budgets = [(x, low[1]) for x in budgets if low[0] <= x <= high[0]]
    at_values = [(low[0], y) for y in _round_numbers(low[1], high[1])]
    ticks = [
        [(round(float(place(np.array(point))[axis]), 1), f"{point[axis]:.3g}") for point in points]
        for axis, points in enumerate((at_budgets, at_values))
    ]
    return {
        "lines": [{"title": title, "chains": title in chains, "points": arm} for title, arm in arms.items()],
        "x_ticks": ticks[0], "y_ticks": ticks[1], "beyond": any(p["over"] for arm in arms.values() for p in arm),
    }  # fmt: skip


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between two numbers, the powers alone where they are many."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1,) if high / low > 100 else (1, 2, 5)
    return [float(step * power) for power in powers for step in steps if low <= step * power <= high]


def where(row: dict) -> str:
    """Say at which levels chains were: `35 % at sigma 0.58 to 1.82, ...`, the least noise last."""
    parts = zip(row["slices"], row["visits"], strict=True)
    return ", ".join(f"{100 * v:.0f} % at sigma {figure(a)} to {figure(b)}" for (a, b), v in parts if v >= 0.005)


def traces(lines: Sequence[verdicts.Line]) -> list[dict]:
    """Draw the levels that chains sent down, window by window: the median and its 5th to 95th percentile."""
    drawn = []
    for line in lines:
        values = np.array(line.row["trace"])
        if len(values) < 2 or line.budget != max(other.budget for other in lines):
            continue
        drawn.append({
            **band(*values.T, (WIDTH, HEIGHT), values.max()),
            "title": line.title, "top": figure(float(values.max())), "last": figure(float(values[-1, 1])),
        })  # fmt: skip
    return drawn
