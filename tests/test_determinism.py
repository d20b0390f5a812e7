"""The same bits twice, and at one and two threads."""

from __future__ import annotations

import pytest
import torch

from tests.contenders import BACKENDS, CONTENDERS, moe_compute
from tests.error_rule import threads
from tests.test_combine import combine_compute
from tests.test_experts import experts_compute
from tests.test_gating import gating_compute
from tests.trap_cases import Trap

# Long enough for several chunks a thread, widths that leave remainders.
SHAPE = {"T": 389, "H": 72, "I": 88, "Is": 56, "E": 6}
TRAPS = {
    "random": Trap("random", "", **SHAPE),
    "one_expert": Trap("one_expert", "", **SHAPE | {"K": 1}, picks="one_expert"),
    "expert_choice": Trap("expert_choice", "", **SHAPE, picks="expert_choice"),
}
ROOMS = {
    "moe_mlp": moe_compute,
    "experts": experts_compute,
    "combine": combine_compute,
    "gating": lambda trap, dtype: gating_compute((trap.T, trap.H, trap.E, trap.K), dtype),
}


def assert_same_bits(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), (
            f"{name}: {(got[name] != tensor).sum()} of {tensor.numel()} elements differ"
        )


@pytest.mark.parametrize(("backend", "dtype"), CONTENDERS)
@pytest.mark.parametrize("trap", TRAPS.values(), ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_same_bits_twice(room, trap, backend, dtype, seed):
    compute = ROOMS[room](trap, dtype)
    with threads(2):
        first = compute(seed, backend)
        for _ in range(3):
            assert_same_bits(compute(seed, backend), first)


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trap", TRAPS.values(), ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_same_bits_at_any_thread_count(room, trap, dtype, seed):
    compute = ROOMS[room](trap, dtype)
    alone = compute(seed, "native")
    for count in (2, 3):
        with threads(count):
            assert_same_bits(compute(seed, "native"), alone)
