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
def ordered_sum(partials, out, count, n, other_partials, other_out, other_count, other_n, BLOCK: tl.constexpr):
    """out[i] = partials[0, i] + partials[1, i] + ..., float32 (count, n) -> (n,) in the dtype of out; twice at once."""
    blocks = tl.cdiv(n, BLOCK)
    other = tl.program_id(0) >= blocks
    size = tl.where(other, other_n, n)
    source, into = tl.where(other, other_partials, partials), tl.where(other, other_out, out)
    first = tl.where(other, tl.program_id(0) - blocks, tl.program_id(0)).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    live = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(tl.where(other, other_count, count)):
        total += tl.load(source + tl.cast(part, tl.int64) * size + i, mask=live, other=0.0)
    tl.store(into + i, total, mask=live)
