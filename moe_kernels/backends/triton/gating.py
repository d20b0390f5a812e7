"""Gating: router logits, softmax and top k in float32, one pass over x; the way back in one more."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles
from .sums import exact_exp, sum_in_order


@triton.jit
def picks(
    logits,
    tokens,
    live_t,
    topk_weights,
    topk_ids,
    probs,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """Store softmax(logits) and its K largest per token, the lower expert first on a tie."""
    experts = tl.arange(0, E_PADDED)
    live_e = experts < E
    at = tokens.to(tl.int64)
    logits = tl.where(live_e[None, :], logits, float("-inf"))
    shifted = exact_exp(logits - tl.max(logits, 1)[:, None])
    scores = tl.div_rn(shifted, tl.sum(shifted, 1)[:, None])
    tl.store(probs + at[:, None] * E + experts[None, :], scores, mask=live_t[:, None] & live_e[None, :])
    nothing = 0.0 * tl.sum(scores, 1)  # NaN where a logit is not finite: the picks stay valid ids, their weights do not
    left = tl.where(live_e[None, :], tl.where(scores == scores, scores, 0.0), -1.0)
    for k in tl.static_range(K):
        best, best_expert = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(topk_weights + at * K + k, best + nothing, mask=live_t)
        tl.store(topk_ids + at * K + k, best_expert.to(tl.int32), mask=live_t)
        left = tl.where(experts[None, :] == best_expert[:, None], -1.0, left)


@triton.jit
def router_gradient(
    dtopk_weights,
    dprobs,
    topk_ids,
    probs,
    tokens,
    live_t,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_DTOPK: tl.constexpr,
    DPROBS: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return dlogits = probs (d - sum(probs d)), d = dprobs + dtopk_weights at the picks.

    DPROBS: "none", "row" (the same for every token) or "rows".
    """
    experts = tl.arange(0, E_PADDED)
    at = tokens.to(tl.int64)
    live_p = live_t[:, None] & (experts < E)[None, :]
    scores = tl.load(probs + at[:, None] * E + experts[None, :], mask=live_p, other=0.0)
    total = tl.zeros((BLOCK_T, E_PADDED), tl.float32)
    if DPROBS == "row":
        total += tl.load(dprobs + experts, mask=experts < E, other=0.0)[None, :]
    elif DPROBS == "rows":
        total = tl.load(dprobs + at[:, None] * E + experts[None, :], mask=live_p, other=0.0)
    if HAS_DTOPK:
        for k in tl.static_range(K):
            picked = tl.load(topk_ids + at * K + k, mask=live_t, other=-1)
            gradient = tl.load(dtopk_weights + at * K + k, mask=live_t, other=0.0)
            total += tl.where(experts[None, :] == picked[:, None], gradient[:, None], 0.0)
    return scores * (total - tl.sum(scores * total, 1)[:, None])


