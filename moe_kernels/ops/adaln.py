"""What adaLN puts around a MoE layer, fused with its first and its last room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from ..backends.base import Backend, Request
from ..backends.registry import choose
from ._library import register
from .gating import one_row_or_all


def modulated_gating(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate_weight: Tensor,
    top_k: int,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise and modulate the tokens of images, and gate what comes out, in one pass over x.

    tokens = LayerNorm(x) (1 + scale_b) + shift_b, b the image of the token; then `gating` of the tokens, as rounded.

    Args:
        x: (B, L, H) images of L tokens; float32, bfloat16, float16 or float64. LayerNorm has no parameters.
        shift, scale: (B, H); the same dtypes, not necessarily that of x.
        gate_weight: (E, H) router weight; the same dtypes.
        top_k: picks per token, 0 (affinities only) to E.
        eps: added to the variance.
        backend: "auto" or a name out of `backends()`.
    Returns:
        tokens (B L, H) in the dtype of x, or autocast's, and topk_weights, topk_ids and probs as `gating` returns them.
    Raises: TypeError, ValueError naming the argument; ValueError for router logits that are not finite (CPU only).
    Cost: reads x once, writes tokens once; 2 T H E FLOPs. Saves x, its means and deviations, shift, scale and probs.
    Source: reference.dit.modulate, reference.routing.token_choice.
    """
    _checks.tensor("x", x, "B,L,H")
    B, _, H = x.shape
    for name, value in (("shift", shift), ("scale", scale)):
        _checks.tensor(name, value, "B,H", like=x)
        _checks.shape(name, value.shape, (B, H), "B,H")
    _checks.router(gate_weight, x, H, top_k)
    dtype = _checks.compute_dtype(x)
    shift, scale = _checks.narrow(shift, x), _checks.narrow(scale, x)
    return _modulated_gating(x, shift, scale, gate_weight, top_k, eps, dtype, backend)[:4]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) (1 + scale_b) + shift_b for x (B, L, H), in the dtype that the layer computes in."""
    _checks.tensor("x", x, "B,L,H")
    for name, value in (("shift", shift), ("scale", scale)):
        _checks.tensor(name, value, "B,H", like=x)
        _checks.shape(name, value.shape, (x.shape[0], x.shape[2]), "B,H")
    normal = normalise(x)
    shift, scale = shift.to(normal.dtype), scale.to(normal.dtype)
    return (normal * (1 + scale[:, None]) + shift[:, None]).to(_checks.compute_dtype(x))


def normalise(x: Tensor) -> Tensor:
    """Return LayerNorm(x), without parameters, in the accumulation dtype."""
    return F.layer_norm(x.to(_checks.accumulator(x.dtype)), x.shape[-1:], eps=1e-6)


def _backend(x: Tensor, gate_weight: Tensor, backend: str) -> Backend:
    E, H = gate_weight.shape
    return choose(backend, Request("gating", x.dtype, x.device.type, num_experts=E, hidden_size=H))


def _kernel(x, shift, scale, gate_weight, top_k: int, eps: float, dtype: torch.dtype, backend: str):
    given = (t.contiguous() for t in (x, shift, scale, gate_weight))
    return _backend(x, gate_weight, backend).modulated_gating(*given, top_k, eps, dtype)


def _fake(x, shift, scale, gate_weight, top_k: int, eps: float, dtype: torch.dtype, backend: str):
    (B, L, H), E = x.shape, gate_weight.shape[0]
    T, wide = B * L, _checks.accumulator(x.dtype)
    topk_weights, probs = x.new_empty((T, top_k), dtype=wide), x.new_empty((T, E), dtype=wide)
    topk_ids, moments = x.new_empty((T, top_k), dtype=torch.int32), x.new_empty((2, T), dtype=wide)
    return x.new_empty((T, H), dtype=dtype), topk_weights, topk_ids, probs, moments


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, shift, scale, gate_weight, _, _, ctx.tokens_dtype, ctx.backend = inputs
    _, _, topk_ids, probs, moments = output
    ctx.mark_non_differentiable(topk_ids, moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, gate_weight, topk_ids, probs, moments)


def _backward(
    ctx: Any, dtokens: Tensor | None, dtopk_weights: Tensor | None, _ids: None, dprobs: Tensor | None, _m: None
):
    if dtokens is None and dtopk_weights is None and dprobs is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    gradients = _modulated_gating_bwd(dtokens, dtopk_weights, dprobs, *saved, ctx.tokens_dtype, ctx.backend)
    return *gradients, None, None, None, None


def _bwd_kernel(
    dtokens, dtopk_weights, dprobs, x, shift, scale, gate_weight, topk_ids, probs, moments, dtype, backend: str
):
    dtokens, dtopk_weights = (t if t is None else t.contiguous() for t in (dtokens, dtopk_weights))
    given = (t.contiguous() for t in (x, shift, scale, gate_weight))
    return _backend(x, gate_weight, backend).modulated_gating_bwd(
        dtokens, dtopk_weights, one_row_or_all(dprobs), *given, topk_ids, probs, moments, dtype
    )


def _bwd_fake(
    dtokens, dtopk_weights, dprobs, x, shift, scale, gate_weight, topk_ids, probs, moments, dtype, backend: str
):
    return tuple(t.new_empty(t.shape) for t in (x, shift, scale, gate_weight))


_INPUTS = "Tensor x, Tensor shift, Tensor scale, Tensor gate_weight"
_modulated_gating = register(
    f"modulated_gating({_INPUTS}, int top_k, float eps, ScalarType dtype, str backend) "
    "-> (Tensor tokens, Tensor topk_weights, Tensor topk_ids, Tensor probs, Tensor moments)",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
_modulated_gating_bwd = register(
    f"modulated_gating_bwd(Tensor? dtokens, Tensor? dtopk_weights, Tensor? dprobs, {_INPUTS}, Tensor topk_ids, "
    "Tensor probs, Tensor moments, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
