"""Experts: grouped matrix products over routed rows, the shared expert as one more group of every launch.

Persistent programs walk the tiles in the order of groups.py. Rows past a group's end are computed on a valid row in
their place and never stored; columns likewise. Only what is summed over is masked.

A weight is memory (n, N, K) or (n, K, N), a slice every `step` elements: one for each expert, of all its matrices, or,
if INDEXED, one for each matrix, and a table says where: those of expert 0, of expert 1, ..., of the shared expert,
whose memory is another.

With TMA the weights, and rows that are not gathered, come as tensor descriptors: memory, and rows (R, K). Which of two
descriptors a tile reads is chosen outside of its loop, so that both go through the same buffers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid
from .grid import Pair, Weight
from .groups import expert_rows, locate, num_tiles


@triton.jit
def load(at, live, MASKED: tl.constexpr):
    """Load from pointers; only if MASKED, zeros where not live."""
    return tl.load(at, mask=live, other=0.0) if MASKED else tl.load(at)


@triton.jit
def either(first, condition, second):
    """Return one of two tensor descriptors."""
    if condition:
        chosen = first
    else:
        chosen = second
    return chosen


@triton.jit
def slice_of(index, group, half, E: tl.constexpr, HALVES: tl.constexpr, INDEXED: tl.constexpr):
    """Return which slice of its memory a group's matrix `half`, of HALVES, is in; group E is the shared expert."""
    if INDEXED:
        return tl.load(index + group * HALVES + half)
    return tl.where(group == E, 0, group)


@triton.jit
def block(weight, matrix, i, j, M: tl.constexpr, N: tl.constexpr):
    """Load (M, N) of a slice of a weight's memory through its descriptor, zeros beyond its sizes."""
    return tl.reshape(weight.load([matrix, i, j]), (M, N))


@triton.jit
def rounded(t, PRECISION: tl.constexpr):
    """Return an operand as the products take it: float32 rounded to TF32 where that is their precision.

    Tensor cores cut off the 13 bits that TF32 lacks, which errs 2.6 times as much. Ties go away from zero, as with
    cvt.rna; NaN must not carry into the sign.
    """
    if PRECISION == "tf32":
        bits = (t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(t == t, bits.to(tl.float32, bitcast=True), t)
    return t


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b.

    In exact float32 the tile's sum is its own and then added: one chain of multiply-adds over all of K errs 2.1 times
    as much as cuBLAS (H100, K = 384). max_num_imprecise_acc keeps the compiler from making it one chain again.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), total, PRECISION)


