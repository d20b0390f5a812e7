"""Combine: the weighted sum of every token's rows in fixed order, and its way back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_fwd(
    rows,
    row_weight,
    token_row_offsets,
    token_rows,
    shared,
    residual,
    gate,
    out,
    y,
    partial_drow_weight,
    drow_weight,
    T,
    L,
    H: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y_t = sum over the rows r of t, ascending, of row_weight_r rows_r, then + shared_t; float32 inside.

    out = y, or with GATED residual + gate_b y, b the image of L tokens, and y besides.

    In the backward of the layer rows are dx_rows, unweighted, and every row also gets its
    drow_weight = sum of its PARTS partial sums, in order: each row belongs to exactly one token.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_t = tokens < T
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live_h = h < H
    first = tl.load(token_row_offsets + tokens, mask=live_t, other=0)
    count = tl.load(token_row_offsets + tokens + 1, mask=live_t, other=0) - first
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for j in range(0, tl.max(count, 0)):
        has = j < count
        row = tl.load(token_rows + first + j, mask=has, other=0).to(tl.int64)
        value = tl.load(rows + row[:, None] * H + h[None, :], mask=has[:, None] & live_h[None, :], other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value *= tl.load(row_weight + row, mask=has, other=0.0).to(tl.float32)[:, None]
        total += value
        if PARTS > 0:
            if tl.program_id(1) == 0:
                parts = tl.arange(0, PARTS_PADDED)
                live = has[:, None] & (parts < PARTS)[None, :]
                summands = tl.load(partial_drow_weight + row[:, None] * PARTS + parts[None, :], mask=live, other=0.0)
                tl.store(drow_weight + row, tl.sum(summands, 1), mask=has)
    at = tokens.to(tl.int64)[:, None] * H + h[None, :]
    live = live_t[:, None] & live_h[None, :]
    if HAS_SHARED:
        total += tl.load(shared + at, mask=live, other=0.0).to(tl.float32)
    if GATED:
        tl.store(y + at, total, mask=live)
        factor = tl.load(gate + (tokens // L).to(tl.int64)[:, None] * H + h[None, :], mask=live, other=0.0)
        total = tl.load(residual + at, mask=live, other=0.0).to(tl.float32) + factor.to(tl.float32) * total
    tl.store(out + at, total, mask=live)


@triton.jit
def combine_bwd(
    dout,
    y_rows,
    row_token,
    row_weight,
    dy_rows,
    drow_weight,
    R,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dy_r = row_weight_r dout[token of r]; drow_weight_r = dout[token of r] . y_r."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live_r = rows < R
    token = tl.load(row_token + rows, mask=live_r, other=0).to(tl.int64)
    weight = tl.load(row_weight + rows, mask=live_r, other=0.0).to(tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live = live_r[:, None] & (h < H)[None, :]
        at = rows.to(tl.int64)[:, None] * H + h[None, :]
        gradient = tl.load(dout + token[:, None] * H + h[None, :], mask=live, other=0.0).to(tl.float32)
        product += gradient * tl.load(y_rows + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dy_rows + at, weight[:, None] * gradient, mask=live)
    tl.store(drow_weight + rows, tl.sum(product, 1), mask=live_r)
