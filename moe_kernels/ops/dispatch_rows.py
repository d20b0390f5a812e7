"""Dispatch of any rule: from rows, or from marked scores, to the routing plan; plain torch on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
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


def dispatch_mask(weights: Tensor, picks: Tensor, max_rows: int | None = None) -> RoutingPlan:
    """Make a row of every score that is marked: token t goes to expert e with weights[t, e] where picks[t, e].

    Args:
        weights: (T, E) float32, bfloat16, float16 or float64; differentiable where marked.
        picks: (T, E) bool.
        max_rows: how many marks there may be; T E if None. Where all are known to be there, their number.
    Returns: a RoutingPlan with max_rows rows, of which as many count as are marked: see RoutingPlan.
    Raises: TypeError, ValueError naming the argument; ValueError for more marks than max_rows and for weights that are
        not finite (CPU only: it would make a GPU wait; there the last experts lose their last tokens).
    Cost: a cumulative sum over T E marks and a sort of max_rows integers; no host syncs on a GPU.
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
    return RoutingPlan(*_dispatch_mask(weights, picks, max_rows))


def _rows_kernel(row_weight: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int):
    if row_weight.device.type == "cpu" and row_weight.numel():
        for name, index, end in (("row_token", row_token, num_tokens - 1), ("row_expert", row_expert, num_experts)):
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high > end:
                raise ValueError(f"{name}: got indices from {low} to {high}, expected [0, {end}]")
    token, expert = row_token.long().clamp(0, max(num_tokens - 1, 0)), row_expert.long().clamp(0, num_experts)
    order = (expert * num_tokens + token).argsort(stable=True)
    return _plan(row_weight, token[order], expert[order], order, num_tokens, num_experts)


def _mask_kernel(weights: Tensor, picks: Tensor, max_rows: int):
    T, E = picks.shape
    marked = picks.T.reshape(-1)  # expert by expert, tokens ascending: the order of rows
    rows = marked.cumsum(0)
    if picks.device.type == "cpu" and marked.numel() and int(rows[-1]) > max_rows:
        raise ValueError(f"picks: got {int(rows[-1])} marks, expected at most max_rows = {max_rows}")
    rows = torch.where(marked & (rows <= max_rows), rows - 1, max_rows)
    every = torch.arange(T * E, device=picks.device)
    none = torch.full((max_rows + 1,), T * E, device=picks.device)
    source = none.scatter_(0, rows, every)[:max_rows]  # what is no row, and what is one too many, met in the last
    expert = source // max(T, 1)
    token = source - expert * T
    return _plan(weights.reshape(-1), token, expert, token * E + expert, T, E)


def _plan(weights: Tensor, token: Tensor, expert: Tensor, pick: Tensor, T: int, E: int) -> tuple[Tensor, ...]:
    """Return the plan of rows in their order; those of expert E are none: token 0, weight 0, one pick beyond all."""
    is_row, count = expert < E, weights.shape[0]
    token, pick = torch.where(is_row, token, 0), torch.where(is_row, pick, count)
    flat = torch.cat([weights.to(_checks.accumulator(weights.dtype)), weights.new_zeros(1)])
    row_weight = flat.index_select(0, pick)
    if weights.device.type == "cpu" and not bool(row_weight.isfinite().all()):
        raise ValueError("weights: got values that are not finite where they are picked, expected finite ones")
    owner, token_rows = torch.where(is_row, token, T).sort(stable=True)
    expert_offsets = torch.searchsorted(expert, torch.arange(E + 1, device=expert.device), out_int32=True)
    token_row_offsets = torch.searchsorted(owner, torch.arange(T + 1, device=owner.device), out_int32=True)
    indices = expert_offsets.diff(), expert_offsets, token.int(), pick.int(), token_row_offsets, token_rows.int()
    return row_weight, *indices


def _rows_fake(row_weight: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int):
    return fake_plan(row_weight, num_tokens, num_experts, row_weight.shape[0])


def _mask_fake(weights: Tensor, picks: Tensor, max_rows: int):
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
    f"dispatch_mask(Tensor weights, Tensor picks, SymInt max_rows) -> {PLAN}",
    _mask_kernel,
    _mask_fake,
    _setup_context,
    _backward,
)
