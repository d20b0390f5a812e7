"""What the rooms share: an exponential without the error of the range reduction, and sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import grid

FEW = 16  # partial sums: where there are more, a program adds 16 at once, of a sixteenth of the columns
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
def ordered_sum(
    partials, out, count, n, other_partials, other_out, other_count, other_n, WAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = partials[0, i] + partials[1, i] + ..., float32 (count, n) -> (n,) in the dtype of out; twice at once.

    Every WAYS-th in order, then these sums: so many loads are under way, and a sum of many loses fewer bits.
    """
    blocks = tl.cdiv(n, BLOCK)
    other = tl.program_id(0) >= blocks
    size = tl.where(other, other_n, n)
    source, into = tl.where(other, other_partials, partials), tl.where(other, other_out, out)
    first = tl.where(other, tl.program_id(0) - blocks, tl.program_id(0)).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    live = i < size
    ways = tl.arange(0, WAYS)
    total = tl.zeros((WAYS, BLOCK), tl.float32)
    end = tl.where(other, other_count, count)
    for partial in range(0, end, WAYS):
        at = (partial + ways).to(tl.int64)[:, None] * size + i[None, :]
        total += tl.load(source + at, mask=(partial + ways < end)[:, None] & live[None, :], other=0.0)
    tl.store(into + i, tl.sum(total, 0), mask=live)


def sum_in_order(*sums: tuple[Tensor, Tensor]) -> None:
    """For each (partials, out): out = partials[0] + partials[1] + ...; two of them a launch."""
    for first in range(0, len(sums), 2):
        partials, out = sums[first]
        two = first + 1 < len(sums)
        other_partials, other_out = sums[first + 1] if two else (partials, out)
        n, other_n = out.numel(), other_out.numel() if two else 0
        ways = FEW if max(partials.shape[0], other_partials.shape[0]) > FEW else 1
        block = min(1024 // ways, grid.padded(max(n, other_n)))
        grid.launch(
            ordered_sum,
            (grid.cdiv(n, block) + grid.cdiv(other_n, block),),
            {
                "partials": partials,
                "out": out,
                "count": partials.shape[0],
                "n": n,
                "other_partials": other_partials,
                "other_out": other_out,
                "other_count": other_partials.shape[0],
                "other_n": other_n,
                "WAYS": ways,
                "BLOCK": block,
            },
        )
