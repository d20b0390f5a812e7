"""Measurements as JSON lines: where they were taken, how, and the numbers; read back with every doubt spoken out.

The fields are described in results/README.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.instrument.outputs import command, without_paths

SCHEMA = 2
MAX_SAMPLES = 200  # per row; more tell nothing new about a median
REQUIRED = ("schema", "kind", "date", "commit", "dirty", "command", "machine", "versions")
DISTRIBUTION = "dit-moe-kernels"
PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "pytest-benchmark")
ROOT = Path(__file__).parents[2]
GRAMMAR = ("and", "or", "not", "(", ")")  # of -k


def row(kind: str, **fields) -> dict:
    """Make one row: fields plus schema, kind, date, commit, dirty, command, machine, versions; no path of this machine.

    Raises: ValueError for a kind that is no word, or a field that provenance fills in.
    """
    if not re.fullmatch(r"[a-z_]+", kind):
        raise ValueError(f"kind: got {kind!r}, expected a lower-case word")
    taken = sorted(set(fields) & set(REQUIRED))
    if taken:
        raise ValueError(f"fields: got {', '.join(taken)}, which every row already has from its provenance")
    head = {"schema": SCHEMA, "kind": kind, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    shared = {**head, **without_paths(fields), "command": command()}
    return {**shared, **commit(), "machine": machine(), "versions": versions()}


def append(path: str | Path, row: dict) -> None:
    """Write one row at the end of a file, made if need be, in one piece: an interrupted run keeps what it has.

    Raises: ValueError for NaN or infinity (a missing figure is null, never NaN), and for a file of something else.
    """
    text = json.dumps(row, allow_nan=False, separators=(",", ":"))
    path = check_rows_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_rows_file(path: str | Path) -> Path:
    """Return a path that rows may be added to, or that may be forgotten; ValueError for a file of something else."""
    path = Path(path)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                raise ValueError(f"{path}: expected a file of rows (JSON lines) or none, got a file of something else")
    return path


def read(path: str | Path) -> list[dict]:
    """Read all rows of a file.

    Raises: ValueError naming file, line, what came and what was expected: no such file, an empty file, a truncated or
        foreign line, another schema version, a missing field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file of rows (JSON lines), got {'a directory' if path.is_dir() else 'none'}"
        )
    rows = [
        _parse(line, f"{path}:{n}")
        for n, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if line
    ]
    if not rows:
        raise ValueError(f"{path}: expected rows (JSON lines), got an empty file")
    return rows


def recover(path: str | Path) -> list[dict]:
    """Read the rows of an interrupted run; without a file there are none, and half a last line is cut off."""
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return read(path) if whole.strip() else []


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object, got a broken or truncated line ({error.msg})") from None
    if not isinstance(row, dict) or "schema" not in row:
        raise ValueError(f"{where}: expected a row with a schema version, got {line[:60]!r}")
    if row["schema"] == 1:
        row = upgraded(row)
    if row["schema"] != SCHEMA:
        raise ValueError(
            f"{where}: got schema version {row['schema']!r}, expected 1 or {SCHEMA}; measure again with this version"
        )
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(
            f"{where}: expected the field{'s' * (len(missing) > 1)} {', '.join(missing)}, got {sorted(row)}"
        )
    return row


def upgraded(row: dict) -> dict:
    """Return a row of schema 1 as one of schema 2, which has one form for everything that was timed."""
    words, versions = str(row.get("case")).split("-"), row.get("versions", {})
    if "moe-kernels" in versions:  # what the distribution was called
        row = {**row, "versions": {DISTRIBUTION: versions["moe-kernels"], **versions}}
    if row.get("kind") not in ("time", "contest") or len(words) != 8:
        return {**row, "schema": 2}
    level, contender, model, routing, sizes, dtype, mode, where = words
    gpu = where == "cuda"
    told = {
        "race": "-".join([level, "any", *words[2:]]), "level": level, "model": model, "routing": routing,
        "T": int(sizes.split("_")[0][1:]), "dtype": dtype, "mode": mode, "threads": 1 if gpu else int(where[1:]),
        "device": "cuda" if gpu else "cpu", "contender": contender, "title": contender,
        "ours": contender.split("_")[0] in ("native", "triton", "cuda", "grouped", "eager"), 
        "bound": 8.0 if "contender" in row and not row.get("ours", True) else 2.0,  # of `bench gpu`
        "reason": None, "wrong": None, "raised": None, "version": row.get("library", ""), "figures": {}, "errors": {},
        "samples_us": [],
        "speedups": {},
    }  # fmt: skip
    slower = {  # a row of the contest said how many times faster ours were
        name: {"value": 1 / r["value"], "low": 1 / r["high"], "high": 1 / r["low"]}
        for name, r in row.get("speedup_of", {}).items()
    }
    gone = ("backend", "library", "speedup_of", "rate", "rate_unit", "per_call", "what")
    kept = {key: value for key, value in row.items() if key not in gone}
    return {**told, **kept, "speedups": row.get("speedups") or slower, "schema": 2}


