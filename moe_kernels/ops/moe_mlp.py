"""The fused layer: experts, shared expert and combine in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..activation import Activation, spelled
from ..backends.base import Backend, Request
from ..backends.registry import choose
from ..plan import RoutingPlan
from ..weights import Biases, LayerWeights
from ._expert_weights import (
    Weights,
    any_needed,
    by_kind,
    check,
    check_biases,
    check_shared,
    empty_gradients,
    for_backend,
    gate_up_width,
    gradients_of,
)
from ._library import needs_input_grad, register
from .experts import contiguous_plan, in_lists, owned_rows, plan_gradient, require_saved, split_plan


def moe_mlp(
    x: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Weights,
    down_proj: Weights,
    shared_gate_up_proj: Weights | None = None,
    shared_down_proj: Weights | None = None,
    activation: Activation = "swiglu",
    backend: str = "auto",
    recompute: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    layout: str = "gate_up",
    biases: Biases | None = None,
) -> Tensor:
    """Run the experts over their tokens and sum what comes back.

    y_t = shared(x_t) + sum over the rows r of t of row_weight_r expert_e(x_t); out = y, or residual + gate_b y with the
    gate of the token's image b (adaLN).

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 or float64. Under autocast x is cast to its dtype; weights may then
            have another one, and get their gradients in it.
        plan: made for T tokens and E experts; its row_weight is differentiable.
        gate_up_proj, down_proj: as in `experts`.
        shared_gate_up_proj: (2Is, H) ((Is, H) without a gate), or [gate, up], or None.
        shared_down_proj: (H, Is), or [down]; None exactly when shared_gate_up_proj is.
        activation: as in `experts`, of the shared expert, too.
        backend: "auto" or a name out of `backends()`.
        recompute: do not keep gate_up and shared gate_up for backward, compute them there again: the same gradients.
        residual: (T, H), or None; the same dtypes, not necessarily that of x.
        gate: (B, H) for B images of T / B consecutive tokens; None exactly when residual is.
        layout: as in `experts`, of the shared expert's weights, too.
        biases: of the routed experts and of the shared one, in the dtypes that weights may have; or None.
    Returns: (T, H) in the dtype of x, or of residual.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative, and for a backend that
        has not got this function.
    Cost: 6 R H I + 6 T H Is FLOPs (swiglu), twice that backward (with recompute up to three times; on native less
        where all weights of a kind are frozen). Triton and cuda read (out, in) matrices in place wherever they lie, if
        I and Is are multiples of 64. Else backends other than native copy weights that are neither stacked as
        "gate_up" nor consecutive in memory. Saves x, gate_up (R, 2I), shared gate_up (T, 2Is), the plan and the
        weights for backward; with a gate, the gate and y; nothing else.
    Source: reference.moe.moe; the backward identities are SonicMoE's (arXiv 2512.14080).
    """
    _checks.tensor("x", x, "T,H")
    x = x.to(_checks.compute_dtype(x))
    plan = _checks.plan(plan, x.shape[0], x)
    activation = spelled(activation)
    gate_up, down = check(x, plan.num_experts, gate_up_proj, down_proj, activation, layout)
    shared = shared_gate_up_proj, shared_down_proj
    shared_gate_up, shared_down = check_shared(x, plan.num_experts, *shared, activation, layout)
    all_biases = check_biases(x, plan.num_experts, biases, activation, layout, down, shared_down)
    _check_gate(x, residual, gate)
    if residual is not None and residual.dtype == torch.float64 != x.dtype:
        weights = gate_up_proj, down_proj, shared_gate_up_proj, shared_down_proj
        how = {"activation": activation, "backend": backend, "recompute": recompute, "layout": layout}
        how["biases"] = biases
        y = moe_mlp(x, plan, *weights, **how)
        return _add_gated_in_float64(residual, gate, y)
    given = [] if gate is None else [residual, _checks.narrow(gate, x)]
    lists = gate_up, down, shared_gate_up, shared_down, *all_biases
    differentiable = (x, plan.row_weight, *(tensor for kind in lists for tensor in kind), *given)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    return mlp_op(x, plan.tensors(), *lists, given, activation, layout, save, recompute, backend)[0]


def _check_gate(x: Tensor, residual: Tensor | None, gate: Tensor | None) -> None:
    if (residual is None) != (gate is None):
        raise ValueError(
            f"{'gate' if gate is None else 'residual'}: got None, expected both residual and gate, or none"
        )
    if gate is None:
        return
    T, H = x.shape
    _checks.tensor("residual", residual, "T,H", like=x)
    _checks.shape("residual", residual.shape, (T, H), "T,H")
    _checks.tensor("gate", gate, "B,H", like=x)
    B, _ = gate.shape
    _checks.shape("gate", gate.shape, (B, H), "B,H")
    if T % max(B, 1) or (T and not B):
        raise ValueError(f"gate: got {B} images, expected a divisor of T = {T}")


def _add_gated_in_float64(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Plain torch, for no kernel adds in float64, and a residual stream of that dtype is not to lose its bits."""
    tokens_per_image = y.shape[0] // max(gate.shape[0], 1)
    return residual + gate.double().repeat_interleave(tokens_per_image, 0) * y


