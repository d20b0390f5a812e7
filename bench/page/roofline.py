"""The rooms under the ceilings of their run: attained GFLOP/s over FLOPs per byte, both axes logarithmic, as SVG.

FLOPs and bytes are the compulsory ones of bench/instrument/cases.py; the roof is min(peak, FLOPs per byte x bandwidth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bench.instrument.cases import ROOMS
from bench.page.words import rank

WIDTH, HEIGHT = 460.0, 300.0
DODGE = 13.0  # between the marks of two backends, which have the same FLOPs per byte
MARKS = ("circle", "square", "diamond", "triangle")


def share(row: Mapping, roof: Mapping | None) -> float | None:
    """Return which part of the roof a room reached; without arithmetic (dispatch) of the bandwidth alone."""
    figures = row["figures"]
    if not roof or not figures or not figures.get("gbps") or not roof.get(row["dtype"]):
        return None
    if not figures.get("gflops"):
        return figures["gbps"] * 1e9 / roof["copy"]
    intensity = figures["gflops"] / figures["gbps"]
    return figures["gflops"] * 1e9 / min(roof[row["dtype"]], intensity * roof["copy"])


def charts(races: Sequence[Mapping], roof: Mapping | None) -> list[dict]:
    """Return a chart per dtype that has a ceiling: roof, ticks, a mark per room and backend (forward), room names.

    Rooms are those of the first setting. The backends of a room, whose FLOPs and bytes are the same, stand
    side by side.
    """
    rooms = [race for race in races if race["level"] in ROOMS and race["mode"] == "fwd"]
    out = []
    for dtype in dict.fromkeys(race["dtype"] for race in rooms):
        points = [
            _point(race["level"], row)
            for race in rooms
            if race["dtype"] == dtype and race["what"] == rooms[0]["what"]
            for row in race["rows"]
            if row["figures"].get("gflops") and row["figures"].get("gbps")
        ]
        if points and roof and roof.get(dtype):
            out.append(_chart(dtype, points, roof[dtype] / 1e9, roof["copy"] / 1e9))
    return out


def _point(room: str, row: Mapping) -> dict:
    gflops, gbps = row["figures"]["gflops"], row["figures"]["gbps"]
    return {"room": room, "backend": row["contender"], "gflops": gflops, "intensity": gflops / gbps}


def _chart(dtype: str, points: list[dict], peak: float, bandwidth: float) -> dict:
    ridge = peak / bandwidth
    xs, ys = [p["intensity"] for p in points] + [ridge], [p["gflops"] for p in points] + [peak]
    left, right = _decades(xs)
    bottom, top = _decades(ys)

    def x(value: float) -> float:
        return round(WIDTH * (math.log10(value) - left) / (right - left), 1)

    def y(value: float) -> float:
        return round(HEIGHT * (top - math.log10(value)) / (top - bottom), 1)

    backends = sorted({p["backend"] for p in points}, key=rank)
    start = max(10.0**left, 10.0**bottom / bandwidth)
    for p in points:
        at = backends.index(p["backend"])
        p |= {
            "x": round(x(p["intensity"]) + DODGE * (at - (len(backends) - 1) / 2), 1), "y": y(p["gflops"]),
            "mark": MARKS[min(at, len(MARKS) - 1)], "share": p["gflops"] / min(peak, p["intensity"] * bandwidth),
        }  # fmt: skip
    return {
        "dtype": dtype, "points": points, "peak": peak, "bandwidth": bandwidth, "size": (WIDTH, HEIGHT),
        "roof": [(x(start), y(start * bandwidth)), (x(ridge), y(peak)), (WIDTH, y(peak))],
        "x_ticks": [(x(10.0**e), _power(e)) for e in range(left, right + 1)],
        "y_ticks": [(y(10.0**e), _power(e)) for e in range(bottom, top + 1)],
        "names": [(room, x(mine[0]["intensity"]), max(p["y"] for p in mine)) for room in ROOMS
                  if (mine := [p for p in points if p["room"] == room])],
        "backends": [(backend, MARKS[min(i, len(MARKS) - 1)]) for i, backend in enumerate(backends)],
    }  # fmt: skip


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.05))
    return low, max(high, low + 1)


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}"
