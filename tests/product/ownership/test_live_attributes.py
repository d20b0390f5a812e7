"""What a replaced block is told after replacing counts: attributes, other modules, hooks; it stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from moe_kernels import replace_moe, restore_moe
from reference.moe import MoEGate, MoEMLP, SparseMoeBlock
from tests.contenders import BACKENDS, each_backend
from tests.product.ownership.models import (
    B,
    E,
    H,
    I,
    K,
    as_asked,
    assert_same,
    gradients,
    judge_as_plain,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
    one_warning,
    replace,
)


class ActMLP(MoEMLP):
    """An expert with its activation as a module, as the original's has it."""

    def __init__(self, hidden_size=H, intermediate_size=I):
        super().__init__(hidden_size, intermediate_size)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_plain(seed):
    """make_model, its experts with an act_fn."""
    model = make_model(seed)
    experts = [ActMLP() for _ in model.moe.experts]
    for new, old in zip(experts, model.moe.experts, strict=True):
        new.load_state_dict(old.state_dict())
    model.moe.experts = nn.ModuleList(experts)
    return model


@each_backend
@pytest.mark.parametrize("name, value", [("top_k", 1), ("top_k", 4), ("alpha", 0.0), ("alpha", 3.0)])
def test_attributes_of_the_gate(name, value, backend, seed):
    model, expected = make_replaced(seed, backend), make_model(seed)
    gradients(model, make_x(seed))
    setattr(expected.moe.gate, name, value)
    replace_moe(expected, backend=backend)
    before = gradients(model, make_x(seed))
    setattr(model.moe.gate, name, value)
    got = gradients(model, make_x(seed))
    assert_same(got, gradients(expected, make_x(seed)))
    assert any(not torch.equal(got[k], before[k]) for k in got)


@each_backend
@pytest.mark.parametrize("name, value", [("top_k", 3), ("alpha", 2.0)])
def test_attributes_of_the_gate_as_the_plain_model_takes_them(name, value, backend, seed):
    def use(model, x, how):
        model, x = as_asked(replace(model, how), x, how)
        gradients(model, x)
        setattr(model.moe.gate, name, value)
        return gradients(model, x)

    judge_as_plain("live gate", backend, seed, use)


def test_replacing_again_with_another_backend(seed):
    model = make_replaced(seed, BACKENDS[0])
    for backend in reversed(BACKENDS):
        gradients(model, make_x(seed))
        assert replace_moe(model, backend=backend) == 1
        assert f"backend={backend}" in repr(model) and type(model.moe).__mro__.count(SparseMoeBlock) == 1
        assert_same(gradients(model, make_x(seed)), gradients(make_replaced(seed, backend), make_x(seed)))


def test_replacing_again_with_another_mode_of_the_auxiliary_loss(seed):
    model, expected = make_replaced(seed, "auto"), make_model(seed)
    before = gradients(model, make_x(seed))
    replace_moe(expected, aux_loss_mode="scaled")
    replace_moe(model, aux_loss_mode="scaled")
    got = gradients(model, make_x(seed))
    assert_same(got, gradients(expected, make_x(seed)))
    assert not torch.equal(got["moe.gate.weight"], before["moe.gate.weight"])


def patched_forward(block):
    expert = block.experts[2]
    expert.forward = lambda x: 0.5 * MoEMLP.forward(expert, x)


def hook_on_an_expert(block):
    block.experts[2].register_forward_hook(lambda module, args, y: 2 * y)


def hook_before_an_expert(block):
    block.experts[2].register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def hook_on_a_linear(block):
    block.experts[2].up_proj.register_forward_hook(lambda module, args, y: 2 * y)


def hook_behind_a_linear(block):
    block.experts[2].up_proj.register_full_backward_hook(lambda module, grads, dy: (2 * grads[0],))


def another_activation(block):
    block.experts[2].act_fn = nn.GELU()


def activation_of_a_function(block):
    block.experts[2].__dict__["act_fn"] = F.relu


def wider_expert(block):
    block.experts[2] = ActMLP(H, I + 8)


def added_bias(block):
    block.experts[2].up_proj.bias = nn.Parameter(torch.full((I,), 0.3))


def linear_with_bias(block):
    block.experts[2].up_proj = nn.Linear(H, I)


