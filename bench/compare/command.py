"""The command: two row files, or two revisions built and raced here, and what to write about them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from bench.compare import duel, instructions, revisions, trial
from bench.compare.report import FAIL_ON, Report
from bench.compare.rows import compare
from bench.instrument import arguments, cases, store
from bench.instrument.outputs import check_targets, without_paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="row file (JSON lines) or git revision to compare against")
    parser.add_argument("head", metavar="HEAD", help="row file or git revision to judge")
    parser.add_argument("-k", metavar="EXPR", default="", help="words of the case id with and, or, not, ( )")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the verdicts as JSON")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write what is printed, for a pull request")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page")
    conditions = "; ".join(f"{name}: {what}" for name, what in FAIL_ON.items())
    parser.add_argument("--fail-on", choices=list(FAIL_ON), help=f"exit with 1 if {conditions}")
    group = parser.add_argument_group("revisions")
    group.add_argument("--size", choices=list(cases.SIZES), help="of the cases; default: MOE_BENCH_SIZE, or tiny")
    group.add_argument("--backend", default="native", choices=cases.BACKENDS, help="whose cases (default: native)")
    group.add_argument(
        "--seconds",
        type=arguments.positive,
        default=10.0,
        help="for the first look at a case; in doubt 30 times as long (default: 10)",
    )
    group.add_argument("--rows", metavar="FOLDER", type=Path, help="keep the rows of both sides there")


def main(args: argparse.Namespace) -> int:
    """Print the comparison as markdown and write what was asked for; 1 if the --fail-on condition holds."""
    files = [Path(name).exists() or name.endswith(".jsonl") for name in (args.base, args.head)]
    if files[0] != files[1]:
        raise ValueError(
            f"got {args.base} and {args.head}, a row file and a revision, expected two row files or two revisions"
        )
    given = {"BASE": Path(args.base), "HEAD": Path(args.head)} if files[0] else {}
    check_targets({f"--{name}": getattr(args, name) for name in ("json", "markdown", "html")}, given)
    report = compare(store.read(args.base), store.read(args.head), args.k) if files[0] else race(args)
    print(report.to_markdown())
    writers = {"json": lambda: json.dumps(report.to_json(), indent=2), "markdown": report.to_markdown}
    for name, write in (writers | {"html": report.to_html}).items():
        if target := getattr(args, name):
            target.write_text(write() + "\n", encoding="utf-8")
    return int(report.fails(args.fail_on))


def race(args: argparse.Namespace) -> Report:
    """Build both revisions, race the chosen cases and compare the rows.

    Raises: ValueError for an unknown revision, an uncommitted tree, or cases that nobody chose; OSError for a revision
        that does not build.
    """
    chosen = cases.select(cases.all_cases(args.size), args.k, backend=args.backend)
    base, head = (revisions.checkout(name) for name in (args.base, args.head))
    budget = replace(trial.Budget(), seconds=args.seconds, doubt_seconds=30 * args.seconds)
    found = duel.duel(base, head, chosen, budget)
    for side, checkout in (("base", base), ("head", head)):
        found.rows[side] += instructions.rows(checkout)
        for row in found.rows[side] if args.rows else ():
            store.append(args.rows / f"{side}.jsonl", row)
    report = judged(found, f"{base} against {head}, interleaved on one machine: {store.machine()['cpu']}")
    asked = ["-k", args.k, "--backend", args.backend, *(["--size", args.size] if args.size else [])]
    report.removed += sorted(set(revisions.case_ids(base, *asked)) - {case.id for case in chosen})
    return report


def judged(found: duel.Outcome, title: str) -> Report:
    """Turn a duel into a report, in which a case without a verdict says why."""
    report = compare(found.rows["base"], found.rows["head"], judged=found.verdicts)
    for case, why in found.missing.items():
        (report.reasons if case in report.new else report.skipped)[case] = without_paths(why)
    report.notes.append(title)
    return report
