"""The page on samplers: what each makes of the same noise with 5, 10 and 20 evaluations, and how far data are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.images import pictures
from bench.instrument.readers import Npz
from bench.page.render import render
from bench.page.words import figure

STRIPS, PAGE = "samplers.npz", "samplers.html"


def key(row: dict) -> str:
    """Name a row's strip of images in STRIPS."""
    return f"{row['sampler']}_{row['budget']}"


def write(folder: Path, rows: Sequence[dict]) -> Path:
    """Render the page of a run's rows of kind "sampler", with the strips in their folder; return its path."""
    file, path = Npz(folder / STRIPS, "strips"), folder / PAGE
    strips = {name: pictures.data_uri(pictures.grid(file.read(name), len(file.read(name)))) for name in file}
    path.write_text(render("samplers.html.j2", **view_of(rows), strips=strips), encoding="utf-8")
    return path


def view_of(rows: Sequence[dict]) -> dict:
    """Arrange rows by sampler and budget; mark the least distance of each budget."""
    budgets = sorted({row["budget"] for row in rows})
    table = {name: {} for name in dict.fromkeys(row["sampler"] for row in rows)}
    for row in rows:
        table[row["sampler"]][row["budget"]] = row
    best = {b: min((row["fd"], row["sampler"]) for row in rows if row["budget"] == b)[1] for b in budgets}
    return {
        "table": table, "budgets": budgets, "best": best, "sentence": sentence(rows), "floor": rows[0]["fd_held"],
        "held": rows[0]["held"], "count": rows[0]["count"], "last": rows[-1], "figure": figure, "key": key,
    }  # fmt: skip


def sentence(rows: Sequence[dict]) -> str:
    """Say which sampler came nearest to the data with how many evaluations."""
    budgets = sorted({row["budget"] for row in rows})
    nearest = [min((r for r in rows if r["budget"] == b), key=lambda r: r["fd"]) for b in budgets]
    return "; ".join(
        f"{b} evaluations: {row['sampler']} ({figure(row['fd'])})" for b, row in zip(budgets, nearest, strict=True)
    )
