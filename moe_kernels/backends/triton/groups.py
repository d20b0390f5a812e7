"""Which tile of which expert a program computes: tables in registers, from expert_offsets, without the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_rows(expert_offsets, E: tl.constexpr, E_PADDED: tl.constexpr):
    """Return the first row of every expert and the row after its last, (E_PADDED,) each; empty beyond E."""
    experts = tl.arange(0, E_PADDED)
    start = tl.load(expert_offsets + experts, mask=experts < E, other=0)
    return start, tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)


@triton.jit
def swizzle(index, num_m, num_n, GROUP: tl.constexpr):
    """Tile index -> (m, n), n slower than m in bands of GROUP tiles of m: neighbours in time share operands."""
    band = index // (GROUP * num_n)
    size = tl.minimum(num_m - band * GROUP, GROUP)
    within = index % (GROUP * num_n)
    return band * GROUP + within % size, within // size


@triton.jit
def locate(
    tile,
    start,
    stop,
    T,
    num_n,
    shared_num_n,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return group, first row, row after the last of the group, and n of a tile; group E is the shared expert's.

    Routed tiles come first, expert by expert; the shared expert's rows are the T tokens.
    """
    tiles = tl.cdiv(stop - start, BLOCK_M)
    through = tl.cumsum(tiles, 0)
    routed = tl.sum(tiles, 0) * num_n
    shared = tile >= routed
    group = tl.sum((through * num_n <= tile).to(tl.int32), 0)
    mine = tl.arange(0, E_PADDED) == group
    before = tl.sum(tl.where(mine, (through - tiles) * num_n, 0), 0)
    index = tl.where(shared, tile - routed, tile - before)
    num_m = tl.where(shared, tl.cdiv(T, BLOCK_M), tl.sum(tl.where(mine, tiles, 0), 0))
    m, n = swizzle(index, num_m, tl.where(shared, shared_num_n, num_n), GROUP)
    first = tl.where(shared, 0, tl.sum(tl.where(mine, start, 0), 0))
    last = tl.where(shared, T, tl.sum(tl.where(mine, stop, 0), 0))
    return tl.where(shared, E, group), first + m * BLOCK_M, last, n


@triton.jit
def num_tiles(start, stop, T, num_n, shared_num_n, BLOCK_M: tl.constexpr):
    """Return how many tiles there are over all groups."""
    return tl.sum(tl.cdiv(stop - start, BLOCK_M), 0) * num_n + tl.cdiv(T, BLOCK_M) * shared_num_n
