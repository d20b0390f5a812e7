"""A plan for any rule: from rows, each an expert, a token and a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..plan import RoutingPlan


def plan_of_rows(
    row_expert: Tensor, row_token: Tensor, row_weight: Tensor, num_tokens: int, num_experts: int
) -> RoutingPlan:
    """Group rows by expert, tokens ascending inside each.

    Args:
        row_expert: (R,) int32 or int64 in [0, E).
        row_token: (R,) int32 or int64 in [0, T). A pair of expert and token may occur more than once: weights add up.
        row_weight: (R,) float32, bfloat16, float16 or float64; differentiable.
        num_tokens, num_experts: T and E.
    Returns: a RoutingPlan of R rows; row_pick is the place of a row in the arguments, row_weight float32 (float64 for
        float64).
    Raises: TypeError, ValueError naming the argument. Indices are not looked at: that would make a GPU wait.
    Cost: two sorts of R keys, in plain torch; no host syncs.
    Source: the fields of RoutingPlan.
    """
    _checks.tensor("row_expert", row_expert, "R", _checks.INTEGERS)
    _checks.tensor("row_token", row_token, "R", _checks.INTEGERS, like=row_expert)
    _checks.tensor("row_weight", row_weight, "R", like=row_expert)
    for name, rows in (("row_token", row_token), ("row_weight", row_weight)):
        _checks.shape(name, rows.shape, row_expert.shape, "R")
    _checks.positive("num_experts", num_experts)
    order = torch.argsort(row_expert.long() * num_tokens + row_token, stable=True)
    expert, token = row_expert[order], row_token[order]
    expert_offsets = _starts(expert, num_experts)
    owner, token_rows = torch.sort(token, stable=True)
    return RoutingPlan(
        row_weight=row_weight[order].to(_checks.accumulator(row_weight.dtype)),
        expert_counts=expert_offsets.diff(),
        expert_offsets=expert_offsets,
        row_token=token.int(),
        row_pick=order.int(),
        token_row_offsets=_starts(owner, num_tokens),
        token_rows=token_rows.int(),
    )


def _starts(ascending: Tensor, count: int) -> Tensor:
    """Return where each of `count` values begins in an ascending tensor, and its end: (count + 1,) int32."""
    values = torch.arange(count + 1, device=ascending.device, dtype=ascending.dtype)
    return torch.searchsorted(ascending, values, out_int32=True)
