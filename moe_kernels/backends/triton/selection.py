"""Selection: the largest scores of each group digit by digit, and each token's best experts; no atomics.

A group may be all scores of a batch, so that many programs share it: each counts the digits of its part, and all of
them then see in the counts of all which digit the last picked score has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles

DIGITS: tl.constexpr = tl.constexpr(256)
MOST_SCORES = 4096  # that a program looks at together
PROGRAMS = 1  # that share a group, on a processor: each reads the counts of all


@triton.jit
def key_of(score):
    """Return an integer in the order of the scores: 0 and -0 alike, NaN above infinity as in torch."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def order_keys(scores, at, live):
    """Load the keys of scores; least where not live."""
    return tl.where(live, key_of(tl.load(scores + at, mask=live, other=0.0)), -2147483648)


@triton.jit
def score_of(key):
    """Return the score of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def wanted(counts, count, column, M, HAS_COUNTS: tl.constexpr):
    """Return how many scores of a column are picked."""
    if HAS_COUNTS:
        count = tl.load(counts + column)
    return tl.minimum(tl.maximum(count, 0), M)


@triton.jit
def narrowed(state, tables, PASS: tl.constexpr, BLOCK_TABLE: tl.constexpr):
    """Return the bound with its digit of a pass, how many scores that have all its digits so far are picked, and how
    many of those lie in the parts before this one.

    state (passes, 2, columns): the same before the pass. tables (columns, parts, digits): how often each part of a
    column has every digit. Program (column, part).
    """
    column, columns, parts = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    digits = tl.arange(0, DIGITS)
    total = tl.zeros((DIGITS,), tl.int32)
    before = tl.zeros((DIGITS,), tl.int32)
    for first in range(0, parts, BLOCK_TABLE):
        p = first + tl.arange(0, BLOCK_TABLE)
        at = (column.to(tl.int64) * parts + p[:, None]) * DIGITS + digits[None, :]
        some = tl.load(tables + at, mask=(p < parts)[:, None], other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where((p < tl.program_id(1))[:, None], some, 0), 0)
    bound = tl.load(state + 2 * PASS * columns + column)
    need = tl.load(state + (2 * PASS + 1) * columns + column)
    above = tl.sum(total, 0) - tl.cumsum(total, 0)
    found = ((above < need) & (above + total >= need)).to(tl.int32)
    digit = tl.sum(found * digits, 0) - (128 if PASS == 0 else 0)
    return bound + (digit << (24 - 8 * PASS)), need - tl.sum(found * above, 0), tl.sum(found * before, 0)


@triton.jit
def select_count(
    scores,
    counts,
    count,
    state,
    tables_before,
    tables,
    M,
    chunk,
    N: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
):
    """Count the digits of a pass in a part of a column, among the keys that have all digits of the bound before it.

    Program (column, part): `chunk` of the M scores of column g N + n. See `narrowed`.
    """
    column, part, columns, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    bound = 0
    need = wanted(counts, count, column, M, HAS_COUNTS)
    if PASS > 0:
        bound, need, _ = narrowed(state, tables_before, PASS - 1, BLOCK_TABLE)
    if part == 0:
        tl.store(state + 2 * PASS * columns + column, bound)
        tl.store(state + (2 * PASS + 1) * columns + column, need)
    first_score = scores + (column // N).to(tl.int64) * M * N + column % N
    total = tl.zeros((DIGITS,), tl.int32)
    stop = tl.minimum(M, (part + 1) * chunk)
    for first in range(part * chunk, stop, BLOCK):
        m = first + tl.arange(0, BLOCK)
        keys = order_keys(first_score, m.to(tl.int64) * N, m < stop)
        if PASS == 0:
            total += tl.histogram((keys >> 24) + 128, DIGITS, m < stop)
        else:
            same = (keys >> (32 - 8 * PASS)) == (bound >> (32 - 8 * PASS))
            total += tl.histogram((keys >> (24 - 8 * PASS)) & (DIGITS - 1), DIGITS, (m < stop) & same)
    tl.store(tables + (column.to(tl.int64) * parts + part) * DIGITS + tl.arange(0, DIGITS), total)


@triton.jit
def select_mark(
    scores,
    counts,
    count,
    state,
    tables,
    picks,
    least,
    M,
    chunk,
    N: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
):
    """Mark a part of a column: keys above the bound, and the first of those that equal it. Program (column, part)."""
    column, part = tl.program_id(0), tl.program_id(1)
    some = wanted(counts, count, column, M, HAS_COUNTS) > 0
    bound, ties, before = narrowed(state, tables, 3, BLOCK_TABLE)
    if part == 0:
        tl.store(least + column, tl.where(some, score_of(bound), float("inf")))
    ties -= before
    start = (column // N).to(tl.int64) * M * N + column % N
    stop = tl.minimum(M, (part + 1) * chunk)
    for first in range(part * chunk, stop, BLOCK):
        m = first + tl.arange(0, BLOCK)
        at, live = start + m.to(tl.int64) * N, m < stop
        keys = order_keys(scores, at, live)
        equal = (live & (keys == bound)).to(tl.int32)
        chosen = some & ((keys > bound) | ((equal == 1) & (tl.cumsum(equal, 0) <= ties)))
        tl.store(picks + at, chosen.to(tl.int8), mask=live)
        ties -= tl.sum(equal, 0)


def largest(scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return picks (G, M, N) bool and least (G, N), of scores (G, M, N)."""
    G, M, N = scores.shape
    picks, least = torch.empty_like(scores, dtype=torch.int8), scores.new_full((G, N), torch.inf)
    if not scores.numel():
        return picks.view(torch.bool), least
    block = min(MOST_SCORES, grid.padded(M))
    parts = min(grid.cdiv(M, block), grid.cdiv(PROGRAMS * tiles.device_of(scores).processors, G * N))
    chunk = block * grid.cdiv(M, block * parts)
    parts = grid.cdiv(M, chunk)
    state = torch.empty(4, 2, G * N, dtype=torch.int32, device=scores.device)
    tables = torch.empty(2, G * N, parts, DIGITS.value, dtype=torch.int32, device=scores.device)
    shared = {
        "scores": scores,
        "counts": counts if isinstance(counts, Tensor) else state,
        "count": 0 if isinstance(counts, Tensor) else counts,
        "state": state,
        "M": M,
        "chunk": chunk,
        "N": N,
        "HAS_COUNTS": isinstance(counts, Tensor),
        "BLOCK": block,
        "BLOCK_TABLE": 16,
    }
    for number in range(4):
        before, after = tables[(number + 1) % 2], tables[number % 2]
        grid.launch(select_count, (G * N, parts), {"tables_before": before, "tables": after, "PASS": number, **shared})
    grid.launch(select_mark, (G * N, parts), {"tables": tables[1], "picks": picks, "least": least, **shared})
    return picks.view(torch.bool), least


