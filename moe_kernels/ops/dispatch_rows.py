"""Dispatch of any rule: from rows (plain torch on any device), or from marked scores, to the routing plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Request
from ..backends.plain import plan_of_rows
from ..backends.registry import choose
from ..plan import RoutingPlan
from ._library import register
from .dispatch import PLAN, fake_plan


def dispatch_rows(
    row_weight: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int
) -> RoutingPlan:
    """Group rows that are given in any order: token row_token[r] goes to expert row_expert[r] with row_weight[r].

    A row of expert E is none: it goes behind all others, out of every expert's reach. So the number of rows may depend
    on values that only the device knows, below a bound that the host knows: see RoutingPlan.

    Args:
        row_weight: (R,) float32, bfloat16, float16 or float64; differentiable; negative ones, too.
        row_token: (R,) int32 or int64 in [0, T).
        row_expert: (R,) int32 or int64 in [0, E].
        num_tokens: T.
        num_experts: E.
    Returns: a RoutingPlan with R rows, of which the first ones, those of experts below E, count; row_pick is the place
        of a row among those given.
    Raises: TypeError, ValueError naming the argument; ValueError for indices out of range and for weights that are not
        finite (CPU only: it would make a GPU wait; there indices are clamped).
    Cost: two sorts of R integers; no host syncs on a GPU.
    Source: reference.rooms.dispatch_mask gives the same plan for the same picks.
    """
    _checks.tensor("row_weight", row_weight, "R")
    for name, index in (("row_token", row_token), ("row_expert", row_expert)):
        _checks.tensor(name, index, "R", _checks.INTEGERS, like=row_weight)
        _checks.shape(name, index.shape, row_weight.shape, "R")
    _checks.positive("num_experts", num_experts)
    if row_weight.shape[0]:
        _checks.positive("num_tokens", num_tokens)
    return RoutingPlan(*_dispatch_rows(row_weight, row_token, row_expert, num_tokens, num_experts))


def dispatch_mask(weights: Tensor, picks: Tensor, max_rows: int | None = None, backend: str = "auto") -> RoutingPlan:
    """Make a row of every score that is marked: token t goes to expert e with weights[t, e] where picks[t, e].

    Args:
        weights: (T, E) float32, bfloat16, float16 or float64; differentiable where marked.
        picks: (T, E) bool.
        max_rows: how many marks there may be; T E if None. Where all are known to be there, their number.
        backend: "auto" or a name out of `backends()`.
    Returns: a RoutingPlan with max_rows rows, of which as many count as are marked: see RoutingPlan.
    Raises: TypeError, ValueError naming the argument; ValueError for more marks than max_rows and for weights that are
        not finite (CPU only: it would make a GPU wait; there the last experts lose their last tokens).
    Cost: one pass over T E marks, two on a GPU (eager, grouped: a cumulative sum, and a sort of max_rows integers); no
        host syncs on a GPU.
    Source: reference.rooms.dispatch_mask.
    """
    _checks.tensor("weights", weights, "T,E")
    T, E = weights.shape
    _checks.tensor("picks", picks, "T,E", (torch.bool,), like=weights)
    _checks.shape("picks", picks.shape, (T, E), "T,E")
    _checks.positive("num_experts", E)
    max_rows = T * E if max_rows is None else max_rows
    if not 0 <= max_rows <= T * E:
        raise ValueError(f"max_rows: got {max_rows}, expected 0 to T E = {T * E}")
    return RoutingPlan(*_dispatch_mask(weights, picks, max_rows, backend))


def _rows_kernel(row_weight: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int):
    if row_weight.device.type == "cpu" and row_weight.numel():
        for name, index, end in (("row_token", row_token, num_tokens - 1), ("row_expert", row_expert, num_experts)):
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high > end:
                raise ValueError(f"{name}: got indices from {low} to {high}, expected [0, {end}]")
    token, expert = row_token.long().clamp(0, max(num_tokens - 1, 0)), row_expert.long().clamp(0, num_experts)
    order = (expert * num_tokens + token).argsort(stable=True)
    return _finite(plan_of_rows(row_weight, token[order], expert[order], order, num_tokens, num_experts))


def _mask_kernel(weights: Tensor, picks: Tensor, max_rows: int, backend: str):
    if picks.device.type == "cpu" and max_rows < picks.numel() and int(picks.count_nonzero()) > max_rows:
        raise ValueError(f"picks: got {int(picks.count_nonzero())} marks, expected at most max_rows = {max_rows}")
    weights = weights.to(_checks.accumulator(weights.dtype)).contiguous()
    request = Request("dispatch", weights.dtype, weights.device.type, num_experts=weights.shape[1])
    return _finite(choose(backend, request).dispatch_mask(weights, picks.contiguous(), max_rows).tensors())


def _finite(plan: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    row_weight = plan[0]
    if row_weight.device.type == "cpu" and not bool(row_weight.isfinite().all()):
        raise ValueError("weights: got values that are not finite where they are picked, expected finite ones")
    return plan


def _rows_fake(row_weight: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int):
    return fake_plan(row_weight, num_tokens, num_experts, row_weight.shape[0])


def _mask_fake(weights: Tensor, picks: Tensor, max_rows: int, backend: str):
    return fake_plan(weights, *weights.shape, max_rows)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.shape, ctx.dtype, ctx.num_inputs = inputs[0].shape, inputs[0].dtype, len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(RoutingPlan(*output).row_pick)


def _backward(ctx: Any, drow_weight: Tensor | None, *_: None):
    dweights = None
    if drow_weight is not None:
        (row_pick,) = ctx.saved_tensors
        count = ctx.shape.numel()
        dweights = drow_weight.new_zeros(count + 1).scatter(0, row_pick.long(), drow_weight)  # the last: no rows
        dweights = dweights[:count].view(ctx.shape).to(ctx.dtype)
    return dweights, *[None] * (ctx.num_inputs - 1)


_dispatch_rows = register(
    "dispatch_rows(Tensor row_weight, Tensor row_token, Tensor row_expert, SymInt num_tokens, int num_experts) -> "
    + PLAN,
    _rows_kernel,
    _rows_fake,
    _setup_context,
    _backward,
)
_dispatch_mask = register(
    f"dispatch_mask(Tensor weights, Tensor picks, SymInt max_rows, str backend) -> {PLAN}",
    _mask_kernel,
    _mask_fake,
    _setup_context,
    _backward,
)
