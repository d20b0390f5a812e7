"""Dispatch: expert histogram of every block of picks, then each pick's row; no atomics, so the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hits(topk_ids, picks, R, E_PADDED: tl.constexpr):
    ids = tl.load(topk_ids + picks, mask=picks < R, other=-1)
    return ids, (ids[:, None] == tl.arange(0, E_PADDED)[None, :]).to(tl.int32)


@triton.jit
def dispatch_count(topk_ids, block_counts, R, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """block_counts[b, e] = picks of expert e among the BLOCK picks of block b."""
    block = tl.program_id(0)
    _, hits = _hits(topk_ids, block * BLOCK + tl.arange(0, BLOCK), R, E_PADDED)
    tl.store(block_counts + block * E_PADDED + tl.arange(0, E_PADDED), tl.sum(hits, 0))


@triton.jit
def dispatch_place(
    topk_ids,
    topk_weights,
    block_counts,
    expert_counts,
    expert_offsets,
    row_token,
    row_weight,
    row_pick,
    token_row_offsets,
    token_rows,
    R,
    num_blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
):
    """row of a pick = first row of its expert + the expert's picks before it; token_rows ascend within a token.

    Every program sums the histograms itself: 4 E bytes a block, from L2.
    """
    block = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    total = tl.zeros((E_PADDED,), tl.int32)
    before = tl.zeros((E_PADDED,), tl.int32)
    for first in range(0, num_blocks, BLOCK_COUNTS):
        b = first + tl.arange(0, BLOCK_COUNTS)
        counts = tl.load(block_counts + b[:, None] * E_PADDED + experts[None, :], mask=b[:, None] < num_blocks, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(b[:, None] < block, counts, 0), 0)
    offsets = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(expert_counts + experts, total, mask=experts < E)
        tl.store(expert_offsets + experts, offsets, mask=experts < E)
        tl.store(expert_offsets + E, R)
        tl.store(token_row_offsets + R // K, R)
    picks = block * BLOCK + tl.arange(0, BLOCK)
    live = picks < R
    ids, hits = _hits(topk_ids, picks, R, E_PADDED)
    rank = tl.cumsum(hits, 0) - hits
    row = tl.sum(hits * ((offsets + before)[None, :] + rank), 1)
    token, k = picks // K, picks % K
    tl.store(row_token + row, token, mask=live)
    tl.store(row_weight + row, tl.load(topk_weights + picks, mask=live, other=0.0), mask=live)
    tl.store(row_pick + row, picks, mask=live)
    slot = tl.zeros((BLOCK,), tl.int32)
    for other_k in tl.static_range(K):
        other = tl.load(topk_ids + token * K + other_k, mask=live, other=0)
        slot += ((other < ids) | ((other == ids) & (other_k < k))).to(tl.int32)
    tl.store(token_rows + token * K + slot, row, mask=live)
    tl.store(token_row_offsets + token, token * K, mask=live & (k == 0))