def thin(samples: Sequence[float], limit: int = MAX_SAMPLES) -> list[float]:
    """Keep at most limit samples, evenly spaced in time, in order."""
    n = len(samples)
    return [samples[i * n // limit] for i in range(limit)] if n > limit else list(samples)


def commit() -> dict:
    """Return {"commit": hash or None, "dirty": bool or None}: tracked files only; None outside a git checkout."""
    revision = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": revision, "dirty": None if changes is None else bool(changes)}


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """Return what git says in a checkout; None where it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def machine() -> dict:
    """Describe the machine: the fields of results/README.md."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    kernels, torch_isa = extension(), torch.backends.cpu.get_cpu_capability().lower()
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "isa": kernels.isa_level() if kernels else torch_isa,  # MOE_KERNELS_ISA forces one
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "caches_kib": native_caches(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "gpu": gpu,
        "driver": _proc_field("/proc/driver/nvidia/version", "NVRM version") if gpu else None,
    }


def extension() -> Any:
    """Return the module of the compiled kernels, None where they are not built."""
    import torch  # noqa: F401  the extension shares torch's OpenMP runtime, which must be loaded first

    try:
        from moe_kernels import _C
    except ImportError:
        return None
    return _C


def native_caches() -> list[int] | None:
    """Return the KiB of L1, L2 and L3 that the compiled kernels reckon with, None where they are not built."""
    sizes = getattr(extension(), "blocking", dict)()  # an older revision in a race has none
    return [sizes[cache] // 1024 for cache in ("l1", "l2", "l3")] if sizes else None


def _proc_field(path: str, name: str) -> str | None:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


@cache
def versions() -> dict:
    """Return the versions of Python, this project and what it computes with; packages not installed are left out."""
    found = {"python": platform.python_version()}
    for package in (DISTRIBUTION, *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def openmp_runtimes() -> list[str]:
    """Return the OpenMP runtimes mapped into this process; more than one means pools that fight for the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(file for file in files if re.match(r"lib(g|i|)omp", Path(file).name))


def keyword_filter(expression: str) -> Callable[[str], bool]:
    """Compile an expression like pytest's -k: words (part of the id, any case), and, or, not, parentheses; "" takes
    all.

    Raises: ValueError for what cannot be read.
    """
    tokens = re.findall(r"[()]|[^\s()]+", expression)
    if not tokens:
        return lambda text: True
    words = [t.lower() for t in tokens if t not in GRAMMAR]
    source = " ".join(t if t in GRAMMAR else "w[%d]" for t in tokens) % tuple(range(len(words)))
    try:
        tree = ast.parse(source, "-k", "eval")
        if any(isinstance(node, ast.Call) for node in ast.walk(tree)):
            raise SyntaxError("a word before a parenthesis")
        code = compile(tree, "-k", "eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"-k: got {expression!r}, expected words with and, or, not and parentheses") from None
    return lambda text: bool(eval(code, {"__builtins__": {}, "w": [word in text.lower() for word in words]}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def main(args: argparse.Namespace) -> int:
    """Print machine, threads, OpenMP runtimes, versions, commit, backends; return 1 when two runtimes are mapped."""
    import torch

    import moe_kernels

    torch.ones(64, 64) @ torch.ones(64, 64)
    backends = [info._asdict() for info in moe_kernels.backends()]
    facts = {
        "machine": machine(),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "openmp": openmp_runtimes(),
        "versions": versions(),
        "source": commit(),
        "backends": backends,
    }
    two_pools = len(facts["openmp"]) > 1
    if args.json:
        print(json.dumps(facts, indent=2))
        return int(two_pools)
    for title in ("machine", "threads", "versions", "source"):
        print(f"{title}: " + ", ".join(f"{k} {v}" for k, v in facts[title].items() if v is not None))
    print(f"openmp: {', '.join(facts['openmp']) or 'none'}{' <- two pools fight for the same cores' * two_pools}")
    print("backends:")
    for info in backends:
        state = "available" if info["available"] else f"not available: {info['reason']}"
        print(f"  {info['name']:<8} {state}; verified on {', '.join(info['verified']) or 'nothing yet'}")
    return int(two_pools)
