"""pytest --benchmark: the fused layer on routing presets, the transformer block, whole training and sampling steps."""

from __future__ import annotations

import pytest

from bench.instrument.cases import all_cases, select

pytestmark = pytest.mark.benchmark(max_time=0.1, min_rounds=5, warmup=False)


@pytest.mark.parametrize("case", select(all_cases(), level="layer"), ids=str)
def test_layer(case, time_case):
    time_case(case)


@pytest.mark.parametrize("case", select(all_cases(), level="block"), ids=str)
def test_block(case, time_case):
    time_case(case)


@pytest.mark.parametrize("case", select(all_cases(), level="step"), ids=str)
def test_step(case, time_case):
    time_case(case)
