"""LoRA by PEFT on the experts' linear layers, put on before or after replacing, is what it is on the plain model."""

from __future__ import annotations

import pytest
import torch

from moe_kernels import replace_moe
from tests.contenders import BACKENDS, each_backend
from tests.error_rule import judge
from tests.product.ownership.models import (
    B,
    E,
    H,
    K,
    L,
    as_asked,
    assert_same,
    by_matrix,
    gradients,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
    one_warning,
    replace,
    ten_losses,
)
from tests.trap_cases import draw_router

peft = pytest.importorskip("peft")
KINDS = ["gate_proj", "up_proj", "down_proj"]  # of the experts and of the shared one
each_order = pytest.mark.parametrize("first", ["LoRA first", "replaced first"])


def config(**options):
    return peft.LoraConfig(target_modules=KINDS, r=4, lora_alpha=8, init_lora_weights=False, **options)


def adapted(model, how, seed, first="replaced first", adapters=("default",), **options):
    """Return the model under PEFT, replaced before or after where `how` is a backend."""
    if first == "replaced first":
        replace(model, how)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config(**options), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(**options))
    if first != "replaced first":
        replace(model, how)
    return model


def judge_adapted(op, backend, seed, use, **options):
    def compute(seed, how):
        model = adapted(make_model(seed), how, seed, **options)
        model, x = as_asked(model, make_x(seed), how)
        return by_matrix(use(model, x))

    judge(op, compute, backend, torch.float32, seed)


@each_backend
@each_order
def test_gradients_reach_every_adapter(first, backend, seed):
    def use(model, x):
        results = {}
        for training in (True, False):
            found = gradients(model.train(training), x)
            assert sum("lora_" in name for name in found) == 2 * 3 * 6
            assert not [name for name in found if "base_layer" in name]
            results |= {f"{name} {training}": t for name, t in found.items()}
        return results

    judge_adapted("LoRA", backend, seed, use, first=first)


@native_and_eager
@each_order
def test_frozen_weights_get_no_gradient_and_stay(first, backend, seed):
    model = adapted(make_model(seed), backend, seed, first)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x = make_x(seed)
    model(x).square().mean().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in trained)
    ten_losses(model, seed, optimizer.step)
    assert_same({n: model.get_parameter(n) for n in frozen}, frozen)
    assert all(not torch.equal(a, b) for a, b in zip(trained, before, strict=True))


@native_and_eager
def test_both_orders_give_the_same_bits(backend, seed):
    models = [adapted(make_model(seed), backend, seed, first) for first in ("LoRA first", "replaced first")]
    assert_same(*(gradients(model, make_x(seed)) for model in models))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    pairs = zip(models, optimizers, strict=True)
    assert torch.equal(*(ten_losses(model, seed, optimizer.step) for model, optimizer in pairs))


@pytest.mark.parametrize("backend", BACKENDS[:1])
@each_order
def test_two_adapters_are_switched_disabled_merged_and_unmerged(first, backend, seed):
    def use(model, x):
        results = {}
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            results[f"y {name}"] = model(x)
        assert not torch.equal(results["y one"], results["y two"])
        with model.disable_adapter():
            results["disabled"] = model(x)
        results["enabled"] = model(x)
        model.base_model.set_adapter(["one", "two"])
        results |= {f"both {name}": t for name, t in gradients(model, x).items()}
        model.merge_adapter()
        results["merged"] = model(x)
        with model.disable_adapter():
            results["disabled while merged"] = model(x)
        model.merge_adapter()
        model.unmerge_adapter()
        results["unmerged"] = model(x)
        return results

    judge_adapted("adapters", backend, seed, use, first=first, adapters=("one", "two"))


@native_and_eager
@each_order
def test_merged_for_good_it_is_a_replaced_model_with_those_weights(first, backend, seed):
    model = adapted(make_model(seed), backend, seed, first)
    merged = model.merge_and_unload()
    other = make_model(seed)
    other.load_state_dict(merged.state_dict())
    for parameter in merged.parameters():
        parameter.requires_grad_()
    replace_moe(other, backend=backend)
    assert_same(gradients(merged, make_x(seed)), gradients(other, make_x(seed)))


@native_and_eager
@each_order
def test_taken_off_the_block_is_as_before(first, backend, seed):
    expected = make_replaced(seed, backend)(make_x(seed))
    model = adapted(make_model(seed), backend, seed, first)
    assert not torch.equal(model(make_x(seed)), expected)
    assert torch.equal(model.unload()(make_x(seed)), expected)


@each_order
def test_saved_adapters_are_those_of_the_plain_model(first, seed, tmp_path):
    ours, plain = (adapted(make_model(seed), how, seed, first) for how in ("auto", "loop"))
    assert_same(peft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(plain))
    ours.save_pretrained(tmp_path)
    loaded = [
        peft.PeftModel.from_pretrained(make(seed), tmp_path)
        for make in (make_model, lambda s: make_replaced(s, "auto"))
    ]
    assert_same(dict(loaded[0].named_parameters()), dict(plain.named_parameters()))
    assert torch.equal(loaded[1](make_x(seed)), ours(make_x(seed)))


@native_and_eager
@each_order
def test_dropout_in_an_adapter_falls_back_in_training_alone(first, backend, seed):
    ours, plain = (adapted(make_model(seed), how, seed, first, lora_dropout=0.5) for how in (backend, "loop"))
    results = []
    with one_warning("moe.experts.0.gate_proj"):
        for model in (ours, plain, ours):
            torch.manual_seed(seed)
            results.append(gradients(model.train(), make_x(seed)))
    assert_same(results[0], results[1])
    assert_same(results[2], results[1])
    without = adapted(make_model(seed), backend, seed, first)
    assert_same(gradients(ours.eval(), make_x(seed)), gradients(without.eval(), make_x(seed)))


@native_and_eager
def test_adapters_that_are_more_than_a_product_fall_back(backend, seed):
    ours, plain = (adapted(make_model(seed), how, seed, use_dora=True) for how in (backend, "loop"))
    with one_warning("moe.experts.0.gate_proj"):
        assert_same(gradients(ours, make_x(seed)), gradients(plain, make_x(seed)))


@native_and_eager
def test_an_adapter_on_one_kind_of_matrix(backend, seed):
    def compute(seed, how):
        torch.manual_seed(seed)
        options = {"target_modules": r".*experts\.[02]\.up_proj", "r": 2, "init_lora_weights": False}
        model = peft.get_peft_model(replace(make_model(seed), how), peft.LoraConfig(**options))
        model, x = as_asked(model, make_x(seed), how)
        return by_matrix(gradients(model, x))

    judge("LoRA on two", compute, backend, torch.float32, seed)


@native_and_eager
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_base_of_half_the_width(dtype, backend, seed):
    """What fine-tuning in bfloat16 is: PEFT keeps the adapters in float32."""

    def compute(seed, how):
        x, gate_weight = draw_router(B * L, H, E, K, dtype, 1.0, seed)
        model = make_model(seed).to(dtype)
        model.moe.gate.weight.data.copy_(gate_weight)
        model = adapted(model, how, seed)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        model, x = as_asked(model, x.view(B, L, H), how)
        return by_matrix(gradients(model, x))

    judge("LoRA float32", compute, backend, dtype, seed)
