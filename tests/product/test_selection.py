"""Selection by rules that pass over all scores: what the oracle picks, where scores tie or are no numbers."""

from __future__ import annotations

import math

import pytest
import torch

import reference.rooms
from moe_kernels import ops
from moe_kernels.backends.base import Request
from moe_kernels.backends.registry import get
from reference import routers, routing
from tests.contenders import BACKENDS, each_backend
from tests.trap_cases import DEVICE, sample

NANS = torch.tensor([math.nan, -math.nan, math.inf, 1.0, 2.0, -2.0, -1.0, 0.5])
SPECIAL = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e38, 1.0])
DRAWS = {  # sums of two are exact in float32: it and float64 see the same ties between groups of experts
    "random": lambda shape, g: sample(torch.randn, shape, generator=g).mul(2**16).round() / 2**16,
    "ties": lambda shape, g: sample(torch.randn, shape, generator=g).mul(2).round() / 2,
    "all equal": lambda shape, g: sample(torch.zeros, shape) - 0.0,
    "zeros of both signs": lambda shape, g: sample(torch.randn, shape, generator=g) * 0,
    "infinities": lambda shape, g: SPECIAL.to(DEVICE)[sample(torch.randint, 0, 8, shape, generator=g)],
    "NaN": lambda shape, g: NANS.to(DEVICE)[sample(torch.randint, 0, 8, shape, generator=g)],
    "one binade": lambda shape, g: 1 + sample(torch.randint, 0, 1024, shape, generator=g) * 2**-20,
}
SHAPES = {  # why
    (1, 185, 1): "a race over the batch",
    (3, 60, 1): "a race of each image",
    (1, 37, 5): "experts over the batch, ragged",
    (2, 24, 18): "experts of each image, more than are gathered at once",
    (1, 5000, 1): "longer than a block",
    (1, 0, 3): "no token",
    (0, 4, 1): "no image",
    (2, 1, 1): "one token",
}
each_draw = pytest.mark.parametrize("drawn", DRAWS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(drawn, shape, seed):
    return DRAWS[drawn](shape, generator(seed))


def oracle(scores, counts):
    """The rule of reference.routing.take_tokens and routers.race, with a count for each group: float64."""
    G, M, N = scores.shape
    values, order = scores.double().sort(dim=1, descending=True, stable=True)
    places = torch.arange(M, device=scores.device)[:, None].expand(G, M, N)
    picks = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, places < counts[:, None])
    least = torch.full((G, N), math.inf, dtype=torch.float64, device=scores.device)
    for g, n in (counts > 0).nonzero().tolist() if M else ():
        least[g, n] = values[g, min(int(counts[g, n]), M) - 1, n]
    return picks, least


@each_backend
@each_draw
@each_shape
def test_the_largest_of_each_group(shape, drawn, backend, seed):
    G, M, N = shape
    scores = draw(drawn, shape, seed)
    interpreted = (backend, DEVICE) == ("triton", "cpu")  # slow: the test below has other counts for it
    for count in {M // 3} if interpreted else {0, min(1, M), M // 3, max(M - 1, 0), M}:
        expected = oracle(scores, torch.full((G, N), count, device=scores.device))
        assert_same(ops.select_top(scores, count, backend), expected)


def assert_same(got, expected):
    assert got[0].dtype == torch.bool and torch.equal(got[0], expected[0])
    assert torch.equal(got[1].double().nan_to_num(7.0), expected[1].nan_to_num(7.0))


@each_backend
@each_draw
def test_a_count_for_each_group_that_only_the_device_knows(drawn, backend, seed):
    for shape in ((2, 37, 5), (3, 60, 1)):
        scores = draw(drawn, shape, seed)
        counts = sample(torch.randint, -1, shape[1] + 3, shape[::2], generator=generator(seed))
        assert_same(ops.select_top(scores, counts, backend), oracle(scores, counts))
        assert_same(ops.select_top(scores, counts.int(), backend), oracle(scores, counts))


@each_backend
def test_it_is_the_rule_of_the_oracle(backend, seed):
    scores = sample(torch.randn, 36, 6, generator=generator(seed))
    for tokens in (12, 36):
        race, _ = ops.select_top(scores.view(-1, tokens * 6, 1), 2 * tokens, backend)
        assert torch.equal(race.view(36, 6), routers.race(scores.double(), 2 * tokens, tokens))
        taken, _ = ops.select_top(scores.view(-1, tokens, 6), 4, backend)
        assert torch.equal(taken.view(36, 6), routing.take_tokens(scores.double(), 4, tokens))


GROUPED = [(8, 2, 4, 2), (6, 3, 3, 1), (48, 5, 1, 1), (12, 4, 12, 5), (5, 5, 1, 1), (16, 9, 4, 3), (130, 6, 10, 3)]


@each_backend
@each_draw
@pytest.mark.parametrize(("E", "K", "groups", "taken"), GROUPED)
def test_experts_out_of_the_best_groups(E, K, groups, taken, drawn, backend, seed):
    for T in (0, 37):
        scores = draw(drawn, (T, E), seed)
        ids = ops.select_experts(scores, K, groups, taken, backend)
        assert ids.shape == (T, K) and ids.dtype == torch.int32
        exact = scores.double()
        marked = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids.long(), True)
        assert torch.equal(marked, routers.group_limited_choice(exact, K, groups, taken)[1])
        if groups == taken:
            assert torch.equal(ids.long(), exact.sort(dim=-1, descending=True, stable=True).indices[:, :K])
        assert torch.equal(ids, ops.select_experts(exact, K, groups, taken, "eager")), "and in the same order"


