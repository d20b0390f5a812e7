"""Timed rows as races: who ran against whom, how the rooms add up, what whole models reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bench.instrument.cases import ROOMS
from bench.page.words import LEVELS, MODES, STEPS, plural, rank

SHARED = ("device", "level", "mode", "dtype", "T", "threads", "model", "routing", "what")


def of(rows: Sequence[dict]) -> list[dict]:
    """Group timed rows that ran against each other, in the order in which they ran.

    Of a contender that ran twice the last row counts; one that did not run (`reason`) is left out.
    """
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in map(complete, rows):
        if not row["reason"]:
            groups[row["race"]][row["backend"]] = row
    return [
        {**{key: first[key] for key in SHARED}, "race": race, "title": title(first), "rows": members}
        for race, group in groups.items()
        for members in [sorted(group.values(), key=lambda row: rank(row["backend"]))]
        for first in members[:1]
    ]


def complete(row: dict) -> dict:
    """Give rows of `bench gpu` what those of `bench run` say more, and those the device."""
    if "backend" in row:
        return {"reason": None, "device": "cuda" if row["figures"].get("clock") == "cuda" else "cpu", **row}
    figures = row["figures"]
    unit = {"train_step": "images/s", "sampling_step": "images/s of one step"}.get(row["level"], "")
    where = row["machine"]["gpu"] or "CPU"
    return {
        "threads": 0, "rate": figures.get("images_per_s", 0.0), "rate_unit": unit, **row, "backend": row["contender"],
        "what": f"{row['model']}, T={row['T']}, {row['routing'].replace('_', '-')} routing, {where}",
    }  # fmt: skip


def title(row: dict) -> str:
    mode = "" if row["level"] in STEPS else f"{MODES[row['mode']]}, "
    return f"{LEVELS.get(row['level'], row['level']).removeprefix('op: ')}, {mode}{row['dtype']}"


def stages(races: Sequence[dict]) -> list[dict]:
    """Line up the forward times of the four rooms per dtype and backend of the first setting, as shares of the longest.

    Returns: dtype, backend, total_ms, rooms (name, ms, percent of the longest line), fastest first within a dtype.
    """
    rooms = [race for race in races if race["level"] in ROOMS and race["mode"] == "fwd"]
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for race in rooms:
        for row in race["rows"]:
            if race["what"] == rooms[0]["what"] and not row["wrong"]:
                times[race["dtype"], row["backend"]][race["level"]] = row["figures"]["time_us_median"] / 1e3
    whole = {key: ms for key, ms in times.items() if len(ms) == len(ROOMS)}
    longest = max((sum(ms.values()) for ms in whole.values()), default=1.0)
    return [
        {"dtype": dtype, "backend": backend, "total_ms": sum(ms.values()),
         "rooms": [(room, ms[room], 100 * ms[room] / longest) for room in ROOMS]}
        for (dtype, backend), ms in sorted(whole.items(), key=lambda item: (item[0][0] != "fp32", rank(item[0][1])))
    ]  # fmt: skip


def unmeasured(rows: Sequence[dict]) -> list[str]:
    """Return a line for every contender and reason why it did not run, with how many cases that concerns."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for row in map(complete, rows):
        if row["reason"]:
            found[row["backend"], row["reason"]] += 1
    return [f"{who}: {why} ({plural(count, 'case')})" for (who, why), count in found.items()]
