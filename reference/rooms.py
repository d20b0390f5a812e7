"""The four rooms of the MoE layer, in the order in which tokens pass them: gating, dispatch, experts, combine.

`moe.routed_sum` is the same layer in one loop over experts, without a plan. Here every room stands alone, under the
name and with the arguments that it has in moe_kernels, so that each can be checked by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reference.moe import Activation, expert_mlp, of_each_expert
from reference.routing import check_ids, take_tokens, token_choice


class Plan(NamedTuple):
    """Routed rows grouped by expert, tokens ascending inside an expert, and the way back from a token to its rows.

    Offsets are exclusive prefix sums: expert e owns the rows expert_offsets[e] to expert_offsets[e + 1].
    """

    row_weight: Tensor  # (R,) in the dtype of the scores that it was taken from, differentiable
    expert_counts: Tensor  # (E,) int32
    expert_offsets: Tensor  # (E+1,) int32
    row_token: Tensor  # (R,) int32: the token of each row
    row_pick: Tensor  # (R,) int32: where in those scores, flattened: t K + k (token choice) or t E + e (expert choice)
    token_row_offsets: Tensor  # (T+1,) int32
    token_rows: Tensor  # (R,) int32: the rows of each token, ascending


def gating(x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let each token pick its top_k experts: routing.token_choice, computed in float32 at least.

    Args:
        x: (T, H), any float dtype. gate_weight: (E, H). top_k: 1..E.
    Returns:
        topk_weights (T, K), topk_ids (T, K) int64, probs (T, E); floats in float32, in float64 for float64 x.
    Raises:
        ValueError: as token_choice.
    Cost: 2 T H E FLOPs; one host sync.
    Source: DiT-MoE, arXiv 2407.11633, section 2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return token_choice(x.to(wide), gate_weight.to(wide), top_k)


def dispatch(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Plan:
    """Group the T K picks by expert: the pick (t, k) becomes a row of expert topk_ids[t, k].

    Args:
        topk_ids: (T, K), integers in 0..num_experts-1. topk_weights: (T, K), any float dtype.
    Returns:
        plan of R = T K rows.
    Raises:
        ValueError: topk_ids that do not fit topk_weights or num_experts.
    Cost: a sort of T K ids.
    """
    T, K = topk_weights.shape
    check_ids(topk_ids, T, num_experts)
    if topk_ids.shape[1] != K:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected {(T, K)} as topk_weights")
    experts = topk_ids.flatten().long()
    row_pick = experts.argsort(stable=True)  # picks ascend by token, and so do those of one expert
    return _plan(experts[row_pick], row_pick // K, row_pick, topk_weights, num_experts)


def dispatch_expert_choice(affinities: Tensor, capacity: int, tokens_per_group: int) -> Plan:
    """Let each expert take its best tokens of every group: a row for each (t, e) that routing.take_tokens picks.

    Args:
        affinities: (T, E), any float dtype. capacity, tokens_per_group: as take_tokens.
    Returns:
        plan of R = E capacity T / tokens_per_group rows.
    Raises:
        ValueError: as take_tokens.
    Cost: a sort of T E scores; one host sync.
    Source: EC-DIT, arXiv 2410.02098.
    """
    return dispatch_mask(affinities, take_tokens(affinities, capacity, tokens_per_group))


def dispatch_mask(weights: Tensor, picks: Tensor) -> Plan:
    """Make a row of each picked score: the plan of any rule of `routers`.

    Args:
        weights: (T, E), any float dtype. picks: (T, E) bool.
    Returns:
        plan of R = picks.sum() rows.
    Cost: one host sync.
    """
    E = weights.shape[1]
    row_expert, row_token = picks.T.nonzero().unbind(1)  # expert by expert, tokens ascending
    return _plan(row_expert, row_token, row_token * E + row_expert, weights, E)


def experts(
    x: Tensor,
    plan: Plan,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Run every row's token through the row's expert: y[r] = expert_e(x[row_token[r]]), unweighted.

    Args:
        x: (T, H), any float dtype; all weights in the dtype of x. plan: a Plan, or anything with its fields.
        gate_up_proj: (E, 2I, H), (E, I, H) for gelu. down_proj: (E, H, I). activation: as moe.expert_mlp.
        gate_up_bias: (E, 2I), (E, I) for gelu, or None. down_bias: (E, H), or None.
    Returns:
        (R, H) in the dtype of x.
    Raises:
        ValueError: as moe.expert_mlp.
    Cost: 6 R H I FLOPs (swiglu), 4 R H I (gelu); one host sync.
    """
    groups = x[plan.row_token].split(plan.expert_counts.tolist())
    parts = zip(groups, of_each_expert(gate_up_proj, down_proj, gate_up_bias, down_bias), strict=True)
    return torch.cat([expert_mlp(rows, g, d, activation, gb, db) for rows, (g, d, gb, db) in parts])


def combine(y_rows: Tensor, plan: Plan, shared: Tensor | None = None) -> Tensor:
    """Sum each token's rows in ascending order: out[t] = sum over its rows r of row_weight[r] y_rows[r], + shared[t].

    Args:
        y_rows: (R, H), any float dtype. plan: a Plan, or anything with its fields. shared: (T, H), or None.
    Returns:
        (T, H) in the dtype of y_rows, accumulated in the wider of y_rows' and row_weight's; 0 for a token without rows.
    Cost: 2 R H FLOPs.
    """
    T, H = plan.token_row_offsets.shape[0] - 1, y_rows.shape[1]
    weighted = plan.row_weight[:, None] * y_rows
    out = weighted.new_zeros(T, H).index_add(0, plan.row_token, weighted)
    return (out if shared is None else out + shared).to(y_rows.dtype)


def _plan(row_expert: Tensor, row_token: Tensor, row_pick: Tensor, scores: Tensor, num_experts: int) -> Plan:
    """Build the plan of rows in their final order; scores is (T, K) or (T, E), and row_pick points into it."""
    counts, counts_of_tokens = row_expert.bincount(minlength=num_experts), row_token.bincount(minlength=len(scores))
    return Plan(
        expert_counts=counts.int(),
        expert_offsets=_offsets(counts),
        row_token=row_token.int(),
        row_weight=scores.flatten()[row_pick],
        row_pick=row_pick.int(),
        token_row_offsets=_offsets(counts_of_tokens),
        token_rows=row_token.argsort(stable=True).int(),
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
