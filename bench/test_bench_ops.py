"""pytest --benchmark: the four rooms. -k filters by words of the case id; MOE_BENCH_SIZE=tiny|small|full."""

from __future__ import annotations

import pytest

from bench.instrument.cases import all_cases, select

pytestmark = pytest.mark.benchmark(max_time=0.1, min_rounds=5, warmup=False)


@pytest.mark.parametrize("case", select(all_cases(), level="op"), ids=str)
def test_op(case, time_case):
    time_case(case)
