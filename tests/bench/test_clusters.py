"""The cost model: parameters as known, its table on the page, what it says of extremes. Bytes: test_traffic.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.clusters import cost

PAGE = Path(__file__).parents[2] / "docs/many_machines.md"
XL, LARGEST = (cost.Sizes.of(name) for name in cost.MODELS.values())


def test_the_page_has_the_table_of_the_command():
    assert cost.table() in PAGE.read_text()


def test_sizes_are_those_of_the_models():
    """Parameters of the public checkpoints; multiply-adds of an image, attention included: 328.0 G and 698.3 G."""
    assert XL.expert_parameters + XL.other_parameters == 4_168_172_192
    assert LARGEST.expert_parameters + LARGEST.other_parameters == 16_503_731_232
    assert XL.flops(1) / 2e9 == pytest.approx(328.0, rel=2e-3)
    assert LARGEST.flops(1) / 2e9 == pytest.approx(698.3, rel=2e-3)


def test_one_gpu_sends_nothing_and_links_bind_as_they_must():
    assert cost.sharded_bytes(100, 1, 4) == 0 and cost.sharded_bytes(100, 4, 2) == 150
    machine = cost.Machine(nvlink=1000.0, network=10.0)
    assert cost.gather_s(1600, 8, 8, 1, machine) == 1400 / 1000  # a node: NVLink alone
    assert cost.gather_s(1600, 16, 8, 1, machine) == 800 / 80  # two: half of it through 8 cards
    assert cost.gather_s(200, 2, 1, 1, machine) == 100 / 10  # a rank of each node, its own card


def test_expert_parallelism_gathers_no_expert_within_a_node():
    alone, parallel = cost.step(LARGEST, 8, 1), cost.step(LARGEST, 8, 8)
    share = LARGEST.other_parameters / (LARGEST.other_parameters + LARGEST.expert_parameters)
    assert parallel["sharding_ms"] == pytest.approx(alone["sharding_ms"] * share)
    assert alone["exchange_ms"] == 0 < parallel["exchange_ms"] and alone["compute_ms"] == parallel["compute_ms"]


@pytest.mark.parametrize(("gpus", "ep"), [(8, 3), (12, 4), (16, 16)])
def test_what_does_not_fit_is_refused(gpus, ep):
    with pytest.raises(ValueError, match=f"ep: got {ep} on {gpus} GPUs, expected a divisor of 16 experts"):
        cost.step(LARGEST, gpus, ep)
