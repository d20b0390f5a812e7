"""The verdict, the means over the cases of a level, and which backend ran where: computed from the rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.instrument import store
from bench.instrument.cases import ONLY_ON, OWN
from bench.instrument.races import fastest, races_of, speedup
from bench.page import races
from bench.page.words import BASELINES, LEVELS, MODES, figure, listed, name, plural, rank, ratio

NOT_YET = "not yet run on hardware"
VERIFIED = store.ROOT / "moe_kernels" / "verified.json"
BEST = "best other"
NAMED = 12  # cases in which we are not faster
GAIN_COLUMNS = ["level", "case", "backend", "disturbed", "against", "rival", "value", "low", "high"]


def headline(rows: Sequence[dict]) -> str:
    """Say which backends have parity, whether the deliberate faults were found, how often ours is the fastest, and
    where it is not."""
    found = gains(rows)
    best = found[found["against"] == BEST]
    sentences = [_verdicts(rows), _controls(rows)]
    for backend, cases in best.groupby("backend", sort=False):
        won, lost = int((cases["low"] > 1).sum()), int((cases["high"] < 1).sum())
        open_ = len(cases) - won - lost
        sentences.append(
            f"{backend} is faster than everything else in {won} of {plural(len(cases), 'case')}, slower in {lost}"
            + (f", {open_} undecided" if open_ else "") + " (95 % intervals)."
        )  # fmt: skip
        sentences.append(_not_faster(cases[cases["low"] <= 1]))
    sentences.append(_alone(rows))
    wrong = [row for row in rows if row["kind"] == "time" and row["wrong"]]
    if wrong:
        who = listed(sorted({name(row["contender"]) for row in wrong}))
        sentences.append(f"{plural(len(wrong), 'result')} of {who} failed the check and got no number.")
    if len(best) and best["disturbed"].mean() > 0.5:
        sentences.append("Other programs used the cores during most of these cases: the ratios are worth little.")
    return " ".join(filter(None, sentences))


def _not_faster(cases: pd.DataFrame) -> str:
    """Name cases, the worst first, with how many times faster ours is than the fastest other."""
    found = [
        f"{case.case} {ratio(case._asdict())} {name(case.rival)}" for case in cases.sort_values("value").itertuples()
    ]
    more = [f"{len(found) - NAMED} more"] if len(found) > NAMED else []
    return f"Not faster: {'; '.join(found[:NAMED] + more)}." if found else ""


def _alone(rows: Sequence[dict]) -> str:
    """Count the cases in which whoever else ran was hopeless, and so has no interval."""
    alone = 0
    for race in races.of([row for row in rows if row["kind"] == "time"]):
        others = [row for row in race["rows"] if not _ours(row) and not row["wrong"]]
        ours = [row for row in race["rows"] if _ours(row) and not row["wrong"]]
        alone += bool(ours and others and all(row.get("once") for row in others))
    return f"In {plural(alone, 'more case')} whoever else ran was called once, so slow is it." if alone else ""


def _verdicts(rows: Sequence[dict]) -> str:
    dtypes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "parity":
            dtypes[row["verdict"]][row["backend"]].append(row["dtype"])
    parts = []
    for verdict in ("DIFFERENT", "UNSURE", "PARITY"):
        groups = defaultdict(list)
        for backend, of in sorted(dtypes[verdict].items(), key=lambda item: rank(item[0])):
            groups[listed(of)].append(backend)
        parts += [f"{verdict} in {of}: {', '.join(backends)}" for of, backends in groups.items()]
    return "; ".join(parts) + "." if parts else "No parity verdicts yet."


def _controls(rows: Sequence[dict]) -> str:
    controls = [row for row in rows if row["kind"] == "control"]
    blind = [f"{row['control']} ({row['dtype']}) {row['verdict']}" for row in controls if row["verdict"] != "DIFFERENT"]
    if blind:
        return f"The ladder is blind: {listed(blind)}."
    return f"All {plural(len(controls), 'deliberate fault')} came out DIFFERENT." if controls else ""


def gains(rows: Sequence[dict]) -> pd.DataFrame:
    """Return a line per case of our kernels and thing it was raced against: how many times faster it was, and interval.

    Columns: level, case, backend, disturbed, against (a baseline, or BEST, the fastest other contender of the race),
    rival (who that is), value, low, high. Cases of the contest are a level of their own: other people's packages, each
    in its own process, the fastest of ours against them. Other people's whole layers are not among them: see
    `families`.
    """
    lines = []
    for race in races.of([row for row in rows if row["kind"] == "time" and row["routing"] != OWN]):
        right = [row for row in race["rows"] if not row["wrong"]]
        others = [row for row in right if not _ours(row)]
        best = min(others, key=lambda row: row["figures"]["time_us_median"], default={"contender": None})
        for row in filter(_ours, right):
            rivals = {title: base for base, title in BASELINES.items()} | {BEST: best["contender"]}
            what = (race["level"], f"{race['title']}, {row['model']}", row["contender"], row["figures"]["disturbed"])
            lines += [
                (*what, title, rival, *(r[key] for key in ("value", "low", "high")))
                for title, rival in rivals.items() if (r := row["speedups"].get(rival))
            ]  # fmt: skip
    for race in races_of([row for row in rows if row["kind"] == "contest"]):
        ours, best = fastest(race, ours=True), fastest(race, ours=False)
        if ours and best and (r := speedup(ours, best)):
            backend, disturbed = ours["contender"].removesuffix("_packed"), ours["figures"]["disturbed"]
            what = ("contest", f"contest {ours['race']}", backend, disturbed, BEST, best["contender"])
            lines.append((*what, r["value"], r["low"], r["high"]))
    return pd.DataFrame(lines, columns=GAIN_COLUMNS)


def families(rows: Sequence[dict]) -> list[tuple[str, str, str, str]]:
    """Return a line per layer or block of another family's model: what, how, the time of ours, and how many times
    faster it is than each other way, with intervals. A case of ours that is wrong says so."""
    lines = []
    for race in races.of([row for row in rows if row["kind"] == "time" and row["routing"] == OWN]):
        first = race["rows"][0]
        what = f"{first['model']}, {LEVELS[first['level']].removeprefix('MoE ')}"
        how = f"{MODES[first['mode']]}, {first['dtype']}, T={first['T']}, {plural(first['threads'], 'thread')}"
        titles = {row["contender"]: row["title"] for row in race["rows"]}
        for row in filter(_ours, race["rows"]):
            against = "; ".join(f"{ratio(value)} {titles[other]}" for other, value in row["speedups"].items())
            star = "*" if row["figures"].get("disturbed") else ""
            ms = (
                f"wrong: {row['wrong']}"
                if row["wrong"]
                else f"{figure(row['figures']['time_us_median'] / 1e3)} ms{star}"
            )
            lines.append((what, how, f"{row['contender']} {ms}", against))
    return lines


def _ours(row: dict) -> bool:
    return row["contender"].removesuffix("_graph").removesuffix("_packed") in ONLY_ON


def levels(found: pd.DataFrame) -> list[dict]:
    """Return per level and backend of ours the geometric mean against each baseline, its range and number of cases.

    Means are taken over cases of one level only: a mean over a room and a training step means nothing.
    """
    order = [*LEVELS, "contest"]
    out = []
    groups = found.groupby(["level", "backend"], sort=False)
    for (level, backend), cases in sorted(groups, key=lambda item: order.index(item[0][0])):
        cells = {
            against: {"mean": float(np.exp(np.log(values).mean())), "least": values.min(), "most": values.max(),
                      "n": len(values)}
            for against, values in cases.groupby("against")["value"]
        }  # fmt: skip
        disturbed = int(cases.loc[cases["against"] == BEST, "disturbed"].sum())
        title = "layer, contest" if level == "contest" else LEVELS[level]
        out.append(
            {
                "title": title,
                "backend": backend,
                "cells": cells,
                "disturbed": disturbed,
                "n": max(cell["n"] for cell in cells.values()),
            }
        )
    return out


def backends(rows: Sequence[dict]) -> list[dict]:
    """Return per backend what ran it here, in which version, where it is verified, and why it did not run.

    `label` is NOT_YET where neither moe_kernels/verified.json nor these rows know it on any hardware.
    """
    run = next((row for row in reversed(rows) if row["kind"] == "run"), None)
    timed = [row for row in rows if row["kind"] == "time"]
    verified = json.loads(VERIFIED.read_text())
    out = []
    for info in run["backends"] if run else []:
        mine = [row for row in timed if row["contender"] == info["name"] and row["figures"]]
        places = list(dict.fromkeys(where(row) for row in mine))
        known = verified.get(info["name"], [])
        out.append({
            "name": info["name"], "places": places, "version": version(info["name"], (mine or [run])[-1]),
            "verified": known, "reason": "" if info["available"] else info["reason"],
            "label": "" if known or places else NOT_YET,
        })  # fmt: skip
    return out


def where(row: dict) -> str:
    """Name the machine of a row: the GPU of a case on a GPU, else the CPU with the level of its kernels."""
    machine = row["machine"]
    if row["device"] == "cuda":
        return machine["gpu"]
    return f"{machine['cpu']} {machine['isa']}, {plural(row['threads'], 'thread')}"


def version(backend: str, row: dict) -> str:
    """Return the package that computes: torch for its own code, triton for what it compiles, else this project."""
    package = {"grouped": "torch", "eager": "torch", "triton": "triton"}.get(backend, store.DISTRIBUTION)
    commit = f" ({row['commit'][:10]})" if package == store.DISTRIBUTION and row["commit"] else ""
    return f"{package} {row['versions'][package]}{commit}" if package in row["versions"] else ""


def spent(rows: Sequence[dict]) -> dict:
    """Return how long each stage of a run took, in order (`spent`), and all of them, in a sentence (`took`)."""
    stages = {row["stage"]: row["stage_s"] for row in rows if "stage" in row}
    asked = next((f" of {row['minutes']:g} minutes" for row in rows if row.get("minutes")), "")
    return {"spent": list(stages.items()), "took": f"{sum(stages.values()):.0f} s{asked}"}


def fewer(paces: Sequence[dict]) -> list[str]:
    """Say in which dtypes images rest on fewer samples than were asked for."""
    return [
        f"{row['dtype']}: {row['samples']} samples instead of {row['asked']} for time, "
        f"{figure(row['sample_s'])} s each in plain torch"
        for row in paces
        if row["samples"] < row["asked"]
    ]
