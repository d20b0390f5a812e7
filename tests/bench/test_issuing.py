"""What calls cost the CPU: launches counted, kernels empty while it lasts, and everything as it was afterwards."""

from __future__ import annotations

import pytest
import torch
import triton

from bench.gpu import issuing
from bench.instrument.cases import kernels_on
from moe_kernels import dispatch, moe_mlp
from moe_kernels.backends import registry
from moe_kernels.backends.triton import grid

LAUNCHES = {"triton": (4, 12), "cuda": (5, 12)}  # of dispatch and the layer, without and with backward
LAYER = {"cuda": {"forward": 7, "step": 15}, "triton": {"forward": 5, "step": 13}}  # of MoELayer
# Of MoELayer: tensors allocated, calls of the extension, functions called at most (torch's and Triton's among them).
COUNTS = {
    "cuda": {
        "forward": {"allocations": 2, "bindings": 2, "calls": 85},
        "step": {"allocations": 10, "bindings": 4, "calls": 195},
    },
    "triton": {
        "forward": {"allocations": 17, "bindings": 0, "calls": 400},
        "step": {"allocations": 36, "bindings": 0, "calls": 945},
    },
}


@pytest.mark.unpoisoned  # what fills the tensors would be counted
@pytest.mark.parametrize("backend", kernels_on("cuda"))
def test_a_call_issues_few_launches_and_computes_nothing(backend):
    if why := issuing.why_not(backend):
        pytest.skip(why)
    before = triton.runtime.driver._active, dict(registry.get("native").__dict__)
    row = issuing.row(backend, lambda: None, 0.0)
    figures = row["figures"]
    assert (figures["forward_launches"], figures["forward_backward_launches"]) == LAUNCHES[backend]
    for run, launches in LAYER[backend].items():
        assert figures[f"layer_{run}_launches"] == launches
        assert figures[f"model_{run}_launches"] == issuing.BLOCKS * launches
        assert figures[f"model_{run}_allocations"] == issuing.BLOCKS * figures[f"layer_{run}_allocations"] > 0
    for run, most in COUNTS[backend].items():
        got = {what: figures[f"layer_{run}_{what}"] for what in most}
        assert got["calls"] <= most["calls"]
        assert got | {"calls": most["calls"]} == most
    assert 0 < figures["forward_us"] < figures["forward_backward_us"]
    assert row["case"] == f"layer-{backend}-digits-uniform-T16_H96_I384_Is192_E8_K2-bf16-fwd-t1"
    assert (triton.runtime.driver._active, dict(registry.get("native").__dict__)) == before


@pytest.mark.unpoisoned
@pytest.mark.parametrize("backend", kernels_on("cuda"))
def test_gate_and_up_in_two_stacks_cost_the_same_whatever_they_hold(backend):
    """Where their matrices lie is a table on the device, and nobody lists them to find it again."""
    if why := issuing.why_not(backend):
        pytest.skip(why)

    def counts(num_experts: int) -> list[dict[str, int]]:
        x, both = torch.zeros(4, 64), torch.zeros(2, num_experts, 64, 64)
        leaves = gate, up, down = [*both.unbind(), torch.zeros(num_experts, 64, 64)]
        plan = dispatch(torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), num_experts, backend="eager")

        def forward() -> torch.Tensor:
            return moe_mlp(x, plan, [gate, up], down, backend=backend)

        found = [issuing.counted(forward, launches)]
        for t in leaves:
            t.requires_grad_()
        return [*found, issuing.counted(lambda: torch.autograd.grad(forward(), leaves, x), launches)]

    with issuing.empty_kernels(backend) as launches:
        few, many = counts(64), counts(512)
    for some, more, most in zip(few, many, (500, 1300), strict=True):  # a sum over rows is cut into fewer parts
        assert more["calls"] <= some["calls"] < most and more["allocations"] == some["allocations"]


def test_a_backend_that_cannot_be_tried_says_why(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_FIBERS", raising=False)
    assert issuing.why_not("cuda") == "needs MOE_KERNELS_FIBERS, the module that `make fibers` builds"
    monkeypatch.setattr(issuing.importlib.util, "find_spec", lambda name: None)
    assert issuing.why_not("triton") == "not available: no package triton"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted kernels are not launched" in issuing.why_not("triton")


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 255, 256, 257, 12_345])
def test_sizes_of_blocks_are_those_that_triton_gives(n):
    import triton

    assert grid.power_of_2(n) == triton.next_power_of_2(n) and grid.padded(n) == max(16, triton.next_power_of_2(n))
    assert [grid.cdiv(n, b) for b in (1, 3, 16, 300)] == [triton.cdiv(n, b) for b in (1, 3, 16, 300)]
    assert grid.cdiv(0, n) == 0 and grid.padded(0) == 16
