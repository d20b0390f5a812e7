"""Models without memory, and models made where torch records nothing: meta, fake tensors, inference_mode, FLOPs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moe_kernels import MoELayer, moe_mlp, replace_moe
from tests.contenders import each_backend, plan_of
from tests.product.ownership.models import (
    B,
    E,
    H,
    I,
    Is,
    K,
    L,
    Model,
    assert_like_untouched,
    assert_same,
    gradients,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
)
from tests.trap_cases import DEVICE, PLAIN, make_problem

FLOPS = 6 * B * L * K * H * I + 6 * B * L * H * Is + 2 * B * L * H * E


@pytest.mark.unpoisoned
@each_backend
@pytest.mark.parametrize("way", ["meta", "init_empty_weights"])
def test_replaced_on_meta_and_loaded_later(way, backend, seed):
    empty = torch.device("meta")
    if way != "meta":
        empty = pytest.importorskip("accelerate").init_empty_weights()
    with empty:
        model = Model()
        replace_moe(model, backend=backend)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(make_model(seed).state_dict(), assign=True)
    assert_like_untouched(model, backend, seed)


@pytest.mark.unpoisoned
@each_backend
def test_to_empty_and_loaded_later(backend, seed):
    with torch.device("meta"):
        model = Model()
    replace_moe(model, backend=backend)
    model.to_empty(device=DEVICE).load_state_dict(make_model(seed).state_dict())
    assert_like_untouched(model, backend, seed)


@pytest.mark.unpoisoned
@native_and_eager
def test_a_meta_model_gives_shapes(backend):
    with torch.device("meta"):
        model, x = Model(), torch.randn(B, L, H)
        replace_moe(model, backend=backend)
        assert model(x).shape == x.shape


@pytest.mark.unpoisoned
@each_backend
@pytest.mark.parametrize("replaced", ["inside", "outside"])
def test_fake_tensors_give_shapes_forward_and_backward(replaced, backend, seed):
    model = None if replaced == "inside" else make_replaced(seed, backend)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if model is None:
            model = Model()
            replace_moe(model, backend=backend)
        x = torch.randn(B, L, H, requires_grad=True)
        y = model(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        grads = torch.autograd.grad(y.sum(), [x, *model.parameters()])
        assert [g.shape for g in grads] == [x.shape, *(p.shape for p in model.parameters())]
    if replaced == "outside":
        assert_like_untouched(model, backend, seed)


@each_backend
@pytest.mark.parametrize("made", ["built", "copied", "replaced"])
def test_what_is_made_in_inference_mode_is_used_inside_and_outside(made, backend, seed):
    expected = make_replaced(seed, backend)(make_x(seed)).detach()
    with torch.inference_mode():
        model = make_model(seed) if made == "built" else None
    model = model or make_model(seed)
    with torch.inference_mode():
        replace_moe(model, backend=backend)
        if made == "copied":
            model = copy.deepcopy(model)
        assert torch.equal(model(make_x(seed)), expected)
    with torch.no_grad():
        assert torch.equal(model(make_x(seed)), expected)
    if made == "replaced":
        assert_same(gradients(model, make_x(seed)), gradients(make_replaced(seed, backend), make_x(seed)))


@native_and_eager
def test_inference_mode_and_training_in_turn(backend, seed):
    model, expected = make_replaced(seed, backend), gradients(make_replaced(seed, backend), make_x(seed))
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(make_x(seed)), expected["y"])
        assert_same(gradients(model, make_x(seed)), expected)


def layer_of(module: str, backend: str, seed: int):
    if module == "block":
        return make_replaced(seed, backend).moe
    return MoELayer(H, I, E, K, shared_intermediate_size=Is, backend=backend)


@each_backend
@pytest.mark.parametrize("module", ["block", "MoELayer"])
def test_floating_point_operations_are_counted(module, backend, seed):
    layer, x = layer_of(module, backend, seed), make_x(seed).requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        layer(x)
    assert forward.get_total_flops() == FLOPS
    with FlopCounterMode(display=False) as both:
        layer(x).sum().backward()
    assert both.get_total_flops() == 3 * FLOPS


@each_backend
def test_operations_on_gate_and_up_in_two_stacks_are_counted(backend, seed):
    problem, totals = make_problem(PLAIN, seed, torch.float32).with_leaves()[0], []
    for gate_up in (problem.gate_up_proj, problem.gate_up_proj.chunk(2, 1)):
        with FlopCounterMode(display=False) as both:
            moe_mlp(problem.x, plan_of(problem, backend), gate_up, problem.down_proj, backend=backend).sum().backward()
        totals.append(both.get_total_flops())
    assert totals[0] == totals[1] > 0
