"""Combine: shared + the weighted sum of a token's rows, in ascending row order."""

from __future__ import annotations

import torch

from moe_kernels import combine
from tests.contenders import each_backend, each_contender, each_trap, gradients, judge_trap, plan_of, rooms_of
from tests.trap_cases import LAYOUTS, Trap, make_problem, sample


def combine_compute(trap, dtype, scale=1.0):
    def compute(seed, how):
        problem = make_problem(trap, seed, dtype)
        g = torch.Generator().manual_seed(seed)
        shapes = {"y_rows": plan_of(problem, "oracle").row_token.shape[0], "shared": trap.T}
        tensors = {
            n: (sample(torch.randn, rows, trap.H, generator=g) * scale * trap.magnitude).to(dtype)
            for n, rows in shapes.items()
        }
        tensors = {name: LAYOUTS[trap.layout](t) for name, t in tensors.items() if name == "y_rows" or trap.Is}
        if how == "oracle":
            problem, tensors = problem.double(), {name: t.double() for name, t in tensors.items()}
        problem, leaves = problem.with_leaves()
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()} | {"routing": leaves["routing"]}
        out = rooms_of(how).combine(leaves["y_rows"], plan_of(problem, how), leaves.get("shared"))
        return gradients(out, leaves, problem.dout)

    return compute


@each_trap()
@each_contender
def test_trap(trap, scale, backend, dtype, seed):
    judge_trap("combine", combine_compute, trap, scale, backend, dtype, seed)


@each_backend
def test_rows_are_summed_in_ascending_order(backend):
    """A sum that only comes out in that order: 2^24 swallows a 1."""
    trap = Trap("all three experts", "", T=50, H=72, E=3, K=3)
    problem = make_problem(trap, 0, torch.float32)
    problem.routing = torch.ones_like(problem.routing)
    plan = plan_of(problem, backend)
    value = torch.tensor([2.0**24, 1.0, -(2.0**24)]).repeat_interleave(trap.T)  # rows of experts 0, 1, 2
    y_rows = value[:, None].expand(-1, trap.H)
    assert not combine(y_rows, plan, backend=backend).any()
