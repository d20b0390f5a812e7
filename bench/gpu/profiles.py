"""Which kernels the time goes to: torch's profiler always, Nsight Compute's sections of the slowest where it is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu import counters
from bench.instrument import store, workloads
from bench.instrument.cases import Case
from bench.instrument.race import facts

CALLS = 5
SLOWEST = 4
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats"),
    "SourceCounters",
)
# By default it locks the clocks of a machine that is not ours, and what else was measured ran without.
NCU = ("ncu", "--clock-control", "none", "--target-processes", "all", "--import-source", "yes")
_OURS = re.compile(r"(\w+)$|(?:void )?moe::cuda::(?:\(anonymous namespace\)::|\w+::)*(\w+)[<(].*")  # Triton's, C++
ONE_CALL = "from bench.gpu import profiles; profiles.one_call({id!r})"


def profile(case: Case) -> Iterator[dict]:
    """Yield a row of kind "profile" for each kernel of a case (on a CPU: operator), slowest first."""
    with workloads.arithmetic(case.dtype):
        run = workloads.build(case).run
        run()
        seen = counters.events(lambda: [run() for _ in range(CALLS)], case.device)
    times: dict[str, list[float]] = defaultdict(list)
    for event in seen:
        on_gpu = case.device == "cuda"
        times[event.name].append(event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
    total = sum(map(sum, times.values()))
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        yield store.row(
            "profile",
            case=case.id,
            **facts(case),
            kernel=name[:200],
            calls=len(each) / CALLS,
            us=sum(each) / CALLS,
            share=sum(each) / total if total else 0.0,
        )


def table(rows: list[dict], limit: int = 12) -> str:
    """Return the slowest kernels of a case in lines."""
    names = [_plain(row["kernel"])[:80] for row in rows]
    figures = [f"{row['us']:>10.1f} us {row['share']:>6.1%} {row['calls']:>5.1f} x" for row in rows]
    lines = [f"{figure}  {name}" for figure, name in zip(figures, names, strict=True)]
    return "\n".join([rows[0]["case"], *lines[:limit]])


def _plain(kernel: str) -> str:
    """Return a kernel's name without the namespaces that all of ours share."""
    return re.sub(r"^void |moe::cuda::|\(anonymous namespace\)::", "", kernel)


def base_name(kernel: str) -> str | None:
    """Return what Nsight Compute calls a kernel of ours, None for others: torch's are C++ templates in namespaces."""
    match = _OURS.match(kernel)
    return match and (match[1] or match[2])


def sections(case: Case, kernels: list[str], log: Path, seconds: float) -> str | None:
    """Append Nsight Compute's sections of the slowest kernels to a log; return why there are none.

    Args:
        kernels: names, slowest first. seconds: after which the profiler is stopped.
    """
    if shutil.which("ncu") is None:
        return "ncu is not on PATH"
    wanted = [name for name in map(base_name, kernels) if name][:SLOWEST]
    if not wanted:
        return "none of our kernels was seen"
    names = f"regex:^({'|'.join(dict.fromkeys(wanted))})$"
    chosen = [word for section in SECTIONS for word in ("--section", section)]
    ncu = [*NCU, "--kernel-name", names, "--launch-count", str(2 * len(wanted)), *chosen]
    call = [sys.executable, "-c", ONE_CALL.format(id=case.id)]
    with log.open("ab") as file:
        try:
            code = subprocess.run([*ncu, *call], stdout=file, stderr=file, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"ncu took more than {seconds:.0f} s"
    return f"ncu ended with exit code {code}: {log.name}" if code else None


def one_call(case: str) -> None:
    """Run a case twice: what Nsight Compute watches."""
    case = Case.from_id(case)
    with workloads.arithmetic(case.dtype):
        run = workloads.build(case).run
        run()
        run()
        if case.device == "cuda":
            torch.cuda.synchronize()
