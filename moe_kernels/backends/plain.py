"""Selection in plain torch, on any device, without a wait: what backends without kernels for it do."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulator


def select_top(scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
    """Do what Backend.select_top says, by a sort: torch.topk leaves ties undefined."""
    G, M, N = scores.shape
    values, order = scores.sort(dim=1, descending=True, stable=True)
    picks = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(counts, Tensor):
        counts = counts.long()[:, None]
        taken = torch.arange(M, device=scores.device)[:, None] < counts
        last = values.gather(1, counts.clamp(1, M) - 1)[:, 0] if M else values.new_zeros(G, N)
        return picks.scatter(1, order, taken), torch.where(counts[:, 0] > 0, last, torch.inf)
    least = values[:, counts - 1] if counts else values.new_full((G, N), torch.inf)
    return picks.scatter(1, order[:, :counts], True), least.clone()


def select_experts(scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
    """Do what Backend.select_experts says."""
    if groups_taken < groups:
        by_group = scores.unflatten(1, (groups, -1))
        worth = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
        allowed, _ = select_top(worth[..., None], groups_taken)
        scores = by_group.masked_fill(~allowed, -torch.inf).flatten(1)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].int()


def plan_of_marks(weights: Tensor, picks: Tensor, max_rows: int) -> tuple[Tensor, ...]:
    """Do what Backend.dispatch_mask says; return the tensors of the plan."""
    T, E = picks.shape
    marked = picks.T.reshape(-1)  # expert by expert, tokens ascending: the order of rows
    rows = marked.cumsum(0)
    rows = torch.where(marked & (rows <= max_rows), rows - 1, max_rows)
    every = torch.arange(T * E, device=picks.device)
    none = torch.full((max_rows + 1,), T * E, device=picks.device)
    source = none.scatter_(0, rows, every)[:max_rows]  # what is no row, and what is one too many, met in the last
    expert = source // max(T, 1)
    token = source - expert * T
    return plan_of_rows(weights.reshape(-1), token, expert, token * E + expert, T, E)


def plan_of_rows(weights: Tensor, token: Tensor, expert: Tensor, pick: Tensor, T: int, E: int) -> tuple[Tensor, ...]:
    """Return the plan of rows in their order; those of expert E are none: token 0, weight 0, one pick beyond all."""
    is_row, count = expert < E, weights.shape[0]
    token, pick = torch.where(is_row, token, 0), torch.where(is_row, pick, count)
    flat = torch.cat([weights.to(accumulator(weights.dtype)), weights.new_zeros(1)])
    owner, token_rows = torch.where(is_row, token, T).sort(stable=True)
    expert_offsets = torch.searchsorted(expert, torch.arange(E + 1, device=expert.device), out_int32=True)
    token_row_offsets = torch.searchsorted(owner, torch.arange(T + 1, device=owner.device), out_int32=True)
    indices = expert_offsets.diff(), expert_offsets, token.int(), pick.int(), token_row_offsets, token_rows.int()
    return flat.index_select(0, pick), *indices
