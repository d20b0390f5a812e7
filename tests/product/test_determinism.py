"""The same bits twice, and at one and two threads."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.contenders import each_backend, each_contender, moe_compute, moe_ours, needs_native
from tests.error_rule import threads
from tests.product.test_combine import combine_compute
from tests.product.test_experts import experts_compute
from tests.product.test_gating import gating_compute
from tests.trap_cases import Trap, make_problem

# Long enough for several chunks a thread, widths that leave remainders.
SHAPE = {"T": 389, "H": 72, "I": 88, "Is": 56, "E": 6}
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton's interpreter runs one program after another, in one thread",
)
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


@each_contender
@pytest.mark.parametrize("trap", TRAPS.values(), ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_same_bits_twice(room, trap, backend, dtype, seed):
    compute = ROOMS[room](trap, dtype)
    with threads(2):
        first = compute(seed, backend)
        for _ in range(3):
            assert_same_bits(compute(seed, backend), first)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trap", TRAPS.values(), ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_same_bits_at_any_thread_count(room, trap, dtype, seed):
    compute = ROOMS[room](trap, dtype)
    alone = compute(seed, "native")
    for count in (2, 3):
        with threads(count):
            assert_same_bits(compute(seed, "native"), alone)


@each_backend
def test_same_bits_from_several_python_threads_at_once(backend, seed):
    """Workspaces and packs are not shared between calls that run at the same time (the GIL is released)."""
    computes = [moe_compute(dataclasses.replace(TRAPS["random"], T=T), torch.float32) for T in (100, 389, 211, 57)]
    alone = [compute(seed, backend) for compute in computes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda compute: compute(seed, backend), computes)
            for got, expected in zip(together, alone, strict=True):
                assert_same_bits(got, expected)


@needs_native
def test_same_bits_after_a_fork(seed):
    """A forked child has no worker threads: a pool that waits for them hangs."""
    problem = make_problem(TRAPS["random"], seed, torch.float32)
    with threads(2):
        expected = moe_ours(problem, "native")
        child = multiprocessing.get_context("fork").Process(target=exit_unless_equal, args=(problem, expected))
        child.start()
        child.join(30)
        child.kill()
    assert child.exitcode == 0


def exit_unless_equal(problem, expected):
    os._exit(not torch.equal(moe_ours(problem, "native"), expected))