def pack_weights(
    weights: Sequence[Weights | None], activation: str, layout: str, backend: str, biases: Biases | None = None
) -> Callable[[], None] | None:
    """Pack the weights of one layer, as `moe_mlp` takes them, where its backend can; see Backend.pack."""
    lists, of_biases = (
        [[] if w is None else [w] if isinstance(w, Tensor) else list(w) for w in kinds]
        for kinds in (weights, biases or ())
    )
    with torch.no_grad():
        w = LayerWeights(*lists, layout, of_biases)
        chosen = _backend(w, lists[0][0], activation, backend)
        if w.readable() is not w:
            return None  # every call copies those, and a pack is found by their address
        return chosen.pack(w, activation, [t for tensors in lists for t in tensors])


def _backend(w: LayerWeights, x: Tensor, activation: str, backend: str) -> Backend:
    sizes = w.num_experts, w.hidden_size, w.intermediate_size, w.shared_intermediate_size
    return choose(backend, Request("moe_mlp", x.dtype, x.device.type, *sizes, activation, any(w.biases)))


def _kernel(
    x,
    plan,
    gate_up,
    down,
    shared_gate_up,
    shared_down,
    gate_up_bias,
    down_bias,
    shared_gate_up_bias,
    shared_down_bias,
    gated,
    activation,
    layout,
    save_for_backward,
    recompute,
    backend,
):
    plan = contiguous_plan(plan)
    biases = gate_up_bias, down_bias, shared_gate_up_bias, shared_down_bias
    weights = LayerWeights(gate_up, down, shared_gate_up, shared_down, layout, biases).to(x.dtype)
    save = save_for_backward and not recompute
    chosen = _backend(weights, x, activation, backend)
    w = for_backend(chosen, weights)
    if not gated:
        return *chosen.moe_mlp(x.contiguous(), plan, w, activation, save), x.new_empty(0)
    residual, gate = (t.contiguous() for t in gated)
    *results, y = chosen.gated_moe_mlp(x.contiguous(), plan, w, activation, save, residual, gate)
    return *results, y if save_for_backward else x.new_empty(0)


def _fake(
    x,
    plan,
    gate_up,
    down,
    shared_gate_up,
    shared_down,
    gate_up_bias,
    down_bias,
    shared_gate_up_bias,
    shared_down_bias,
    gated,
    activation,
    layout,
    save_for_backward,
    recompute,
    backend,
):
    T, H = x.shape
    plan = RoutingPlan(*plan)
    save = save_for_backward and not recompute
    routed = (plan.num_rows, gate_up_width(gate_up, plan.num_experts, layout)) if save else (0,)
    shared = (T, gate_up_width(shared_gate_up, 1, layout)) if save and shared_gate_up else (0,)
    out = gated[0].new_empty((T, H)) if gated else x.new_empty((T, H))
    y = (T, H) if gated and save_for_backward else (0,)
    return out, x.new_empty(routed), x.new_empty(shared), x.new_empty(y)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, plan, *weights, ctx.activation, ctx.layout, ctx.saved, _, ctx.backend = inputs
    ctx.lengths = [len(tensors) for tensors in weights]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    weights[-1] = weights[-1][1:]  # the residual's gradient is that of the output
    ctx.save_for_backward(x, *output[1:], *plan, *(tensor for tensors in weights for tensor in tensors))


