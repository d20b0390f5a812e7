"""MoELayer, the drop-in, against the oracle's blocks: values, gradients, aux loss, shapes, what it says of itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference.moe
import reference.rooms
from moe_kernels import ExpertChoice, MoELayer, Router, TokenChoice, dispatch
from moe_kernels.backends import registry
from moe_kernels.weights import stack_dit_moe, unstack_dit_moe
from tests.contenders import each_backend, each_backend_but_interpreted, each_contender, moe_loop
from tests.error_rule import judge
from tests.product.test_gating import aux_loss_loop
from tests.trap_cases import Problem, Trap, draw_router, sample

TRAP = Trap("layer", "", T=36, H=32, I=24, Is=16, E=5, K=2)
PARAMETERS = ("gate_weight", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")


def draw_layer(seed, dtype, scale=1.0, router=None, backend="eager", trap=TRAP):
    """A layer and tokens (3, T/3, H) for it, near ties excluded."""
    x, gate_weight = draw_router(trap.T, trap.H, trap.E, trap.K, dtype, scale, seed)
    torch.manual_seed(seed)
    sizes = (trap.H, trap.I, trap.E, trap.K, trap.Is, trap.activation)
    layer = MoELayer(*sizes, router=router or TokenChoice(trap.K, aux_loss_alpha=1.0), backend=backend, dtype=dtype)
    layer.gate_weight.data.copy_(gate_weight)
    return layer, x.view(3, -1, trap.H), torch.randn(3, trap.T // 3, trap.H).to(dtype)


def oracle_block(layer: MoELayer) -> reference.moe.SparseMoeBlock:
    (E, H, I), Is = layer.down_proj.shape, layer.shared_down_proj.shape[1]
    block = reference.moe.SparseMoeBlock(H, I, E, TRAP.K, Is, alpha=layer.router.aux_loss_alpha)
    block.double().load_state_dict(unstack_dit_moe(layer.state_dict()))
    return block.train(layer.training)


def layer_compute(dtype, scale=1.0, training=True):
    def compute(seed, how):
        layer, x, dout = draw_layer(seed, dtype, scale, backend="eager" if how in ("oracle", "loop") else how)
        layer.train(training)
        module = oracle_block(layer) if how == "oracle" else layer
        x = (x.double() if how == "oracle" else x).requires_grad_()
        outputs = loop(layer, x) if how == "loop" else [module(x)]
        torch.autograd.backward(outputs, [dout.to(x.dtype), None][: len(outputs)])
        grads = {name: p.grad for name, p in module.named_parameters()}
        grads = stack_dit_moe(grads) if how == "oracle" else grads
        return {"out": outputs[0].detach(), "dx": x.grad} | {f"d{name}": grads[name] for name in PARAMETERS}

    def loop(layer, x):
        tokens = x.flatten(0, 1)
        weights, ids, probs = reference.rooms.gating(tokens, layer.gate_weight, TRAP.K)
        aux = aux_loss_loop(probs, ids, layer.router.aux_loss_alpha)
        slabs = [getattr(layer, name) for name in PARAMETERS[1:]]
        out = moe_loop(Problem(TRAP, tokens, weights, ids, *slabs, dout=x)).view(x.shape)
        return [out, aux] if training else [out]

    return compute


@each_contender
@pytest.mark.parametrize(("scale", "training"), [(1e-3, True), (1.0, True), (30.0, True), (1.0, False)])
def test_equals_the_oracle(scale, training, backend, dtype, seed):
    """Eval mode gives gradients too: the original's silently has none."""
    judge("layer", layer_compute(dtype, scale, training), backend, dtype, seed, scale)


@each_backend
@pytest.mark.parametrize("tokens_per_group", [None, 6, 36])
@pytest.mark.parametrize("capacity_factor", [0.5, 2.0])
def test_expert_choice_equals_the_oracle(capacity_factor, tokens_per_group, backend, seed):
    trap = Trap("expert_choice", "", T=36, H=32, I=24, Is=0, E=5, activation="gelu")
    router = ExpertChoice(capacity_factor, tokens_per_group)

    def compute(seed, how):
        backend = "eager" if how in ("oracle", "loop") else how
        layer, x, dout = draw_layer(seed, torch.float32, router=router, backend=backend, trap=trap)
        if how in ("oracle", "loop"):
            module = reference.moe.ExpertChoiceMoE(trap.H, trap.I, trap.E, capacity_factor, tokens_per_group)
            module.load_state_dict(layer.state_dict())
            layer = module.double() if how == "oracle" else module
        x, dout = (t.to(layer.down_proj.dtype) for t in (x, dout))
        out = layer(x.requires_grad_())
        out.backward(dout)
        return {"out": out.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in layer.named_parameters()}

    judge("layer", compute, backend, torch.float32, seed)


@each_backend
@pytest.mark.parametrize("shape", [(32,), (7, 32), (2, 3, 32), (2, 3, 4, 32), (0, 32), (2, 0, 32)])
def test_shapes_in_are_shapes_out(shape, backend):
    layer = MoELayer(32, 24, 5, 2, shared_intermediate_size=16, backend=backend)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad.isfinite().all() for p in layer.parameters())
    assert torch.equal(layer(x.reshape(-1, 32)).view(shape), y)


def gate_gradient_of_aux(layer, x, loss_scale, asked=False):
    """The router's gradient of a loss that is 0 times the output, and aux where the call asks for it."""
    layer.zero_grad()
    y, aux = layer(x, return_aux_loss=True) if asked else (layer(x), 0)
    (((y * 0).sum() + aux) * loss_scale).backward()
    return layer.gate_weight.grad.clone()