@triton.jit
def gating_fwd(
    x,
    gate_weight,
    topk_weights,
    topk_ids,
    probs,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """probs = softmax(x gate_weight^T); topk_weights, topk_ids = its K largest, the lower expert first on a tie."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_PADDED)
    live_t, live_e = tokens < T, experts < E
    logits = tl.zeros((BLOCK_T, E_PADDED), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live_h = h < H
        x_tile = tl.load(
            x + tokens.to(tl.int64)[:, None] * H + h[None, :], mask=live_t[:, None] & live_h[None, :], other=0.0
        )
        w_tile = tl.load(
            gate_weight + experts[None, :] * H + h[:, None], mask=live_e[None, :] & live_h[:, None], other=0.0
        )
        logits = tl.dot(x_tile.to(tl.float32), w_tile.to(tl.float32), logits, input_precision="ieee")
    picks(logits, tokens, live_t, topk_weights, topk_ids, probs, E, K, E_PADDED)


def router_blocks(E: int, most_tokens: int = 32) -> dict[str, int]:
    """Return how a router's kernels are cut and run: up to `most_tokens` tokens, all experts, features in steps."""
    experts = grid.padded(E)
    return {"E_PADDED": experts, "BLOCK_T": most_tokens if experts <= 32 else 16, "BLOCK_H": 64, "num_warps": 4}


def incoming(dtopk_weights: Tensor | None, dprobs: Tensor | None, probs: Tensor) -> dict[str, Any]:
    """Return the gradients that reach a router, as its kernels take them: a stand-in and a flag for what is not there.

    dprobs is (T, E), or one row (E,) or (1, E) for all tokens.
    """
    return {
        "dtopk_weights": grid.given(dtopk_weights, probs),
        "dprobs": grid.given(dprobs, probs),
        "HAS_DTOPK": dtopk_weights is not None,
        "DPROBS": "none" if dprobs is None else "rows" if dprobs.shape == probs.shape else "row",
    }


def forward(x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return topk_weights (T, K), topk_ids (T, K) int32 and probs (T, E), of x (T, H) and gate_weight (E, H)."""
    (T, H), E = x.shape, gate_weight.shape[0]
    topk_weights = x.new_empty(T, top_k, dtype=torch.float32)
    topk_ids = x.new_empty(T, top_k, dtype=torch.int32)
    probs = x.new_empty(T, E, dtype=torch.float32)
    blocks = router_blocks(E)
    grid.launch(
        gating_fwd,
        (grid.cdiv(T, blocks["BLOCK_T"]),),
        {
            "x": x,
            "gate_weight": gate_weight,
            "topk_weights": topk_weights,
            "topk_ids": topk_ids,
            "probs": probs,
            "T": T,
            "H": H,
            "E": E,
            "K": top_k,
            **blocks,
        },
    )
    return topk_weights, topk_ids, probs


@triton.jit
def gating_bwd(
    dtopk_weights,
    dprobs,
    x,
    gate_weight,
    topk_ids,
    probs,
    dx,
    partial_dweight,
    T,
    tokens_per_chunk,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_DTOPK: tl.constexpr,
    DPROBS: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx = dlogits gate_weight, dlogits from router_gradient.

    Program (chunk, block of H): partial_dweight[chunk] (E, H) = dlogits^T x over the chunk's tokens, in order.
    """
    chunk = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    live_e = experts < E
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live_h = h < H
    live_w = live_e[:, None] & live_h[None, :]
    w_tile = tl.load(gate_weight + experts[:, None] * H + h[None, :], mask=live_w, other=0.0).to(tl.float32)
    dweight = tl.zeros((E_PADDED, BLOCK_H), tl.float32)
    stop = tl.minimum(T, (chunk + 1) * tokens_per_chunk)
    for first in range(chunk * tokens_per_chunk, stop, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        live_t = tokens < stop
        at = tokens.to(tl.int64)
        dlogits = router_gradient(
            dtopk_weights, dprobs, topk_ids, probs, tokens, live_t, E, K, HAS_DTOPK, DPROBS, E_PADDED, BLOCK_T
        )
        live_x = live_t[:, None] & live_h[None, :]
        x_tile = tl.load(x + at[:, None] * H + h[None, :], mask=live_x, other=0.0).to(tl.float32)
        tl.store(dx + at[:, None] * H + h[None, :], tl.dot(dlogits, w_tile, input_precision="ieee"), mask=live_x)
        dweight = tl.dot(tl.trans(dlogits), x_tile, dweight, input_precision="ieee")
    tl.store(partial_dweight + (chunk.to(tl.int64) * E + experts[:, None]) * H + h[None, :], dweight, mask=live_w)


def backward(
    dtopk_weights: Tensor | None, dprobs: Tensor | None, x: Tensor, gate_weight: Tensor, topk_ids: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx (T, H) and dgate_weight (E, H)."""
    (T, H), E, K = x.shape, gate_weight.shape[0], topk_ids.shape[1]
    dx, dgate_weight = torch.empty_like(x), torch.empty_like(gate_weight)
    blocks = router_blocks(E)
    chunk = blocks["BLOCK_T"] * max(1, grid.cdiv(T, blocks["BLOCK_T"] * tiles.device_of(x).processors))
    chunks = grid.cdiv(T, chunk)
    partials = dgate_weight if chunks == 1 else x.new_empty(chunks, E, H, dtype=torch.float32)
    grid.launch(
        gating_bwd,
        (chunks, grid.cdiv(H, blocks["BLOCK_H"])),
        {
            "x": x,
            "gate_weight": gate_weight,
            "topk_ids": topk_ids,
            "probs": probs,
            "dx": dx,
            "partial_dweight": partials,
            "T": T,
            "tokens_per_chunk": chunk,
            "H": H,
            "E": E,
            "K": K,
            **incoming(dtopk_weights, dprobs, probs),
            **blocks,
        },
    )
    if partials is not dgate_weight:
        sum_in_order((partials, dgate_weight))
    return dx, dgate_weight