def subclass_of_linear(block):
    class Halved(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    new = Halved(H, I, bias=False)
    new.load_state_dict(block.experts[2].up_proj.state_dict())
    block.experts[2].up_proj = new


def another_class_of_expert(block):
    class Negative(MoEMLP):
        def forward(self, x):
            return -super().forward(x)

    block.experts[2] = Negative(H, I)


def dropout_in_a_linear(block):
    block.experts[2].down_proj = nn.Sequential(block.experts[2].down_proj, nn.Dropout(0.5))


def pruned(block):
    prune.l1_unstructured(block.experts[2].up_proj, "weight", 0.5)


CHANGES = [
    patched_forward, hook_on_an_expert, hook_before_an_expert, hook_on_a_linear, hook_behind_a_linear,
    another_activation, activation_of_a_function, wider_expert, added_bias, linear_with_bias, subclass_of_linear,
    another_class_of_expert, dropout_in_a_linear, pruned,
]  # fmt: skip
each_change = pytest.mark.parametrize("change", CHANGES)


class SharperGate(MoEGate):
    def forward(self, x):
        return super().forward(3 * x)


def hook_on_the_gate(model):
    model.moe.gate.register_forward_hook(lambda module, args, y: (2 * y[0], *y[1:]))


def another_gate(model):
    new = SharperGate(H, E, K, 0.1)
    new.load_state_dict(model.moe.gate.state_dict())
    model.moe.gate = new


def patched_gate(model):
    gate = model.moe.gate
    gate.forward = lambda x: MoEGate.forward(gate, 2 * x)


def changed(model, change, seed):
    torch.manual_seed(seed)
    change(model.moe)
    return model


def seeded(seed, model):
    torch.manual_seed(seed)
    return gradients(model, make_x(seed))


@native_and_eager
@each_change
def test_what_kernels_cannot_do_the_original_does_and_says_so_once(change, backend, seed):
    model = make_plain(seed)
    replace_moe(model, backend=backend)
    before = gradients(model, make_x(seed))
    expected = seeded(seed, changed(make_plain(seed), change, seed))
    changed(model, change, seed)
    with one_warning("moe.experts.2"):
        for _ in range(3):
            assert_same(seeded(seed, model), expected)
    assert_same(seeded(seed, model.eval()), seeded(seed, changed(make_plain(seed), change, seed).eval()))
    assert "original" in repr(model.moe) and "moe.experts.2" in repr(model.moe)
    assert not torch.equal(before["y"], expected["y"]) or change is hook_behind_a_linear


@native_and_eager
@pytest.mark.parametrize("change", [hook_on_the_gate, another_gate, patched_gate])
def test_a_gate_that_does_more_is_obeyed(change, backend, seed):
    model, plain = make_replaced(seed, backend), make_model(seed)
    for each in (model, plain):
        change(each)
    with one_warning("moe.gate"):
        for _ in range(2):
            assert_same(gradients(model, make_x(seed)), gradients(plain, make_x(seed)))


@each_backend
def test_the_shared_expert_is_taken_off(backend, seed):
    def use(model, x, how):
        model, x = as_asked(replace(model, how), x, how)
        gradients(model, x)
        model.moe.shared_experts = None
        return gradients(model, x)

    judge_as_plain("shared taken off", backend, seed, use)


@pytest.mark.unpoisoned
def test_attributes_of_the_gate_and_new_experts_after_compiling(seed):
    torch.compiler.reset()
    model = make_replaced(seed, "auto")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(make_x(seed))
    model.moe.gate.top_k = 1
    assert torch.equal(compiled(make_x(seed)), model(make_x(seed)))
    model.moe.experts[1] = MoEMLP(H, I)
    assert torch.equal(compiled(make_x(seed)), model(make_x(seed)))
    model.bfloat16()
    assert torch.equal(compiled(make_x(seed).bfloat16()), model(make_x(seed).bfloat16()))


@pytest.mark.unpoisoned
@each_change
def test_what_kernels_cannot_do_is_an_error_under_compile(change, seed):
    torch.compiler.reset()
    model = make_plain(seed)
    replace_moe(model)
    changed(model, change, seed)
    with pytest.raises(RuntimeError, match=r"moe\.experts\.2"):
        torch.compile(model, backend="eager", fullgraph=True)(make_x(seed))


def test_an_original_without_gradients_in_eval_is_an_error_there(seed):
    class NoGradients(SparseMoeBlock):
        def forward(self, x, return_aux_loss=False):
            with torch.set_grad_enabled(self.training):
                return super().forward(x, return_aux_loss)

    model = make_model(seed)
    model.moe.__class__ = NoGradients
    replace_moe(model)
    hook_on_an_expert(model.moe)
    with one_warning("moe.experts.2"):
        gradients(model, make_x(seed))
    with pytest.raises(RuntimeError, match=r"moe\.experts\.2.*no gradients in eval"):
        model.eval()(make_x(seed))
    with torch.no_grad():
        assert torch.isfinite(model(make_x(seed))).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linears(seed):
    plain, model = make_model(seed).eval(), make_replaced(seed, "auto").eval()
    expected, got = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (plain, model))
    with torch.no_grad(), one_warning("moe.experts.0"):
        assert torch.equal(got(make_x(seed)), expected(make_x(seed)))
        got(make_x(seed))


