"""Gating: router logits, softmax and the top k picks of every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Request
from ..backends.registry import choose
from ._library import register


def gating(x: Tensor, gate_weight: Tensor, top_k: int, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Score the experts for every token and pick the best.

    probs = softmax(x gate_weight^T); topk_weights, topk_ids = top_k(probs), raw, without renormalisation.

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 or float64.
        gate_weight: (E, H) router weight; the same dtypes.
        top_k: picks per token, 0 (affinities only) to E.
        backend: "auto" or a name out of `backends()`.
    Returns:
        topk_weights (T, K) float32 in descending order, topk_ids (T, K) int32, probs (T, E) float32; float64 for
        float64 x. All is computed from upcast x and gate_weight, under autocast too. The lower expert wins a tie.
    Raises:
        TypeError, ValueError naming the argument; ValueError for router logits that are not finite (CPU only: it would
        make a GPU wait).
    Cost: 2 T H E FLOPs, one pass over x; no host syncs on a GPU.
    Source: reference.routing.token_choice.
    """
    _checks.tensor("x", x, "T,H")
    _, H = x.shape
    _checks.router(gate_weight, x, H, top_k)
    return gating_op(x, gate_weight, top_k, backend)


def aux_loss(probs: Tensor, expert_counts: Tensor, top_k: int, alpha: float) -> Tensor:
    """Compute the load-balancing loss of a batch.

    aux = alpha E sum_i f_i P_i, f_i = expert_counts_i / (T K), P_i = mean over tokens of probs[:, i].

    Args:
        probs: (T, E) float32 or float64; the gradient goes through it alone.
        expert_counts: (E,) int32, rows of every expert.
        top_k: K.
        alpha: weight of the loss.
    Returns: a scalar in the dtype of probs; 0 for T = 0.
    Raises: TypeError, ValueError naming the argument.
    Cost: one pass over probs.
    Source: reference.routing.aux_loss.
    """
    _checks.tensor("probs", probs, "T,E")
    _checks.tensor("expert_counts", expert_counts, "E", _checks.INTEGERS, like=probs)
    _checks.shape("expert_counts", expert_counts.shape, probs.shape[1:], "E")
    _checks.positive("top_k", top_k)
    return torch.dot(probs.sum(0), aux_loss_gradient(expert_counts, probs, top_k, alpha))


def inject_aux_loss(row_weight: Tensor, probs: Tensor, expert_counts: Tensor, top_k: int, alpha: float) -> Tensor:
    """Let weights carry the gradient of the load-balancing loss: an identity whose backward gives it gradient 1.

    Args:
        row_weight: of a plan that came from probs.
        probs, expert_counts, top_k, alpha: as in `aux_loss`.
    Returns: row_weight.
    Cost: nothing forward; the gradient of probs is one row for all tokens, backward.
    Source: reference.moe.inject_aux.
    """
    return _AuxLoss.apply(row_weight, probs, expert_counts, top_k, alpha)


def aux_loss_gradient(expert_counts: Tensor, probs: Tensor, top_k: int, alpha: float) -> Tensor:
    """Return the gradient of `aux_loss` with respect to probs, (E,), the same for every token: alpha E f_i / T."""
    return expert_counts.to(probs.dtype) * aux_loss_scale(*probs.shape, top_k, alpha)


def aux_loss_scale(T: int, E: int, top_k: int, alpha: float) -> float:
    """Return what the counts of the experts are multiplied by in `aux_loss_gradient`."""
    return alpha * E / max(T * T * top_k, 1)


class _AuxLoss(torch.autograd.Function):
    """What inject_aux_loss says; the value of the loss is not needed for it."""

    @staticmethod
    def forward(ctx: Any, row_weight: Tensor, probs: Tensor, expert_counts: Tensor, top_k: int, alpha: float) -> Tensor:
        ctx.save_for_backward(expert_counts, probs)
        ctx.top_k, ctx.alpha = top_k, alpha
        return row_weight.view_as(row_weight)

    @staticmethod
    def backward(ctx: Any, drow_weight: Tensor) -> tuple:
        expert_counts, probs = ctx.saved_tensors
        dprobs = aux_loss_gradient(expert_counts, probs, ctx.top_k, ctx.alpha).expand_as(probs)
        return drow_weight, dprobs, None, None, None


def one_row_or_all(t: Tensor | None) -> Tensor | None:
    """Return a gradient as backends take it: contiguous; (1, n) where all rows are one in memory."""
    return None if t is None else (t[:1] if t.shape[0] > 1 and not t.stride(0) else t).contiguous()


def _backend(x: Tensor, gate_weight: Tensor, backend: str):
    E, H = gate_weight.shape
    return choose(backend, Request("gating", x.dtype, x.device.type, num_experts=E, hidden_size=H))


def _kernel(x: Tensor, gate_weight: Tensor, top_k: int, backend: str):
    return _backend(x, gate_weight, backend).gating(x.contiguous(), gate_weight.contiguous(), top_k)


def _fake(x: Tensor, gate_weight: Tensor, top_k: int, backend: str):
    T, E = x.shape[0], gate_weight.shape[0]
    dtype = _checks.accumulator(x.dtype)
    ids = x.new_empty((T, top_k), dtype=torch.int32)
    return x.new_empty((T, top_k), dtype=dtype), ids, x.new_empty((T, E), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate_weight, _, ctx.backend = inputs
    _, topk_ids, probs = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_weight, topk_ids, probs)


def _backward(ctx: Any, dtopk_weights: Tensor | None, dtopk_ids: None, dprobs: Tensor | None):
    if dtopk_weights is None and dprobs is None:
        return None, None, None, None
    dx, dgate_weight = gating_op_bwd(dtopk_weights, dprobs, *ctx.saved_tensors, ctx.backend)
    return dx, dgate_weight, None, None


def _bwd_kernel(dtopk_weights, dprobs, x, gate_weight, topk_ids, probs, backend: str):
    dtopk_weights = None if dtopk_weights is None else dtopk_weights.contiguous()
    return _backend(x, gate_weight, backend).gating_bwd(
        dtopk_weights, one_row_or_all(dprobs), x.contiguous(), gate_weight.contiguous(), topk_ids, probs
    )


def _bwd_fake(dtopk_weights, dprobs, x, gate_weight, topk_ids, probs, backend: str):
    return x.new_empty(x.shape), gate_weight.new_empty(gate_weight.shape)


gating_op = register(
    "gating(Tensor x, Tensor gate_weight, int top_k, str backend) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
gating_op_bwd = register(
    "gating_bwd(Tensor? dtopk_weights, Tensor? dprobs, Tensor x, Tensor gate_weight, Tensor topk_ids, Tensor probs, "
    "str backend) -> (Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
