"""What adaLN puts around the layer: LayerNorm, modulation and gating in one pass; gate and residual, and back.

Programs stay inside one image, so that sums over an image need no atomics: they write partial sums, which are added in
order later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles
from .gating import incoming, picks, router_blocks, router_gradient
from .sums import sum_in_order

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    mean = tl.div_rn(total, 1.0 * H)  # `/`, tl.sqrt err 2 ulp on a GPU: all of a token's dx would, and add up to 1.5x
    square = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        live = live_t[:, None] & (h < H)[None, :]
        value = tl.load(x + at + h[None, :], mask=live, other=0.0).to(tl.float32)
        centred = tl.where(live, value - mean[:, None], 0.0)
        square += tl.sum(centred * centred, 1)
    reciprocal = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, 1.0 * H) + eps))
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


def modulated_gating(
    x: Tensor, shift: Tensor, scale: Tensor, gate_weight: Tensor, top_k: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tokens (T, H) in `dtype`, topk_weights (T, K), topk_ids (T, K) int32, probs (T, E) and moments (2, T).

    x (B, L, H), shift and scale (B, H), gate_weight (E, H).
    """
    (B, L, H), E = x.shape, gate_weight.shape[0]
    T = B * L
    tokens = x.new_empty(T, H, dtype=dtype)
    topk_weights = x.new_empty(T, top_k, dtype=torch.float32)
    topk_ids = x.new_empty(T, top_k, dtype=torch.int32)
    probs = x.new_empty(T, E, dtype=torch.float32)
    moments = x.new_empty(2, T, dtype=torch.float32)
    grid.launch(
        adaln_fwd_gating,
        (grid.cdiv(T, 16),),
        {
            "x": x,
            "shift": shift,
            "scale": scale,
            "gate_weight": gate_weight,
            "tokens": tokens,
            "topk_weights": topk_weights,
            "topk_ids": topk_ids,
            "probs": probs,
            "moments": moments,
            "T": T,
            "L": L,
            "eps": eps,
            "H": H,
            "E": E,
            "K": top_k,
            **router_blocks(E, 16),
        },
    )
    return tokens, topk_weights, topk_ids, probs, moments


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
    means,
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
    """means (2, T) over a token's features, of dnormal and dnormal normal, which LayerNorm's gradient needs."""
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
    tl.store(means + t, tl.div_rn(plain, 1.0 * H), mask=live_t)
    tl.store(means + T + t, tl.div_rn(along, 1.0 * H), mask=live_t)


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
    means,
    dx,
    partial_dmodulation,
    partial_dweight,
    T,
    L,
    B,
    tokens_per_chunk,
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
    b, chunk = tl.program_id(0), tl.program_id(1)
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
    stop = b * L + tl.minimum(L, (chunk + 1) * tokens_per_chunk)
    for first in range(b * L + chunk * tokens_per_chunk, stop, BLOCK_T):
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
        plain = tl.load(means + t, mask=live_t, other=0.0)[:, None]
        along = tl.load(means + T + t, mask=live_t, other=0.0)[:, None]
        normal = tl.where(live, (tl.load(x + at, mask=live, other=0.0).to(tl.float32) - mean) * reciprocal, 0.0)
        tl.store(dx + at, reciprocal * (gradient * factor - plain - normal * along), mask=live)
        dshift += tl.sum(gradient, 0)
        dscale += tl.sum(gradient * normal, 0)
        token = tl.where(live, normal * factor + summand, 0.0).to(ROUNDED).to(tl.float32)
        dweight = tl.dot(tl.trans(dlogits), token, dweight, input_precision="ieee")
    into = partial_dmodulation + (chunk.to(tl.int64) * B + b) * H + h
    tl.store(into, dshift, mask=live_h)
    tl.store(into + tl.num_programs(1).to(tl.int64) * B * H, dscale, mask=live_h)
    into = partial_dweight + ((chunk.to(tl.int64) * B + b) * E + experts[:, None]) * H + h[None, :]
    tl.store(into, dweight, mask=live_w)


