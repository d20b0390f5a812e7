"""Combine: the weighted sum of every token's rows in fixed order, and its way back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid
from .grid import Pair


@triton.jit
def combine_fwd(
    rows,
    row_weight,
    row_pick,
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
    PARTIALS: tl.constexpr,
    PARTIALS_PADDED: tl.constexpr,
    AT_PICKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y_t = sum over the rows r of t, ascending, of row_weight_r rows_r, then + shared_t; float32 inside.

    out = y, or with GATED residual + gate_b y, b the image of L tokens, and y besides.

    In the backward of the layer rows are dx_rows, unweighted, and every row also gets its
    drow_weight = sum of its PARTIALS partial sums, in order: each row belongs to exactly one token. AT_PICKS: it lies
    where dispatch_bwd would bring it, at the row's pick.
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
        if PARTIALS > 0:
            if tl.program_id(1) == 0:
                i = tl.arange(0, PARTIALS_PADDED)
                live = has[:, None] & (i < PARTIALS)[None, :]
                summands = tl.load(partial_drow_weight + row[:, None] * PARTIALS + i[None, :], mask=live, other=0.0)
                place = tl.load(row_pick + row, mask=has, other=0) if AT_PICKS else row
                tl.store(drow_weight + place, tl.sum(summands, 1), mask=has)
    at = tokens.to(tl.int64)[:, None] * H + h[None, :]
    live = live_t[:, None] & live_h[None, :]
    if HAS_SHARED:
        total += tl.load(shared + at, mask=live, other=0.0).to(tl.float32)
    if GATED:
        tl.store(y + at, total, mask=live)
        factor = tl.load(gate + (tokens // L).to(tl.int64)[:, None] * H + h[None, :], mask=live, other=0.0)
        total = tl.load(residual + at, mask=live, other=0.0).to(tl.float32) + factor.to(tl.float32) * total
    tl.store(out + at, total, mask=live)


def sum_rows(
    rows: Pair,
    plan,
    out: Tensor,
    weighted: bool,
    partials: Tensor | None = None,
    drow_weight: Tensor | None = None,
    at_picks: bool = False,
) -> Tensor:
    """Fill out (T, H) with every token's sum of its rows (R, H), and of the shared ones (T, H).

    With partials (R, n) fill drow_weight (R,) with their sums, `at_picks` of token choice: (T K,), by pick.
    """
    _forward(
        rows,
        plan,
        residual=out,
        gate=out,
        out=out,
        y=out,
        tokens_per_image=1,
        weighted=weighted,
        gated=False,
        partials=partials,
        drow_weight=drow_weight,
        at_picks=at_picks,
    )
    return out


def sum_rows_gated(rows: Pair, plan, residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return residual + gate_b y (T, H), and fill y with every token's weighted sum of its rows and the shared one."""
    out = torch.empty_like(residual)
    _forward(
        rows,
        plan,
        residual=residual,
        gate=gate,
        out=out,
        y=y,
        tokens_per_image=out.shape[0] // max(gate.shape[0], 1),
        weighted=True,
        gated=True,
        partials=None,
        drow_weight=None,
        at_picks=False,
    )
    return out


def _forward(
    rows: Pair,
    plan,
    residual: Tensor,
    gate: Tensor,
    out: Tensor,
    y: Tensor,
    tokens_per_image: int,
    weighted: bool,
    gated: bool,
    partials: Tensor | None,
    drow_weight: Tensor | None,
    at_picks: bool,
) -> None:
    (T, H), num_partials = out.shape, grid.width(partials)
    block_h = min(512, grid.power_of_2(H))
    grid.launch(
        combine_fwd,
        (grid.cdiv(T, 8), grid.cdiv(H, block_h)),
        {
            "rows": rows[0],
            "row_weight": plan.row_weight,
            "row_pick": plan.row_pick,
            "token_row_offsets": plan.token_row_offsets,
            "token_rows": plan.token_rows,
            "shared": grid.given(rows[1], out),
            "residual": residual,
            "gate": gate,
            "out": out,
            "y": y,
            "partial_drow_weight": grid.given(partials, out),
            "drow_weight": grid.given(drow_weight, out),
            "T": T,
            "L": tokens_per_image,
            "H": H,
            "WEIGHTED": weighted,
            "HAS_SHARED": rows[1] is not None,
            "GATED": gated,
            "PARTIALS": num_partials,
            "PARTIALS_PADDED": grid.power_of_2(max(num_partials, 1)),
            "AT_PICKS": at_picks,
            "BLOCK_T": 8,
            "BLOCK_H": block_h,
        },
    )


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


def backward(dout: Tensor, y_rows: Tensor, plan) -> tuple[Tensor, Tensor]:
    """Return dy_rows (R, H) and drow_weight (R,), of dout (T, H) and y_rows (R, H)."""
    R, H = y_rows.shape
    dy_rows, drow_weight = torch.empty_like(y_rows), torch.empty_like(plan.row_weight)
    grid.launch(
        combine_bwd,
        (grid.cdiv(R, 16),),
        {
            "dout": dout,
            "y_rows": y_rows,
            "row_token": plan.row_token,
            "row_weight": plan.row_weight,
            "dy_rows": dy_rows,
            "drow_weight": drow_weight,
            "R": R,
            "H": H,
            "BLOCK_R": 16,
            "BLOCK_H": min(512, grid.power_of_2(H)),
        },
    )
    return dy_rows, drow_weight