@each_backend_but_interpreted
def test_aux_loss_is_scaled_with_the_loss_where_it_is_asked_for_and_not_where_it_is_injected(backend, seed):
    """Parity with the original, whose injected gradient ignores the loss scale of fp16, and the way that does not."""
    inject, x, _ = draw_layer(seed, torch.float32, backend=backend, router=TokenChoice(2, 0.01, "injected"))
    scaled, *_ = draw_layer(seed, torch.float32, backend=backend, router=TokenChoice(2, 0.01, "scaled"))
    once = gate_gradient_of_aux(inject, x, 1.0)
    assert once.any()
    assert torch.equal(gate_gradient_of_aux(inject, x, 2.0**16), once)
    for layer in (inject, scaled):
        assert torch.equal(gate_gradient_of_aux(layer, x, 1.0, asked=True), once), "more than once"
        assert torch.equal(gate_gradient_of_aux(layer, x, 2.0**16, asked=True), once * 2.0**16)
    assert not gate_gradient_of_aux(scaled, x, 1.0).any()
    assert not gate_gradient_of_aux(inject.eval(), x, 1.0).any(), "injected in eval mode"


class Ops(TorchDispatchMode):
    """The operators that run meanwhile."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@each_backend
def test_the_injected_aux_loss_costs_two_operators_backward_and_none_forward(backend, seed, monkeypatch):
    """On a GPU each is a launch. Its gradient is one row for all tokens, never (T, E) in memory."""
    layer, x, dout = draw_layer(seed, torch.float32, backend=backend)
    kind, shapes = type(registry.get(backend)), []
    gating_bwd = kind.gating_bwd

    def noting(self, dtopk_weights, dprobs, *args):
        shapes.append(None if dprobs is None else tuple(dprobs.shape))
        return gating_bwd(self, dtopk_weights, dprobs, *args)

    monkeypatch.setattr(kind, "gating_bwd", noting)
    ways = []
    for training in (True, False):
        layer.zero_grad()
        with Ops() as forward:
            out = layer.train(training)(x)
        with Ops() as backward:
            out.backward(dout)
        ways.append(Counter(forward.names + backward.names))
    assert ways[0] - ways[1] == {"aten::_to_copy": 1, "aten::mul.Tensor": 1, "aten::expand": 1, "aten::view": 1}
    assert shapes == [(1, TRAP.E), None]


@each_backend
@pytest.mark.parametrize("mode", ["injected", "scaled"])
def test_returned_aux_loss_is_the_oracles(mode, backend, seed):
    layer, x, _ = draw_layer(seed, torch.float32, backend=backend, router=TokenChoice(2, 0.01, mode))
    y, aux = layer(x, return_aux_loss=True)
    block = oracle_block(layer)
    block(x.double())
    assert torch.equal(y, layer(x))
    assert aux.shape == () and aux.item() == pytest.approx(block.last_aux.item(), rel=1e-5)
    assert aux.requires_grad


@pytest.mark.parametrize("images", [1, 4, 16])
def test_a_gate_for_another_number_of_images_is_refused(images):
    """The tokens of all images, 16, would do for each."""
    layer, (shift, scale) = MoELayer(32, 24, 5, 2), torch.randn(2, 2, 32)
    with pytest.raises(ValueError, match=rf"gate: got shape \({images}, 32\), expected \(B,H\) = \(2, 32\)"):
        layer.forward_adaln(torch.randn(2, 8, 32), shift, scale, torch.randn(images, 32))


@each_backend
def test_float64_vectors_in_a_block(backend, seed):
    layer, x, dout = draw_layer(seed, torch.float32, backend=backend)
    drawn, answers = sample(torch.randn, 3, 3, 32, generator=torch.Generator().manual_seed(seed)), []
    for dtype in (torch.float32, torch.float64):
        vectors = drawn.to(dtype).requires_grad_()
        out = layer.forward_adaln(x, *vectors)
        (grad,) = torch.autograd.grad(out, vectors, dout)
        answers.append((out, grad.float()))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@each_backend
def test_repr_shows_the_backend_that_runs(backend):
    layer = MoELayer(32, 24, 5, 2, backend=backend)
    assert f"backend={backend}" in repr(layer) and "num_experts=5" in repr(layer) and "top_k=2" in repr(layer)
    assert "auto -> " in repr(MoELayer(32, 24, 5, 2))


def test_parameters():
    layer = MoELayer(32, 24, 5, 2, shared_intermediate_size=16, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == dict(zip(PARAMETERS, [(5, 32), (5, 48, 32), (5, 32, 24), (32, 32), (32, 16)], strict=True))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert all(p.abs().max() > 0 and p.isfinite().all() for p in layer.parameters())
    assert set(MoELayer(32, 24, 5, 2, activation="gelu").state_dict()) == set(PARAMETERS[:3])
    assert MoELayer(32, 24, 5, 2, device="meta").down_proj.is_meta


def test_a_router_of_ones_own():
    class FirstExpert(Router):
        def plan(self, call):
            ids = torch.zeros(call.num_tokens, 1, dtype=torch.int32)
            return dispatch(ids, torch.ones(call.num_tokens, 1), call.gate_weight.shape[0], call.backend), None

    layer, x = MoELayer(32, 24, 5, 2, router=FirstExpert()), torch.randn(4, 32)
    expected = reference.moe.expert_mlp(x, layer.gate_up_proj[0], layer.down_proj[0], "swiglu")
    torch.testing.assert_close(layer(x), expected)
    assert layer(x, return_aux_loss=True)[1].item() == 0
