"""packed_weights: the same bits, and an error instead of stale weights."""

import pytest
import torch

import moe_kernels
from bench.instrument.cases import DTYPES
from moe_kernels.backends import registry
from reference.moe import SparseMoeBlock
from tests.product.families.standins import CoreMultiHeadMoE, LingBotVideoSparseMoeBlock

SIZES = dict(hidden_size=40, intermediate_size=72, num_experts=5, top_k=2)  # no multiple of a panel


def layer(**changes) -> moe_kernels.MoELayer:
    torch.manual_seed(0)
    return moe_kernels.MoELayer(**{**SIZES, "shared_intermediate_size": 24, "backend": "native", **changes})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"shared_intermediate_size": 0}, {"activation": "gelu"}, {"intermediate_size": 1056}],
    ids=["swiglu", "no shared expert", "gelu", "more than one chunk of K"],
)
def test_packed_weights_give_the_same_bits(dtype, changes):
    moe = layer(dtype=DTYPES[dtype], **changes)
    x = torch.randn(3, 19, SIZES["hidden_size"]).to(DTYPES[dtype])
    with torch.no_grad():
        expected = moe(x)
        with moe_kernels.packed_weights(moe) as packed:
            assert packed == 1
            assert torch.equal(moe(x), expected)
        assert torch.equal(moe(x), expected)


def test_replaced_blocks_and_gradients():
    torch.manual_seed(0)
    block = SparseMoeBlock(40, 72, 4, 2, 24)
    model = torch.nn.Sequential(block)
    moe_kernels.replace_moe(model, "native")
    x = torch.randn(1, 19, 40)

    def step():
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    expected = step()
    with moe_kernels.packed_weights(model) as packed:
        assert packed == 1
        for got, want in zip(step(), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "block", [LingBotVideoSparseMoeBlock, lambda: CoreMultiHeadMoE(heads=2)], ids=["LingBot", "MAGI-2"]
)
def test_blocks_whose_gate_and_up_are_two_stacks(block):
    torch.manual_seed(0)
    model = torch.nn.Sequential(block())
    moe_kernels.replace_moe(model, "native")
    (stack, *_), x = (p for p in model.parameters() if p.dim() == 3), torch.randn(19, 32)
    with torch.no_grad():
        expected = model(x)
        with moe_kernels.packed_weights(model) as packed:
            assert packed == 1 and torch.equal(model(x), expected)
            stack.mul_(2)
            with pytest.raises(ValueError, match=r"packed.weights.*changed"):
                model(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda moe: moe.down_proj.mul_(1.5),
        lambda moe: moe.gate_up_proj[2].zero_(),
        lambda moe: moe.shared_down_proj.data.copy_(moe.shared_down_proj * 2),
        lambda moe: moe.gate_up_proj.data.mul_(1.5),
    ],
    ids=["in place", "one expert", "through .data, as EMA swaps do", "routed, through .data"],
)
def test_changed_weights_are_an_error(change):
    moe, x = layer(), torch.randn(7, SIZES["hidden_size"])
    with torch.no_grad():
        with moe_kernels.packed_weights(moe):
            moe(x)
            change(moe)
            with pytest.raises(ValueError, match=r"packed.weights.*changed"):
                moe(x)
        moe(x)


def test_nested_contexts_and_foreign_backends():
    native, grouped = layer(), layer(backend="grouped")
    with moe_kernels.packed_weights(torch.nn.ModuleList([native, grouped])) as packed:
        assert packed == 1
        with moe_kernels.packed_weights(native), torch.no_grad():
            native(torch.randn(3, SIZES["hidden_size"]))
    with torch.no_grad():  # nothing is left behind
        native.down_proj.mul_(2)
        native(torch.randn(3, SIZES["hidden_size"]))


def with_gaps(t):
    return t.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(("stored", "packs"), [(lambda t: t.mT.contiguous().mT, 1), (with_gaps, 0)])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"])
def test_weights_that_every_call_copies_are_not_packed(name, stored, packs):
    """The pack of a copy would be found by whoever gets the copy's memory next, and by nobody else."""
    moe, x = layer(), torch.randn(7, SIZES["hidden_size"])
    with torch.no_grad():
        expected = moe(x)
        setattr(moe, name, torch.nn.Parameter(stored(getattr(moe, name))))
        with moe_kernels.packed_weights(moe) as packed:
            assert packed == packs and len(registry.get("native")._packed) == packs
            assert torch.equal(moe(x), expected)


def test_a_model_without_layers_is_an_error():
    with (
        pytest.raises(ValueError, match=r"model: found no MoELayer .* in Linear"),
        moe_kernels.packed_weights(torch.nn.Linear(2, 2)),
    ):
        pass