def _backward(ctx: Any, dout: Tensor | None, dgate_up: None, dshared_gate_up: None, dy: None):
    require_saved(ctx.saved)
    x, gate_up, shared_gate_up, y, *rest = ctx.saved_tensors
    plan, rest = split_plan(rest)
    flat = iter(rest)
    weights = in_lists(flat, ctx.lengths[:8])
    gate = next(flat, None)
    dgated = [None] * ctx.lengths[8]
    needed = any_needed(needs_input_grad(ctx)[2:10])
    dx, drow_weight, dweights = None, None, [[None] * len(kind) for kind in weights]
    if dout is not None:
        if gate is not None:
            dresidual = dout
            dout, dgate = _gated_residual_bwd(dout, y, gate, ctx.backend)
            dgated = [dresidual, dgate]
        how = ctx.activation, ctx.layout, needed, ctx.backend
        dx, drow_weight, gradients = mlp_op_bwd(dout, x, plan, *weights, gate_up, shared_gate_up, *how)
        drow_weight = owned_rows(drow_weight, RoutingPlan(*plan))
        dweights = by_kind(iter(gradients), weights, needed)
    return dx, plan_gradient(drow_weight), *dweights, dgated, None, None, None, None, None


def _gated_kernel(dout: Tensor, y: Tensor, gate: Tensor, backend: str):
    request = Request("combine", y.dtype, y.device.type, hidden_size=y.shape[1])
    return choose(backend, request).gated_residual_bwd(dout.contiguous(), y, gate.contiguous())


def _gated_fake(dout: Tensor, y: Tensor, gate: Tensor, backend: str):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _bwd_kernel(
    dout, x, plan, gate_up_proj, down, shared_gate_up_proj, shared_down, gate_up_bias, down_bias, shared_gate_up_bias,
    shared_down_bias, gate_up, shared_gate_up, activation, layout, needed, backend,
):  # fmt: skip
    plan = contiguous_plan(plan)
    weights = gate_up_proj, down, shared_gate_up_proj, shared_down
    lists = *weights, gate_up_bias, down_bias, shared_gate_up_bias, shared_down_bias
    w = LayerWeights(*weights, layout, lists[4:]).to(x.dtype)
    chosen = _backend(w, x, activation, backend)
    dx, drow_weight, *gradients = chosen.moe_mlp_bwd(
        dout.contiguous(), x.contiguous(), plan, for_backend(chosen, w), gate_up, shared_gate_up, activation, needed
    )
    return dx, drow_weight, gradients_of(chosen, w, gradients, lists, needed)


def _bwd_fake(
    dout, x, plan, gate_up_proj, down, shared_gate_up_proj, shared_down, gate_up_bias, down_bias, shared_gate_up_bias,
    shared_down_bias, gate_up, shared_gate_up, activation, layout, needed, backend,
):  # fmt: skip
    weights = gate_up_proj, down, shared_gate_up_proj, shared_down
    lists = *weights, gate_up_bias, down_bias, shared_gate_up_bias, shared_down_bias
    drow_weight = torch.empty_like(RoutingPlan(*plan).row_weight)
    return x.new_empty(x.shape), drow_weight, empty_gradients(lists, needed)


_WEIGHTS = (
    "Tensor[] gate_up_proj, Tensor[] down_proj, Tensor[] shared_gate_up_proj, Tensor[] shared_down_proj, "
    "Tensor[] gate_up_bias, Tensor[] down_bias, Tensor[] shared_gate_up_bias, Tensor[] shared_down_bias"
)
mlp_op = register(
    f"moe_mlp(Tensor x, Tensor[] plan, {_WEIGHTS}, Tensor[] gated, str activation, str layout, bool save_for_backward, "
    "bool recompute, str backend) "
    "-> (Tensor out, Tensor gate_up, Tensor shared_gate_up, Tensor y)",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
mlp_op_bwd = register(
    f"moe_mlp_bwd(Tensor dout, Tensor x, Tensor[] plan, {_WEIGHTS}, Tensor gate_up, Tensor shared_gate_up, "
    "str activation, str layout, bool[] needed, str backend) -> (Tensor, Tensor, Tensor[])",
    _bwd_kernel,
    _bwd_fake,
)
_gated_residual_bwd = register(
    "gated_residual_bwd(Tensor dout, Tensor y, Tensor gate, str backend) -> (Tensor, Tensor)",
    _gated_kernel,
    _gated_fake,
)
