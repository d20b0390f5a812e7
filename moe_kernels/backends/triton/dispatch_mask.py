"""Dispatch of any rule: how many marks each program's tokens have at every expert, then their rows; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles
from .dispatch import HISTOGRAM, PROGRAMS, sums_of_counts


@triton.jit
def load_marks(picks, tokens, stop, E: tl.constexpr, E_PADDED: tl.constexpr):
    """Load which experts are marked for tokens below `stop`, (tokens, experts): 0 or 1."""
    experts = tl.arange(0, E_PADDED)
    live = (tokens < stop)[:, None] & (experts < E)[None, :]
    at = tokens.to(tl.int64)[:, None] * E + experts[None, :]
    return (tl.load(picks + at, mask=live, other=0) != 0).to(tl.int32)


@triton.jit
def mask_count(picks, counts, T, chunk, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[p, e] = marks of expert e among the `chunk` tokens of program p."""
    program = tl.program_id(0)
    total = tl.zeros((E_PADDED,), tl.int32)
    stop = tl.minimum(T, (program + 1) * chunk)
    for first in range(program * chunk, stop, BLOCK):
        total += tl.sum(load_marks(picks, first + tl.arange(0, BLOCK), stop, E, E_PADDED), 0)
    tl.store(counts + program * E_PADDED + tl.arange(0, E_PADDED), total)


@triton.jit
def mask_behind(row_token, row_weight, row_pick, token_rows, rows, R, none, BLOCK: tl.constexpr):
    """Fill what lies behind the rows that there are: token 0, weight 0, no pick; each its own token_rows."""
    for first in range(rows + tl.program_id(0) * BLOCK, R, tl.num_programs(0) * BLOCK):
        r = first + tl.arange(0, BLOCK)
        tl.store(row_token + r, tl.zeros_like(r), mask=r < R)
        tl.store(row_weight + r, tl.zeros((BLOCK,), tl.float32), mask=r < R)
        tl.store(row_pick + r, tl.zeros_like(r) + none, mask=r < R)
        tl.store(token_rows + r, r, mask=r < R)


@triton.jit
def mask_offsets(expert_counts, expert_offsets, offsets, total, R, E: tl.constexpr, E_PADDED: tl.constexpr):
    """Store what experts have, up to R rows in all."""
    experts = tl.arange(0, E_PADDED)
    begin = tl.minimum(offsets, R)
    tl.store(expert_offsets + experts, begin, mask=experts < E)
    tl.store(expert_counts + experts, tl.minimum(offsets + total, R) - begin, mask=experts < E)


@triton.jit
def mask_rows(weights, row_weight, row_token, row_pick, row, tokens, kept, E: tl.constexpr, E_PADDED: tl.constexpr):
    """Store the rows of tokens (tokens, experts) that are kept."""
    token = tl.zeros_like(row) + tokens[:, None]
    pick = token * E + tl.arange(0, E_PADDED)[None, :]
    tl.store(row_token + row, token, mask=kept)
    tl.store(row_pick + row, pick, mask=kept)
    tl.store(row_weight + row, tl.load(weights + pick, mask=kept, other=0.0), mask=kept)


@triton.jit
def mask_place(
    weights,
    picks,
    counts,
    row_weight,
    expert_counts,
    expert_offsets,
    row_token,
    row_pick,
    token_row_offsets,
    token_rows,
    T,
    R,
    chunk,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
):
    """Place a row for each mark; rows from R on are dropped. See dispatch_place, which does it for K picks a token."""
    program = tl.program_id(0)
    total, before = sums_of_counts(counts, E_PADDED, BLOCK_COUNTS)
    offsets = tl.cumsum(total, 0) - total
    rows = tl.minimum(tl.sum(total, 0), R)
    if program == 0:
        mask_offsets(expert_counts, expert_offsets, offsets, total, R, E, E_PADDED)
        tl.store(expert_offsets + E, rows)
        tl.store(token_row_offsets + T, rows)
    slot = tl.sum(tl.minimum(before, tl.maximum(R - offsets, 0)), 0)  # of the rows of earlier programs' tokens
    before += offsets
    stop = tl.minimum(T, (program + 1) * chunk)
    for first in range(program * chunk, stop, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        hits = load_marks(picks, tokens, stop, E, E_PADDED)
        row = before[None, :] + tl.cumsum(hits, 0) - hits
        kept = hits * (row < R).to(tl.int32)
        of_token = tl.sum(kept, 1)
        starts = slot + tl.cumsum(of_token, 0) - of_token
        tl.store(token_row_offsets + tokens, starts, mask=tokens < stop)
        tl.store(token_rows + starts[:, None] + tl.cumsum(kept, 1) - kept, row, mask=kept == 1)
        mask_rows(weights, row_weight, row_token, row_pick, row, tokens, kept == 1, E, E_PADDED)
        before += tl.sum(hits, 0)
        slot += tl.sum(of_token, 0)
    mask_behind(row_token, row_weight, row_pick, token_rows, rows, R, T * E, 1024)


def marks(weights: Tensor, picks: Tensor, plan) -> None:
    """Fill a plan from weights (T, E) and picks (T, E) bool."""
    (T, E), E_PADDED = weights.shape, grid.padded(weights.shape[1])
    block = max(16, HISTOGRAM // E_PADDED)
    chunk = block * grid.cdiv(T, block * PROGRAMS * tiles.device_of(weights).processors)
    programs = grid.cdiv(T, chunk)
    counts = plan.expert_counts.new_empty(programs, E_PADDED)
    shared = {"picks": picks.view(torch.int8), "counts": counts, "T": T, "chunk": chunk, "E": E}
    shared |= {"E_PADDED": E_PADDED, "BLOCK": block}
    grid.launch(mask_count, (programs,), shared)
    grid.launch(
        mask_place, (programs,), {"weights": weights, "R": plan.num_rows, "BLOCK_COUNTS": 64, **vars(plan), **shared}
    )
