"""Experts: the grouped MLP over routed rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..activation import Activation, spelled
from ..backends.base import Backend, Request
from ..backends.registry import choose
from ..plan import FIELDS, RoutingPlan
from ..weights import Biases, LayerWeights
from ._expert_weights import (
    Weights,
    any_needed,
    by_kind,
    check,
    check_biases,
    empty_gradients,
    for_backend,
    gate_up_width,
    gradients_of,
)
from ._library import needs_input_grad, register


def experts(
    x: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Weights,
    down_proj: Weights,
    activation: Activation = "swiglu",
    backend: str = "auto",
    layout: str = "gate_up",
    biases: Biases | None = None,
) -> Tensor:
    """Apply to every routed row the MLP of its expert, without the row's weight.

    y_r = act(x[row_token_r] gate_up_proj_e^T + gate_up_bias_e) down_proj_e^T + down_bias_e; swiglu: act([g; u]) =
    silu(g) u; gelu: the exact one, gelu_tanh: its other form.

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 or float64. Under autocast x is cast to its dtype.
        plan: made for T tokens and E experts.
        gate_up_proj: (E, 2I, H), rows [gate; up]; (E, I, H) without a gate (gelu, gelu_tanh); the dtype of x. Or the
            pair [gate_proj, up_proj], two stacks (E, I, H), in this order in every layout. Or the sequence
            [gate_0, up_0, gate_1, ...] of (I, H) matrices, wherever each lies.
        down_proj: (E, H, I), or the sequence [down_0, ...] of (H, I) matrices.
        activation: "swiglu", "gelu", "gelu_tanh" or a ClampedSwiGLU. Triton and cuda have the first two.
        backend: "auto" or a name out of `backends()`.
        layout: how weights are stored, a name out of `moe_kernels.weights.LAYOUTS`: "up_gate" for stacks with rows
            [up; gate]; "gate_up_in_out", "up_gate_in_out" for (E, H, 2I) and (E, I, H), sequences likewise.
        biases: gate_up and down of Biases, in the dtype of x; or None. Triton and cuda have none.
    Returns: y_rows (R, H) in the dtype of x.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a backend that has not got this function.
    Cost: 6 R H I FLOPs (swiglu). Saves x, gate_up (R, 2I), the plan and the weights for backward.
    Source: reference.moe.expert_mlp.
    """
    _checks.tensor("x", x, "T,H")
    x = x.to(_checks.compute_dtype(x))
    plan = _checks.plan(plan, x.shape[0], x)
    activation = spelled(activation)
    gate_up, down = check(x, plan.num_experts, gate_up_proj, down_proj, activation, layout)
    gate_up_bias, down_bias, *_ = check_biases(x, plan.num_experts, biases, activation, layout, down, [])
    lists = gate_up, down, gate_up_bias, down_bias
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(t for kind in lists for t in kind)))
    if plan.row_weight.requires_grad and not save:  # the rows do not depend on it, and backward has nothing saved
        plan = replace(plan, row_weight=plan.row_weight.detach())
    return _experts(x, plan.tensors(), *lists, activation, layout, save, backend)[0]


def _backend(w: LayerWeights, x: Tensor, activation: str, backend: str) -> Backend:
    sizes = w.num_experts, w.hidden_size, w.intermediate_size
    request = Request("experts", x.dtype, x.device.type, *sizes, activation=activation, biases=any(w.biases))
    return choose(backend, request)


def _kernel(
    x, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, activation: str, layout: str, save_for_backward: bool,
    backend: str,
):  # fmt: skip
    plan = contiguous_plan(plan)
    w = LayerWeights(gate_up_proj, down_proj, layout=layout, biases=(gate_up_bias, down_bias)).to(x.dtype)
    chosen = _backend(w, x, activation, backend)
    return chosen.experts(x.contiguous(), plan, for_backend(chosen, w), activation, save_for_backward)


def contiguous_plan(tensors: list[Tensor]) -> RoutingPlan:
    """Return the plan behind an op's seven tensors, contiguous as backends expect."""
    return RoutingPlan.from_tensors([tensor.contiguous() for tensor in tensors])


