"""The authors' loop is neither better nor worse than theirs: as many ATen calls as were counted on the original."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.instrument.loops import AuthorsMoE, SortedLoopMoE, install
from reference.moe import SparseMoeBlock


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def layer(cls=AuthorsMoE, num_experts=8, pretraining_tp=1):
    torch.manual_seed(3)
    return cls(SparseMoeBlock(16, 64, num_experts, 2, 32), pretraining_tp)


def expert_choice_by_hand(moe, x, topk_weights, topk_ids):
    """sum_k w[t,k] mlp_{id[t,k]}(x[t]), one token and pick at a time."""
    return torch.stack(
        [
            sum(w * moe.experts[int(e)](token[None])[0] for w, e in zip(ws, es, strict=True))
            for token, ws, es in zip(x, topk_weights, topk_ids, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("training", "num_experts", "pretraining_tp", "calls"),
    [
        (False, 8, 1, 158),
        (False, 8, 2, 290),
        (False, 16, 1, 286),
        (False, 16, 2, 530),
        (True, 8, 1, 145),
        (True, 8, 2, 277),
        (True, 16, 1, 241),
        (True, 16, 2, 485),
    ],
)
def test_aten_calls_equal_those_of_the_original(training, num_experts, pretraining_tp, calls):
    moe = layer(num_experts=num_experts, pretraining_tp=pretraining_tp).train(training)
    x = torch.randn(2, 256, 16)
    assert moe.gate(x)[1].unique().numel() == num_experts, "the count holds when every expert has rows"
    with CallCounter() as counter:
        moe(x)
    assert len(counter.calls) == calls


def test_host_syncs_two_per_expert_in_training_and_one_boundary_copy_in_inference():
    moe, x = layer(), torch.randn(2, 256, 16)
    with CallCounter() as counter:
        moe.train()(x)
    masked = sum(call in ("aten.index", "aten.index_put_") for call in counter.calls)
    assert masked == 2 * 8
    with CallCounter() as counter:
        moe.eval()(x)
    assert counter.calls.count("aten.bincount") == 1
    assert counter.calls.count("aten.repeat") == 8  # the index repeated across H, once per expert


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [AuthorsMoE, SortedLoopMoE])
@pytest.mark.parametrize("pretraining_tp", [1, 2])
def test_routed_sum_equals_the_formula(cls, pretraining_tp, training):
    moe = layer(cls, pretraining_tp=pretraining_tp).train(training)
    x = torch.randn(1, 40, 16)
    topk_weights, topk_ids, _ = moe.gate(x)
    with torch.no_grad():
        want = expert_choice_by_hand(moe.double(), x[0].double(), topk_weights.double(), topk_ids)
        got = moe.float().routed(x[0], topk_weights, topk_ids)
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_training_gives_every_expert_a_gradient_and_inference_none():
    moe = layer()
    x = torch.randn(1, 4, 16)  # 8 picks at most: some expert stays without rows
    moe.train()(x).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    moe.zero_grad()
    moe.eval()(x).sum().backward()
    assert all(p.grad is None for p in moe.experts.parameters())
    assert all(p.grad is not None for p in moe.shared_experts.parameters())


def test_aux_gradient_is_injected_whatever_the_loss_scale():
    moe, x = layer().train(), torch.randn(2, 64, 16)
    (injected,) = torch.autograd.grad(moe.gate(x)[2], moe.gate.weight)
    (moe(x) * 0.0).sum().backward()
    assert injected.norm() > 0
    assert torch.equal(moe.gate.weight.grad, injected)


def test_pure_bf16_training_crashes_like_the_original():
    with pytest.raises(RuntimeError):
        layer().bfloat16().train()(torch.randn(2, 8, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("cls", [AuthorsMoE, SortedLoopMoE])
def test_install_keeps_keys_parameters_and_values(cls):
    model = torch.nn.ModuleDict({"a": layer(), "b": torch.nn.Sequential(layer())})
    before = dict(model.named_parameters())
    assert install(model, pretraining_tp=2, peer=cls) == 2
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[k] is after[k] for k in before)
    assert type(model["b"][0]) is cls and model["a"].experts[0].pretraining_tp == 2


def test_install_refuses_what_it_cannot_swap():
    with pytest.raises(ValueError, match="no DiT-MoE block"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"AuthorsMoE\(model\)"):
        install(layer())
    with pytest.raises(ValueError, match="pretraining_tp must divide"):
        layer(pretraining_tp=3)
