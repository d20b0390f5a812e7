"""What adaLN puts around the layer: LayerNorm, modulation and gating in one pass; gate and residual, and back.

Programs stay inside one image, so that sums over an image need no atomics: they write parts, added in order later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gating import picks, router_gradient


@triton.jit
def adaln_fwd_gating(
    x,
    shift,
    scale,
    gate_weight,
    tokens,
    topk_weights,
    topk_ids,
    probs,
    moments,
    T,
    L,
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """tokens = LayerNorm(x) (1 + scale_b) + shift_b, then gating; x comes from memory once, then from the cache."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_t = t < T
    at = t.to(tl.int64)[:, None] * H
    image = (t // L).to(tl.int64)[:, None] * H
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live = live_t[:, None] & (h < H)[None, :]
        total += tl.sum(tl.load(x + at + h[None, :], mask=live, other=0.0).to(tl.float32), 1)
    mean = total / H
    square = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live = live_t[:, None] & (h < H)[None, :]
        value = tl.load(x + at + h[None, :], mask=live, other=0.0).to(tl.float32)
        centred = tl.where(live, value - mean[:, None], 0.0)
        square += tl.sum(centred * centred, 1)
    reciprocal = 1.0 / tl.sqrt(square / H + eps)
    tl.store(moments + t, mean, mask=live_t)
    tl.store(moments + T + t, reciprocal, mask=live_t)
    experts = tl.arange(0, E_PADDED)
    live_e = experts < E
    logits = tl.zeros((BLOCK_T, E_PADDED), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live_h = h < H
        live = live_t[:, None] & live_h[None, :]
        value = tl.load(x + at + h[None, :], mask=live, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale + image + h[None, :], mask=live, other=0.0).to(tl.float32)
        summand = tl.load(shift + image + h[None, :], mask=live, other=0.0).to(tl.float32)
        token = (value - mean[:, None]) * reciprocal[:, None] * factor + summand
        token = tl.where(live, token, 0.0).to(tokens.dtype.element_ty)
        tl.store(tokens + at + h[None, :], token, mask=live)
        w_at = gate_weight + experts[None, :] * H + h[:, None]
        weight = tl.load(w_at, mask=live_e[None, :] & live_h[:, None], other=0.0).to(tl.float32)
        logits = tl.dot(token.to(tl.float32), weight, logits, input_precision="ieee")
    picks(logits, t, live_t, topk_weights, topk_ids, probs, E, K, E_PADDED)


@triton.jit
def adaln_bwd_sums(
    dtokens,
    dtopk_weights,
    dprobs,
    x,
    scale,
    gate_weight,
    topk_ids,
    probs,
    moments,
    sums,
    T,
    L,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_DTOKENS: tl.constexpr,
    HAS_DTOPK: tl.constexpr,
    DPROBS: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """sums (2, T): over a token's features, of dnormal and of dnormal normal, which LayerNorm's gradient needs."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_t = t < T
    at = t.to(tl.int64)[:, None] * H
    image = (t // L).to(tl.int64)[:, None] * H
    experts = tl.arange(0, E_PADDED)
    dlogits = router_gradient(
        dtopk_weights, dprobs, topk_ids, probs, t, live_t, E, K, HAS_DTOPK, DPROBS, E_PADDED, BLOCK_T
    )
    mean = tl.load(moments + t, mask=live_t, other=0.0)[:, None]
    reciprocal = tl.load(moments + T + t, mask=live_t, other=0.0)[:, None]
    plain = tl.zeros((BLOCK_T,), tl.float32)
    along = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live = live_t[:, None] & (h < H)[None, :]
        w_at = gate_weight + experts[:, None] * H + h[None, :]
        weight = tl.load(w_at, mask=(experts < E)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(dlogits, weight, input_precision="ieee")
        if HAS_DTOKENS:
            gradient += tl.load(dtokens + at + h[None, :], mask=live, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale + image + h[None, :], mask=live, other=0.0).to(tl.float32)
        normal = (tl.load(x + at + h[None, :], mask=live, other=0.0).to(tl.float32) - mean) * reciprocal
        dnormal = tl.where(live, gradient * factor, 0.0)
        plain += tl.sum(dnormal, 1)
        along += tl.sum(dnormal * normal, 1)
    tl.store(sums + t, plain, mask=live_t)
    tl.store(sums + T + t, along, mask=live_t)


@triton.jit
def adaln_bwd_gating(
    dtokens,
    dtopk_weights,
    dprobs,
    x,
    shift,
    scale,
    gate_weight,
    topk_ids,
    probs,
    moments,
    sums,
    dx,
    partial_dmodulation,
    partial_dweight,
    T,
    L,
    B,
    chunk,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_DTOKENS: tl.constexpr,
    HAS_DTOPK: tl.constexpr,
    DPROBS: tl.constexpr,
    ROUNDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx, and over each chunk of an image's tokens, in order, the sums that are dshift, dscale and dgate_weight.

    Program (image, chunk, block of H). partial_dmodulation (2, chunks, B, H), partial_dweight (chunks, B, E, H).
    ROUNDED: the dtype the tokens had.
    """
    b, part = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    live_h = h < H
    experts = tl.arange(0, E_PADDED)
    live_w = (experts < E)[:, None] & live_h[None, :]
    weight = tl.load(gate_weight + experts[:, None] * H + h[None, :], mask=live_w, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + b.to(tl.int64) * H + h, mask=live_h, other=0.0).to(tl.float32)[None, :]
    summand = tl.load(shift + b.to(tl.int64) * H + h, mask=live_h, other=0.0).to(tl.float32)[None, :]
    dshift = tl.zeros((BLOCK_H,), tl.float32)
    dscale = tl.zeros((BLOCK_H,), tl.float32)
    dweight = tl.zeros((E_PADDED, BLOCK_H), tl.float32)
    stop = b * L + tl.minimum(L, (part + 1) * chunk)
    for first in range(b * L + part * chunk, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        live_t = t < stop
        live = live_t[:, None] & live_h[None, :]
        at = t.to(tl.int64)[:, None] * H + h[None, :]
        dlogits = router_gradient(
            dtopk_weights, dprobs, topk_ids, probs, t, live_t, E, K, HAS_DTOPK, DPROBS, E_PADDED, BLOCK_T
        )
        gradient = tl.dot(dlogits, weight, input_precision="ieee")
        if HAS_DTOKENS:
            gradient += tl.load(dtokens + at, mask=live, other=0.0).to(tl.float32)
        mean = tl.load(moments + t, mask=live_t, other=0.0)[:, None]
        reciprocal = tl.load(moments + T + t, mask=live_t, other=0.0)[:, None]
        plain = tl.load(sums + t, mask=live_t, other=0.0)[:, None]
        along = tl.load(sums + T + t, mask=live_t, other=0.0)[:, None]
        normal = tl.where(live, (tl.load(x + at, mask=live, other=0.0).to(tl.float32) - mean) * reciprocal, 0.0)
        tl.store(dx + at, reciprocal * (gradient * factor - plain / H - normal * (along / H)), mask=live)
        dshift += tl.sum(gradient, 0)
        dscale += tl.sum(gradient * normal, 0)
        token = tl.where(live, normal * factor + summand, 0.0).to(ROUNDED).to(tl.float32)
        dweight = tl.dot(tl.trans(dlogits), token, dweight, input_precision="ieee")
    into = partial_dmodulation + (part.to(tl.int64) * B + b) * H + h
    tl.store(into, dshift, mask=live_h)
    tl.store(into + tl.num_programs(1).to(tl.int64) * B * H, dscale, mask=live_h)
    into = partial_dweight + ((part.to(tl.int64) * B + b) * E + experts[:, None]) * H + h[None, :]
    tl.store(into, dweight, mask=live_w)


@triton.jit
def adaln_bwd_gate(
    dout,
    y,
    gate,
    dy,
    partial_dgate,
    L,
    B,
    chunk,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dy = gate_b dout; partial_dgate (chunks, B, H) = sums of dout y over a chunk of an image's tokens, in order."""
    b, part = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    live_h = h < H
    factor = tl.load(gate + b.to(tl.int64) * H + h, mask=live_h, other=0.0).to(tl.float32)[None, :]
    dgate = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    stop = b * L + tl.minimum(L, (part + 1) * chunk)
    for first in range(b * L + part * chunk, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        live = (t < stop)[:, None] & live_h[None, :]
        at = t.to(tl.int64)[:, None] * H + h[None, :]
        gradient = tl.load(dout + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dy + at, gradient * factor, mask=live)
        dgate += gradient * tl.load(y + at, mask=live, other=0.0).to(tl.float32)
    tl.store(partial_dgate + (part.to(tl.int64) * B + b) * H + h, tl.sum(dgate, 0), mask=live_h)
