"""What the rooms share: an exponential without the error of the range reduction, and sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: n LN2_HIGH is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def exact_exp(x):
    """exp(x) = 2^n exp(x - n ln 2) to 2 ulp for x <= 0; exp2(x log2 e) alone loses |x| ulp. NaN stays NaN."""
    bounded = tl.where(x < -87.0, -87.0, x)
    n = tl.floor(bounded * LOG2_E + 0.5)
    rest = bounded - n * LN2_HIGH - n * LN2_LOW
    return tl.where(x < -87.0, 0.0, tl.exp2(n) * tl.exp(rest))


@triton.jit
def ordered_sum(partials, out, COUNT, N, BLOCK: tl.constexpr):
    """out[i] = partials[0, i] + partials[1, i] + ..., float32 (COUNT, N) -> (N,) in the dtype of out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(COUNT):
        total += tl.load(partials + tl.cast(part, tl.int64) * N + i, mask=live, other=0.0)
    tl.store(out + i, total, mask=live)