@each_backend
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("T", "E"), [(37, 5), (1, 1), (0, 3), (301, 3), (64, 48), (9, 130)])
def test_a_plan_of_marks(T, E, share, backend, seed):
    g = generator(seed)
    weights, picks = sample(torch.randn, T, E, generator=g), sample(torch.rand, T, E, generator=g) < share
    R, exact = int(picks.sum()), reference.rooms.dispatch_mask(weights, picks)
    for bound in {R, min(R + 3, T * E), None}:
        plan = ops.dispatch_mask(weights, picks, bound, backend)
        plan.validate()
        assert plan.num_rows == (T * E if bound is None else bound) and not plan.row_weight[R:].any()
        for name in exact._fields:
            assert torch.equal(getattr(plan.owned(), name), getattr(exact, name)), name


@each_backend
def test_float64_and_float16_scores(backend, seed):
    scores = sample(torch.randn, 1, 60, 3, generator=generator(seed))
    expected = ops.select_top(scores.half().float(), 7, "eager")
    assert_same(ops.select_top(scores.half(), 7, backend), (expected[0], expected[1].double()))
    if get(backend).supports(Request("dispatch", torch.float64, DEVICE)):
        with pytest.raises(RuntimeError, match="float64"):
            ops.select_top(scores.double(), 7, backend)
    else:
        assert_same(ops.select_top(scores.double(), 7, backend), oracle(scores.double(), torch.full((1, 3), 7)))


X = torch.zeros(2, 4, 3)
REFUSED = {
    "flat": (lambda: ops.select_top(X[0], 1), r"scores: got shape \(4, 3\), expected \(G,M,N\)"),
    "integers": (lambda: ops.select_top(X.int(), 1), "scores: got torch.int32"),
    "too many": (lambda: ops.select_top(X, 5), "counts: got 5, expected 0 to M = 4"),
    "of others": (lambda: ops.select_top(X, torch.ones(2, 4).int()), r"counts: got shape \(2, 4\)"),
    "no integers": (lambda: ops.select_top(X, torch.ones(2, 3)), "counts: got torch.float32"),
    "K": (lambda: ops.select_experts(X[0], 4), "top_k: got 4, expected 1 to 3"),
    "ragged groups": (lambda: ops.select_experts(X[0], 1, 2), "groups: got 2, expected a divisor of E = 3"),
    "no group": (lambda: ops.select_experts(X[0], 1, 3, 0), "groups_taken: got 0"),
}


@pytest.mark.parametrize(("call", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@pytest.mark.parametrize("op", ["select_top", "select_experts"])
def test_ops_are_registered_well(op):
    scores = torch.randn(2, 9, 3)
    calls = {
        "select_top": ((scores, None, 4, "auto"), (scores, torch.ones(2, 3).int(), 0, "auto")),
        "select_experts": ((scores[0], 2, 3, 1, "auto"),),
    }
    for args in calls[op]:
        torch.library.opcheck(getattr(torch.ops.moe_kernels, op).default, args)


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not built, or not for this device")
def test_the_extension_refuses_other_tensors():
    native = get("native")
    with pytest.raises(ValueError, match="scores"):
        native.select_top(X.transpose(1, 2), 1)
    with pytest.raises(ValueError, match="counts"):
        native.select_top(X, torch.ones(2, 3))
    with pytest.raises(ValueError, match="marks"):
        native.dispatch_mask(X[0], X[0] == 0, 3)
    with pytest.raises(ValueError, match="top_k"):
        native.select_experts(X[0], 4, 1, 1)
