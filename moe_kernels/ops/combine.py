"""Combine: the weighted sum of every token's rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Backend, Request
from ..backends.registry import choose
from ..plan import RoutingPlan
from ._library import register
from .experts import contiguous_plan, owned_rows, plan_gradient


def combine(y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Sum the rows of every token with their weights, and the shared expert's output.

    out_t = shared_t + sum over the rows r of t, ascending, of row_weight_r y_r; accumulated in float32 (float64).
    Whether shared_t comes first or last in the sum is the backend's choice, and always the same.

    Args:
        y_rows: (R, H); float32, bfloat16, float16 or float64.
        plan: the plan that made the rows; its row_weight is differentiable.
        shared: (T, H) in the dtype of y_rows, or None.
        backend: "auto" or a name out of `backends()`.
    Returns: (T, H) in the dtype of y_rows; zeros for a token without rows and without `shared`.
    Raises: TypeError, ValueError naming the argument.
    Cost: reads R H + T H, writes T H elements; fixed order, no atomics. Saves y_rows for backward.
    Source: reference.moe.moe.
    """
    _checks.tensor("y_rows", y_rows, "R,H")
    R, H = y_rows.shape
    plan = _checks.plan(plan, None, y_rows)
    _checks.shape("y_rows", (R, H), (plan.num_rows, H), "R,H")
    if shared is not None:
        _checks.tensor("shared", shared, "T,H", (y_rows.dtype,), like=y_rows)
        _checks.shape("shared", shared.shape, (plan.num_tokens, H), "T,H")
    return _combine(y_rows, plan.tensors(), shared, backend)


def _backend(y_rows: Tensor, plan: RoutingPlan, backend: str) -> Backend:
    return choose(
        backend, Request("combine", y_rows.dtype, y_rows.device.type, plan.num_experts, hidden_size=y_rows.shape[1])
    )


def _kernel(y_rows, plan, shared, backend: str):
    plan = contiguous_plan(plan)
    shared = None if shared is None else shared.contiguous()
    return _backend(y_rows, plan, backend).combine(y_rows.contiguous(), plan, shared)


def _fake(y_rows, plan, shared, backend: str):
    return y_rows.new_empty((RoutingPlan(*plan).num_tokens, y_rows.shape[1]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y_rows, plan, shared, ctx.backend = inputs
    ctx.has_shared = shared is not None
    ctx.save_for_backward(y_rows, *plan)


def _backward(ctx: Any, dout: Tensor):
    y_rows, *plan = ctx.saved_tensors
    dy_rows, drow_weight = _combine_bwd(dout, y_rows, plan, ctx.backend)
    dshared = dout if ctx.has_shared else None
    dy_rows, drow_weight = (owned_rows(rows, RoutingPlan(*plan)) for rows in (dy_rows, drow_weight))
    return dy_rows, plan_gradient(drow_weight), dshared, None


def _bwd_kernel(dout, y_rows, plan, backend: str):
    plan = contiguous_plan(plan)
    return _backend(y_rows, plan, backend).combine_bwd(dout.contiguous(), y_rows.contiguous(), plan)


def _bwd_fake(dout, y_rows, plan, backend: str):
    return y_rows.new_empty(y_rows.shape), torch.empty_like(RoutingPlan(*plan).row_weight)


_combine = register(
    "combine(Tensor y_rows, Tensor[] plan, Tensor? shared, str backend) -> Tensor",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
_combine_bwd = register(
    "combine_bwd(Tensor dout, Tensor y_rows, Tensor[] plan, str backend) -> (Tensor, Tensor)", _bwd_kernel, _bwd_fake
)
