"""reference.routing against hand cases, brute force and its own identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.routing import aux_loss, expert_capacity, expert_choice, token_choice


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_choice_by_hand():
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    gate_weight = torch.tensor([[0.0, 9.0], [math.log(2), 0.0], [math.log(5), 0.0]], dtype=torch.float64)
    topk_weights, topk_ids, probs = token_choice(x, gate_weight, 2)
    assert topk_ids.tolist() == [[2, 1]] and topk_ids.dtype == torch.int64
    assert probs[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-14)
    assert topk_weights[0].tolist() == pytest.approx([5 / 8, 2 / 8], rel=1e-14), "raw probabilities, not renormalised"


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(0, 20), E=st.integers(1, 9), K=st.integers(1, 9), seed=st.integers(0, 2**16), levels=st.integers(1, 4)
)
def test_token_choice_equals_sorting_by_hand(T, E, K, seed, levels):
    K = min(K, E)
    x = normal(seed, T, 3).mul(levels).round()  # few levels: many exact ties
    topk_weights, topk_ids, probs = token_choice(x, normal(seed + 1, E, 3).sign(), K)
    for t in range(T):
        expected = sorted(range(E), key=lambda e: (-probs[t, e].item(), e))[:K]
        assert topk_ids[t].tolist() == expected
        assert topk_weights[t].tolist() == probs[t, expected].tolist()


def test_ties_go_to_the_lower_index():
    x, gate_weight = normal(0, 300, 8), torch.zeros(16, 8, dtype=torch.float64)
    _, topk_ids, _ = token_choice(x, gate_weight, 3)
    assert (topk_ids == torch.arange(3)).all()
    _, picks = expert_choice(x, gate_weight, 2.0, 100)
    assert (picks.view(3, 100, 16) == (torch.arange(100) < 12)[None, :, None]).all(), "each expert: the first C tokens"


def test_all_experts_picked_weighs_one():
    topk_weights, _, _ = token_choice(normal(1, 50, 8), normal(2, 5, 8), 5)
    assert torch.allclose(topk_weights.sum(1), torch.ones(50, dtype=torch.float64), rtol=1e-14, atol=0)


def test_gate_gradients():
    x, gate_weight = normal(3, 6, 4).requires_grad_(), normal(4, 5, 4).requires_grad_()

    def gate(x, gate_weight):
        topk_weights, topk_ids, probs = token_choice(x, gate_weight, 2)
        return topk_weights, probs, aux_loss(probs, topk_ids, 0.01)

    assert torch.autograd.gradcheck(gate, (x, gate_weight))
    assert torch.autograd.gradcheck(lambda x, w: expert_choice(x, w, 2.0, 3)[0], (x, gate_weight))


@pytest.mark.parametrize("E", [1, 7, 8, 16])
def test_uniform_router_has_aux_loss_alpha(E):
    probs = torch.full((64, E), 1 / E, dtype=torch.float64)
    topk_ids = torch.randint(E, (64, 2), generator=torch.Generator().manual_seed(E))
    assert aux_loss(probs, topk_ids, 0.01).item() == pytest.approx(0.01, rel=1e-14)


def test_aux_loss_by_hand():
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4]], dtype=torch.float64, requires_grad=True)
    loss = aux_loss(probs, torch.tensor([[0], [0]]), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 2 * (1.0 * 0.65 + 0.0 * 0.35), rel=1e-14)
    assert probs.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]], "the fractions f carry no gradient"


def test_no_tokens():
    x, gate_weight = torch.zeros(0, 4), torch.ones(3, 4)
    topk_weights, topk_ids, probs = token_choice(x, gate_weight, 2)
    assert topk_weights.shape == topk_ids.shape == (0, 2)
    assert aux_loss(probs, topk_ids, 0.01).item() == 0
    assert expert_choice(x, gate_weight, 1.0, 8)[1].shape == (0, 3)


@pytest.mark.parametrize(
    "group, factor, E, C", [(256, 2.0, 8, 64), (128, 2.0, 64, 4), (16, 1.0, 48, 1), (10, 1.5, 4, 3)]
)
def test_expert_choice_takes_c_tokens_per_group(group, factor, E, C):
    affinities, picks = expert_choice(normal(5, 3 * group, 8), normal(6, E, 8), factor, group)
    assert expert_capacity(group, factor, E) == C
    assert (picks.view(3, group, E).sum(1) == C).all()
    assert torch.allclose(affinities.sum(1), torch.ones(3 * group, dtype=torch.float64), rtol=1e-14, atol=0)
    for g in range(3):
        rows = affinities[g * group : (g + 1) * group]
        for e in range(E):
            best = sorted(range(group), key=lambda t: (-rows[t, e].item(), t))[:C]
            assert picks[g * group : (g + 1) * group, e].nonzero().flatten().tolist() == sorted(best)


def test_full_capacity_picks_everything():
    assert expert_choice(normal(7, 12, 4), normal(8, 3, 4), 3.0, 6)[1].all()


def test_a_group_does_not_see_the_others():
    x, gate_weight = normal(9, 64, 8), normal(10, 4, 8)
    alone = torch.cat([expert_choice(part, gate_weight, 1.0, 16)[1] for part in x.split(16)])
    assert torch.equal(expert_choice(x, gate_weight, 1.0, 16)[1], alone)
    assert not torch.equal(expert_choice(x, gate_weight, 1.0, 32)[1], alone), "a group of two images couples them"


def test_a_token_has_zero_to_many_experts():
    x, gate_weight = normal(11, 4096, 64), normal(12, 16, 64) * 0.006
    picks = expert_choice(x, gate_weight, 2.0, 4096)[1].sum(1)
    assert picks.sum() == 2 * 4096 and picks.min() == 0 and picks.max() >= 4, "2 per token on average, 0..E for one"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: token_choice(torch.ones(2, 4), torch.ones(3, 4), 4), "top_k: got 4, expected 1..3"),
        (lambda: token_choice(torch.ones(2, 4), torch.ones(3, 4), 0), "top_k: got 0"),
        (lambda: token_choice(torch.ones(2, 5), torch.ones(3, 4), 1), r"x: got shape \(2, 5\), expected \(T, 4\)"),
        (lambda: token_choice(torch.full((2, 4), math.nan), torch.ones(3, 4), 1), "non-finite router logits"),
        (lambda: token_choice(torch.ones(2, 4), torch.full((3, 4), math.inf), 1), "non-finite router logits"),
        (
            lambda: expert_choice(torch.ones(6, 4), torch.ones(3, 4), 1.0, 4),
            "tokens_per_group: got 4, expected a divisor",
        ),
        (lambda: expert_choice(torch.ones(6, 4), torch.ones(3, 4), 1.0, 0), "tokens_per_group: got 0"),
        (lambda: expert_choice(torch.ones(6, 4), torch.ones(3, 4), 3.5, 6), "capacity_factor: got 3.5"),
        (lambda: expert_choice(torch.ones(6, 4), torch.ones(3, 4), 0.0, 6), "capacity_factor: got 0.0"),
        (
            lambda: aux_loss(torch.ones(2, 3), torch.tensor([[0], [3]]), 0.01),
            "topk_ids: got 0..3, expected ids in 0..2",
        ),
        (lambda: aux_loss(torch.ones(2, 3), torch.tensor([[0], [-1]]), 0.01), "topk_ids: got -1..0"),
        (lambda: aux_loss(torch.ones(2, 3), torch.tensor([[0]]), 0.01), r"topk_ids: got shape \(1, 1\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
