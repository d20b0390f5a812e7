"""Experts: grouped MLPs over routed rows against a loop over experts."""

from __future__ import annotations

import torch

from tests.contenders import each_contender, each_trap, gradients, judge_trap, plan_of, rooms_of
from tests.trap_cases import make_problem, sample

LEAVES = ("x", "gate_up_proj", "down_proj")


def experts_compute(trap, dtype, scale=1.0):
    def compute(seed, how):
        problem = make_problem(trap, seed, dtype, scale)
        problem, leaves = (problem.double() if how == "oracle" else problem).with_leaves()
        weights = problem.gate_up_proj, problem.down_proj
        y_rows = rooms_of(how).experts(problem.x, plan_of(problem, how), *weights, trap.activation)
        g = torch.Generator().manual_seed(seed)
        dy_rows = sample(torch.randn, y_rows.shape, generator=g, dtype=torch.float64).to(dtype)
        if trap.layout == "expanded_dout":
            dy_rows = dy_rows.new_ones(()).expand(y_rows.shape)
        return gradients(y_rows, {name: leaves[name] for name in LEAVES}, dy_rows)

    return compute


@each_trap("no_shared")
@each_contender
def test_trap(trap, scale, backend, dtype, seed):
    judge_trap("experts", experts_compute, trap, scale, backend, dtype, seed)
