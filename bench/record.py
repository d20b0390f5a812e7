"""Keep a run for good: its rows under results/, and what they prove in moe_kernels/verified.json."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench import store

ROOT = Path(__file__).parents[1]


def record(report: Path, root: Path = ROOT) -> Path:
    """Copy report/rows.jsonl to results/ and note per backend the machine and dtypes on which it had PARITY.

    Args:
        report: folder of a finished `bench run`.
        root: the checkout.
    Returns: the new file, results/DATE_CPU-ISA_COMMIT.jsonl.
    Raises: ValueError for rows of a dirty tree or without a commit, for wrong cases, and for a run without parity rows:
        a committed figure names the commit that gives it again.
    """
    rows = store.read(report / "rows.jsonl")
    start = next((row for row in rows if row["kind"] == "run"), None)
    if start is None or start["commit"] is None or any(row.get("dirty") for row in rows):
        raise ValueError(f"{report}: rows of a dirty tree or of no commit, expected a run of a clean checkout")
    wrong = [row["case"] for row in rows if row.get("wrong")]
    if wrong:
        raise ValueError(f"{report}: {wrong[0]} is wrong, expected only verified cases")
    passed = [row for row in rows if row["kind"] == "parity" and row["verdict"] == "PARITY"]
    if not passed:
        raise ValueError(f"{report}: no backend has PARITY, expected a finished run")
    machine = f"{start['machine']['gpu'] or start['machine']['cpu']} {start['machine']['isa']}"
    name = f"{start['date'][:10]}_{re.sub(r'[^A-Za-z0-9]+', '-', machine)}_{start['commit'][:10]}.jsonl"
    target = root / "results" / name
    target.write_text((report / "rows.jsonl").read_text())
    _note(root / "moe_kernels" / "verified.json", passed, f"{machine}, {start['date'][:10]}")
    return target


def _note(path: Path, passed: list[dict[str, Any]], where: str) -> None:
    verified = json.loads(path.read_text())
    for backend in {row["backend"] for row in passed}:
        dtypes = sorted({row["dtype"] for row in passed if row["backend"] == backend})
        machine = where.rsplit(",", 1)[0]
        others = [entry for entry in verified.get(backend, []) if not entry.startswith(f"{machine},")]
        verified[backend] = sorted([*others, f"{where}: {', '.join(dtypes)}"])
    path.write_text(json.dumps(verified, indent=2, sort_keys=True) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m bench record`."""
    parser.add_argument("report", type=Path, nargs="?", default=Path("report"), help="folder of a finished run")


def main(args: argparse.Namespace) -> int:
    """Record a run and print where."""
    print(f"recorded in {record(args.report)}")
    return 0
