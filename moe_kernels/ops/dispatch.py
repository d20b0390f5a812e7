"""Dispatch: from picks to the routing plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Request
from ..backends.registry import choose
from ..plan import RoutingPlan
from ._library import register


def dispatch(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, backend: str = "auto") -> RoutingPlan:
    """Group the picks of token choice by expert.

    Rows are the T K picks, ordered by (expert, token): a stable counting sort, hence deterministic.

    Args:
        topk_ids: (T, K) int32 or int64 in [0, E).
        topk_weights: (T, K) float32, bfloat16, float16 or float64; differentiable.
        num_experts: E.
        backend: "auto" or a name out of `backends()`.
    Returns: a RoutingPlan with R = T K rows; row_weight is float32 (float64 for float64 topk_weights).
    Raises: TypeError, ValueError naming the argument; ValueError for ids out of range (CPU only: it would make a GPU
        wait; there backends clamp them to [0, E), so that no index is out of range).
    Cost: O(T K) reads and writes; no host syncs on a GPU.
    Source: reference.moe.moe loops over experts instead.
    """
    _checks.tensor("topk_ids", topk_ids, "T,K", _checks.INTEGERS)
    _checks.tensor("topk_weights", topk_weights, "T,K", like=topk_ids)
    T, K = topk_ids.shape
    _checks.shape("topk_weights", topk_weights.shape, (T, K), "T,K")
    _checks.positive("K", K)
    _checks.positive("num_experts", num_experts)
    return RoutingPlan(*dispatch_op(topk_weights, topk_ids, num_experts, backend))


def dispatch_expert_choice(
    affinities: Tensor, capacity: int, tokens_per_group: int, backend: str = "auto"
) -> RoutingPlan:
    """Let every expert take its best tokens out of each group of consecutive tokens.

    Expert e takes the `capacity` largest affinities[t, e] of a group; the lower token wins a tie.

    Args:
        affinities: (T, E) float32, bfloat16, float16 or float64; differentiable.
        capacity: tokens per expert and group, 1 to tokens_per_group.
        tokens_per_group: group size; divides T.
        backend: "auto" or a name out of `backends()`.
    Returns: a RoutingPlan with R = E capacity T / tokens_per_group rows; row_weight = the raw affinities.
    Raises: TypeError, ValueError naming the argument; ValueError for affinities that are not finite (CPU only).
    Cost: a pass over the affinities per bit that decides, at most 34 (eager, grouped: a sort of each group for each
        expert); no host syncs on a GPU.
    Source: reference.routing.expert_choice.
    """
    _checks.tensor("affinities", affinities, "T,E")
    T, E = affinities.shape
    _checks.positive("num_experts", E)
    _checks.positive("tokens_per_group", tokens_per_group)
    _checks.positive("capacity", capacity)
    if T % tokens_per_group:
        raise ValueError(f"tokens_per_group: got {tokens_per_group}, expected a divisor of T = {T}")
    if capacity > tokens_per_group:
        raise ValueError(f"capacity: got {capacity}, expected at most tokens_per_group = {tokens_per_group}")
    return RoutingPlan(*_dispatch_expert_choice(affinities, capacity, tokens_per_group, backend))


def _kernel(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, backend: str):
    _checks.ids(topk_ids, num_experts)
    weights = topk_weights.to(_checks.accumulator(topk_weights.dtype)).contiguous()
    request = Request("dispatch", weights.dtype, weights.device.type, num_experts=num_experts)
    return choose(backend, request).dispatch(topk_ids.int().contiguous(), weights, num_experts).tensors()


def _fake(topk_weights: Tensor, topk_ids: Tensor, num_experts: int, backend: str):
    T, K = topk_ids.shape
    return fake_plan(topk_weights, T, num_experts, T * K)


def fake_plan(weights: Tensor, T: int, E: int, R: int) -> tuple[Tensor, ...]:
    """Return a plan's seven tensors, empty."""

    def indices(n: int) -> Tensor:
        return weights.new_empty((n,), dtype=torch.int32)

    row_weight = weights.new_empty((R,), dtype=_checks.accumulator(weights.dtype))
    return row_weight, indices(E), indices(E + 1), indices(R), indices(R), indices(T + 1), indices(R)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.shape, ctx.dtype, ctx.backend = inputs[0].shape, inputs[0].dtype, inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(RoutingPlan(*output).row_pick)


def _backward(ctx: Any, drow_weight: Tensor | None, *_: None):
    if drow_weight is None:
        return None, None, None, None
    (row_pick,) = ctx.saved_tensors
    T, N = ctx.shape
    dweights = dispatch_op_bwd(drow_weight, row_pick, T * N, ctx.backend)
    return dweights.view(T, N).to(ctx.dtype), None, None, None


def _bwd_kernel(drow_weight: Tensor, row_pick: Tensor, count: int, backend: str) -> Tensor:
    request = Request("dispatch", drow_weight.dtype, drow_weight.device.type)
    return choose(backend, request).dispatch_bwd(drow_weight.contiguous(), row_pick.contiguous(), count)


def _bwd_fake(drow_weight: Tensor, row_pick: Tensor, count: int, backend: str) -> Tensor:
    return drow_weight.new_empty((count,))


def _expert_choice_kernel(affinities: Tensor, capacity: int, tokens_per_group: int, backend: str):
    if affinities.device.type == "cpu" and not bool(affinities.isfinite().all()):
        raise ValueError("affinities: got values that are not finite, expected finite ones")
    affinities = affinities.to(_checks.accumulator(affinities.dtype)).contiguous()
    request = Request("dispatch", affinities.dtype, affinities.device.type, num_experts=affinities.shape[1])
    return choose(backend, request).dispatch_expert_choice(affinities, capacity, tokens_per_group).tensors()


def _expert_choice_fake(affinities: Tensor, capacity: int, tokens_per_group: int, backend: str):
    T, E = affinities.shape
    return fake_plan(affinities, T, E, E * capacity * (T // tokens_per_group))


PLAN = (  # opcheck wants a floating-point tensor in front
    "(Tensor row_weight, Tensor expert_counts, Tensor expert_offsets, Tensor row_token, Tensor row_pick, "
    "Tensor token_row_offsets, Tensor token_rows)"
)
dispatch_op_bwd = register(
    "dispatch_bwd(Tensor drow_weight, Tensor row_pick, SymInt count, str backend) -> Tensor", _bwd_kernel, _bwd_fake
)
dispatch_op = register(
    f"dispatch(Tensor topk_weights, Tensor topk_ids, int num_experts, str backend) -> {PLAN}",
    _kernel,
    _fake,
    _setup_context,
    _backward,
)
_dispatch_expert_choice = register(
    "dispatch_expert_choice(Tensor affinities, SymInt capacity, SymInt tokens_per_group, str backend) -> " + PLAN,
    _expert_choice_kernel,
    _expert_choice_fake,
    _setup_context,
    _backward,
)
