"""Keep what was measured: rows under results/, and what a run or a GPU proves in moe_kernels/verified.json."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench.gpu.command import SOURCES, bad
from bench.images import routers
from bench.images.dmcmc.command import FILE as CHAINS
from bench.instrument import ledger, store

GPU_ROWS = "rows_cuda_default.jsonl"
ROWS = {  # as they are
    "peers.jsonl": "peers",
    CHAINS: "dmcmc",
    routers.FILE: "routers",
    "family.jsonl": "family",
    "overhead.jsonl": "overhead",
}
ROOT = store.ROOT


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
    target = root / "results" / f"{_name(start)}.jsonl"
    target.write_text((report / "rows.jsonl").read_text())
    _note(root / "moe_kernels" / "verified.json", passed, f"{_machine(start)}, {start['date'][:10]}")
    return target


def record_rows(path: Path, root: Path = ROOT) -> Path:
    """Copy one of the files of ROWS to results/DATE_CPU-ISA_COMMIT_NAME.jsonl and return that path.

    Raises: ValueError for rows of a dirty tree, of no commit or of several, and where one of ours is wrong; other
        people's wrong results are part of the answer.
    """
    name, rows = ROWS[path.name], store.read(path)
    commits = {row["commit"] for row in rows}
    if any(row["dirty"] for row in rows) or None in commits or len(commits) > 1:
        raise ValueError(f"{path}: expected rows of one commit and a clean checkout: measure again, with another --out")
    if wrong := [row["case"] for row in rows if row.get("wrong") and row.get("ours", True)]:
        raise ValueError(f"{path}: {wrong[0]} is wrong, expected only verified cases of ours")
    target = root / "results" / f"{_name(rows[0])}_{name}.jsonl"
    target.write_text(path.read_text())
    return target


def record_gpu(folder: Path, root: Path = ROOT) -> Path:
    """Copy what `bench gpu` wrote to results/DATE_GPU-ISA_COMMIT_gpu.jsonl and return that path.

    A machine that is lent has no git: its rows get the commit of this checkout, whose sources they must name. Rows of
    other sources, from before something was mended, are left out. The dtypes of the layers that were timed go to
    moe_kernels/verified.json, as those of a run do.
    Raises: ValueError for a checkout that is not clean, no row of its sources, one of ours that failed or is wrong.
    """
    source, commit = ledger.source_digest(SOURCES), store.commit()
    if commit["commit"] is None or commit["dirty"]:
        raise ValueError(f"{root}: got a dirty tree or no commit, expected a clean checkout")
    rows = [row for row in store.read(folder / GPU_ROWS) if row["source"] == source]
    if not rows:
        raise ValueError(f"{folder / GPU_ROWS}: got no row of the sources {source}, expected a run of this checkout")
    if failed := [row for row in rows if bad(row)]:
        raise ValueError(f"{folder / GPU_ROWS}: {failed[0].get('case') or failed[0]['stage']} failed or is wrong")
    target = root / "results" / f"{_name(rows[0] | commit)}_gpu.jsonl"
    target.write_text("".join(json.dumps(row | commit, separators=(",", ":")) + "\n" for row in rows))
    passed = [row | {"backend": row["contender"]} for row in rows if _verified_layer(row)]
    _note(root / "moe_kernels" / "verified.json", passed, f"{_machine(rows[0])}, {rows[0]['date'][:10]}")
    return target


def _verified_layer(row: dict[str, Any]) -> bool:
    """Tell whether a row timed the layer of one of our backends, which was verified against the oracle before."""
    return row["kind"] == "time" and row["level"] == "layer" and row["ours"] and bool(row["figures"])


def _machine(row: dict[str, Any]) -> str:
    return f"{row['machine']['gpu'] or row['machine']['cpu']} {row['machine']['isa']}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['date'][:10]}_{re.sub(r'[^A-Za-z0-9]+', '-', _machine(row))}_{row['commit'][:10]}"


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
    parser.add_argument(
        "report", type=Path, nargs="?", default=Path("report"), help="folder of what was measured (default: report)"
    )


def main(args: argparse.Namespace) -> int:
    """Record the run, the files of ROWS, what a GPU gave, or all of them, and print where."""
    kept, gpu = [args.report / name for name in ROWS if (args.report / name).exists()], args.report / GPU_ROWS
    if (args.report / "rows.jsonl").exists() or not (kept or gpu.exists()):
        print(f"recorded in {record(args.report)}")
    for path in kept:
        print(f"recorded in {record_rows(path)}")
    if gpu.exists():
        print(f"recorded in {record_gpu(args.report)}")
    return 0
