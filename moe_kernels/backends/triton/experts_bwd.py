"""Experts, backward: gradients of what the activation got, and of the weights. Tiles and operands as in experts.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles
from .experts import block, either, load, multiply, quarters, slice_of
from .grid import Pair, Weight
from .groups import expert_rows, locate, num_tiles, swizzle


@triton.jit
def activation_bwd(dact, gate, up, GELU: tl.constexpr):
    """Return activation(gate, up), dgate and dup in float32; for gelu dup is not used."""
    if GELU:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * cdf, dact * (cdf + gate * density), dact
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return silu * up, dact * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), dact * silu


@triton.jit
def dact_epilogue(
    dact,
    saved,
    out,
    out_act,
    weight,
    rows,
    last,
    column,
    width,
    GELU: tl.constexpr,
    N: tl.constexpr,
):
    """Finish a slice of columns of experts_bwd_dact's tile; return what it adds to drow_weight, (M,)."""
    HALVES: tl.constexpr = 1 if GELU else 2
    columns = column + tl.arange(0, N)
    live = (rows < last)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    wide_at = rows.to(tl.int64)[:, None] * (HALVES * width) + columns[None, :]
    gate = tl.load(saved + wide_at, mask=live, other=0.0).to(tl.float32)
    up = gate if GELU else tl.load(saved + width + wide_at, mask=live, other=0.0).to(tl.float32)
    act, dgate, dup = activation_bwd(dact * weight[:, None], gate, up, GELU)
    tl.store(out_act + at, act * weight[:, None], mask=live)
    tl.store(out + wide_at, dgate, mask=live)
    if not GELU:
        tl.store(out + width + wide_at, dup, mask=live)
    return tl.sum(tl.where(live, dact * act, 0.0), 1)