@native_and_eager
@each_change
def test_taken_back_the_kernels_compute_again(change, backend, seed):
    model = make_plain(seed)
    replace_moe(model, backend=backend)
    expected, kept = gradients(model, make_x(seed)), copy.deepcopy(model.moe.experts)
    changed(model, change, seed)
    with one_warning("moe.experts.2"):
        seeded(seed, model)
    model.moe.experts = kept
    assert_same(gradients(model, make_x(seed)), expected)
    assert "original" not in repr(model.moe)


@each_backend
def test_the_class_of_the_original_is_kept_and_restored(backend, seed):
    model = make_model(seed)
    expected, original, names = gradients(model, make_x(seed)), type(model.moe), set(vars(model.moe))
    replace_moe(model, backend=backend)
    assert isinstance(model.moe, SparseMoeBlock) and type(model.moe) is not original
    assert type(model.moe).__name__ == original.__name__ and issubclass(type(model.moe), original)
    gradients(model, make_x(seed))
    assert restore_moe(model) == 1
    assert type(model.moe) is original and set(vars(model.moe)) == names
    assert_same(gradients(model, make_x(seed)), expected)
    assert restore_moe(model) == 0
    assert replace_moe(model, backend=backend) == 1


@each_backend
def test_hooks_on_the_block_itself_run(backend, seed):
    model, seen = make_replaced(seed, backend), []
    expected = gradients(model, make_x(seed))
    handle = model.moe.register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    assert not torch.equal(gradients(model, make_x(seed))["y"], expected["y"]) and len(seen) == 1
    handle.remove()
    assert_same(gradients(model, make_x(seed)), expected)


@each_backend
def test_the_auxiliary_loss_asked_for_is_scaled_with_the_loss(backend, seed):
    """(loss + aux) / 8, as in gradient accumulation: nothing is injected beside it."""

    def use(model, x, how):
        model, x = as_asked(replace(model, how), x, how)
        y, aux = model.moe(x, return_aux_loss=True)
        named = dict(model.moe.named_parameters())
        grads = torch.autograd.grad(((y**2).mean() + aux) / 8, list(named.values()))
        return {"y": y, "aux": aux} | {f"d{name}": g for name, g in zip(named, grads, strict=True)}

    judge_as_plain("aux asked for", backend, seed, use)


@native_and_eager
def test_the_auxiliary_loss_asked_of_the_original(backend, seed):
    results = []
    for model in (make_model(seed), make_replaced(seed, backend)):
        hook_on_an_expert(model.moe)
        y, aux = model.moe(make_x(seed), return_aux_loss=True)
        named = dict(model.moe.named_parameters())
        grads = torch.autograd.grad(((y**2).mean() + aux) / 8, list(named.values()))
        results.append({"y": y.detach(), "aux": aux.detach()} | dict(zip(named, grads, strict=True)))
    assert_same(*results)


@native_and_eager
def test_the_fused_adaln_around_the_original(backend, seed):
    model, plain = make_replaced(seed, backend), make_model(seed)
    for block in (model.moe, plain.moe):
        hook_on_an_expert(block)
    x, (shift, scale, gate) = make_x(seed), torch.randn(3, B, H)
    normal = F.layer_norm(x, (H,), eps=1e-6)
    expected = x + gate[:, None] * plain.moe(normal * (1 + scale[:, None]) + shift[:, None])
    with one_warning("moe.experts.2"):
        for _ in range(2):
            assert torch.equal(model.moe.forward_adaln(x, shift, scale, gate), expected)
