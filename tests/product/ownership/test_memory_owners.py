"""Memory belongs to whoever put a parameter there: flat buffers, averages, swapped experts, and a replaced block reads
it where it lies, without moving it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from moe_kernels import replace_moe
from reference.moe import MoEMLP
from tests.contenders import each_backend
from tests.product.ownership.models import (
    LR,
    STEPS,
    H,
    I,
    assert_like_untouched,
    assert_same,
    gradients,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
    ten_losses,
    untouched,
)


def into_one_buffer(model) -> torch.Tensor:
    flat, start = parameters_to_vector(model.parameters()).detach().clone(), 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return flat


@each_backend
def test_a_flat_buffer_is_trained_through(backend, seed):
    expected = ten_losses(make_replaced(seed, backend), seed)
    model = make_replaced(seed, backend)
    flat = into_one_buffer(model)
    places = [p.data_ptr() for p in model.parameters()]

    def step():
        flat.add_(torch.cat([p.grad.flatten() for p in model.parameters()]), alpha=-LR)

    assert torch.equal(ten_losses(model, seed, step), expected)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(parameters_to_vector(model.parameters()), flat)


@native_and_eager
def test_parameters_moved_between_any_two_steps(backend, seed):
    expected = ten_losses(make_replaced(seed, backend), seed)
    model = make_replaced(seed, backend)

    def step():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-LR)
                p.data = p.data.clone()

    assert torch.equal(ten_losses(model, seed, step), expected)


def averages_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() * 0.5 + 0.1 for name, p in model.named_parameters()}


@each_backend
@pytest.mark.parametrize("way", ["copied", "pointed to"])
def test_averages_put_in_for_evaluation_and_taken_out_again(way, backend, seed):
    model = make_replaced(seed, backend)
    ten_losses(model, seed)
    trained, averages = copy.deepcopy(model.state_dict()), averages_of(model)
    kept = {name: p.data for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if way == "copied":
            p.data.copy_(averages[name])
        else:
            p.data = averages[name]
    assert_same(dict(model.state_dict()), averages)
    assert_like_untouched(model.eval(), backend, seed)
    for name, p in model.named_parameters():
        if way == "copied":
            p.data.copy_(trained[name])
        else:
            p.data = kept[name]
    assert_same(dict(model.state_dict()), trained)
    assert_like_untouched(model.train(), backend, seed)


@each_backend
def test_what_is_pointed_to_changes_in_place(backend, seed):
    model = make_replaced(seed, backend)
    gradients(model, make_x(seed))
    averages = averages_of(model)
    for name, p in model.named_parameters():
        p.data = averages[name]
    for factor in (0.75, 0.5):
        gradients(model, make_x(seed))
        for average in averages.values():
            average.mul_(factor)
        assert_like_untouched(model, backend, seed)


@each_backend
def test_vector_to_parameters_then_the_vector_changes_in_place(backend, seed):
    model = make_replaced(seed, backend)
    vector = parameters_to_vector(model.parameters()).detach() * 0.5
    vector_to_parameters(vector, model.parameters())
    for factor in (0.75, 0.5):
        gradients(model, make_x(seed))
        vector.mul_(factor)
        assert torch.equal(parameters_to_vector(model.parameters()), vector)
        assert_like_untouched(model, backend, seed)


@each_backend
def test_functional_call_with_other_tensors(backend, seed):
    model, other = make_replaced(seed, backend), make_replaced(seed + 1, backend)
    tensors = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    before = gradients(model, make_x(seed))
    expected = gradients(other, make_x(seed))
    x = make_x(seed).requires_grad_()
    y = functional_call(model, tensors, (x,))
    grads = torch.autograd.grad(y.square().mean(), [x, *tensors.values()])
    assert_same({"y": y.detach()} | dict(zip(["x", *tensors], grads, strict=True)), expected)
    assert_same(gradients(model, make_x(seed)), before)


def swap(model):
    experts = model.moe.experts
    experts[0], experts[3] = experts[3], experts[0]


def put_in_a_new_one(model):
    model.moe.experts[1] = MoEMLP(H, I)


def new_linear(model):
    model.moe.experts[2].down_proj = nn.Linear(I, H, bias=False)


def new_parameter(model):
    model.moe.experts[2].up_proj.weight = nn.Parameter(torch.randn(I, H))


def tie(model):
    model.moe.experts[4].up_proj.weight = model.moe.experts[0].up_proj.weight


def new_shared(model):
    model.moe.shared_experts = MoEMLP(H, 16)


@each_backend
@pytest.mark.parametrize("change", [swap, put_in_a_new_one, new_linear, new_parameter, new_shared])
def test_modules_and_parameters_exchanged(change, backend, seed):
    model = make_replaced(seed, backend)
    gradients(model, make_x(seed))
    change(model)
    assert_like_untouched(model, backend, seed)


@each_backend
def test_tied_experts_add_up_their_gradients(backend, seed):
    model = make_replaced(seed, backend)
    tie(model)
    expected = gradients(untouched(model, backend), make_x(seed))
    first, last = "moe.experts.0.up_proj.weight", "moe.experts.4.up_proj.weight"
    expected[first] = expected[first] + expected.pop(last)
    assert_same(gradients(model, make_x(seed)), expected)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@each_backend
def test_a_parametrized_linear(backend, seed):
    model = make_replaced(seed, backend)
    expected = make_replaced(seed, backend)
    with torch.no_grad():
        expected.moe.experts[1].up_proj.weight.mul_(2)
    expected = gradients(expected, make_x(seed))
    parametrize.register_parametrization(model.moe.experts[1].up_proj, "weight", Doubled())
    got = gradients(model, make_x(seed))
    name = "moe.experts.1.up_proj.{}weight{}"
    original, plain = name.format("parametrizations.", ".original"), name.format("", "")
    assert torch.equal(got.pop(original), 2 * expected.pop(plain))
    assert_same(got, expected)
    parametrize.remove_parametrizations(model.moe.experts[1].up_proj, "weight")
    assert_like_untouched(model, backend, seed)


@each_backend
def test_dtypes_back_and_forth(backend, seed):
    model, x = make_replaced(seed, backend), make_x(seed)
    gradients(model, x)
    model.to(torch.bfloat16)
    expected = gradients(untouched(model, backend, torch.bfloat16), x.bfloat16())
    assert_same(gradients(model, x.bfloat16()), expected)
    model.to(torch.float32)
    assert_like_untouched(model, backend, seed)


@each_backend
def test_load_state_dict_with_assign(backend, seed):
    model, state = make_replaced(seed, backend), make_model(seed + 1).state_dict()
    gradients(model, make_x(seed))
    model.load_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in model.named_parameters())
    assert_like_untouched(model, backend, seed)


@each_backend
def test_a_gradient_is_a_storage_of_its_own(backend, seed):
    model = make_replaced(seed, backend)
    model(make_x(seed)).square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g.untyped_storage().nbytes() == g.numel() * g.element_size() for g in grads)
    before = [g.clone() for g in grads]
    grads[3].zero_()
    assert [i for i, (a, b) in enumerate(zip(grads, before, strict=True)) if not torch.equal(a, b)] == [3]


@each_backend
def test_a_parameter_is_a_storage_of_its_own(backend, seed):
    model = make_replaced(seed, backend)
    gradients(model, make_x(seed))
    storages = [p.untyped_storage() for p in model.parameters()]
    assert all(s.nbytes() == p.numel() * p.element_size() for s, p in zip(storages, model.parameters(), strict=True))
    assert len({s.data_ptr() for s in storages}) == len(storages)


@each_backend
def test_gradients_put_into_one_buffer(backend, seed):
    """What ZeRO and gradient bucketing do: p.grad is a view of a buffer before backward, and is added to there."""
    model, expected = make_replaced(seed, backend), gradients(make_replaced(seed, backend), make_x(seed))
    parameters = list(model.parameters())
    buffer = torch.zeros(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    model(make_x(seed)).square().mean().backward()
    names = [name for name, _ in model.named_parameters()]
    assert torch.equal(buffer, torch.cat([expected[name].flatten() for name in names]))


@each_backend
def test_a_fused_optimizer_made_before_replacing(backend, seed):
    losses = []
    for first in (True, False):
        model = make_model(seed)
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused=True) if first else None
        replace_moe(model, backend=backend)
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
        losses.append(ten_losses(model, seed, optimizer.step))
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(*losses) and len(losses[0]) == STEPS
