"""What the contest's rows say: one line per case, contenders beside each other in % of the peak of the same rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bench.instrument.races import failures, fastest, races_of, speedup, worst_error


def title(race: Sequence[dict]) -> str:
    """Name a case in a few words."""
    row = race[0]
    return f"{row['model']} {row['routing']} T={row['T']} {row['dtype']} {row['mode']} t{row['threads']}"


def cell(row: dict | None) -> str:
    """Return % of peak (ms where no peak was measured), "wrong", or "-" for what did not run."""
    if row is None or row["reason"]:
        return "-"
    if row["wrong"]:
        return "wrong"
    share = row["figures"].get("peak_share")
    star = "*" * row["figures"]["disturbed"]
    return f"{100 * share['value']:.1f}{star}" if share else f"{row['figures']['time_us_median'] / 1e3:.3g} ms{star}"


def lead(race: Sequence[dict]) -> str:
    """Say how many times faster the best of ours is than the best peer, with the interval."""
    ours, peer = fastest(race, ours=True), fastest(race, ours=False)
    ratio = speedup(ours, peer) if ours and peer else None
    if ratio is None:
        return ""
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] {ours['contender']} / {peer['contender']}"


def view(rows: Sequence[dict]) -> dict:
    """Return what the report shows: titles of the columns, rows of cells, charts, reasons, errors."""
    races = races_of(rows)
    titles = {row["contender"]: row["title"] for row in rows}
    lines = []
    for race in races:
        by_name, best = {row["contender"]: row for row in race}, fastest(race, ours=False)
        cells = [
            {
                "text": cell(by_name.get(name)),
                "best": bool(best) and name == best["contender"],
                "why": _why(by_name, name),
            }
            for name in titles
        ]
        lines.append({"title": title(race), "cells": cells, "lead": lead(race)})
    return {
        "titles": list(titles.values()), "rows": lines, "charts": charts(races), "failures": failures(rows),
        "errors": errors(rows), "libraries": sorted({row["version"] for row in rows} - {""}),
    }  # fmt: skip


def _why(by_name: dict[str, dict], name: str) -> str:
    row = by_name.get(name)
    return "" if row is None else row["reason"] or row["wrong"] or f"{row['figures']['time_us_median'] / 1e3:.3g} ms"


def charts(races: Sequence[Sequence[dict]], width: int = 300, height: int = 230) -> list[dict]:
    """Draw % of peak over T, one chart per model and dtype with several T (forward, one thread), as SVG points.

    x is log2 T; labels stand to the right of the lines' ends, moved apart where they would touch.
    """
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in (row for race in races for row in race):
        if row["mode"] == "fwd" and row["threads"] == 1 and row["figures"].get("peak_share"):
            groups.setdefault((row["model"], row["dtype"], row["routing"]), []).append(row)
    out = []
    for (model, dtype, routing), rows in groups.items():
        tokens = sorted({row["T"] for row in rows})
        if len(tokens) < 2:
            continue
        low, high = math.log2(tokens[0]), math.log2(tokens[-1])
        lines: dict[str, dict] = {}
        for row in sorted(rows, key=lambda row: row["T"]):
            x = width * (math.log2(row["T"]) - low) / (high - low)
            y = height * (1 - min(1.0, row["figures"]["peak_share"]["value"]))
            line = lines.setdefault(row["contender"], {"title": row["title"], "ours": row["ours"], "points": []})
            line["points"].append((round(x, 1), round(y, 1)))
        ticks = [(T, width * (math.log2(T) - low) / (high - low)) for T in tokens]
        title = f"{model}, {dtype}, {routing.replace('_', ' ')}"
        out.append({"title": title, "lines": _labelled(lines.values(), height), "ticks": ticks})
    return out


def _labelled(lines: Iterable[dict], height: int, gap: float = 14.0) -> list[dict]:
    ordered, y = sorted(lines, key=lambda line: line["points"][-1][1]), -gap
    for line in ordered:
        line["label"] = y = max(y + gap, line["points"][-1][1])
    y = height + gap
    for line in reversed(ordered):
        line["label"] = y = min(y - gap, line["label"])
    return ordered


def line(race: Sequence[dict]) -> str:
    """Return one case's result in one line."""
    cells = ", ".join(f"{row['contender']} {cell(row)}" for row in race if not row["reason"])
    return f"{title(race)}: {cells}" + (f"; ours / best peer {text}" if (text := lead(race)) else "")


def text(rows: Sequence[dict]) -> str:
    """Return the table, the reasons of those that did not run or were wrong, and everybody's worst error."""
    races = races_of(rows)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    table = [["% of peak", *names, "ours / best peer"]]
    for race in races:
        by_name = {row["contender"]: row for row in race}
        table.append([title(race), *(cell(by_name.get(name)) for name in names), lead(race)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(f"{word:<{w}}" if i in (0, len(row) - 1) else f"{word:>{w}}" for i, (word, w) in
                  enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip
    return "\n".join([*lines, "", *failures(rows), f"worst error, x plain torch's: {errors(rows)}"])


def errors(rows: Sequence[dict]) -> str:
    """Name every contender's worst error over all cases, in multiples of plain torch's."""
    worst: dict[str, float] = {}
    for row in rows:
        if (error := worst_error(row)) is not None:
            worst[row["contender"]] = max(error, worst.get(row["contender"], 0.0))
    return ", ".join(f"{name} {error:.2g}" for name, error in worst.items()) or "nothing was compared"
