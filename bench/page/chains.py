"""The page on Denoising MCMC: every arm's figures, what chains gained or lost, their levels, their experts' load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.images.dmcmc import verdicts
from bench.images.dmcmc.command import FILE
from bench.instrument import store
from bench.page.render import render
from bench.page.words import figure, plural, signed

NAME = "dmcmc.html"
WIDTH, HEIGHT = 420.0, 200.0
AGAINST = {
    "evaluations": "best of as many evaluations", "time": "best of as much CPU time", "alone": "its integrator alone",
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
    tiers = [_tier(name, facts[name], [line for line in found if line.tier == name]) for name in facts]
    return render(
        "dmcmc.html.j2", tiers=[tier for tier in tiers if tier["lines"]], last=rows[-1], against=AGAINST, figure=figure,
        signed=signed, size=(WIDTH, HEIGHT), recall=verdicts.RECALL,
    )  # fmt: skip


def _tier(name: str, facts: dict, lines: list[verdicts.Line]) -> dict:
    compared = verdicts.comparisons(lines)
    return {
        "name": name, "facts": facts, "lines": lines, "compared": compared, "sentence": verdicts.sentence(compared),
        "what": _what(facts, lines), "chart": chart(lines), "traces": traces(lines),
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
    """Place distances, as they are, over evaluations, both axes logarithmic: a polyline per arm of several budgets."""
    if not lines:
        return {}
    arms: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        arms.setdefault(line.title, []).append((line.figures["evaluations"], max(line.figures["fd"], 1e-9)))
    points = np.log(np.array([p for arm in arms.values() for p in arm]))
    low, high = points.min(0), points.max(0) + 1e-9

    def place(point: tuple[float, float]) -> str:
        x, y = (np.log(point) - low) / (high - low)
        return f"{WIDTH * x:.1f},{HEIGHT * (1 - y):.1f}"

    chains = {line.title for line in lines if line.choice}
    return {
        "lines": [{"title": t, "chains": t in chains, "points": " ".join(map(place, p))} for t, p in arms.items()],
        **{axis: [figure(float(np.exp(v[i]))) for v in (low, high)] for i, axis in enumerate("xy")},
    }  # fmt: skip


def traces(lines: Sequence[verdicts.Line]) -> list[dict]:
    """Draw the levels that chains sent down, window by window: the median and its 5th to 95th percentile."""
    drawn = []
    for line in lines:
        values = np.array(line.row["trace"])
        if len(values) < 2 or line.budget != max(other.budget for other in lines):
            continue
        top = values.max()
        xs = np.linspace(0, WIDTH, len(values))
        low, mid, high = (
            [f"{x:.1f},{HEIGHT * (1 - v / top):.1f}" for x, v in zip(xs, c, strict=True)] for c in values.T
        )
        drawn.append({
            "title": line.title, "line": " ".join(mid), "spread": " ".join([*high, *reversed(low)]),
            "top": figure(float(top)), "last": figure(float(values[-1, 1])),
        })  # fmt: skip
    return drawn
