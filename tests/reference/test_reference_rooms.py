"""reference.rooms: plans by hand, the rooms one after the other against routed_sum, and moe_kernels' plans."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.backends.registry import get
from reference import rooms
from reference.moe import moe, moe_expert_choice
from reference.routing import expert_choice, take_tokens, token_choice

H, I = 8, 12
CASES = {  # T, E, K
    "plain": (37, 5, 2),
    "no token": (0, 5, 2),
    "one token": (1, 7, 3),
    "every expert": (9, 4, 4),
    "one expert": (6, 1, 1),
}
each_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
each_gate = pytest.mark.parametrize("gate", ["drawn", "ties", "idle experts"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def draw(sizes, gate, dtype, seed):
    """Return x, gate_weight, gate_up_proj, down_proj; a gate of one row for all ties, one that falls leaves the last
    experts idle."""
    (T, E, _), g = sizes, torch.Generator().manual_seed(seed)
    shapes = (T, H), (E, H), (E, 2 * I, H), (E, H, I)
    x, gate_weight, *weights = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    if gate == "ties":
        gate_weight = gate_weight[:1].expand(E, H)
    elif gate == "idle experts":
        x, gate_weight = x.abs(), -torch.arange(E)[:, None].expand(E, H)
    return [t.to(dtype) for t in (x, gate_weight, *weights)]


def test_a_plan_by_hand():
    ids, weights = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2]]), torch.arange(8.0).view(4, 2)
    plan = rooms.dispatch(ids, weights, 5)
    assert [t.tolist() for t in plan] == [
        [1, 2, 6, 0, 5, 7, 3, 4],
        [3, 0, 3, 2, 0],
        [0, 3, 3, 6, 8, 8],
        [0, 1, 3, 0, 2, 3, 1, 2],
        [1, 2, 6, 0, 5, 7, 3, 4],
        [0, 2, 4, 6, 8],
        [0, 3, 1, 6, 4, 7, 2, 5],
    ]
    assert [t.dtype for t in plan if t is not plan.row_weight] == [torch.int32] * 6


def test_an_expert_choice_plan_by_hand():
    """Two groups of two tokens; a tie in the first goes to its lower token, and token 3 has no row."""
    affinities = torch.tensor([[0.5, 0.1], [0.5, 0.9], [0.7, 0.6], [0.3, 0.4]])
    plan = rooms.dispatch_expert_choice(affinities, 1, 2)
    assert plan.row_token.tolist() == [0, 2, 1, 2] and plan.row_pick.tolist() == [0, 4, 3, 5]
    assert torch.equal(plan.row_weight, torch.tensor([0.5, 0.7, 0.9, 0.6]))
    assert plan.expert_counts.tolist() == [2, 2] and plan.expert_offsets.tolist() == [0, 2, 4]
    assert plan.token_row_offsets.tolist() == [0, 1, 2, 4, 4] and plan.token_rows.tolist() == [0, 2, 1, 3]


@each_case
@each_gate
@each_dtype
def test_one_room_after_the_other_is_the_routed_sum(sizes, gate, dtype, seed):
    """To the bit: both multiply the same rows and add them in the same order."""
    x, gate_weight, *weights = draw(sizes, gate, dtype, seed)
    topk_weights, topk_ids, probs = rooms.gating(x, gate_weight, sizes[2])
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plan = rooms.dispatch(topk_ids, topk_weights, sizes[1])
    if gate == "idle experts" and sizes[2] < sizes[1]:
        assert plan.expert_counts[-1] == 0
    out = rooms.combine(rooms.experts(x, plan, *weights), plan)
    assert torch.equal(out, moe(x, topk_weights, topk_ids, *weights)) and out.dtype == dtype


@each_case
@each_gate
@each_dtype
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_expert_choice_too(factor, sizes, gate, dtype, seed):
    (T, E, _), (x, gate_weight, *weights) = sizes, draw(sizes, gate, dtype, seed)
    affinities, picks = expert_choice(x, gate_weight, factor, max(T, 1))
    plan = rooms.dispatch_expert_choice(affinities, max(1, int(T * factor / E)), max(T, 1))
    out = rooms.combine(rooms.experts(x, plan, *weights), plan)
    assert torch.equal(out, moe_expert_choice(x, affinities, picks, *weights, "swiglu"))
    assert not out[~picks.any(1)].any()


@each_case
def test_gradients_are_those_of_the_routed_sum(sizes, seed):
    leaves = [t.requires_grad_() for t in draw(sizes, "drawn", torch.float64, seed)]
    x, gate_weight, *weights = leaves
    topk_weights, topk_ids, _ = rooms.gating(x, gate_weight, sizes[2])
    plan = rooms.dispatch(topk_ids, topk_weights, sizes[1])
    out = rooms.combine(rooms.experts(x, plan, *weights), plan, shared=x.cos())
    expected = moe(x, *token_choice(x, gate_weight, sizes[2])[:2], *weights) + x.cos()
    assert torch.equal(out, expected)
    both = (torch.autograd.grad(y.sin().sum(), leaves) for y in (out, expected))
    for got, exact in zip(*both, strict=True):
        assert (got - exact).norm() <= 1e-13 * exact.norm()


def assert_same(plan, exact):
    assert list(plan.__dataclass_fields__) == list(exact._fields)
    for got, expected in zip(plan.tensors(), exact, strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


@each_case
@each_gate
def test_eager_makes_the_same_plans(sizes, gate, seed):
    (T, E, K), (x, gate_weight, *_) = sizes, draw(sizes, gate, torch.float32, seed)
    topk_weights, topk_ids, affinities = rooms.gating(x, gate_weight, K)
    eager = get("eager")
    assert_same(eager.dispatch(topk_ids.int(), topk_weights, E), rooms.dispatch(topk_ids, topk_weights, E))
    for groups in (1, T or 1):
        choice = affinities, max(1, T // groups // 2), T // groups or 1
        assert_same(eager.dispatch_expert_choice(*choice), rooms.dispatch_expert_choice(*choice))


ONES = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rooms.dispatch(ONES.long() * 3, ONES, 3), "topk_ids: got 3..3, expected ids in 0..2"),
        (lambda: rooms.dispatch(ONES[:, :1].long(), ONES, 3), r"topk_ids: got shape \(4, 1\), expected \(4, 2\)"),
        (lambda: take_tokens(ONES, 1, 3), "tokens_per_group: got 3, expected a divisor of the 4 tokens"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
