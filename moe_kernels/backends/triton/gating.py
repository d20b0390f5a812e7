"""Gating: router logits, softmax and top k in float32, one pass over x; the way back in one more."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import exact_exp


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
    scores = shifted / tl.sum(shifted, 1)[:, None]
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