def _chunks(t: Tensor, B: int, L: int, block: int) -> tuple[int, int]:
    """Return the tokens of a chunk and the chunks of an image: a few programs for every processor."""
    wanted = max(1, 4 * tiles.device_of(t).processors // max(B, 1))
    chunk = block * max(1, grid.cdiv(L, block * wanted))
    return chunk, grid.cdiv(L, chunk)


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
    """Return dx (B, L, H), dshift and dscale (B, H), and dgate_weight (E, H); `dtype` is that of the tokens."""
    (B, L, H), E, K = x.shape, gate_weight.shape[0], topk_ids.shape[1]
    chunk, chunks = _chunks(x, B, L, 16)
    dmodulation = x.new_empty(2, chunks, B, H, dtype=torch.float32)
    dweight = x.new_empty(chunks * B, E, H, dtype=torch.float32)
    dx, blocks = torch.empty_like(x), router_blocks(E, 16)
    both = {
        "dtokens": grid.given(dtokens, x),
        "HAS_DTOKENS": dtokens is not None,
        "x": x,
        "scale": scale,
        "gate_weight": gate_weight,
        "topk_ids": topk_ids,
        "probs": probs,
        "moments": moments,
        "means": torch.empty_like(moments),
        "T": B * L,
        "L": L,
        "H": H,
        "E": E,
        "K": K,
        **incoming(dtopk_weights, dprobs, probs),
        **blocks,
    }
    grid.launch(adaln_bwd_sums, (grid.cdiv(B * L, 16),), both)
    grid.launch(
        adaln_bwd_gating,
        (B, chunks, grid.cdiv(H, blocks["BLOCK_H"])),
        {
            "shift": shift,
            "dx": dx,
            "partial_dmodulation": dmodulation,
            "partial_dweight": dweight,
            "B": B,
            "tokens_per_chunk": chunk,
            "ROUNDED": _TRITON[dtype],
            **both,
        },
    )
    results = [torch.empty_like(t) for t in (shift, scale, gate_weight)]
    sum_in_order(*zip((*dmodulation, dweight), results, strict=True))
    return dx, *results


@triton.jit
def adaln_bwd_gate(
    dout,
    y,
    gate,
    dy,
    partial_dgate,
    L,
    B,
    tokens_per_chunk,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dy = gate_b dout; partial_dgate (chunks, B, H) = sums of dout y over a chunk of an image's tokens, in order."""
    b, chunk = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    live_h = h < H
    factor = tl.load(gate + b.to(tl.int64) * H + h, mask=live_h, other=0.0).to(tl.float32)[None, :]
    dgate = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    stop = b * L + tl.minimum(L, (chunk + 1) * tokens_per_chunk)
    for first in range(b * L + chunk * tokens_per_chunk, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        live = (t < stop)[:, None] & live_h[None, :]
        at = t.to(tl.int64)[:, None] * H + h[None, :]
        gradient = tl.load(dout + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dy + at, gradient * factor, mask=live)
        dgate += gradient * tl.load(y + at, mask=live, other=0.0).to(tl.float32)
    tl.store(partial_dgate + (chunk.to(tl.int64) * B + b) * H + h, tl.sum(dgate, 0), mask=live_h)


def gated_residual_bwd(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy (T, H) and dgate (B, H), of dout and y (T, H) and gate (B, H)."""
    (B, H), dy, dgate = gate.shape, torch.empty_like(y), torch.empty_like(gate)
    L = y.shape[0] // max(B, 1)
    chunk, chunks = _chunks(y, B, L, 32)
    partials = y.new_empty(chunks, B, H, dtype=torch.float32)
    grid.launch(
        adaln_bwd_gate,
        (B, chunks, grid.cdiv(H, 128)),
        {
            "dout": dout,
            "y": y,
            "gate": gate,
            "dy": dy,
            "partial_dgate": partials,
            "L": L,
            "B": B,
            "tokens_per_chunk": chunk,
            "H": H,
            "BLOCK_T": 32,
            "BLOCK_H": 128,
            "num_warps": 4,
        },
    )
    sum_in_order((partials, dgate))
    return dy, dgate