@triton.jit
def activation(gate, up, GELU: tl.constexpr):
    """Return silu(gate) up, or the exact gelu(gate), in float32."""
    if GELU:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def split_columns(t, M: tl.constexpr, N: tl.constexpr):
    """Return the left and the right half of the columns of t (M, N)."""
    return tl.split(tl.permute(tl.reshape(t, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def quarters(t, M: tl.constexpr, N: tl.constexpr):
    """Return the four quarters of the columns of t (M, N), from left to right."""
    left, right = split_columns(t, M, N)
    first, second = split_columns(left, M, N // 2)
    third, fourth = split_columns(right, M, N // 2)
    return first, second, third, fourth


@triton.jit
def up_epilogue(
    gate,
    up,
    out,
    saved,
    rows,
    last,
    column,
    width,
    GELU: tl.constexpr,
    SAVE: tl.constexpr,
    N: tl.constexpr,
):
    """Store a slice of columns of experts_fwd_up's tile: fewer registers than all of it at once."""
    HALVES: tl.constexpr = 1 if GELU else 2
    columns = column + tl.arange(0, N)
    live = (rows < last)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None]
    tl.store(out + at * width + columns[None, :], activation(gate, up, GELU), mask=live)
    if SAVE:
        wide_at = at * (HALVES * width) + columns[None, :]
        tl.store(saved + wide_at, gate, mask=live)
        if not GELU:
            tl.store(saved + width + wide_at, up, mask=live)


@grid.kernel
def experts_fwd_up(
    x,
    gate_up_proj,
    shared_gate_up_proj,
    index,
    step,
    shared_step,
    expert_offsets,
    row_token,
    act,
    shared_act,
    gate_up,
    shared_gate_up,
    T,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    GELU: tl.constexpr,
    SAVE: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """act_r = activation(x[token of r] gate_up_proj_e^T), the rows of x gathered while they are loaded."""
    HALVES: tl.constexpr = 1 if GELU else 2
    start, stop = expert_rows(expert_offsets, E, E_PADDED)
    num_n, shared_num_n = tl.cdiv(I, BLOCK_N), tl.cdiv(SHARED_I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles(start, stop, T, num_n, shared_num_n, BLOCK_M), tl.num_programs(0)):
        group, row, last, n = locate(tile, start, stop, T, num_n, shared_num_n, E, E_PADDED, BLOCK_M, GROUP)
        shared = group == E
        width = tl.where(shared, SHARED_I, I)
        rows = row + tl.arange(0, BLOCK_M)
        tokens = tl.load(row_token + rows, mask=rows < tl.where(shared, 0, last), other=0)
        tokens = tl.where(shared, tl.minimum(rows, last - 1), tokens).to(tl.int64)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = x + tokens[:, None] * H + k[None, :]
        gate_slice = slice_of(index, group, 0, E, HALVES, INDEXED)
        up_slice = slice_of(index, group, HALVES - 1, E, HALVES, INDEXED)
        up_row = 0 if INDEXED else width
        if TMA:
            weight = either(shared_gate_up_proj, shared, gate_up_proj)
        else:
            one = tl.where(shared, shared_step, step).to(tl.int64)
            weight = tl.where(shared, shared_gate_up_proj, gate_up_proj) + gate_slice * one
            gate_at = weight + tl.minimum(columns, width - 1)[None, :].to(tl.int64) * H + k[:, None]
            up_at = gate_at + ((up_slice - gate_slice) * one + up_row * H)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(0, H, BLOCK_K, warp_specialize=SPECIALIZE):
            live = first + k < H
            x_tile = load(x_at + first, live[None, :], H % BLOCK_K)
            if TMA:
                gate_tile = tl.trans(block(weight, gate_slice, n * BLOCK_N, first, BLOCK_N, BLOCK_K))
            else:
                gate_tile = load(gate_at + first, live[:, None], H % BLOCK_K)
            gate = multiply(x_tile, gate_tile, gate, PRECISION)
            if not GELU:
                if TMA:
                    up_tile = tl.trans(block(weight, up_slice, up_row + n * BLOCK_N, first, BLOCK_N, BLOCK_K))
                else:
                    up_tile = load(up_at + first, live[:, None], H % BLOCK_K)
                up = multiply(x_tile, up_tile, up, PRECISION)
        out, saved = tl.where(shared, shared_act, act), tl.where(shared, shared_gate_up, gate_up)
        gates, ups = quarters(gate, BLOCK_M, BLOCK_N), quarters(up, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            column = n * BLOCK_N + i * (BLOCK_N // 4)
            up_epilogue(gates[i], ups[i], out, saved, rows, last, column, width, GELU, SAVE, BLOCK_N // 4)


def _halves_of(gate_up_proj: Weight, down_proj: Weight, E: int) -> int:
    """Return how many matrices an expert has beside down_proj: gate and up, or up alone."""
    memory, shared, index = gate_up_proj
    if index is None:
        return memory.shape[1] // down_proj[0].shape[-1]
    return index.numel() // (E + (shared is not None))


def up(x: Tensor, plan, gate_up_proj: Weight, down_proj: Weight, save: bool) -> tuple[Pair, Pair]:
    """Return act (R, I) and gate_up (R, 2I), each with the shared expert's; gate_up is (0,) unless `save`."""
    (T, H), R, E, I = x.shape, plan.num_rows, plan.num_experts, down_proj[0].shape[-1]
    Is, halves = grid.width(down_proj[1]), _halves_of(gate_up_proj, down_proj, E)
    act, shared_act = x.new_empty(R, I), x.new_empty(T if Is else 0, Is)
    gate_up = x.new_empty(R, halves * I) if save else x.new_empty(0)
    shared_gate_up = x.new_empty(T, halves * Is) if save and Is else x.new_empty(0)
    tile = grid.tile_of("up", x, plan, I, H)
    w_block = 1, tile.n, tile.k
    tma, weights = grid.operands(tile, (gate_up_proj[0], w_block), (gate_up_proj[1], w_block))
    grid.launch(
        experts_fwd_up,
        grid.programs_of(x, plan, tile, grid.cdiv(I, tile.n), grid.cdiv(Is, tile.n)),
        {
            "x": x,
            "gate_up_proj": weights[0],
            "shared_gate_up_proj": weights[1],
            "expert_offsets": plan.expert_offsets,
            "row_token": plan.row_token,
            "act": act,
            "shared_act": shared_act,
            "gate_up": gate_up,
            "shared_gate_up": shared_gate_up,
            "T": T,
            "H": H,
            "I": I,
            "SHARED_I": Is,
            "E": E,
            "E_PADDED": grid.padded(E),
            "GELU": halves == 1,
            "SAVE": save,
            "PRECISION": grid.input_precision(x),
            "SPECIALIZE": tile.specialize,
            **grid.place_of(gate_up_proj, tma),
            **tile.arguments(),
        },
    )
    return (act, shared_act), (gate_up, shared_gate_up)


@grid.kernel
def experts_rows_times(
    rows_in,
    shared_in,
    weight,
    shared_weight,
    index,
    step,
    shared_step,
    expert_offsets,
    rows_out,
    shared_out,
    T,
    K: tl.constexpr,
    SHARED_K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    K_INNER: tl.constexpr,
    HALVES: tl.constexpr,
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """rows_out_r = rows_in_r W_e^T for a weight (n, N, K) (K_INNER: down_proj), else rows_in_r W_e (gate_up_proj).

    W_e has K rows; of HALVES matrices, one behind the other, each has K / HALVES, a multiple of BLOCK_K.
    """
    start, stop = expert_rows(expert_offsets, E, E_PADDED)
    MASKED: tl.constexpr = K % BLOCK_K or SHARED_K % BLOCK_K or (N % BLOCK_N and not K_INNER)
    num_n = tl.cdiv(N, BLOCK_N)
    shared_num_n = num_n if SHARED_K else 0
    for tile in tl.range(tl.program_id(0), num_tiles(start, stop, T, num_n, shared_num_n, BLOCK_M), tl.num_programs(0)):
        group, row, last, n = locate(tile, start, stop, T, num_n, shared_num_n, E, E_PADDED, BLOCK_M, GROUP)
        shared = group == E
        depth = tl.where(shared, SHARED_K, K)
        rows = row + tl.arange(0, BLOCK_M)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        matrix = slice_of(index, group, 0, E, HALVES, INDEXED)
        second = slice_of(index, group, HALVES - 1, E, HALVES, INDEXED)
        if TMA:
            a, b = either(shared_in, shared, rows_in), either(shared_weight, shared, weight)
        else:
            a = tl.where(shared, shared_in, rows_in) + tl.minimum(rows, last - 1).to(tl.int64)[:, None] * depth
            one = tl.where(shared, shared_step, step).to(tl.int64)
            b = tl.where(shared, shared_weight, weight) + matrix * one
            if K_INNER:
                b += tl.minimum(columns, N - 1)[None, :].to(tl.int64) * depth + k[:, None]
            else:
                b += k.to(tl.int64)[:, None] * N + columns[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(0, depth, BLOCK_K, warp_specialize=SPECIALIZE):
            b_slice, b_first = matrix, first
            if HALVES > 1:
                beyond = first >= depth // HALVES
                b_slice, b_first = tl.where(beyond, second, matrix), first - tl.where(beyond, depth // HALVES, 0)
            if TMA:
                a_tile = a.load([row, first])
                if K_INNER:
                    b_tile = tl.trans(block(b, b_slice, n * BLOCK_N, first, BLOCK_N, BLOCK_K))
                else:
                    b_tile = block(b, b_slice, b_first, n * BLOCK_N, BLOCK_K, BLOCK_N)
            else:
                live = first + k < depth
                b_step = first if K_INNER else tl.cast(b_first, tl.int64) * N + (b_slice - matrix) * one
                a_tile = load(a + first + k[None, :], live[None, :], MASKED)
                b_tile = load(b + b_step, live[:, None] & (columns < N)[None, :], MASKED)
            total = multiply(a_tile, b_tile, total, PRECISION)
        out = tl.where(shared, shared_out, rows_out) + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out, total, mask=(rows < last)[:, None] & (columns < N)[None, :])


def rows_times(rows: Pair, weight: Weight, plan, x: Tensor, k_inner: bool) -> Pair:
    """Return rows_e W_e^T (k_inner, W (N, K)) or rows_e W_e (W (K, N)), (R, N), and the shared expert's (T, N)."""
    K, Ks, N, E = rows[0].shape[1], 0 if weight[1] is None else rows[1].shape[1], x.shape[1], plan.num_experts
    out, shared_out = x.new_empty(plan.num_rows, N), torch.empty_like(x) if Ks else None
    tile = grid.tile_of("rows_times", x, plan, N, K)
    num_n = grid.cdiv(N, tile.n)
    halves = K // weight[0].shape[-1 if k_inner else -2]
    if halves > 1:
        tile = tile._replace(k=math.gcd(tile.k, K // halves, Ks // halves))  # no step in two matrices
    in_block, w_block = (tile.m, tile.k), (1, tile.n, tile.k) if k_inner else (1, tile.k, tile.n)
    sources = (rows[0], in_block), (rows[1] if Ks else None, in_block), (weight[0], w_block), (weight[1], w_block)
    tma, operands = grid.operands(tile, *sources)
    grid.launch(
        experts_rows_times,
        grid.programs_of(x, plan, tile, num_n, num_n if Ks else 0),
        {
            "rows_in": operands[0],
            "shared_in": operands[1],
            "weight": operands[2],
            "shared_weight": operands[3],
            "expert_offsets": plan.expert_offsets,
            "rows_out": out,
            "shared_out": grid.given(shared_out, out),
            "T": x.shape[0],
            "K": K,
            "SHARED_K": Ks,
            "N": N,
            "E": E,
            "E_PADDED": grid.padded(E),
            "K_INNER": k_inner,
            "HALVES": halves,
            "PRECISION": grid.input_precision(x),
            "SPECIALIZE": tile.specialize,
            **grid.place_of(weight, tma),
            **tile.arguments(),
        },
    )
    return out, shared_out
