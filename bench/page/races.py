"""Timed rows as races: who ran against whom, how the rooms add up, what whole models reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bench.instrument.cases import ROOMS
from bench.instrument.races import races_of
from bench.page.words import LEVELS, MODES, STEPS, plural, rank

SHARED = ("race", "device", "level", "mode", "dtype", "T", "threads", "model", "routing")
UNITS = {"train_step": "images/s", "sampling_step": "images/s of one step"}


def of(rows: Sequence[dict]) -> list[dict]:
    """Group timed rows that ran against each other, in the order in which they ran.

    Of a contender that ran twice the last row counts; one that did not run (`reason`) is left out.
    """
    races = races_of([row for row in rows if not row["reason"]])
    return [
        {**{key: race[0][key] for key in SHARED}, "title": title(race[0]), "what": what(race[0]),
         "unit": UNITS.get(race[0]["level"], ""), "rows": sorted(race, key=lambda row: rank(row["contender"]))}
        for race in races
    ]  # fmt: skip


def what(row: dict) -> str:
    """Return the setting of a case, and where it ran."""
    where = (row["machine"]["gpu"] or "GPU") if row["device"] == "cuda" else plural(row["threads"], "thread")
    return f"{row['model']}, T={row['T']}, {row['routing'].replace('_', '-')} routing, {where}"


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
                times[race["dtype"], row["contender"]][race["level"]] = row["figures"]["time_us_median"] / 1e3
    whole = {key: ms for key, ms in times.items() if len(ms) == len(ROOMS)}
    longest = max((sum(ms.values()) for ms in whole.values()), default=1.0)
    return [
        {"dtype": dtype, "backend": backend, "total_ms": sum(ms.values()),
         "rooms": [(room, ms[room], 100 * ms[room] / longest) for room in ROOMS]}
        for (dtype, backend), ms in sorted(whole.items(), key=lambda item: (item[0][0] != "fp32", rank(item[0][1])))
    ]  # fmt: skip
