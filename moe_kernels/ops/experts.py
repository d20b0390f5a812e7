"""Experts: the grouped MLP over routed rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Backend, Case
from ..backends.registry import choose
from ..plan import RoutingPlan
from ._expert_weights import Weights, check, gate_up_width, stack, unstack_gradient
from ._library import register


def experts(
    x: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Weights,
    down_proj: Weights,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """Apply to every routed row the MLP of its expert, without the row's weight.

    y_r = act(x[row_token_r] gate_up_proj_e^T) down_proj_e^T; swiglu: act([g; u]) = silu(g) u; gelu: the exact one.

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 or float64. Under autocast x is cast to its dtype.
        plan: made for T tokens and E experts.
        gate_up_proj: (E, 2I, H), rows [gate; up]; (E, I, H) for gelu; the dtype of x. Or the sequence
            [gate_0, up_0, gate_1, ...] of (I, H) matrices that are consecutive views of one slab.
        down_proj: (E, H, I), or the sequence [down_0, ...] of consecutive (H, I) views.
        activation: "swiglu" or "gelu".
        backend: "auto" or a name out of `backends()`.
    Returns: y_rows (R, H) in the dtype of x.
    Raises: TypeError, ValueError naming the argument; RuntimeError for views that are not of one slab.
    Cost: 6 R H I FLOPs (swiglu). Saves x, gate_up (R, 2I), the plan and the weights for backward.
    Source: reference.moe.expert_mlp.
    """
    _checks.tensor("x", x, "T,H")
    x = x.to(_checks.compute_dtype(x))
    plan = _checks.plan(plan, x.shape[0], x)
    gate_up, down = check(x, plan, gate_up_proj, down_proj, activation)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *gate_up, *down))
    if plan.row_weight.requires_grad and not save:  # the rows do not depend on it, and backward has nothing saved
        plan = replace(plan, row_weight=plan.row_weight.detach())
    return _experts(x, plan.tensors(), gate_up, down, activation, save, backend)[0]


def _backend(x: Tensor, E: int, I: int, activation: str, backend: str) -> Backend:
    return choose(backend, Case("experts", x.dtype, x.device.type, E, x.shape[1], I, activation=activation))


def _kernel(x, plan, gate_up_proj, down_proj, activation: str, save_for_backward: bool, backend: str):
    plan = contiguous_plan(plan)
    w = stack(x, plan.num_experts, gate_up_proj, down_proj)
    chosen = _backend(x, plan.num_experts, w.down_proj.shape[2], activation, backend)
    return chosen.experts(x.contiguous(), plan, w.gate_up_proj, w.down_proj, activation, save_for_backward)


def contiguous_plan(tensors: list[Tensor]) -> RoutingPlan:
    """Return the plan behind an op's seven tensors, contiguous as backends expect."""
    return RoutingPlan.from_tensors([tensor.contiguous() for tensor in tensors])


def _fake(x, plan, gate_up_proj, down_proj, activation: str, save_for_backward: bool, backend: str):
    R, E = plan[2].shape[0], plan[0].shape[0]
    gate_up = (R, gate_up_width(gate_up_proj, E)) if save_for_backward else (0,)
    return x.new_empty((R, x.shape[1])), x.new_empty(gate_up)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, plan, gate_up_proj, down_proj, ctx.activation, ctx.saved, ctx.backend = inputs
    ctx.num_gate_up = len(gate_up_proj)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *plan, *gate_up_proj, *down_proj)


def _backward(ctx: Any, dy_rows: Tensor | None, dgate_up: None):
    require_saved(ctx.saved)
    x, gate_up, *rest = ctx.saved_tensors
    plan, weights = rest[:7], rest[7:]
    lists = weights[: ctx.num_gate_up], weights[ctx.num_gate_up :]
    dx, *gradients = None, None, None
    if dy_rows is not None:
        dx, *gradients = _experts_bwd(dy_rows, x, plan, *lists, gate_up, ctx.activation, ctx.backend)
    return dx, [None] * 7, *map(unstack_gradient, gradients, lists), None, None, None


def require_saved(saved: bool) -> None:
    """Refuse a backward whose forward was told not to save for it."""
    if not saved:
        raise RuntimeError("moe_kernels: backward of an op that was called with save_for_backward=False")


def _bwd_kernel(dy_rows, x, plan, gate_up_proj, down_proj, gate_up, activation: str, backend: str):
    plan = contiguous_plan(plan)
    w = stack(x, plan.num_experts, gate_up_proj, down_proj)
    chosen = _backend(x, plan.num_experts, w.down_proj.shape[2], activation, backend)
    dx, dgate_up_proj, ddown_proj = chosen.experts_bwd(
        dy_rows.contiguous(), x.contiguous(), plan, gate_up, w.gate_up_proj, w.down_proj, activation
    )
    return dx, dgate_up_proj.to(gate_up_proj[0].dtype), ddown_proj.to(down_proj[0].dtype)


def _bwd_fake(dy_rows, x, plan, gate_up_proj, down_proj, gate_up, activation: str, backend: str):
    H, E, I = x.shape[1], plan[0].shape[0], down_proj[0].shape[-1]
    dgate_up_proj = gate_up_proj[0].new_empty((E, gate_up_width(gate_up_proj, E), H))
    return x.new_empty(x.shape), dgate_up_proj, down_proj[0].new_empty((E, H, I))


_experts = register(
    "experts(Tensor x, Tensor[] plan, Tensor[] gate_up_proj, Tensor[] down_proj, str activation, "
    "bool save_for_backward, str backend) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
_experts_bwd = register(
    "experts_bwd(Tensor dy_rows, Tensor x, Tensor[] plan, Tensor[] gate_up_proj, Tensor[] down_proj, Tensor gate_up, "
    "str activation, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
