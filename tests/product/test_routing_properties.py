"""Properties of routing and plans over random sizes (hypothesis, derandomized)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.routing
from moe_kernels import combine, dispatch, dispatch_expert_choice, gating
from tests.contenders import WIDTH_STEP, each_backend
from tests.trap_cases import sample

quick = settings(derandomize=True, deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)


@st.composite
def picks(draw):
    """Ids (T, K) without repeats in a row, weights, E: skewed by giving low experts a bonus."""
    E = draw(st.integers(1, 20))
    K, T = draw(st.integers(1, E)), draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(seeds))
    bonus = draw(st.sampled_from([0.0, 0.5, 2.0])) * (torch.arange(E) < E // 2)
    ids = (sample(torch.rand, T, E, generator=g) + bonus).argsort(descending=True)[:, :K]
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), sample(torch.rand, T, K, generator=g), E


@each_backend
@quick
@given(picks())
def test_a_plan_loses_and_invents_no_row(backend, drawn):
    ids, weights, E = drawn
    plan = dispatch(ids, weights, E, backend=backend)
    plan.validate()
    experts = torch.repeat_interleave(torch.arange(E), plan.expert_counts.long())
    T, K = ids.shape
    assert plan.row_pick.sort().values.tolist() == list(range(T * K))
    assert torch.equal(ids.flatten()[plan.row_pick.long()].long(), experts)
    assert torch.equal(plan.row_token, plan.row_pick // K)
    assert torch.equal(plan.row_weight, weights.flatten()[plan.row_pick.long()])


@each_backend
@quick
@given(picks(), seeds)
def test_experts_renamed_rename_the_groups_and_nothing_else(backend, drawn, seed):
    ids, weights, E = drawn
    names = sample(torch.randperm, E, generator=torch.Generator().manual_seed(seed))
    plan, renamed = (dispatch(i, weights, E, backend=backend) for i in (ids, names[ids.long()].to(ids.dtype)))
    for e in range(E):
        (a, b), (c, d) = plan.expert_offsets[e : e + 2], renamed.expert_offsets[names[e] : names[e] + 2]
        assert torch.equal(plan.row_pick[a:b], renamed.row_pick[c:d])


@each_backend
@quick
@given(picks())
def test_combine_undoes_dispatch(backend, drawn):
    """Rows that are copies of their token, with weights 2^-j: the sum is exact, and so is the answer."""
    ids, _, E = drawn
    T, K = ids.shape
    weights = (0.5 ** (1 + torch.arange(K).clamp(max=20))).expand(T, K).contiguous()
    plan = dispatch(ids, weights, E, backend=backend)
    x = torch.arange(T * 8.0).view(T, 8) % 7
    assert torch.equal(combine(x[plan.row_token.long()], plan, backend=backend), x * weights[:1].sum())


@each_backend
@quick
@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 12), seeds)
def test_gating_picks_the_largest_and_the_lower_on_ties(backend, T, E, H, seed):
    """Small whole numbers: logits are exact in any order of summation, ties are frequent."""
    H *= WIDTH_STEP.get(backend, 1)
    g = torch.Generator().manual_seed(seed)
    x, gate_weight = (sample(torch.randint, -1, 2, (n, H), generator=g).float() for n in (T, E))
    K = seed % E + 1
    weights, ids, probs = gating(x, gate_weight, K, backend=backend)
    _, exact_ids, exact_probs = reference.routing.token_choice(x.double(), gate_weight.double(), K)
    logits = x @ gate_weight.T
    assert torch.equal(ids.long(), logits.sort(dim=-1, descending=True, stable=True).indices[:, :K])
    assert torch.equal(ids.long(), exact_ids)
    assert torch.equal(weights, probs.gather(1, ids.long()))
    assert torch.allclose(probs.double(), exact_probs, rtol=1e-5, atol=0)


@each_backend
@quick
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 9), st.data())
def test_expert_choice_takes_capacity_from_every_group(backend, groups, tokens_per_group, E, data):
    T, capacity = groups * tokens_per_group, data.draw(st.integers(1, tokens_per_group))
    g = torch.Generator().manual_seed(data.draw(seeds))
    affinities = sample(torch.randint, 0, 4, (T, E), generator=g) / 4
    plan = dispatch_expert_choice(affinities, capacity, tokens_per_group, backend=backend)
    plan.validate()
    assert plan.expert_counts.tolist() == [groups * capacity] * E
    picked = torch.zeros(T, E, dtype=torch.bool).view(-1).index_fill(0, plan.row_pick.long(), True).view(T, E)
    assert torch.equal(picked, reference.routing.take_tokens(affinities, capacity, tokens_per_group))
