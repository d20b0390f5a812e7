"""Rows of what was timed, read as races: who ran against whom, who won, by how much, in one line."""

from __future__ import annotations

from collections.abc import Sequence


def races_of(rows: Sequence[dict]) -> list[list[dict]]:
    """Group rows by case, in the order in which the cases first ran; of a contender that ran twice the last counts."""
    races: dict[str, dict[str, dict]] = {}
    for row in rows:
        races.setdefault(row["race"], {})[row["contender"]] = row
    return [list(race.values()) for race in races.values()]


def fastest(race: Sequence[dict], ours: bool) -> dict | None:
    """Return the row of the fastest of ours, or of the peers, that got a number."""
    timed = [row for row in race if row["figures"] and row["ours"] == ours]
    return min(timed, key=lambda row: row["figures"]["time_us_median"], default=None)


def speedup(row: dict, other: dict) -> dict | None:
    """Return how many times faster a row's contender is than another's: value, low, high; None where nobody knows."""
    if ratio := row["speedups"].get(other["contender"]):
        return ratio
    if ratio := other["speedups"].get(row["contender"]):
        return {"value": 1 / ratio["value"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
    return None


def worst_error(row: dict) -> float | None:
    """Return the largest error of a row in multiples of plain torch's, None where nothing was compared."""
    pairs = [(e["ours"], e["torch"]) for e in row["errors"].values() if e["ours"] is not None and e["torch"]]
    return max((ours / torch for ours, torch in pairs), default=None)


def failures(rows: Sequence[dict]) -> list[str]:
    """Return a line for every contender and reason why it has no number, with the number of cases."""
    cases: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if why := row["reason"] or (row["wrong"] and f"wrong: {row['wrong']}"):
            cases.setdefault((row["contender"], why), set()).add(row["race"])
    return [f"{name}: {why} ({len(races)} case{'s' * (len(races) > 1)})" for (name, why), races in cases.items()]


def called_once(rows: Sequence[dict]) -> list[str]:
    """Return a line for every contender that was so slow that it was called once."""
    return [f"{row['contender']}, {row['race']}: {row['once']}" for row in rows if row.get("once")]


def line(row: dict) -> str:
    """Return one row's result in one line."""
    if why := row["reason"] or (row["wrong"] and f"wrong: {row['wrong']}"):
        return f"{row['case']}: {why}"
    ratios = (f"x{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}] {name}" for name, r in row["speedups"].items())
    star = "*" * row["figures"]["disturbed"]
    return f"{row['case']}: {row['figures']['time_us_median'] / 1e3:.4g} ms{star}; {', '.join(ratios)}"
