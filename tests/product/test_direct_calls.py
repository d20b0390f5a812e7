"""Ops that are called past torch's dispatcher: the same bits as through it, and nobody who watches it misses one."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ExpertChoice, MoELayer
from moe_kernels.ops import token_choice
from tests.contenders import each_backend
from tests.trap_cases import DEVICE

OPS = ["gating", "dispatch", "moe_mlp", "dispatch_bwd", "gating_bwd", "moe_mlp_bwd"]


class Watching(TorchDispatchMode):
    """Sees every op that is called, backward too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_kernels":
            self.seen.append(func._schema.name.removeprefix("moe_kernels::"))
        return func(*args, **(kwargs or {}))


def make(backend, **options):
    layer = MoELayer(64, 64, 4, 2, shared_intermediate_size=64, backend=backend, **options).to(DEVICE)
    return layer, torch.randn(2, 8, 64, device=DEVICE, requires_grad=True)


def results(layer, x):
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), (x, *layer.parameters()))]


@each_backend
@pytest.mark.parametrize("router", ["token choice", "expert choice"])
def test_the_same_bits_through_the_dispatcher(router, backend, seed):
    layer, x = make(backend, **({"router": ExpertChoice(2.0)} if router == "expert choice" else {}))
    direct = results(layer, x)
    with Watching() as mode:
        watched = results(layer, x)
    assert all(map(torch.equal, direct, watched))
    expected = [op.replace("dispatch", "dispatch_expert_choice", 1) if op == "dispatch" else op for op in OPS]
    assert sorted(set(mode.seen)) == sorted(expected if router == "expert choice" else OPS)


def test_a_direct_call_makes_no_dispatcher_call(monkeypatch):
    """What the shortcut is for: the op itself is not called, forward or backward."""
    layer, x = make("eager")
    calls = []
    monkeypatch.setattr(token_choice, "seen", lambda tensors: calls.append(len(tensors)) or False)
    with torch.profiler.profile() as profile:
        results(layer, x)
    assert calls and not [e.name for e in profile.events() if e.name.startswith("moe_kernels::")]


def test_a_profiler_sees_the_ops():
    layer, x = make("eager")
    with torch.profiler.profile() as profile:
        results(layer, x)
    assert {f"moe_kernels::{op}" for op in OPS} <= {event.name for event in profile.events()}


def test_forward_derivatives_are_refused_not_dropped():
    layer, x = make("eager")
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent.sum()


def test_second_derivatives_are_refused():
    layer, x = make("eager")
    (dx,) = torch.autograd.grad(layer(x).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def test_meta_tensors_give_shapes():
    layer, _ = make("auto")
    layer = layer.to("meta")
    assert layer(torch.empty(2, 8, 64, device="meta")).shape == (2, 8, 64)
