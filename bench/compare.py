"""Judge two row files case by case; the headline is computed from the verdicts, never written by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import inner_loops, stats, store
from bench.cases import BACKENDS

KINDS = ("time", "contest")
MACHINE_KEYS = ("cpu", "isa", "gpu")  # times from machines that differ in these say nothing about the code
FAIL_ON = {
    "slower": "a case is SLOWER",
    "different": "a case is SLOWER or FASTER, or inner loops changed",
    "any": "a case is not SAME, or was added, removed or left out, or inner loops changed",
}
LEGEND = (
    f"speedup > 1: head is faster. Median ratio with {stats.LEVEL:.0%} bootstrap interval, Mann-Whitney p after Holm; "
    f"a change counts at p <= {stats.ALPHA:g}, beyond {stats.EFFECT:.0%}, and unless the peers of its race moved too."
)


@dataclass
class Report:
    """What two row files say about each other. `broken`: right in base, wrong in head, which is worse than slow."""

    verdicts: list[stats.Verdict]
    new: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    inner_loops: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {name: sum(v.verdict == name for v in self.verdicts) for name in stats.VERDICTS}

    @property
    def headline(self) -> str:
        """One line: what is broken, slower, faster, and how many cases that rests on."""
        parts = [f"{len(self.broken)} BROKEN"] if self.broken else []
        parts += [f"{n} {name}" for name in ("SLOWER", "FASTER", "UNSURE", "SAME") if (n := self.counts[name])]
        extra = [
            f"{len(x)} {name}"
            for name, x in (("new", self.new), ("removed", self.removed), ("left out", self.skipped))
            if x
        ] + ["inner loops changed"] * bool(self.inner_loops)
        return f"{', '.join(parts) or 'nothing comparable'} of {len(self.verdicts) + len(self.broken)} cases" + (
            f" ({', '.join(extra)})" if extra else ""
        )

    def fails(self, condition: str | None) -> bool:
        """Tell whether a --fail-on condition holds; a broken case fails every one of them."""
        if condition is None:
            return False
        seen = {v.verdict for v in self.verdicts}
        bad = {"slower": {"SLOWER"}, "different": {"SLOWER", "FASTER"}, "any": {"SLOWER", "FASTER", "UNSURE"}}[
            condition
        ]
        changed_set = condition == "any" and bool(self.new or self.removed or self.skipped)
        changed_code = condition != "slower" and bool(self.inner_loops)
        return bool(self.broken or seen & bad or changed_set or changed_code)

    def to_json(self) -> dict:
        return {
            "headline": self.headline,
            "counts": self.counts,
            "rows": [v.to_json() for v in self.verdicts],
            "new": self.new,
            "removed": self.removed,
            "broken": self.broken,
            "skipped": self.skipped,
            "inner_loops": self.inner_loops,
        }

    def to_markdown(self) -> str:
        """Write the headline, a table of what changed or is unsure, and the rest folded away."""
        loud = [v for v in self.verdicts if v.verdict in ("SLOWER", "FASTER")]
        quiet = [v for v in self.verdicts if v not in loud]
        lines = [f"**{self.headline}**", ""]
        lines += [f"- BROKEN `{case}`: {what}" for case, what in self.broken.items()]
        lines += [f"- inner loops changed: {what}" for what in self.inner_loops]
        lines += [*_table(sorted(loud, key=lambda v: v.speedup.value)), ""]
        if quiet:
            fold = f"<details><summary>{len(quiet)} cases unchanged or unsure</summary>"
            lines += [fold, "", *_table(quiet), "", "</details>"]
        for title, cases in (("new", self.new), ("removed", self.removed)):
            lines += [f"- {title}: `{case}`" for case in cases]
        lines += [*(f"- left out: `{case}`: {why}" for case, why in self.skipped.items()), "", LEGEND]
        return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))


def _table(verdicts: list[stats.Verdict]) -> list[str]:
    if not verdicts:
        return []
    head = ["| verdict | case | speedup | p | n |", "|---|---|---|---|---|"]
    return head + [f"| {v.verdict} | `{v.case}` | {v.speedup} | {v.p:.2g} | {v.speedup.n} |" for v in verdicts]


def compare(base: list[dict], head: list[dict], expression: str = "") -> Report:
    """Compare the timed cases of two lists of rows; of a case measured twice the last row counts.

    Args:
        base, head: rows as `store.read` returns them; used are those of the kinds "time" and "contest", and the last
            of kind "inner_loops", whatever the machine and the expression: the file holds the loops of all levels.
        expression: cases to compare, as pytest's -k.
    Returns:
        a Report. Rows of another machine (CPU model, ISA level, GPU), without samples or taken on
            cores that others used are left out and named.
    Raises: ValueError when the expression selects nothing, or no case is in both files, on the same machine, with
        samples.
    """
    wanted = store.keyword_filter(expression)
    sides = [{r["case"]: r for r in rows if r["kind"] in KINDS and wanted(r["case"])} for rows in (base, head)]
    if not sides[0] and not sides[1]:
        raise ValueError(
            f"-k {expression!r} selects none of the timed rows" if expression else "no rows of kind 'time' or 'contest'"
        )
    report = Report(
        [], new=sorted(sides[1].keys() - sides[0].keys()), removed=sorted(sides[0].keys() - sides[1].keys())
    )
    pairs = {}
    for case in sides[0].keys() & sides[1].keys():
        a, b = sides[0][case], sides[1][case]
        if b.get("wrong") and not a.get("wrong") and b.get("ours", True):
            report.broken[case] = b["wrong"]
        elif why := _incomparable(a, b):
            report.skipped[case] = why
        else:
            pairs[case] = (a["samples_us"], b["samples_us"])
    if not pairs and not report.broken:
        why = next(iter(report.skipped.values()), f"{len(sides[0])} cases in base, {len(sides[1])} others in head")
        raise ValueError(f"no comparable case: {why}")
    report.verdicts = stats.verdicts(dict(sorted(pairs.items())), _controls(pairs))
    _compare_inner_loops(report, base, head)
    return report


def _compare_inner_loops(report: Report, base: list[dict], head: list[dict]) -> None:
    last = [next((r for r in reversed(rows) if r["kind"] == "inner_loops"), None) for rows in (base, head)]
    if None in last:
        return
    reasons = [f"{name}: {row['reason']}" for name, row in zip(("base", "head"), last, strict=True) if row["reason"]]
    if reasons:
        report.skipped["inner loops"] = "; ".join(reasons)
    else:
        report.inner_loops = inner_loops.changes(*last)


def _controls(cases: Collection[str]) -> dict[str, list[str]]:
    """Return for every case the peers of its race: cases that differ in the backend alone, and that is a peer."""
    races = {case: (case.split("-")[0], *case.split("-")[2:]) for case in cases}
    backends = {case: (case.split("-")[1:2] or ["native"])[0] for case in cases}
    peers = [case for case, name in backends.items() if name not in BACKENDS and not name.startswith("native")]
    return {case: [p for p in peers if races[p] == race and p != case] for case, race in races.items()}


def _incomparable(a: Mapping, b: Mapping) -> str | None:
    for key in MACHINE_KEYS:
        if a["machine"].get(key) != b["machine"].get(key):
            return f"base was taken on {key} {a['machine'].get(key)}, head on {b['machine'].get(key)}"
    for name, row in (("base", a), ("head", b)):
        if not row.get("samples_us"):
            why = row.get("wrong") or row.get("reason")
            return f"{name} has no samples{': ' + why if why else ''}"
        if row["figures"].get("disturbed"):
            return f"{name} was disturbed: its threads had {row['figures'].get('cpu_share')} of their cores"
    if a["figures"].get("clock") != b["figures"].get("clock"):
        return f"base was taken by the {a['figures'].get('clock')} clock, head by {b['figures'].get('clock')}"
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="row file (JSON lines) to compare against")
    parser.add_argument("head", metavar="HEAD", help="row file to judge")
    parser.add_argument("-k", metavar="EXPR", default="", help="words of the case id with and, or, not, ( )")
    parser.add_argument("--json", metavar="FILE", help="also write the verdicts as JSON")
    conditions = "; ".join(f"{name}: {what}" for name, what in FAIL_ON.items())
    parser.add_argument("--fail-on", choices=list(FAIL_ON), help=f"exit with 1 if {conditions}")


def main(args: argparse.Namespace) -> int:
    """Print the comparison as markdown; return 1 if the --fail-on condition holds."""
    report = compare(store.read(args.base), store.read(args.head), args.k)
    print(report.to_markdown())
    if args.json:
        Path(args.json).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return int(report.fails(args.fail_on))
