"""Dispatch: how often each program's picks are of every expert, then the row of each pick; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_ids(topk_ids, at, live, E: tl.constexpr):
    """Load ids, -1 where not live. Nobody can raise here: ids outside [0, E) are clamped, lest rows stay unwritten."""
    ids = tl.load(topk_ids + at, mask=live, other=0)
    return tl.where(live, tl.minimum(tl.maximum(ids, 0), E - 1), -1)


@triton.jit
def hits_of(ids, E_PADDED: tl.constexpr):
    """Return (picks, experts): 1 where a pick is of that expert."""
    return (ids[:, None] == tl.arange(0, E_PADDED)[None, :]).to(tl.int32)


@triton.jit
def dispatch_count(topk_ids, counts, R, chunk, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[p, e] = picks of expert e among the `chunk` picks of program p."""
    program = tl.program_id(0)
    total = tl.zeros((E_PADDED,), tl.int32)
    stop = tl.minimum(R, (program + 1) * chunk)
    for first in range(program * chunk, stop, BLOCK):
        picks = first + tl.arange(0, BLOCK)
        total += tl.sum(hits_of(load_ids(topk_ids, picks, picks < stop, E), E_PADDED), 0)
    tl.store(counts + program * E_PADDED + tl.arange(0, E_PADDED), total)


@triton.jit
def dispatch_place(
    topk_ids,
    topk_weights,
    counts,
    expert_counts,
    expert_offsets,
    row_token,
    row_weight,
    row_pick,
    token_row_offsets,
    token_rows,
    R,
    chunk,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
):
    """row of a pick = first row of its expert + the expert's picks before it; token_rows ascend within a token.

    Every program sums the counts of all programs itself: they are few, and in L2.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    total = tl.zeros((E_PADDED,), tl.int32)
    before = tl.zeros((E_PADDED,), tl.int32)
    for first in range(0, tl.num_programs(0), BLOCK_COUNTS):
        p = first + tl.arange(0, BLOCK_COUNTS)
        at = counts + p[:, None] * E_PADDED + experts[None, :]
        some = tl.load(at, mask=p[:, None] < tl.num_programs(0), other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where(p[:, None] < program, some, 0), 0)
    offsets = tl.cumsum(total, 0) - total
    if program == 0:
        tl.store(expert_counts + experts, total, mask=experts < E)
        tl.store(expert_offsets + experts, offsets, mask=experts < E)
        tl.store(expert_offsets + E, R)
        tl.store(token_row_offsets + R // K, R)
    before += offsets
    stop = tl.minimum(R, (program + 1) * chunk)
    for first in range(program * chunk, stop, BLOCK):
        picks = first + tl.arange(0, BLOCK)
        live = picks < stop
        ids = load_ids(topk_ids, picks, live, E)
        hits = hits_of(ids, E_PADDED)
        rank = tl.cumsum(hits, 0) - hits
        row = tl.sum(hits * (before[None, :] + rank), 1)
        before += tl.sum(hits, 0)
        token, k = picks // K, picks % K
        tl.store(row_token + row, token, mask=live)
        tl.store(row_weight + row, tl.load(topk_weights + picks, mask=live, other=0.0), mask=live)
        tl.store(row_pick + row, picks, mask=live)
        slot = tl.zeros((BLOCK,), tl.int32)
        for other_k in tl.static_range(K):
            other = load_ids(topk_ids, token * K + other_k, live, E)
            slot += ((other < ids) | ((other == ids) & (other_k < k))).to(tl.int32)
        tl.store(token_rows + token * K + slot, row, mask=live)
        tl.store(token_row_offsets + token, token * K, mask=live & (k == 0))


@triton.jit
def dispatch_bwd(drow_weight, row_pick, dweights, R, BLOCK: tl.constexpr):
    """dweights[row_pick_r] = drow_weight_r: every pick has one row at most."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < R
    pick = tl.load(row_pick + rows, mask=live, other=0)
    tl.store(dweights + pick, tl.load(drow_weight + rows, mask=live, other=0.0), mask=live)
