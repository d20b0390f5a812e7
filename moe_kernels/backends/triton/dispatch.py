"""Dispatch: how often each program's picks are of every expert, then the row of each pick; no atomics.

By expert choice: the tokens of each expert and group, then the rows of each token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import grid, tiles

HISTOGRAM = 4096  # elements of the (picks, experts) table of a program
CHOOSING = 2048  # tokens that a program of expert choice looks at together
PROGRAMS = 2  # of token choice, on a processor


@triton.jit
def load_ids(topk_ids, at, live, E: tl.constexpr):
    """Load ids, -1 where not live. Kernels cannot raise: ids are clamped to [0, E), so that all rows are written."""
    ids = tl.load(topk_ids + at, mask=live, other=0)
    return tl.where(live, tl.minimum(tl.maximum(ids, 0), E - 1), -1)


@triton.jit
def hits_of(ids, E_PADDED: tl.constexpr):
    """Return (picks, experts): 1 where a pick is of that expert."""
    return (ids[:, None] == tl.arange(0, E_PADDED)[None, :]).to(tl.int32)


@triton.jit
def counts_of(topk_ids, start, stop, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many of the picks from start to stop are of each expert."""
    total = tl.zeros((E_PADDED,), tl.int32)
    for first in range(start, stop, BLOCK):
        picks = first + tl.arange(0, BLOCK)
        total += tl.sum(hits_of(load_ids(topk_ids, picks, picks < stop, E), E_PADDED), 0)
    return total


