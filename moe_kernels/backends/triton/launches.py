"""From tensors to launches: grids, tiles and workspace of the kernels in the rooms beside this file.

Launches go to the current device and stream. Sizes follow from shapes alone: nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import combine, dispatch, experts, gating, sums, tiles

Pair = tuple[Tensor, Tensor | None]  # of the routed experts and of the shared one
OCCUPANCY = 2  # programs of a grouped product on a processor
HISTOGRAM = 8192  # elements of the (picks, experts) table of a dispatch program


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel where there is something to do; multiplications and additions may fuse, as nvcc does."""
    if all(grid):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def padded(n: int) -> int:
    """Return the power of two that a block of n elements takes; products want at least 16."""
    return max(16, triton.next_power_of_2(n))


def sum_in_order(partials: Tensor, out: Tensor) -> None:
    """out = partials[0] + partials[1] + ..."""
    n = out.numel()
    block = min(1024, triton.next_power_of_2(n))
    launch(sums.ordered_sum, (triton.cdiv(n, block),), partials, out, partials.shape[0], n, block)


def _router_blocks(E: int) -> dict[str, int]:
    return {"E_PADDED": padded(E), "BLOCK_T": 32 if padded(E) <= 32 else 16, "BLOCK_H": 64}


def gating_fwd(x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return topk_weights, topk_ids and probs."""
    (T, H), E = x.shape, gate_weight.shape[0]
    topk_weights = x.new_empty((T, top_k), dtype=torch.float32)
    topk_ids = x.new_empty((T, top_k), dtype=torch.int32)
    probs = x.new_empty((T, E), dtype=torch.float32)
    blocks = _router_blocks(E)
    grid = (triton.cdiv(T, blocks["BLOCK_T"]),)
    launch(
        gating.gating_fwd, grid, x, gate_weight, topk_weights, topk_ids, probs, T, H, E, top_k, **blocks, num_warps=4
    )
    return topk_weights, topk_ids, probs


def gating_bwd(
    dtopk_weights: Tensor | None, dprobs: Tensor | None, x: Tensor, gate_weight: Tensor, topk_ids: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx and dgate_weight."""
    (T, H), E, K = x.shape, gate_weight.shape[0], topk_ids.shape[1]
    dx, dgate_weight = torch.empty_like(x), torch.empty_like(gate_weight)
    blocks = _router_blocks(E)
    chunk = blocks["BLOCK_T"] * max(1, triton.cdiv(T, blocks["BLOCK_T"] * tiles.device_of(x).processors))
    partials = x.new_empty((triton.cdiv(T, chunk), E, H), dtype=torch.float32)
    launch(
        gating.gating_bwd, (partials.shape[0], triton.cdiv(H, blocks["BLOCK_H"])),
        probs if dtopk_weights is None else dtopk_weights, probs if dprobs is None else dprobs, x, gate_weight,
        topk_ids, probs, dx, partials, T, chunk, H, E, K, dtopk_weights is not None, dprobs is not None, **blocks,
        num_warps=4,
    )  # fmt: skip
    sum_in_order(partials, dgate_weight)
    return dx, dgate_weight


def dispatch_plan(topk_ids: Tensor, topk_weights: Tensor, plan: list[Tensor]) -> None:
    """Fill the tensors of a plan."""
    R, K, E = topk_ids.numel(), topk_ids.shape[1], plan[0].shape[0]
    block = max(16, HISTOGRAM // padded(E))
    blocks = triton.cdiv(R, block)
    counts = topk_ids.new_empty((blocks, padded(E)))
    launch(dispatch.dispatch_count, (blocks,), topk_ids, counts, R, padded(E), block)
    launch(
        dispatch.dispatch_place, (blocks,), topk_ids, topk_weights, counts, *plan, R, blocks, E, K, padded(E), block, 64
    )


def _tile(kernel: str, x: Tensor, plan, n: int, k: int) -> tiles.Tile:
    rows = plan.num_rows // plan.num_experts
    return tiles.choose(kernel, tiles.device_of(x), tiles.precision(x.dtype), rows, n, k)


def _input_precision(x: Tensor) -> str:
    return "tf32" if tiles.precision(x.dtype) == "tf32" else "ieee"


def _grid(x: Tensor, plan, tile: tiles.Tile, num_n: int, shared_num_n: int) -> tuple[int]:
    """Return the number of programs: at most what runs at once, at most the tiles that any routing can give."""
    R, E = plan.num_rows, plan.num_experts
    most = (R // tile.m + min(E, R)) * num_n + triton.cdiv(x.shape[0], tile.m) * shared_num_n
    return (min(most, OCCUPANCY * tiles.device_of(x).processors),)


def _width(shared: Tensor | None) -> int:
    return 0 if shared is None else shared.shape[1]


def _or(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return what a kernel gets for a tensor that is not there and that it will not touch."""
    return stand_in if t is None else t


def up(x: Tensor, plan, gate_up_proj: Pair, down_proj: Pair, save: bool) -> tuple[Pair, Pair]:
    """Return act (R, I) and gate_up (R, 2I), each with the shared expert's; gate_up is (0,) unless `save`."""
    (T, H), R, (E, _, I), Is = x.shape, plan.num_rows, down_proj[0].shape, _width(down_proj[1])
    parts = gate_up_proj[0].shape[1] // I
    act, shared_act = x.new_empty((R, I)), x.new_empty((T if Is else 0, Is))
    gate_up = x.new_empty((R, parts * I) if save else 0)
    shared_gate_up = x.new_empty((T, parts * Is) if save and Is else 0)
    tile = _tile("up", x, plan, I, H)
    grid = _grid(x, plan, tile, triton.cdiv(I, tile.n), triton.cdiv(Is, tile.n))
    launch(
        experts.experts_fwd_up, grid, x, gate_up_proj[0], _or(gate_up_proj[1], gate_up_proj[0]), plan.expert_offsets,
        plan.row_token, act, shared_act, gate_up, shared_gate_up, T, H, I, Is, E, padded(E), parts == 1, save,
        _input_precision(x), **tile.arguments(),
    )  # fmt: skip
    return (act, shared_act), (gate_up, shared_gate_up)


def rows_times(rows: Pair, weight: Pair, plan, x: Tensor, k_inner: bool) -> Pair:
    """Return rows_e W_e^T (k_inner, W (N, K)) or rows_e W_e (W (K, N)), (R, N), and the shared expert's (T, N)."""
    K, Ks, N, E = rows[0].shape[1], 0 if weight[1] is None else rows[1].shape[1], x.shape[1], plan.num_experts
    out, shared_out = x.new_empty((plan.num_rows, N)), torch.empty_like(x) if Ks else None
    tile = _tile("rows_times", x, plan, N, K)
    num_n = triton.cdiv(N, tile.n)
    launch(
        experts.experts_rows_times, _grid(x, plan, tile, num_n, num_n if Ks else 0), rows[0], rows[1], weight[0],
        _or(weight[1], weight[0]), plan.expert_offsets, out, _or(shared_out, out), x.shape[0], K, Ks, N, E, padded(E),
        k_inner, _input_precision(x), **tile.arguments(),
    )  # fmt: skip
    return out, shared_out


def dact(dout: Tensor, x: Tensor, plan, down_proj: Pair, gate_up: Pair, combined: bool) -> tuple[Pair, Pair, Tensor]:
    """Return dgate_up (R, 2I) and row_weight act (R, I), with the shared expert's, and the parts of drow_weight."""
    (T, H), R, (E, _, I), Is = x.shape, plan.num_rows, down_proj[0].shape, _width(down_proj[1])
    dgate_up, shared_dgate_up = (torch.empty_like(t) for t in gate_up)
    act, shared_act = x.new_empty((R, I)), x.new_empty((T if Is else 0, Is))
    tile = _tile("dact", x, plan, I, H)
    num_n = triton.cdiv(I, tile.n)
    parts = x.new_empty((R, num_n if combined else 0), dtype=torch.float32)
    launch(
        experts.experts_bwd_dact, _grid(x, plan, tile, num_n, triton.cdiv(Is, tile.n)), dout, down_proj[0],
        _or(down_proj[1], down_proj[0]), *gate_up, plan.expert_offsets, plan.row_token, plan.row_weight, dgate_up,
        shared_dgate_up, act, shared_act, parts, T, H, I, Is, E, padded(E), gate_up[0].shape[1] == I, combined,
        _input_precision(x), **tile.arguments(),
    )  # fmt: skip
    return (dgate_up, shared_dgate_up), (act, shared_act), parts


def dweight(left: Pair, right: Pair, plan, weight: Pair, gather: tuple[bool, bool]) -> Pair:
    """Return the gradients of a weight (E, M, N) and of its shared counterpart: sums over rows of left^T right.

    gather: which side has a row per token instead of a row per routed row. The rows of a group are split into parts,
    summed in order, where there are few tiles; the shared expert has more rows than a routed one, and more parts.
    """
    (E, M, N), (shared_m, shared_n) = weight[0].shape, (0, 0) if weight[1] is None else weight[1].shape
    out, shared_out = torch.empty_like(weight[0]), None if weight[1] is None else torch.empty_like(weight[1])
    tile, T = _tile("dweight", out, plan, M, N), plan.num_tokens
    processors = tiles.device_of(out).processors
    area = E * triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    shared_area = triton.cdiv(shared_m, tile.m) * triton.cdiv(shared_n, tile.n)
    split = min(4, max(1, OCCUPANCY * processors // area))
    shared_split = split * min(8, max(1, T * E // max(plan.num_rows, 1)))
    partials = out.new_empty((split if split > 1 else 0, E, M, N), dtype=torch.float32)
    shared_partials = out.new_empty((shared_split if shared_split > 1 else 0, shared_m, shared_n), dtype=torch.float32)
    grid = (min(area * split + shared_area * shared_split, OCCUPANCY * processors),)
    launch(
        experts.experts_bwd_dweight, grid, *left, *right, plan.expert_offsets, plan.row_token, out,
        _or(shared_out, out), partials, shared_partials, T, M, shared_m, N, shared_n, E, *gather, split, shared_split,
        _input_precision(out), **tile.arguments(),
    )  # fmt: skip
    if split > 1:
        sum_in_order(partials, out)
    if shared_split > 1 and shared_out is not None:
        sum_in_order(shared_partials, shared_out)
    return out, shared_out


def sum_rows(
    rows: Pair, plan, out: Tensor, weighted: bool, parts: Tensor | None = None, drow_weight: Tensor | None = None
) -> Tensor:
    """Fill `out` with every token's sum of its rows, and of the shared one; with `parts` fill drow_weight from them."""
    (T, H), num_parts = out.shape, _width(parts)
    block_h = min(512, triton.next_power_of_2(H))
    launch(
        combine.combine_fwd, (triton.cdiv(T, 8), triton.cdiv(H, block_h)), rows[0], plan.row_weight,
        plan.token_row_offsets, plan.token_rows, _or(rows[1], out), out, _or(parts, out), _or(drow_weight, out), T, H,
        weighted, rows[1] is not None, num_parts, triton.next_power_of_2(max(num_parts, 1)), 8, block_h,
    )  # fmt: skip
    return out


def combine_bwd(dout: Tensor, y_rows: Tensor, plan) -> tuple[Tensor, Tensor]:
    """Return dy_rows and drow_weight."""
    (R, H), (dy_rows, drow_weight) = y_rows.shape, (torch.empty_like(y_rows), torch.empty_like(plan.row_weight))
    launch(
        combine.combine_bwd, (triton.cdiv(R, 16),), dout, y_rows, plan.row_token, plan.row_weight, dy_rows,
        drow_weight, R, H, 16, min(512, triton.next_power_of_2(H)),
    )  # fmt: skip
    return dy_rows, drow_weight
