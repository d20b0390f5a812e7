"""From tensors to launches: grids, tiles and workspace of the kernels in the rooms beside this file.

Launches go to the current device and stream. Sizes follow from shapes alone: nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import adaln, combine, dispatch, experts, experts_bwd, gating, sums, tiles

Pair = tuple[Tensor, Tensor | None]  # of the routed experts and of the shared one
Weight = tuple[Tensor, Tensor | None, Tensor | None]  # a kind of MoEWeights: the two memories, and the index
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
HISTOGRAM = 4096  # elements of the (picks, experts) table of a dispatch program
CHOOSING = 2048  # tokens that a program of expert choice looks at together
DISPATCHING = 2  # programs of dispatch on a processor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel where there is something to do; multiplications and additions may fuse, as nvcc does."""
    if all(grid):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def padded(n: int) -> int:
    """Return the power of two that a block of n elements takes; products want at least 16."""
    return max(16, triton.next_power_of_2(n))


def sum_in_order(*sums_: tuple[Tensor, Tensor]) -> None:
    """For each (partials, out): out = partials[0] + partials[1] + ...; two of them a launch."""
    for i in range(0, len(sums_), 2):
        partials, out = sums_[i]
        others, other_out = sums_[i + 1] if i + 1 < len(sums_) else (partials, out)
        n, other_n = out.numel(), other_out.numel() if i + 1 < len(sums_) else 0
        block = min(1024, padded(max(n, other_n)))
        launch(
            sums.ordered_sum, (triton.cdiv(n, block) + triton.cdiv(other_n, block),), partials, out,
            partials.shape[0], n, others, other_out, others.shape[0], other_n, block,
        )  # fmt: skip


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


def _rows_of(dprobs: Tensor | None, T: int) -> str:
    """Return what kernels call DPROBS."""
    return "none" if dprobs is None else "rows" if dprobs.shape[0] == T else "row"


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
        topk_ids, probs, dx, partials, T, chunk, H, E, K, dtopk_weights is not None, _rows_of(dprobs, T), **blocks,
        num_warps=4,
    )  # fmt: skip
    sum_in_order((partials, dgate_weight))
    return dx, dgate_weight