def split_plan(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the plan's tensors at the front of what was saved for backward, and the others."""
    return tensors[: len(FIELDS)], tensors[len(FIELDS) :]


def owned_rows(rows: Tensor, plan: RoutingPlan) -> Tensor:
    """Return gradients of rows as autograd is to have them: in anomaly mode 0 behind the plan's last row.

    What memory held there reaches no result, but anomaly mode would call its NaN an error.
    """
    if not torch.is_anomaly_enabled():
        return rows
    behind = torch.arange(len(rows), device=rows.device) >= plan.expert_offsets[-1]
    return rows.masked_fill(behind.view(-1, *[1] * (rows.dim() - 1)), 0)


def plan_gradient(drow_weight: Tensor | None) -> list[Tensor | None]:
    """Return an op's gradients of the plan's tensors, of which row_weight alone has one."""
    return [drow_weight if name == "row_weight" else None for name in FIELDS]


def _fake(
    x, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, activation: str, layout: str, save_for_backward: bool,
    backend: str,
):  # fmt: skip
    plan = RoutingPlan(*plan)
    width = gate_up_width(gate_up_proj, plan.num_experts, layout)
    gate_up = (plan.num_rows, width) if save_for_backward else (0,)
    return x.new_empty((plan.num_rows, x.shape[1])), x.new_empty(gate_up)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, plan, *weights, ctx.activation, ctx.layout, ctx.saved, ctx.backend = inputs
    ctx.lengths = [len(tensors) for tensors in weights]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *plan, *(tensor for tensors in weights for tensor in tensors))


def _backward(ctx: Any, dy_rows: Tensor | None, dgate_up: None):
    require_saved(ctx.saved)
    x, gate_up, *rest = ctx.saved_tensors
    plan, rest = split_plan(rest)
    lists, needed = in_lists(rest, ctx.lengths), any_needed(needs_input_grad(ctx)[2:6])
    dx, gradients = None, [[None] * len(kind) for kind in lists]
    if dy_rows is not None:
        how = ctx.activation, ctx.layout, needed, ctx.backend
        dx, dweights = _experts_bwd(dy_rows, x, plan, *lists, gate_up, *how)
        gradients = by_kind(iter(dweights), lists, needed)
    return dx, plan_gradient(None), *gradients, None, None, None, None


def in_lists(tensors: Iterable[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Return tensors that were saved one behind another as the lists that they were."""
    flat = iter(tensors)
    return [[next(flat) for _ in range(length)] for length in lengths]


def require_saved(saved: bool) -> None:
    """Refuse a backward whose forward was told not to save for it."""
    if not saved:
        raise RuntimeError("moe_kernels: backward of an op that was called with save_for_backward=False")


def _bwd_kernel(
    dy_rows, x, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, gate_up, activation, layout, needed, backend
):
    plan, lists = contiguous_plan(plan), (gate_up_proj, down_proj, gate_up_bias, down_bias)
    w = LayerWeights(*lists[:2], layout=layout, biases=lists[2:]).to(x.dtype)
    chosen = _backend(w, x, activation, backend)
    dx, *gradients = chosen.experts_bwd(
        dy_rows.contiguous(), x.contiguous(), plan, gate_up, for_backend(chosen, w), activation, needed
    )
    return dx, gradients_of(chosen, w, gradients, lists, needed)


def _bwd_fake(
    dy_rows, x, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, gate_up, activation, layout, needed, backend
):
    return x.new_empty(x.shape), empty_gradients((gate_up_proj, down_proj, gate_up_bias, down_bias), needed)


_WEIGHTS = "Tensor[] gate_up_proj, Tensor[] down_proj, Tensor[] gate_up_bias, Tensor[] down_bias"
_experts = register(
    f"experts(Tensor x, Tensor[] plan, {_WEIGHTS}, str activation, str layout, bool save_for_backward, str backend) "
    "-> (Tensor, Tensor)",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
_experts_bwd = register(
    f"experts_bwd(Tensor dy_rows, Tensor x, Tensor[] plan, {_WEIGHTS}, Tensor gate_up, str activation, str layout, "
    "bool[] needed, str backend) -> (Tensor, Tensor[])",
    _bwd_kernel,
    _bwd_fake,
)
