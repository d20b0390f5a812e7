"""Experts: grouped MLPs over routed rows against a loop over experts."""

from __future__ import annotations

import pytest
import torch

import reference.moe
from moe_kernels import experts
from tests.contenders import SCALES, each_backend, each_contender, experts_loop, gradients, plan_of, try_trap
from tests.error_rule import judge
from tests.trap_cases import BY_NAME, PLAIN, TRAPS, make_problem

LEAVES = ("x", "gate_up_proj", "down_proj")


def experts_compute(trap, dtype, scale=1.0):
    def compute(seed, how):
        problem = make_problem(trap, seed, dtype, scale)
        problem, leaves = (problem.double() if how == "oracle" else problem).with_leaves()
        if how == "oracle":
            y_rows = experts_loop(problem, reference.moe.expert_mlp)[0]
        elif how == "loop":
            y_rows = experts_loop(problem)[0]
        else:
            weights = (problem.gate_up_proj, problem.down_proj)
            y_rows = experts(problem.x, plan_of(problem, how), *weights, activation=trap.activation, backend=how)
        dy_rows = torch.randn(y_rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        if trap.layout == "expanded_dout":
            dy_rows = torch.ones((), dtype=dtype).expand(y_rows.shape)
        return gradients(y_rows, {name: leaves[name] for name in LEAVES}, dy_rows)

    return compute


@each_contender
@pytest.mark.parametrize("trap", [t for t in TRAPS if t.name != "no_shared"], ids=str)
def test_trap(trap, backend, dtype, seed):
    try_trap(trap, backend, lambda: judge("experts", experts_compute(trap, dtype), backend, dtype, seed))


@each_contender
@pytest.mark.parametrize("scale", SCALES)
def test_scale(scale, backend, dtype, seed):
    judge("experts", experts_compute(PLAIN, dtype, scale), backend, dtype, seed, scale)


@each_backend
def test_experts_without_rows_get_exact_zero_gradients(backend, seed):
    trap = BY_NAME["empty_experts"]
    got = experts_compute(trap, torch.float32)(seed, backend)
    assert not got["dgate_up_proj"][::3].count_nonzero() and not got["ddown_proj"][::3].count_nonzero()
    assert got["dgate_up_proj"][1::3].flatten(1).any(1).all()


@each_backend
def test_weights_do_not_see_the_routing_weights(backend, seed):
    problem = make_problem(PLAIN, seed, torch.float32)
    plan = plan_of(problem, backend)
    problem.routing = problem.routing * 3
    scaled = plan_of(problem, backend)
    weights = (problem.gate_up_proj, problem.down_proj)
    assert torch.equal(experts(problem.x, plan, *weights, backend=backend), experts(problem.x, scaled, *weights, backend=backend))
