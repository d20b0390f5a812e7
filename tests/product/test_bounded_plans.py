"""Plans of any rule: from marks and from rows; a number of rows that only the device knows, with poison behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference.moe
import reference.rooms
from moe_kernels import RoutingPlan, combine, dispatch_mask, dispatch_rows, experts, moe_mlp
from moe_kernels.backends.base import Request
from moe_kernels.backends.registry import get
from tests.contenders import each_backend, gradients
from tests.error_rule import judge
from tests.trap_cases import BY_NAME, DEVICE, PLAIN, make_problem, sample

FIELDS = reference.rooms.Plan._fields


def draw(seed, T=37, E=5, share=0.3):
    """Weights (T, E), some below zero, and marks: expert 2 has none, token 3 all others."""
    g = torch.Generator().manual_seed(seed)
    weights, picks = sample(torch.randn, T, E, generator=g), sample(torch.rand, T, E, generator=g) < share
    picks[3], picks[:, 2] = True, False
    return weights, picks


def poisoned(plan: RoutingPlan) -> RoutingPlan:
    """The same plan with NaN weights behind the rows that count, and indices that lead to other tokens and rows."""
    R, junk = int(plan.expert_offsets[-1]), torch.iinfo(torch.int32).max
    behind = {"row_weight": torch.nan, "row_token": plan.num_tokens - 1, "row_pick": junk, "token_rows": 0}
    return replace(
        plan,
        **{
            name: getattr(plan, name).clone().index_fill_(0, torch.arange(R, plan.num_rows), value)
            for name, value in behind.items()
        },
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_plan_of_marks_is_the_oracles(share, seed):
    weights, picks = draw(seed, share=share)
    R, exact = int(picks.sum()), reference.rooms.dispatch_mask(weights, picks)
    for bound in (R, R + 1, None):
        plan = dispatch_mask(weights, picks, bound)
        plan.validate()
        assert plan.num_rows == (weights.numel() if bound is None else bound)
        assert all(torch.equal(getattr(plan.owned(), name), getattr(exact, name)) for name in FIELDS)


def test_a_plan_of_rows_in_any_order_is_that_of_marks(seed):
    weights, picks = draw(seed)
    token, expert = picks.nonzero().unbind(1)
    none = torch.full((4,), 5)
    expert, token = torch.cat([expert, none]), torch.cat([token, none])
    order = sample(torch.randperm, len(token), generator=torch.Generator().manual_seed(seed))
    token, expert = token[order], expert[order]
    given = weights[token, expert.clamp(max=4)].requires_grad_()
    plan, marks = dispatch_rows(given, token, expert.int(), 37, 5), dispatch_mask(weights, picks)
    plan.validate()
    for name in FIELDS:
        if name != "row_pick":
            assert torch.equal(getattr(plan.owned(), name), getattr(marks.owned(), name)), name
    (dgiven,) = torch.autograd.grad(plan.row_weight.square().sum(), given)
    assert torch.equal(dgiven, torch.where(expert == 5, 0, 2 * given))


@each_backend
@pytest.mark.parametrize("trap", [PLAIN, BY_NAME["gelu"], BY_NAME["no_shared"]], ids=str)
def test_what_lies_behind_reaches_no_result(trap, backend, seed):
    """Value and every gradient are the oracle's, and to the bit those of a plan without anything behind."""
    ways = {}

    def compute(seed, how, bound=None):
        p = make_problem(trap, seed, torch.float32)
        weights, picks = draw(seed)
        mlp = [t for t in (p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj) if t is not None]
        leaves = [t.double() if how == "oracle" else t.clone() for t in (p.x, weights, *mlp)]
        x, weights, gate_up, down, *shared = (t.requires_grad_() for t in leaves)
        if how in ("oracle", "loop"):
            out = reference.moe.moe_expert_choice(x, weights, picks, gate_up, down, trap.activation)
            out = out + reference.moe.expert_mlp(x, *shared, trap.activation) if shared else out
        else:
            plan = dispatch_mask(weights, picks, bound)
            plan = plan if bound else poisoned(plan)
            out = moe_mlp(x, plan, gate_up, down, *shared, activation=trap.activation, backend=backend)
        inputs = {"x": x, "weights": weights, "gate_up_proj": gate_up, "down_proj": down}
        inputs |= dict(zip(("shared_gate_up_proj", "shared_down_proj"), shared, strict=False))
        return gradients(out, inputs, p.dout)

    judge("bounded plan", compute, backend, torch.float32, seed)
    ways = compute(seed, backend), compute(seed, backend, int(draw(seed)[1].sum()))
    assert all(torch.equal(ways[0][name], ways[1][name]) for name in ways[0])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_room_by_room(backend, dtype, seed):
    if get(backend).supports(Request("experts", dtype, DEVICE)):
        pytest.skip(f"{backend} does not compute {dtype}")
    problem, answers = make_problem(PLAIN, seed, dtype), []
    picks = draw(seed)[1]
    for bound in (None, int(picks.sum())):
        x, weights = problem.x.clone().requires_grad_(), draw(seed)[0].to(dtype).requires_grad_()
        plan = poisoned(dispatch_mask(weights, picks, bound))
        rows = experts(x, plan, problem.gate_up_proj, problem.down_proj, backend=backend)
        with torch.no_grad():
            rows[int(plan.expert_offsets[-1]) :] = torch.nan
        out = combine(rows, plan, backend=backend)
        answers.append((out, *torch.autograd.grad(out, (x, weights), problem.dout)))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@each_backend
def test_anomaly_mode_finds_nothing_behind(backend, seed):
    """Outputs are poisoned here: the gradient of a weight behind the rows is NaN, and reaches nobody."""
    p, (weights, picks) = make_problem(PLAIN, seed, torch.float32), draw(seed)
    x, weights = p.x.clone().requires_grad_(), weights.requires_grad_()
    with torch.autograd.detect_anomaly():
        plan = dispatch_mask(weights, picks)
        y = moe_mlp(x, plan, p.gate_up_proj, p.down_proj, backend=backend)
        rows = experts(x, plan, p.gate_up_proj, p.down_proj, backend=backend)
        (y + combine(rows, plan, backend=backend)).sum().backward()
    assert weights.grad.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w, p: dispatch_mask(w, p, 3), r"picks: got \d+ marks, expected at most max_rows = 3"),
        (lambda w, p: dispatch_mask(w, p, 999), "max_rows: got 999, expected 0 to T E = 185"),
        (lambda w, p: dispatch_mask(w, p[:9]), r"picks: got shape \(9, 5\)"),
        (lambda w, p: dispatch_mask(w / 0, p), "weights: got values that are not finite"),
        (
            lambda w, p: dispatch_rows(w[:, 0], torch.full((37,), 37), p[:, 0].int(), 37, 5),
            "row_token: got .* 37 to 37",
        ),
        (
            lambda w, p: dispatch_rows(w[:, 0], torch.arange(37), torch.full((37,), 6), 37, 5),
            "row_expert: got .*6 to 6",
        ),
        (lambda w, p: replace(dispatch_mask(w, p), row_token=torch.full((185,), -1).int()).validate(), "row_token"),
    ],
)
def test_bad_plans(call, said, seed):
    with pytest.raises(ValueError, match=said):
        call(*draw(seed))
