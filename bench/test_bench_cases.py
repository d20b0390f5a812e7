"""pytest --benchmark: every case. -k filters by words of the case id; MOE_BENCH_SIZE=tiny|small|full|batches."""

from __future__ import annotations

import pytest

from bench.instrument.cases import all_cases


@pytest.mark.benchmark(max_time=0.1, min_rounds=5, warmup=False)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case(case, time_case):
    time_case(case)
