"""A block whose forward is another than its structure says is refused at replace_moe by its path; nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_kernels import replace_moe
from reference.moe import MoEMLP, SparseMoeBlock, inject_aux, routed_sum, spread_picks
from tests.product.ownership.models import H, I, assert_same, gradients, make_model, make_x


class Renormalising(SparseMoeBlock):
    """As Qwen's: the flag is an attribute of the block, and the picks' weights are divided by their sum."""

    norm_topk_prob = True

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids, aux = self.gate(tokens)
        weights = weights / weights.sum(-1, keepdim=True)
        y = routed_sum(tokens, *spread_picks(weights, ids, len(self.experts)), self.experts)
        return inject_aux(y + self.shared_experts(tokens), aux).view(x.shape)


class RenormalisingUnsaid(Renormalising):
    norm_topk_prob = False


class Tuple(SparseMoeBlock):
    def forward(self, x):
        return super().forward(x), None


class Scaled(SparseMoeBlock):
    def forward(self, x):
        return 2.5 * super().forward(x)


class GatedShared(SparseMoeBlock):
    """The shared expert times a sigmoid."""

    def forward(self, x):
        shared = self.shared_experts
        self.shared_experts = None
        y = super().forward(x)
        self.shared_experts = shared
        return y + x.mean(-1, keepdim=True).sigmoid() * shared(x)


class SigmoidRouter(SparseMoeBlock):
    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = (tokens @ self.gate.weight.T).sigmoid().topk(self.gate.top_k)
        y = routed_sum(tokens, *spread_picks(weights, ids, len(self.experts)), self.experts)
        return (y + self.shared_experts(tokens)).view(x.shape)


class WithDropout(MoEMLP):
    def __init__(self):
        super().__init__(H, I)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(super().forward(x))


class Relu(MoEMLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


def of_class(cls):
    def spoil(block):
        block.__class__ = cls

    return spoil


def expert(make):
    def spoil(block):
        block.experts[2] = make()

    return spoil


def hook(block):
    block.experts[2].register_forward_hook(lambda module, args, y: 2 * y)


def hook_on_a_linear(block):
    block.experts[2].up_proj.register_forward_pre_hook(lambda module, args: None)


def hook_on_the_gate(block):
    block.gate.register_forward_hook(lambda module, args, y: y)


def patched_block(block):
    block.forward = lambda x: x


def patched_expert(block):
    block.experts[2].forward = lambda x: x


def bias(block):
    block.experts[2].up_proj = nn.Linear(H, I)


def one_expert_short(block):
    del block.experts[4]


def narrow_router(block):
    block.gate.weight = nn.Parameter(torch.randn(5, H + 1))


def other_dtype(block):
    block.experts[2].up_proj.to(torch.bfloat16)


def extra_parameter(block):
    block.scale = nn.Parameter(torch.ones(H))


def too_many_picks(block):
    block.gate.top_k = 6


def mute_linear(block):
    block.experts[2].up_proj = nn.Identity()


def missing_linear(block):
    block.experts[2].up_proj = None


SPOILERS = {
    "norm_topk_prob on the block": of_class(Renormalising),
    "renormalises, unsaid": of_class(RenormalisingUnsaid),
    "returns a tuple": of_class(Tuple),
    "scales": of_class(Scaled),
    "gates its shared expert": of_class(GatedShared),
    "routes by sigmoid": of_class(SigmoidRouter),
    "dropout in an expert": expert(WithDropout),
    "another activation": expert(lambda: Relu(H, I)),
    "a wider expert": expert(lambda: MoEMLP(H, I + 8)),
} | {
    spoil.__name__.replace("_", " "): spoil
    for spoil in (
        hook, hook_on_a_linear, hook_on_the_gate, patched_block, patched_expert, bias, one_expert_short,
        narrow_router, other_dtype, extra_parameter, too_many_picks, mute_linear, missing_linear,
    )
}  # fmt: skip


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_refused_by_its_path_and_nothing_is_changed(spoiler, seed):
    model = nn.Sequential(make_model(seed), make_model(seed + 1))
    SPOILERS[spoiler](model[1].moe)
    classes, state = [type(m) for m in model.modules()], {n: t.clone() for n, t in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    attributes = [dict(vars(m)) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=r"1\.moe.*(expected|replaced|got)"):
        replace_moe(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [set(vars(m)) for m in model.modules()] == [set(a) for a in attributes]
    assert_same(dict(model.state_dict()), state)


def test_the_other_block_is_the_plain_one_still(seed):
    model, expected = nn.Sequential(make_model(seed), make_model(seed + 1)), gradients(make_model(seed), make_x(seed))
    hook(model[1].moe)
    with pytest.raises(ValueError, match=r"1\.moe\.experts\.2"):
        replace_moe(model)
    assert type(model[0].moe) is SparseMoeBlock
    assert_same(gradients(model[0], make_x(seed)), expected)


def test_a_model_that_was_replaced_stays_as_it_was_when_doing_it_again_is_refused(seed):
    model = make_model(seed)
    replace_moe(model, backend="eager")
    expected = gradients(model, make_x(seed))
    with pytest.raises(ValueError, match="backend"):
        replace_moe(model, backend="warp")
    with pytest.raises(ValueError, match="aux_loss_mode"):
        replace_moe(model, aux_loss_mode="halved")
    assert_same(gradients(model, make_x(seed)), expected)


def test_random_numbers_are_not_used_up(seed):
    model = make_model(seed)
    torch.manual_seed(seed)
    expected = torch.randn(3)
    torch.manual_seed(seed)
    replace_moe(model)
    assert torch.equal(torch.randn(3), expected)