@triton.jit
def best_of(keys, places, PADDED: tl.constexpr):
    """Return the largest key of each row, and the first place that has it."""
    best = tl.max(keys, 1)
    return best, tl.min(tl.where(keys == best[:, None], places[None, :], PADDED), 1)


@triton.jit
def select_best_experts(
    scores,
    topk_ids,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TAKEN: tl.constexpr,
    E_PADDED: tl.constexpr,
    G_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The K best experts of each token, out of its TAKEN best groups: those with the largest sums of two scores."""
    SIZE: tl.constexpr = E // GROUPS
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts, groups = tl.arange(0, E_PADDED), tl.arange(0, G_PADDED)
    live = (tokens < T)[:, None] & (experts < E)[None, :]
    keys = order_keys(scores, tokens.to(tl.int64)[:, None] * E + experts[None, :], live)
    if TAKEN < GROUPS:
        worths = tl.full((BLOCK_T, G_PADDED), -2147483648, tl.int32)
        for g in range(GROUPS):
            own = tl.where((experts // SIZE == g)[None, :], keys, -2147483648)
            first, place = best_of(own, experts, E_PADDED)
            worth = score_of(first)
            if SIZE > 1:
                rest = tl.where(experts[None, :] == place[:, None], -2147483648, own)
                worth += score_of(tl.max(rest, 1))
            worths = tl.where((groups == g)[None, :], key_of(worth)[:, None], worths)
        outside = tl.full((BLOCK_T, E_PADDED), 1, tl.int32)
        for _step in range(TAKEN):
            group = best_of(worths, groups, G_PADDED)[1]
            outside = tl.where((experts // SIZE)[None, :] == group[:, None], 0, outside)
            worths = tl.where(groups[None, :] == group[:, None], -2147483648, worths)
        keys = tl.where(live & (outside == 1), -2139095041, keys)  # minus infinity
    for k in range(K):
        expert = best_of(keys, experts, E_PADDED)[1]
        tl.store(topk_ids + tokens.to(tl.int64) * K + k, expert, mask=tokens < T)
        keys = tl.where(experts[None, :] == expert[:, None], -2147483648, keys)


def best_experts(scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
    """Return topk_ids (T, K) int32, of scores (T, E)."""
    T, E = scores.shape
    topk_ids = torch.empty(T, top_k, dtype=torch.int32, device=scores.device)
    block = max(1, min(32, MOST_SCORES // grid.padded(E)))
    grid.launch(
        select_best_experts,
        (grid.cdiv(T, block),),
        {
            "scores": scores,
            "topk_ids": topk_ids,
            "T": T,
            "E": E,
            "K": top_k,
            "GROUPS": groups,
            "TAKEN": groups_taken,
            "E_PADDED": grid.padded(E),
            "G_PADDED": grid.padded(groups),
            "BLOCK_T": block,
        },
    )
    return topk_ids