def dispatch_plan(topk_ids: Tensor, topk_weights: Tensor, plan: Sequence[Tensor]) -> None:
    """Fill the tensors of a plan."""
    R, K, E = topk_ids.numel(), topk_ids.shape[1], plan[0].shape[0]
    block = max(16, HISTOGRAM // padded(E))
    chunk = block * triton.cdiv(R, block * DISPATCHING * tiles.device_of(topk_ids).processors)
    programs = triton.cdiv(R, chunk)
    counts = topk_ids.new_empty((programs, padded(E)))
    launch(dispatch.dispatch_count, (programs,), topk_ids, counts, R, chunk, E, padded(E), block)
    launch(
        dispatch.dispatch_place, (programs,), topk_ids, topk_weights, counts, *plan, R, chunk, E, K, padded(E), block,
        64,
    )  # fmt: skip


def expert_choice_plan(affinities: Tensor, capacity: int, tokens_per_group: int, plan: Sequence[Tensor]) -> None:
    """Fill the tensors of a plan."""
    (T, E), G = affinities.shape, tokens_per_group
    counts, offsets, row_token, row_weight, row_pick, token_row_offsets, token_rows = plan
    row_of, block = row_token.new_empty((E, T)), max(16, HISTOGRAM // padded(E))
    launch(
        dispatch.choice_select, (T // G * E,), affinities, row_of, row_token, row_weight, row_pick, capacity, G, E,
        min(CHOOSING, padded(G)),
    )  # fmt: skip
    launch(
        dispatch.choice_tokens, (triton.cdiv(T, block),), row_of, counts, offsets, token_row_offsets, token_rows,
        T // G * capacity, T, E, padded(E), block,
    )  # fmt: skip


def dispatch_bwd(drow_weight: Tensor, row_pick: Tensor, count: int) -> Tensor:
    """Return (count,): each row's gradient at its pick, zero where no row came from."""
    R = row_pick.numel()
    out = drow_weight.new_empty(count) if R == count else drow_weight.new_zeros(count)
    launch(dispatch.dispatch_bwd, (triton.cdiv(R, 1024),), drow_weight, row_pick, out, R, 1024)
    return out


def _tile(kernel: str, x: Tensor, plan, n: int, k: int) -> tiles.Tile:
    rows = plan.num_rows // plan.num_experts
    return tiles.choose(kernel, tiles.device_of(x), tiles.precision(x.dtype), rows, n, k)


def _input_precision(x: Tensor) -> str:
    return "tf32" if tiles.precision(x.dtype) == "tf32" else "ieee"


def _grid(x: Tensor, plan, tile: tiles.Tile, num_n: int, shared_num_n: int) -> tuple[int]:
    """Return the number of programs: at most what runs at once, at most the tiles that any routing can give."""
    R, E = plan.num_rows, plan.num_experts
    most = (R // tile.m + min(E, R)) * num_n + triton.cdiv(x.shape[0], tile.m) * shared_num_n
    return (min(most, tile.programs * tiles.device_of(x).processors),)


def _width(shared: Tensor | None) -> int:
    return 0 if shared is None else shared.shape[-1]


def _or(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return what a kernel gets for a tensor that is not there and that it will not touch."""
    return stand_in if t is None else t


def _operands(tile: tiles.Tile, *operands: tuple[Tensor | None, tuple[int, ...]]) -> tuple[bool, list[Any]]:
    """Return whether descriptors are used, and what a kernel gets for each (tensor, block) or (None, block): its
    descriptor, or itself; what is None looks like the one before.

    The copy engine wants rows and addresses of 16 bytes: where a tensor has others, all go as tensors.
    """
    filled = []
    for operand in operands:
        filled.append(filled[-1] if operand[0] is None else operand)
    tma = tile.tma and all(
        t.numel() and t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t, _ in filled
    )
    return tma, [_descriptor(*operand) if tma else operand[0] for operand in filled]


def _descriptor(t: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Describe a tensor as blocks of its last sizes; one that lacks sizes in front gets ones."""
    missing = len(block) - t.dim()
    sizes, strides = [1] * missing + list(t.shape), [t.numel()] * missing + list(t.stride())
    return TensorDescriptor(t, sizes, strides, list(block))


def _where(weight: Weight, tma: bool) -> tuple[Tensor, int, int]:
    """Return what kernels call index, step and shared_step; descriptors know the steps, and another one might compile
    the kernel anew."""
    *memories, index = weight
    steps = (0 if tma or t is None or t.dim() < 3 else t.stride(0) for t in memories)
    return _or(index, memories[0]), *steps


def _parts(gate_up_proj: Weight, down_proj: Weight, E: int) -> int:
    """Return how many matrices an expert has beside down_proj: gate and up, or up alone."""
    memory, shared, index = gate_up_proj
    if index is None:
        return memory.shape[1] // down_proj[0].shape[-1]
    return index.numel() // (E + (shared is not None))


def up(x: Tensor, plan, gate_up_proj: Weight, down_proj: Weight, save: bool) -> tuple[Pair, Pair]:
    """Return act (R, I) and gate_up (R, 2I), each with the shared expert's; gate_up is (0,) unless `save`."""
    (T, H), R, E, I = x.shape, plan.num_rows, plan.num_experts, down_proj[0].shape[-1]
    Is, parts = _width(down_proj[1]), _parts(gate_up_proj, down_proj, E)
    act, shared_act = x.new_empty((R, I)), x.new_empty((T if Is else 0, Is))
    gate_up = x.new_empty((R, parts * I) if save else 0)
    shared_gate_up = x.new_empty((T, parts * Is) if save and Is else 0)
    tile = _tile("up", x, plan, I, H)
    grid = _grid(x, plan, tile, triton.cdiv(I, tile.n), triton.cdiv(Is, tile.n))
    tma, weights = _operands(tile, *((t, (1, tile.n, tile.k)) for t in gate_up_proj[:2]))
    indexed, where = gate_up_proj[2] is not None, _where(gate_up_proj, tma)
    launch(
        experts.experts_fwd_up, grid, x, *weights, *where, plan.expert_offsets, plan.row_token, act, shared_act,
        gate_up, shared_gate_up, T, H, I, Is, E, padded(E), parts == 1, save, indexed, _input_precision(x), TMA=tma,
        SPECIALIZE=tile.specialize, **tile.arguments(),
    )  # fmt: skip
    return (act, shared_act), (gate_up, shared_gate_up)


def rows_times(rows: Pair, weight: Weight, plan, x: Tensor, k_inner: bool) -> Pair:
    """Return rows_e W_e^T (k_inner, W (N, K)) or rows_e W_e (W (K, N)), (R, N), and the shared expert's (T, N)."""
    K, Ks, N, E = rows[0].shape[1], 0 if weight[1] is None else rows[1].shape[1], x.shape[1], plan.num_experts
    out, shared_out = x.new_empty((plan.num_rows, N)), torch.empty_like(x) if Ks else None
    tile = _tile("rows_times", x, plan, N, K)
    num_n = triton.cdiv(N, tile.n)
    parts = K // weight[0].shape[-1 if k_inner else -2]
    if parts > 1:
        tile = tile._replace(k=math.gcd(tile.k, K // parts, Ks // parts))  # no step in two matrices
    block = (1, tile.n, tile.k) if k_inner else (1, tile.k, tile.n)
    blocks = (tile.m, tile.k), (tile.m, tile.k), block, block
    tma, operands = _operands(tile, *zip((rows[0], rows[1] if Ks else None, *weight[:2]), blocks, strict=True))
    indexed, where = weight[2] is not None, _where(weight, tma)
    launch(
        experts.experts_rows_times, _grid(x, plan, tile, num_n, num_n if Ks else 0), *operands, *where,
        plan.expert_offsets, out, _or(shared_out, out), x.shape[0], K, Ks, N, E, padded(E), k_inner, parts, indexed,
        _input_precision(x), TMA=tma, SPECIALIZE=tile.specialize, **tile.arguments(),
    )  # fmt: skip
    return out, shared_out


def dact(dout: Tensor, x: Tensor, plan, down_proj: Weight, gate_up: Pair, combined: bool) -> tuple[Pair, Pair, Tensor]:
    """Return dgate_up (R, 2I) and row_weight act (R, I), with the shared expert's, and the parts of drow_weight."""
    (T, H), R, E, I = x.shape, plan.num_rows, plan.num_experts, down_proj[0].shape[-1]
    Is = _width(down_proj[1])
    dgate_up, shared_dgate_up = (torch.empty_like(t) for t in gate_up)
    act, shared_act = x.new_empty((R, I)), x.new_empty((T if Is else 0, Is))
    tile = _tile("dact", x, plan, I, H)
    num_n = triton.cdiv(I, tile.n)
    parts = x.new_empty((R, num_n if combined else 0), dtype=torch.float32)
    tma, weights = _operands(tile, *((t, (1, tile.k, tile.n)) for t in down_proj[:2]))
    indexed, where = down_proj[2] is not None, _where(down_proj, tma)
    launch(
        experts_bwd.experts_bwd_dact, _grid(x, plan, tile, num_n, triton.cdiv(Is, tile.n)), dout, *weights, *where,
        *gate_up, plan.expert_offsets, plan.row_token, plan.row_weight, dgate_up, shared_dgate_up, act, shared_act,
        parts, T, H, I, Is, E, padded(E), gate_up[0].shape[1] == I, combined, indexed, _input_precision(x), TMA=tma,
        SPECIALIZE=tile.specialize, **tile.arguments(),
    )  # fmt: skip
    return (dgate_up, shared_dgate_up), (act, shared_act), parts


def dweight(
    left: Pair, right: Pair, plan, shapes: Sequence[tuple[int, ...]], gather: tuple[bool, bool]
) -> tuple[Pair, list[tuple[Tensor, Tensor]]]:
    """Compute the gradients of a weight (E, M, N) and of its shared counterpart: sums over rows of left^T right.

    Returns them, and what `sum_in_order` has to do before they are ready.

    gather: which side has a row per token instead of a row per routed row. The rows of a group are split into parts,
    summed in order, where there are few tiles; the shared expert has more rows than a routed one, and more parts.
    """
    (E, M, N), (shared_m, shared_n) = shapes[0], shapes[1] if len(shapes) > 1 else (0, 0)
    out, shared_out = left[0].new_empty(shapes[0]), left[0].new_empty(shapes[1]) if len(shapes) > 1 else None
    tile, T = _tile("dweight", out, plan, M, N), plan.num_tokens
    programs = tile.programs * tiles.device_of(out).processors
    area = E * triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    shared_area = triton.cdiv(shared_m, tile.m) * triton.cdiv(shared_n, tile.n)
    split = min(4, max(1, programs // area))
    shared_split = split * min(8, max(1, T * E // max(plan.num_rows, 1)))
    partials = out.new_empty((split if split > 1 else 0, E, M, N), dtype=torch.float32)
    shared_partials = out.new_empty((shared_split if shared_split > 1 else 0, shared_m, shared_n), dtype=torch.float32)
    grid = (min(area * split + shared_area * shared_split, programs),)
    launch(
        experts_bwd.experts_bwd_dweight, grid, *left, *right, plan.expert_offsets, plan.row_token, out,
        _or(shared_out, out), partials, shared_partials, T, M, shared_m, N, shared_n, E, *gather, split, shared_split,
        _input_precision(out), **tile.arguments(),
    )  # fmt: skip
    pending = [(partials, out)] if split > 1 else []
    if shared_split > 1 and shared_out is not None:
        pending.append((shared_partials, shared_out))
    return (out, shared_out), pending


def sum_rows(
    rows: Pair, plan, out: Tensor, weighted: bool, parts: Tensor | None = None, drow_weight: Tensor | None = None
) -> Tensor:
    """Fill `out` with every token's sum of its rows, and of the shared one; with `parts` fill drow_weight from them."""
    _combine(rows, plan, (out, out, out, out), 1, weighted, False, parts, drow_weight)
    return out


def sum_rows_gated(rows: Pair, plan, residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return residual + gate_b y, and fill y with every token's weighted sum of its rows and the shared one."""
    out = torch.empty_like(residual)
    _combine(rows, plan, (residual, gate, out, y), out.shape[0] // max(gate.shape[0], 1), True, True, None, None)
    return out


def _combine(rows: Pair, plan, operands, L: int, weighted: bool, gated: bool, parts, drow_weight) -> None:
    """Launch combine_fwd; operands are residual, gate, out and y."""
    out = operands[2]
    (T, H), num_parts = out.shape, _width(parts)
    block_h = min(512, triton.next_power_of_2(H))
    launch(
        combine.combine_fwd, (triton.cdiv(T, 8), triton.cdiv(H, block_h)), rows[0], plan.row_weight,
        plan.token_row_offsets, plan.token_rows, _or(rows[1], out), *operands, _or(parts, out), _or(drow_weight, out),
        T, L, H, weighted, rows[1] is not None, gated, num_parts, triton.next_power_of_2(max(num_parts, 1)), 8, block_h,
    )  # fmt: skip


def combine_bwd(dout: Tensor, y_rows: Tensor, plan) -> tuple[Tensor, Tensor]:
    """Return dy_rows and drow_weight."""
    (R, H), (dy_rows, drow_weight) = y_rows.shape, (torch.empty_like(y_rows), torch.empty_like(plan.row_weight))
    launch(
        combine.combine_bwd, (triton.cdiv(R, 16),), dout, y_rows, plan.row_token, plan.row_weight, dy_rows,
        drow_weight, R, H, 16, min(512, triton.next_power_of_2(H)),
    )  # fmt: skip
    return dy_rows, drow_weight


def modulated_gating(
    x: Tensor, shift: Tensor, scale: Tensor, gate_weight: Tensor, top_k: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, topk_weights, topk_ids, probs and moments."""
    (B, L, H), E = x.shape, gate_weight.shape[0]
    T, f32 = B * L, torch.float32
    tokens, probs, moments = (x.new_empty(s, dtype=d) for s, d in (((T, H), dtype), ((T, E), f32), ((2, T), f32)))
    topk_weights, topk_ids = x.new_empty((T, top_k), dtype=f32), x.new_empty((T, top_k), dtype=torch.int32)
    blocks = _router_blocks(E) | {"BLOCK_T": 16}
    launch(
        adaln.adaln_fwd_gating, (triton.cdiv(T, 16),), x, shift, scale, gate_weight, tokens, topk_weights, topk_ids,
        probs, moments, T, L, eps, H, E, top_k, **blocks, num_warps=4,
    )  # fmt: skip
    return tokens, topk_weights, topk_ids, probs, moments


def modulated_gating_bwd(
    dtokens: Tensor | None,
    dtopk_weights: Tensor | None,
    dprobs: Tensor | None,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate_weight: Tensor,
    topk_ids: Tensor,
    probs: Tensor,
    moments: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dshift, dscale and dgate_weight."""
    (B, L, H), E, K = x.shape, gate_weight.shape[0], topk_ids.shape[1]
    dx, sums_, blocks = torch.empty_like(x), torch.empty_like(moments), _router_blocks(E) | {"BLOCK_T": 16}
    chunk, chunks = _chunks(x, B, L, 16)
    dmodulation = x.new_empty((2, chunks, B, H), dtype=torch.float32)
    dweight = x.new_empty((chunks * B, E, H), dtype=torch.float32)
    gradients = _or(dtokens, x), _or(dtopk_weights, probs), _or(dprobs, probs)
    flags = dtokens is not None, dtopk_weights is not None, _rows_of(dprobs, B * L)
    launch(
        adaln.adaln_bwd_sums, (triton.cdiv(B * L, 16),), *gradients, x, scale, gate_weight, topk_ids, probs, moments,
        sums_, B * L, L, H, E, K, *flags, **blocks, num_warps=4,
    )  # fmt: skip
    launch(
        adaln.adaln_bwd_gating, (B, chunks, triton.cdiv(H, blocks["BLOCK_H"])), *gradients, x, shift, scale,
        gate_weight, topk_ids, probs, moments, sums_, dx, dmodulation, dweight, B * L, L, B, chunk, H, E, K, *flags,
        _TRITON[dtype], **blocks, num_warps=4,
    )  # fmt: skip
    results = [torch.empty_like(t) for t in (shift, scale, gate_weight)]
    sum_in_order(*zip((*dmodulation, dweight), results, strict=True))
    return dx, *results


def gated_residual_bwd(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy and dgate."""
    (B, H), dy, dgate = gate.shape, torch.empty_like(y), torch.empty_like(gate)
    L = y.shape[0] // max(B, 1)
    chunk, chunks = _chunks(y, B, L, 32)
    partials = y.new_empty((chunks, B, H), dtype=torch.float32)
    grid = (B, chunks, triton.cdiv(H, 128))
    launch(adaln.adaln_bwd_gate, grid, dout, y, gate, dy, partials, L, B, chunk, H, 32, 128, num_warps=4)
    sum_in_order((partials, dgate))
    return dy, dgate


def _chunks(t: Tensor, B: int, L: int, block: int) -> tuple[int, int]:
    """Return the tokens of a chunk and the chunks of an image: a few programs for every processor."""
    wanted = max(1, 4 * tiles.device_of(t).processors // max(B, 1))
    chunk = block * max(1, triton.cdiv(L, block * wanted))
    return chunk, triton.cdiv(L, chunk)