@triton.jit
def dispatch_count(topk_ids, counts, R, chunk, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[p, e] = picks of expert e among the `chunk` picks of program p."""
    program = tl.program_id(0)
    total = counts_of(topk_ids, program * chunk, tl.minimum(R, (program + 1) * chunk), E, E_PADDED, BLOCK)
    tl.store(counts + program * E_PADDED + tl.arange(0, E_PADDED), total)


@triton.jit
def sums_of_counts(counts, E_PADDED: tl.constexpr, BLOCK_COUNTS: tl.constexpr):
    """Return for every expert the sum of all programs' counts, and of those before this one."""
    experts = tl.arange(0, E_PADDED)
    total = tl.zeros((E_PADDED,), tl.int32)
    before = tl.zeros((E_PADDED,), tl.int32)
    for first in range(0, tl.num_programs(0), BLOCK_COUNTS):
        p = first + tl.arange(0, BLOCK_COUNTS)
        at = counts + p[:, None] * E_PADDED + experts[None, :]
        some = tl.load(at, mask=p[:, None] < tl.num_programs(0), other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where(p[:, None] < tl.program_id(0), some, 0), 0)
    return total, before


@triton.jit
def dispatch_place(
    topk_ids,
    topk_weights,
    counts,
    expert_counts,
    expert_offsets,
    row_token,
    row_weight,
    row_pick,
    token_row_offsets,
    token_rows,
    R,
    chunk,
    E: tl.constexpr,
    K: tl.constexpr,
    ALONE: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
):
    """row of a pick = first row of its expert + the expert's picks before it; token_rows ascend within a token.

    Every program sums the counts of all programs itself: they are few, and in L2. ALONE, it counts.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    if ALONE:
        total = counts_of(topk_ids, 0, R, E, E_PADDED, BLOCK)
        before = tl.zeros((E_PADDED,), tl.int32)
    else:
        total, before = sums_of_counts(counts, E_PADDED, BLOCK_COUNTS)
    offsets = tl.cumsum(total, 0) - total
    if program == 0:
        tl.store(expert_counts + experts, total, mask=experts < E)
        tl.store(expert_offsets + experts, offsets, mask=experts < E)
        tl.store(expert_offsets + E, R)
        tl.store(token_row_offsets + R // K, R)
    before += offsets
    stop = tl.minimum(R, (program + 1) * chunk)
    for first in range(program * chunk, stop, BLOCK):
        picks = first + tl.arange(0, BLOCK)
        live = picks < stop
        ids = load_ids(topk_ids, picks, live, E)
        hits = hits_of(ids, E_PADDED)
        rank = tl.cumsum(hits, 0) - hits
        row = tl.sum(hits * (before[None, :] + rank), 1)
        before += tl.sum(hits, 0)
        token, k = picks // K, picks % K
        tl.store(row_token + row, token, mask=live)
        tl.store(row_weight + row, tl.load(topk_weights + picks, mask=live, other=0.0), mask=live)
        tl.store(row_pick + row, picks, mask=live)
        slot = tl.zeros((BLOCK,), tl.int32)
        for other_k in tl.static_range(K):
            other = load_ids(topk_ids, token * K + other_k, live, E)
            slot += ((other < ids) | ((other == ids) & (other_k < k))).to(tl.int32)
        tl.store(token_rows + token * K + slot, row, mask=live)
        tl.store(token_row_offsets + token, token * K, mask=live & (k == 0))


def token_choice(topk_ids: Tensor, topk_weights: Tensor, plan) -> None:
    """Fill a plan from the picks of each token, (T, K)."""
    R, K, E, E_PADDED = topk_ids.numel(), topk_ids.shape[1], plan.num_experts, grid.padded(plan.num_experts)
    block = max(16, HISTOGRAM // E_PADDED)
    chunk = block * grid.cdiv(R, block * PROGRAMS * tiles.device_of(topk_ids).processors)
    programs = grid.cdiv(R, chunk)
    counts = topk_ids  # not read by a program alone
    if programs > 1:
        counts = topk_ids.new_empty(programs, E_PADDED)
        sizes = {"R": R, "chunk": chunk, "E": E, "E_PADDED": E_PADDED, "BLOCK": block}
        grid.launch(dispatch_count, (programs,), {"topk_ids": topk_ids, "counts": counts, **sizes})
    grid.launch(
        dispatch_place,
        (programs,),
        {
            "topk_ids": topk_ids,
            "topk_weights": topk_weights,
            "counts": counts,
            "expert_counts": plan.expert_counts,
            "expert_offsets": plan.expert_offsets,
            "row_token": plan.row_token,
            "row_weight": plan.row_weight,
            "row_pick": plan.row_pick,
            "token_row_offsets": plan.token_row_offsets,
            "token_rows": plan.token_rows,
            "R": R,
            "chunk": chunk,
            "E": E,
            "K": K,
            "ALONE": programs == 1,
            "E_PADDED": E_PADDED,
            "BLOCK": block,
            "BLOCK_COUNTS": 64,
        },
    )


@triton.jit
def dispatch_bwd(drow_weight, row_pick, dweights, R, BLOCK: tl.constexpr):
    """dweights[row_pick_r] = drow_weight_r: every pick has one row at most."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < R
    pick = tl.load(row_pick + rows, mask=live, other=0)
    tl.store(dweights + pick, tl.load(drow_weight + rows, mask=live, other=0.0), mask=live)


def backward(drow_weight: Tensor, row_pick: Tensor, count: int) -> Tensor:
    """Return (count,): each row's gradient at its pick, zero where no row came from."""
    R = row_pick.numel()
    dweights = drow_weight.new_empty(count) if R == count else drow_weight.new_zeros(count)
    grid.launch(
        dispatch_bwd,
        (grid.cdiv(R, 1024),),
        {"drow_weight": drow_weight, "row_pick": row_pick, "dweights": dweights, "R": R, "BLOCK": 1024},
    )
    return dweights


@triton.jit
def order_keys(affinities, expert, first, tokens, G, E: tl.constexpr):
    """Load an expert's affinities as integers in the same order: 0 and -0 alike, NaN above infinity as in torch."""
    values = tl.load(affinities + (first + tokens).to(tl.int64) * E + expert, mask=tokens < G, other=0.0)
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def count_keys(affinities, expert, first, G, bound, E: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many tokens of a group have a key of at least `bound`."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, G, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys = order_keys(affinities, expert, first, tokens, G, E)
        count += ((tokens < G) & (keys >= bound)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def choice_limit(affinities, expert, first, G, capacity, E: tl.constexpr, BLOCK: tl.constexpr):
    """Return bound and ties: taken are the keys above bound, and the first `ties` of those that equal it.

    Bit by bit the largest bound is found that enough keys reach, up to the first that just enough reach.
    """
    reached = count_keys(affinities, expert, first, G, 0, E, BLOCK)
    bound = tl.where(reached >= capacity, 0, -2147483648).to(tl.int32)
    above = tl.where(reached >= capacity, 0, reached)
    step = tl.full((), 1 << 30, tl.int32)
    while (step > 0) & (reached != capacity):
        reached = count_keys(affinities, expert, first, G, bound + step, E, BLOCK)
        bound += tl.where(reached >= capacity, step, 0)
        above = tl.where(reached >= capacity, above, reached)
        step = step >> 1
    exact = reached == capacity
    return tl.where(exact, bound - 1, bound), tl.where(exact, 0, capacity - above)


@triton.jit
def choice_select(
    affinities,
    row_of,
    row_token,
    row_weight,
    row_pick,
    capacity,
    G,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the `capacity` largest affinities of an expert in a group of G tokens, the lower token first on a tie.

    Program (group, expert), expert faster. row_of (E, T): the row of a token at an expert; ~row where it has none, row
    being the next one.
    """
    expert, group = tl.program_id(0) % E, tl.program_id(0) // E
    groups = tl.num_programs(0) // E
    first, row = group * G, (expert * groups + group) * capacity
    bound, ties = choice_limit(affinities, expert, first, G, capacity, E, BLOCK)
    for start in range(0, G, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys, live = order_keys(affinities, expert, first, tokens, G, E), tokens < G
        equal = (live & (keys == bound)).to(tl.int32)
        chosen = (live & (keys > bound)) | ((equal == 1) & (tl.cumsum(equal, 0) <= ties))
        rows = row + tl.cumsum(chosen.to(tl.int32), 0)
        rows = tl.where(chosen, rows - 1, rows)
        tl.store(row_of + expert.to(tl.int64) * groups * G + first + tokens, tl.where(chosen, rows, ~rows), mask=live)
        pick = (first + tokens).to(tl.int64) * E + expert
        tl.store(row_token + rows, first + tokens, mask=chosen)
        tl.store(row_weight + rows, tl.load(affinities + pick, mask=chosen, other=0.0), mask=chosen)
        tl.store(row_pick + rows, pick.to(tl.int32), mask=chosen)
        row += tl.sum(chosen.to(tl.int32), 0)
        ties -= tl.sum(equal, 0)


@triton.jit
def choice_tokens(
    row_of,
    expert_counts,
    expert_offsets,
    token_row_offsets,
    token_rows,
    rows_per_expert,
    T,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """token_row_offsets and token_rows from row_of. A token's rows ascend as experts do.

    Before its first come the rows of earlier tokens: at every expert as many as lie before the token's row there, or
    before the next one where it has none. No scan over tokens.
    """
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, E_PADDED)
    live = (tokens < T)[:, None] & (experts < E)[None, :]
    starts = experts * rows_per_expert
    rows = tl.load(row_of + experts[None, :].to(tl.int64) * T + tokens[:, None], mask=live, other=0)
    has = (live & (rows >= 0)).to(tl.int32)
    before = tl.where(live, tl.where(rows >= 0, rows, ~rows) - starts[None, :], 0)
    offsets = tl.sum(before, 1)
    tl.store(token_row_offsets + tokens, offsets, mask=tokens < T)
    tl.store(token_rows + offsets[:, None] + tl.cumsum(has, 1) - has, rows, mask=has == 1)
    if tl.program_id(0) == 0:
        tl.store(token_row_offsets + T, E * rows_per_expert)
        tl.store(expert_counts + experts, tl.zeros_like(experts) + rows_per_expert, mask=experts < E)
        tl.store(expert_offsets + experts, starts, mask=experts < E)
        tl.store(expert_offsets + E, E * rows_per_expert)


def expert_choice(affinities: Tensor, capacity: int, tokens_per_group: int, plan) -> None:
    """Fill a plan: in every group of tokens, each expert takes the `capacity` largest of its affinities (T, E)."""
    (T, E), G = affinities.shape, tokens_per_group
    row_of = plan.row_token.new_empty(E, T)
    grid.launch(
        choice_select,
        (T // G * E,),
        {
            "affinities": affinities,
            "row_of": row_of,
            "row_token": plan.row_token,
            "row_weight": plan.row_weight,
            "row_pick": plan.row_pick,
            "capacity": capacity,
            "G": G,
            "E": E,
            "BLOCK": min(CHOOSING, grid.padded(G)),
        },
    )
    block = max(16, HISTOGRAM // grid.padded(E))
    grid.launch(
        choice_tokens,
        (grid.cdiv(T, block),),
        {
            "row_of": row_of,
            "expert_counts": plan.expert_counts,
            "expert_offsets": plan.expert_offsets,
            "token_row_offsets": plan.token_row_offsets,
            "token_rows": plan.token_rows,
            "rows_per_expert": T // G * capacity,
            "T": T,
            "E": E,
            "E_PADDED": grid.padded(E),
            "BLOCK": block,
        },
    )