@grid.kernel
def experts_bwd_dact(
    dout,
    down_proj,
    shared_down_proj,
    index,
    step,
    shared_step,
    gate_up,
    shared_gate_up,
    expert_offsets,
    row_token,
    row_weight,
    dgate_up,
    shared_dgate_up,
    weighted_act,
    shared_act,
    partial_drow_weight,
    T,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    GELU: tl.constexpr,
    COMBINED: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """dact = row_weight (dout[token of r] down_proj_e); dgate_up = activation'(gate_up, dact).

    Also writes row_weight act and, per row and tile of columns, sum(dact act / row_weight): partial sums that make up
    drow_weight.
    Without COMBINED dout is (R, H), one row each, and weights are 1.
    """
    MASKED: tl.constexpr = H % BLOCK_K or I % BLOCK_N or SHARED_I % BLOCK_N
    start, stop = expert_rows(expert_offsets, E, E_PADDED)
    num_n, shared_num_n = tl.cdiv(I, BLOCK_N), tl.cdiv(SHARED_I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles(start, stop, T, num_n, shared_num_n, BLOCK_M), tl.num_programs(0)):
        group, row, last, n = locate(tile, start, stop, T, num_n, shared_num_n, E, E_PADDED, BLOCK_M, GROUP)
        shared = group == E
        width = tl.where(shared, SHARED_I, I)
        rows = row + tl.arange(0, BLOCK_M)
        routed_r = rows < tl.where(shared, 0, last)
        source = tl.minimum(rows, last - 1)
        if COMBINED:
            source = tl.where(shared, source, tl.load(row_token + rows, mask=routed_r, other=0))
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        d_at = dout + source.to(tl.int64)[:, None] * H + k[None, :]
        matrix = slice_of(index, group, 0, E, 1, INDEXED)
        if TMA:
            memory = either(shared_down_proj, shared, down_proj)
        else:
            memory = tl.where(shared, shared_down_proj, down_proj)
            memory += matrix * tl.where(shared, shared_step, step).to(tl.int64)
            w_at = memory + k.to(tl.int64)[:, None] * width + columns[None, :]
        dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(0, H, BLOCK_K, warp_specialize=SPECIALIZE):
            live = first + k < H
            d_tile = load(d_at + first, live[None, :], H % BLOCK_K if TMA else MASKED)
            if TMA:
                w_tile = block(memory, matrix, first, n * BLOCK_N, BLOCK_K, BLOCK_N)
            else:
                w_step = tl.cast(first, tl.int64) * width
                w_tile = load(w_at + w_step, live[:, None] & (columns < width)[None, :], MASKED)
            dact = multiply(d_tile, w_tile, dact, PRECISION)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if COMBINED:
            weight = tl.load(row_weight + rows, mask=routed_r, other=1.0).to(tl.float32)
        saved, out = tl.where(shared, shared_gate_up, gate_up), tl.where(shared, shared_dgate_up, dgate_up)
        out_act = tl.where(shared, shared_act, weighted_act)
        partial = tl.zeros((BLOCK_M,), tl.float32)
        slices = quarters(dact, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            column = n * BLOCK_N + i * (BLOCK_N // 4)
            partial += dact_epilogue(
                slices[i], saved, out, out_act, weight, rows, last, column, width, GELU, BLOCK_N // 4
            )
        if COMBINED:
            tl.store(partial_drow_weight + rows.to(tl.int64) * num_n + n, partial, mask=routed_r)


def dact(dout: Tensor, x: Tensor, plan, down_proj: Weight, gate_up: Pair, combined: bool) -> tuple[Pair, Pair, Tensor]:
    """Return dgate_up (R, 2I) and row_weight act (R, I), both with the shared expert's; drow_weight's partial sums."""
    (T, H), R, E, I = x.shape, plan.num_rows, plan.num_experts, down_proj[0].shape[-1]
    Is = grid.width(down_proj[1])
    dgate_up, shared_dgate_up = torch.empty_like(gate_up[0]), torch.empty_like(gate_up[1])
    act, shared_act = x.new_empty(R, I), x.new_empty(T if Is else 0, Is)
    tile = grid.tile_of("dact", x, plan, I, H)
    num_n = grid.cdiv(I, tile.n)
    partials = x.new_empty(R, num_n if combined else 0, dtype=torch.float32)
    w_block = 1, tile.k, tile.n
    tma, weights = grid.operands(tile, (down_proj[0], w_block), (down_proj[1], w_block))
    grid.launch(
        experts_bwd_dact,
        grid.programs_of(x, plan, tile, num_n, grid.cdiv(Is, tile.n)),
        {
            "dout": dout,
            "down_proj": weights[0],
            "shared_down_proj": weights[1],
            "gate_up": gate_up[0],
            "shared_gate_up": gate_up[1],
            "expert_offsets": plan.expert_offsets,
            "row_token": plan.row_token,
            "row_weight": plan.row_weight,
            "dgate_up": dgate_up,
            "shared_dgate_up": shared_dgate_up,
            "weighted_act": act,
            "shared_act": shared_act,
            "partial_drow_weight": partials,
            "T": T,
            "H": H,
            "I": I,
            "SHARED_I": Is,
            "E": E,
            "E_PADDED": grid.padded(E),
            "GELU": gate_up[0].shape[1] == I,
            "COMBINED": combined,
            "PRECISION": grid.input_precision(x),
            "SPECIALIZE": tile.specialize,
            **grid.place_of(down_proj, tma),
            **tile.arguments(),
        },
    )
    return (dgate_up, shared_dgate_up), (act, shared_act), partials


@grid.kernel
def experts_bwd_dweight(
    left,
    shared_left,
    right,
    shared_right,
    expert_offsets,
    row_token,
    out,
    shared_out,
    partials,
    shared_partials,
    T,
    M: tl.constexpr,
    SHARED_M: tl.constexpr,
    N: tl.constexpr,
    SHARED_N: tl.constexpr,
    E: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out_e (M, N) = sum over the rows r of e of left_r^T right_r, ascending; exact zeros for an expert without rows.

    GATHER_*: that side has a row per token. SPLIT > 1: the rows of a group are split into as many partial sums, which
    ordered_sum adds afterwards. The shared expert's tiles, the longest, come first.
    """
    shared_tiles = tl.cdiv(SHARED_M, BLOCK_M) * tl.cdiv(SHARED_N, BLOCK_N) * SHARED_SPLIT
    routed_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * SPLIT
    for tile in tl.range(tl.program_id(0), shared_tiles + E * routed_tiles, tl.num_programs(0)):
        shared = tile < shared_tiles
        group = tl.where(shared, 0, (tile - shared_tiles) // routed_tiles)
        index = tl.where(shared, tile, (tile - shared_tiles) % routed_tiles)
        split = tl.where(shared, SHARED_SPLIT, SPLIT)
        num_m = tl.where(shared, tl.cdiv(SHARED_M, BLOCK_M), tl.cdiv(M, BLOCK_M))
        num_n = tl.where(shared, tl.cdiv(SHARED_N, BLOCK_N), tl.cdiv(N, BLOCK_N))
        split_index, within = index // (num_m * num_n), index % (num_m * num_n)
        m, n = swizzle(within, num_m, num_n, GROUP)
        start = tl.where(shared, 0, tl.load(expert_offsets + group))
        stop = tl.where(shared, T, tl.load(expert_offsets + group + 1))
        chunk = tl.cdiv(tl.cdiv(stop - start, split), BLOCK_K) * BLOCK_K
        start += split_index * chunk
        stop = tl.minimum(stop, start + chunk)
        left_width, right_width = tl.where(shared, SHARED_M, M), tl.where(shared, SHARED_N, N)
        left_rows, right_rows = tl.where(shared, shared_left, left), tl.where(shared, shared_right, right)
        lines = m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        live_l, live_c = lines < left_width, columns < right_width
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(start, stop, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            live = rows < stop
            tokens = rows
            if GATHER_LEFT or GATHER_RIGHT:
                routed = rows < tl.where(shared, 0, stop)
                tokens = tl.where(shared, rows, tl.load(row_token + rows, mask=routed, other=0))
            l_at = (tokens if GATHER_LEFT else rows).to(tl.int64)[:, None] * left_width + lines[None, :]
            r_at = (tokens if GATHER_RIGHT else rows).to(tl.int64)[:, None] * right_width + columns[None, :]
            l_tile = tl.load(left_rows + l_at, mask=live[:, None] & live_l[None, :], other=0.0)
            r_tile = tl.load(right_rows + r_at, mask=live[:, None] & live_c[None, :], other=0.0)
            total = multiply(tl.trans(l_tile), r_tile, total, PRECISION)
        live_out = live_l[:, None] & live_c[None, :]
        at = lines.to(tl.int64)[:, None] * right_width + columns[None, :]
        if split > 1:
            whole = (split_index * tl.where(shared, 1, E) + group).to(tl.int64) * left_width * right_width
            tl.store(tl.where(shared, shared_partials, partials) + whole + at, total, mask=live_out)
        else:
            whole = group.to(tl.int64) * left_width * right_width
            tl.store(tl.where(shared, shared_out, out) + whole + at, total, mask=live_out)


def _splits(out: Tensor, plan, tile: tiles.Tile, shared_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return into how many partial sums the rows of a routed expert and of the shared one are split, and the programs.

    They are split where there are few tiles; the shared expert has more rows than a routed one, and more partial sums.
    """
    (E, M, N), (shared_m, shared_n) = out.shape, shared_shape
    programs = tile.programs * tiles.device_of(out).processors
    area = E * grid.cdiv(M, tile.m) * grid.cdiv(N, tile.n)
    shared_area = grid.cdiv(shared_m, tile.m) * grid.cdiv(shared_n, tile.n)
    split = min(4, max(1, programs // area))
    shared_split = split * min(8, max(1, plan.num_tokens * E // max(plan.num_rows, 1)))
    return split, shared_split, min(area * split + shared_area * shared_split, programs)


def dweight(
    left: Pair, right: Pair, plan, shapes: Sequence[tuple[int, ...]], gather: tuple[bool, bool]
) -> tuple[Pair, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of a weight (E, M, N) and of its shared counterpart: sums over rows of left^T right.

    With them comes what `sum_in_order` has to do before they are ready.

    gather: which side has a row per token instead of a row per routed row.
    """
    (E, M, N), shared_shape = shapes[0], shapes[1] if len(shapes) > 1 else (0, 0)
    out, shared_out = left[0].new_empty(*shapes[0]), left[0].new_empty(*shapes[1]) if len(shapes) > 1 else None
    tile = grid.tile_of("dweight", out, plan, M, N)
    split, shared_split, programs = _splits(out, plan, tile, shared_shape)
    partials = out.new_empty(split if split > 1 else 0, E, M, N, dtype=torch.float32)
    shared_partials = out.new_empty(shared_split if shared_split > 1 else 0, *shared_shape, dtype=torch.float32)
    grid.launch(
        experts_bwd_dweight,
        (programs,),
        {
            "left": left[0],
            "shared_left": left[1],
            "right": right[0],
            "shared_right": right[1],
            "expert_offsets": plan.expert_offsets,
            "row_token": plan.row_token,
            "out": out,
            "shared_out": grid.given(shared_out, out),
            "partials": partials,
            "shared_partials": shared_partials,
            "T": plan.num_tokens,
            "M": M,
            "SHARED_M": shared_shape[0],
            "N": N,
            "SHARED_N": shared_shape[1],
            "E": E,
            "GATHER_LEFT": gather[0],
            "GATHER_RIGHT": gather[1],
            "SPLIT": split,
            "SHARED_SPLIT": shared_split,
            "PRECISION": grid.input_precision(out),
            **tile.arguments(),
        },
    )
    pending = [(partials, out)] if split > 1 else []
    if shared_split > 1 and shared_out is not None:
        pending.append((shared_partials, shared_out))
    return (out, shared_out), pending
