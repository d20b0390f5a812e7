"""Dispatch: picks -> RoutingPlan, compared exactly with the oracle's; the gradient of the row weights."""

from __future__ import annotations

import pytest
import torch

from moe_kernels import dispatch, dispatch_expert_choice
from moe_kernels.backends import registry
from reference import rooms
from tests.contenders import BACKENDS, each_backend, plan_of
from tests.trap_cases import TRAPS, make_problem, sample


def assert_plan(plan, exact):
    plan.validate()
    for name, expected in exact._asdict().items():
        assert torch.equal(getattr(plan, name), expected) and getattr(plan, name).dtype == expected.dtype, name


@each_backend
@pytest.mark.parametrize("trap", [t for t in TRAPS if t.name != "misaligned"], ids=str)
def test_trap(trap, backend, seed):
    problem, leaves = make_problem(trap, seed, torch.float32).with_leaves()
    plan = plan_of(problem, backend)
    assert_plan(plan, plan_of(problem, "oracle"))
    upstream = torch.randn(plan.num_rows)
    (drouting,) = torch.autograd.grad(plan.row_weight, leaves["routing"], upstream)
    expected = torch.zeros(problem.routing.numel())
    expected[plan.row_pick.long()] = upstream
    assert torch.equal(drouting, expected.view_as(drouting))


@each_backend
def test_many_tokens(backend, seed):
    """Longer than any block of a histogram."""
    g = torch.Generator().manual_seed(seed)
    T, E, K = 5003, 16, 2
    ids = sample(torch.rand, T, E, generator=g).topk(K).indices.int()
    picks = ids, sample(torch.rand, T, K, generator=g), E
    assert_plan(dispatch(*picks, backend=backend), rooms.dispatch(*picks))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
def test_ids_out_of_range_are_clamped_where_a_gpu_may_be(backend):
    """The op looks at ids on a CPU only: see test_errors.py."""
    ids = torch.tensor([[0, 7], [-3, 1]], dtype=torch.int32)
    plan = registry.get(backend).dispatch(ids, torch.rand(2, 2), 3)
    plan.validate()
    assert plan.expert_counts.tolist() == [2, 1, 1]


CHOICES = {  # T, E, tokens per group, capacity
    "one group longer than a block": (2100, 3, 2100, 300),
    "several groups": (72, 5, 24, 7),
    "every token": (40, 4, 10, 10),
    "one token": (3, 4, 1, 1),
    "more experts than tokens": (3, 20, 3, 2),
}


@each_backend
@pytest.mark.parametrize("values", ["distinct", "ties", "equal", "signed"])
@pytest.mark.parametrize("sizes", CHOICES.values(), ids=CHOICES)
def test_expert_choice(sizes, values, backend, seed):
    """Ties, zeros of both signs and negative values too, though a softmax gives none."""
    T, E, G, capacity = sizes
    affinities = sample(torch.rand, T, E, generator=torch.Generator().manual_seed(seed))
    if values == "ties":
        affinities = (affinities * 4).floor() / 4
    elif values == "equal":
        affinities = torch.full_like(affinities, 0.125)
    elif values == "signed":
        affinities = (affinities * 8 - 4).trunc() * 0.5  # -0.0 among them
    picks = affinities, capacity, G
    assert_plan(dispatch_expert_choice(*picks, backend=backend), rooms.dispatch_expert_choice(*picks))
