"""The committed rows over the commits: a line per case.

A machine is not as fast on every day. Where a case was raced against other people's code, which does not change, its
times are divided by how the median of those moved since the first commit; the page says where there was none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bench.instrument import store
from bench.instrument.outputs import check_targets
from bench.page.drawings import band
from bench.page.render import render

RESULTS = store.ROOT / "results"
SERIES = ["case", "machine", "clock"]
SIZE = 600.0, 120.0


def table(rows: Sequence[dict], expression: str = "", root: Path = store.ROOT) -> pd.DataFrame:
    """Return a line per case, machine and commit (the last measurement): times in us, ordered by the commits' dates.

    Columns: case, race, ours, machine, clock, commit, when, median, p20, p80.
    Raises: ValueError when no timed row, or none that the expression selects, names its commit.
    """
    wanted = store.keyword_filter(expression)
    times = _commit_times(root)
    lines = [
        {
            "case": row["case"], "race": row["race"], "ours": row["ours"], "commit": row["commit"],
            "machine": f"{row['machine']['gpu'] or row['machine']['cpu']} {row['machine']['isa']}",
            "clock": row["figures"]["clock"], "when": times.get(row["commit"], pd.Timestamp(row["date"]).timestamp()),
            **{name: row["figures"][f"time_us_{name}"] for name in ("median", "p20", "p80")},
        }
        for row in rows
        if row["kind"] in ("time", "contest") and row["figures"] and row["commit"] and not row["figures"]["disturbed"]
    ]  # fmt: skip
    frame = pd.DataFrame(
        lines, columns=["case", "race", "ours", "commit", "machine", "clock", "when", "median", "p20", "p80"]
    )
    if not (frame["case"].map(wanted) & frame["ours"]).any():
        raise ValueError(f"-k {expression!r} selects none of {len(frame)} timed rows with a commit")
    chosen = frame["case"].map(wanted) | ~frame["ours"]  # the others say how the machine moved
    return frame[chosen].drop_duplicates([*SERIES, "commit"], keep="last").sort_values("when", kind="stable")


def series(frame: pd.DataFrame) -> list[dict]:
    """Return per case of ours with at least two commits its points.

    `peers` is whether the times are relative to peers of the same race, at every one of the commits.
    """
    out = []
    for (case, machine, clock), points in frame[frame["ours"]].groupby(SERIES, sort=False):
        if len(points) < 2:
            continue
        drift = _drift(points, frame[~frame["ours"] & (frame["machine"] == machine) & (frame["clock"] == clock)])
        scaled = points[["median", "p20", "p80"]].div(1.0 if drift is None else drift, axis=0)
        out.append({
            "case": case, "machine": machine, "clock": clock, "peers": drift is not None,
            "commits": list(points["commit"]), **{name: list(scaled[name]) for name in scaled},
        })  # fmt: skip
    return sorted(out, key=lambda s: s["case"])


def _drift(points: pd.DataFrame, others: pd.DataFrame) -> np.ndarray | None:
    """Return how much slower the machine was at each commit than at the first, by the peers that ran at all of them."""
    times = others[others["race"] == points["race"].iloc[0]].pivot(index="commit", columns="case", values="median")
    times = times.reindex(points["commit"]).dropna(axis=1)
    return None if times.empty else (times / times.iloc[0]).median(axis=1).to_numpy()


def page(found: Sequence[dict], single: int) -> str:
    """Return the page; `single` cases were measured at one commit only."""
    drawn = [s | band(s["p20"], s["median"], s["p80"], SIZE, 1.05 * max(s["p80"])) for s in found]
    return render("history.html.j2", series=drawn, single=single, size=SIZE)


def _commit_times(root: Path) -> dict[str, float]:
    """Return when each commit that git knows was made; nothing outside a checkout."""
    log = store.git("log", "--all", "--format=%H %ct", root=root) or ""
    return {commit: float(when) for commit, when in map(str.split, log.splitlines())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="row files (default: results/*.jsonl)")
    parser.add_argument("-k", metavar="EXPR", default="", help="words of the case id with and, or, not, ( )")
    parser.add_argument("--out", type=Path, default=Path("report/history.html"), help="default: report/history.html")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the series as JSON")


def main(args: argparse.Namespace) -> int:
    """Draw the history."""
    files = args.files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        raise ValueError(f"got no row file, and {RESULTS} has none; expected JSON lines as `bench record` writes them")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_targets({"--out": args.out, "--json": args.json}, {path.name: path for path in files})
    frame = table([row for path in files for row in store.read(path)], args.k)
    found = series(frame)
    single = int((frame[frame["ours"]].groupby(SERIES).size() < 2).sum())
    args.out.write_text(page(found, single), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(
        f"{len(found)} cases over {frame['commit'].nunique()} commits, {single} measured at one commit only: {args.out}"
    )
    return 0
