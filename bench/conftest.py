"""The fixture behind the benchmarks: a case, verified against the oracle, then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from bench.instrument import measure, workloads
from bench.instrument.cases import Case


@pytest.fixture
def time_case(benchmark) -> Callable[[Case], None]:
    """Return a function that verifies a case and times it: a wrong result fails and prints no speed."""

    def run(case: Case) -> None:
        if reason := workloads.why_not(case):
            pytest.skip(reason)
        work = workloads.build(case)
        with measure.threads(case.threads):
            check = workloads.check(case, work.named(work.run()))
            assert not check.wrong, f"{case}: {check.wrong}"
            benchmark.group = replace(case, backend="any").id
            benchmark(work.run)
        worst = max(check.errors.values(), key=lambda e: e["ours"] / (e["torch"] + 1e-30))
        benchmark.extra_info.update(case=case.id, flops=case.flops, bytes=case.bytes, errors=check.errors)
        benchmark.extra_info["error_ratio"] = worst["ours"] / worst["torch"] if worst["torch"] else 0.0
        if benchmark.stats:
            benchmark.extra_info.update(rates(case, benchmark.stats.stats.median))

    return run


def rates(case: Case, seconds: float) -> dict[str, float | None]:
    """Return gflops, gbps and the percentage of the measured peak of the case's dtype."""
    gflops, ceiling = case.flops / seconds / 1e9, peak(case.dtype, case.threads)
    share = 100 * gflops / ceiling if ceiling and case.flops else None
    return {"gflops": gflops, "gbps": case.bytes / seconds / 1e9, "peak_pct": share}


@cache
def peak(dtype: str, threads: int) -> float | None:
    return measure.peak_gflops(dtype, threads, 0.1)
