"""What a replaced block of any family must survive: copies, compile, adapters, hooks, offloading, another module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from bench.gpu.issuing import counted
from bench.peers.standins import JiTMoE
from moe_kernels import replace_moe, restore_moe
from moe_kernels.adapters.family import family_of
from moe_kernels.adapters.replace import lay_out
from moe_kernels.backends import native
from tests.contenders import BACKENDS, needs_native
from tests.product.families.cases import BLOCKS, MODELS, blocks_of, build, differentiable
from tests.product.families.standins import CoreMultiHeadMoE
from tests.trap_cases import DEVICE

# Each compilation takes seconds: of ProMoE those in training, which do all that eval does.
COMPILED = [case for case in BLOCKS if "ProMoE" not in case.name or ("without" not in case.name and case.training)]
each_model = pytest.mark.parametrize("case", MODELS, ids=str)
BY_NAME = {case.name: case for case in (*BLOCKS, *MODELS)}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # two ways to sum in float32; the error rule is test_acceptance.py's


def replaced(case, seed, backend=BACKENDS[0]):
    """Return a module, the same one replaced, and arguments."""
    module, arguments = build(case, seed, torch.float32)
    ours = copy.deepcopy(module)
    assert replace_moe(ours, backend=backend) == case.blocks
    return module, ours, arguments


@pytest.mark.parametrize("case", [*BLOCKS, *MODELS], ids=str)
def test_names_values_objects_and_classes_stay(case, seed):
    module, arguments = build(case, seed, torch.float32)
    classes = [type(m) for m in module.modules()]
    parameters, state = dict(module.named_parameters()), {n: t.clone() for n, t in module.state_dict().items()}
    places = [p.data_ptr() for p in module.parameters()]
    replace_moe(module)
    assert all(isinstance(m, cls) for m, cls in zip(module.modules(), classes, strict=True))
    assert all(module.get_parameter(name) is p for name, p in parameters.items())
    assert [p.data_ptr() for p in module.parameters()] == places or DEVICE == "cuda"
    assert list(module.state_dict()) == list(state) and all(
        torch.equal(module.state_dict()[n], state[n]) for n in state
    )
    module.load_state_dict(state)
    expected = case.call(module, arguments)
    for other in (copy.deepcopy(module), pickle.load(io.BytesIO(pickle.dumps(module)))):
        assert torch.equal(case.call(other, arguments), expected) and next(blocks_of(other)).moe_config
    assert restore_moe(module) == case.blocks and [type(m) for m in module.modules()] == classes


@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.unpoisoned
def test_compiles_as_one_graph(case, seed):
    torch.compiler.reset()
    _, ours, arguments = replaced(case, seed)
    ours.train(case.training)
    for value in filter(differentiable, arguments.values()):
        value.requires_grad_()
    wanted = [v for v in (*arguments.values(), *ours.parameters()) if differentiable(v)]
    expected = case.call(ours, arguments)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = case.call(compiled, arguments)
    torch.testing.assert_close(got, expected, **CLOSE)
    grads = [torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (got, expected)]
    torch.testing.assert_close(*grads, **CLOSE)


def adapted(model, config, when, seed):
    """Return the model with LoRA on it, replaced before or after that, or never."""
    if when == "replaced first":
        replace_moe(model)
    torch.manual_seed(seed)
    model = pytest.importorskip("peft").inject_adapter_in_model(config, model)
    if when == "LoRA first":
        replace_moe(model)
    return model


@pytest.mark.parametrize("first", ["LoRA first", "replaced first"])
def test_lora_on_the_experts_and_on_attention(first, seed):
    peft = pytest.importorskip("peft")
    case = BY_NAME["HiDream"]
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3", "to_q"], init_lora_weights=False)
    results = []
    for how in ("plain", "ours"):
        model, arguments = build(case, seed, torch.float32)
        model.train()
        model = adapted(model, config, first if how == "ours" else "never", seed)
        for block in blocks_of(model):
            block._force_inference_output = how == "ours"  # with it, the original gives experts no gradients
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = case.call(model, arguments)
        wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum("experts" in name for name in wanted) > 20 and all("lora_" in name for name in wanted)
        results.append(
            (y, dict(zip(wanted, torch.autograd.grad(y.square().mean(), list(wanted.values())), strict=True)))
        )
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("first", ["LoRA first", "replaced first"])
def test_lora_on_stacks_of_the_block_itself(first, seed):
    """By target_parameters: what is read then is a tensor that was computed, no Parameter."""
    peft = pytest.importorskip("peft")
    case, stacks = BY_NAME["MAGI-2"], ["0.W_gate", "0.W_up", "0.W_down"]
    config = peft.LoraConfig(r=2, target_parameters=stacks, init_lora_weights=False)
    results = []
    for how in ("plain", "ours"):
        block, arguments = build(case, seed, torch.float32)
        model = nn.Sequential(block)
        model = adapted(model, config, first if how == "ours" else "never", seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = case.call(model[0], arguments)
        wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(wanted) == 2 * len(stacks) and all("lora_" in name for name in wanted)
        grads = torch.autograd.grad(y.square().mean(), list(wanted.values()))
        results.append((y, dict(zip(wanted, (g / g.norm() for g in grads), strict=True))))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.skipif(DEVICE != "cpu", reason="offloads to the CPU")
def test_offloaded_stacks_are_read_while_they_are_there(seed):
    pytest.importorskip("accelerate")
    case = BY_NAME["MAGI-2"]
    _, ours, arguments = replaced(case, seed)
    with torch.no_grad():
        expected = case.call(ours, arguments)
        offloaded(ours)
        assert ours.W_gate.is_meta
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(case.call(ours, arguments), expected)


def test_stacks_of_two_dtypes_are_named(seed):
    _, ours, arguments = replaced(BY_NAME["LingBot"], seed)
    ours.experts.w3.data = ours.experts.w3.data.bfloat16()
    said = r"up_proj: got \(6, 24, 32\) torch.bfloat16 \S+, other than gate_proj; the block's original forward"
    with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match="dtype"):
        ours(*arguments.values())


@pytest.mark.unpoisoned  # what fills the tensors would be counted
@pytest.mark.parametrize("in_out", [True, False], ids=["in_out", "out_in"])
@needs_native
def test_what_a_call_does_for_stacks_does_not_grow_with_their_matrices(in_out, monkeypatch):
    """MAGI-2 has 9216 matrices in a layer: an object for each would take longer than the products of a small call."""
    monkeypatch.setattr(native, "_MOST_TABLES", 0)  # whether gradients lie where some lay before is chance

    def calls(heads: int) -> list[int]:
        block = CoreMultiHeadMoE(heads)
        replace_moe(block, backend="native")
        if not in_out:
            lay_out(family_of(block).experts(block, block.moe_config.read))
        x, leaves = torch.randn(2, heads * block.d_head), [block.W_gate, block.W_up, block.W_down]

        def step():
            return torch.autograd.grad(block(x).sum(), leaves)

        return [counted(run, lambda: 0)["calls"] for run in (torch.no_grad()(lambda: block(x)), step)]

    few, many = calls(2), calls(32)
    assert few == many and few[0] < 600 and few[1] < 1600


def hook(model):
    inner = next(blocks_of(model))
    (inner.experts[1].w1 if hasattr(inner, "gate") else inner).register_forward_hook(lambda module, args, y: 2 * y)


def float8_storage(model):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model, "cpu")


def adapted_parameters(model):
    peft = pytest.importorskip("peft")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.transformer_blocks)


def another_expert(model):
    class Doubled(type(next(blocks_of(model)).experts[0])):
        def forward(self, x):
            return 2 * super().forward(x)

    next(blocks_of(model)).experts[1].__class__ = Doubled


@pytest.mark.skipif(DEVICE != "cpu", reason="offloads to the CPU")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("HiDream", hook), ("HiDream", float8_storage), ("HiDream", offloaded), ("HiDream", another_expert),
        ("Nucleus", float8_storage), ("Nucleus", offloaded), ("Nucleus", adapted_parameters),
    ],
)  # fmt: skip
def test_what_reading_cannot_show_is_computed_by_the_original(name, change, seed):
    case = BY_NAME[name]
    module, ours, arguments = replaced(case, seed)
    for model in (module, ours):
        model.eval()
        torch.manual_seed(seed)
        change(model)
    with torch.no_grad():
        expected = case.call(module, arguments)
        with pytest.warns(UserWarning, match="the block's original forward computes it"):
            got = case.call(ours, arguments)
        torch.testing.assert_close(got, expected, **CLOSE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was said
            case.call(ours, arguments)


def test_where_the_original_cuts_gradients_it_does_not_step_in(seed):
    case = BY_NAME["HiDream block"]
    _, ours, arguments = replaced(case, seed)
    ours.experts[2].w3.register_forward_hook(lambda module, args, y: 2 * y)
    ours.train()
    with pytest.warns(UserWarning, match=r"experts\.2\.w3: got forward hooks"):
        case.call(ours, arguments).sum().backward()
    assert all(p.grad is not None for p in ours.experts.parameters())
    for ours._force_inference_output, training in ((True, True), (False, False)):
        with pytest.raises(RuntimeError, match=r"experts\.2\.w3.*gives no gradients"):
            case.call(ours.train(training), arguments)


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("Nucleus block", ("experts.gate_up_proj", "experts.down_proj")),
        ("MAGI-2", ("W_gate", "W_up", "W_down")),
    ],
)
def test_in_out_parameters_whose_memory_is_out_in(name, stacks, seed):
    """What replace_moe does on a GPU: values, keys and results stay, and the layout is that of the kernels."""
    case = BY_NAME[name]
    block, arguments = build(case, seed, torch.float32)
    replace_moe(block)
    state, expected = copy.deepcopy(block.state_dict()), case.call(block, arguments)
    grads = torch.autograd.grad(expected.sum(), list(block.parameters()))
    family, read = family_of(block), block.moe_config.read
    lay_out(family.experts(block, read))
    assert family.experts(block, read).layout == "gate_up"
    assert not any(block.get_parameter(stack).is_contiguous() for stack in stacks)
    assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())
    got = case.call(block, arguments)
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), list(block.parameters())), grads, **CLOSE)
    block.load_state_dict(state)
    for one in (block, copy.deepcopy(block)):
        assert all(one.get_parameter(stack).stride(1) == 1 for stack in stacks)


@pytest.mark.unpoisoned
def test_replaced_on_meta_and_loaded_later(seed):
    case = BY_NAME["LingBot"]
    module, _, arguments = replaced(case, seed)
    with torch.device("meta"):
        ours = case.make()
    assert replace_moe(ours) == 1
    ours.to_empty(device=DEVICE).load_state_dict(module.state_dict())
    torch.testing.assert_close(case.call(ours, arguments), case.call(module, arguments), **CLOSE)


def test_a_router_wider_than_the_experts(seed):
    """Hunyuan's router stays in float32 beside experts in bfloat16."""
    case = BY_NAME["Hunyuan"]
    module, arguments = build(case, seed, torch.bfloat16)
    module.gate.float()
    ours = copy.deepcopy(module)
    replace_moe(ours)
    expected, got = (case.call(m, arguments) for m in (module, ours))
    assert got.dtype == torch.bfloat16 and (got - expected).norm() < 1e-2 * expected.norm()


@each_model
def test_autocast(case, seed):
    """Most rows: where two scores round to one in bfloat16, a token may go to another expert."""
    module, ours, arguments = replaced(case, seed)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        expected, got = (case.call(m.eval(), arguments) for m in (module, ours))
    assert got.dtype == expected.dtype
    assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).float().median() < 2e-2


def test_nan_goes_through(seed):
    """A loss scaler waits for it."""
    case = BY_NAME["HiDream block"]
    _, ours, arguments = replaced(case, seed)
    arguments["x"][0, 3] = float("nan")
    y = case.call(ours, arguments)
    assert y[0, 3].isnan().all() and y[1].isfinite().all()


def test_a_dropout_at_work_is_computed_by_the_original(seed):
    """The largest JiTMoE has one: 0 in eval, where the kernels compute."""
    torch.manual_seed(seed)
    block, x = JiTMoE(drop=0.2).to(DEVICE), BY_NAME["JiTMoE"].arguments()["x"]
    ours = copy.deepcopy(block)
    assert replace_moe(ours) == 1
    results = []
    for one in (block, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(one.eval()(x))
    torch.testing.assert_close(*results, **CLOSE)
    torch.manual_seed(seed)
    expected = block.train()(x)
    torch.manual_seed(seed)
    with pytest.warns(UserWarning, match=r"blocks\.0\.ffn_dropout: got Dropout\(p=0\.2.*\) in training"):
        assert torch.equal(ours.train()(x), expected)


@pytest.mark.parametrize("name", ["ProMoE", "ProMoE by expert"])
def test_labels_are_asked_for_by_name(name, seed):
    _, ours, arguments = replaced(BY_NAME[name], seed)
    with pytest.raises(TypeError, match=r"labels: got NoneType, expected a tensor \(2,\)"):
        ours(arguments["x"])
    with pytest.raises(TypeError, match=r"labels: got \(3,\), expected a tensor \(2,\)"):
        ours(arguments["x"], torch.arange(3, device=DEVICE))


@pytest.mark.parametrize("name", ["ProMoE 2, in training", "ProMoE by expert, in training"])
def test_a_batch_without_any_label_has_a_loss_of_zero(name, seed):
    _, ours, arguments = replaced(BY_NAME[name], seed)
    y, loss = ours(arguments["x"], torch.full((2,), 1000, device=DEVICE))
    assert loss == 0 and y.isfinite().all()
    (y.sum() + loss).backward()
    assert ours.experts[-1].up_proj.weight.grad.any() and not ours.experts[0].up_proj.weight.grad.any()


def test_a_step_of_training_moves_the_thresholds_once(seed):
    module, ours, arguments = replaced(BY_NAME["DiffMoE in training"], seed)
    for one in (module, ours):
        before = one.expert_threshold.clone()
        one.train()(**arguments)
        assert (one.expert_threshold != before).all()
        after = one.expert_threshold.clone()
        one.eval()(**arguments)
        assert torch.equal(one.expert_threshold, after)
    torch.testing.assert_close(ours.expert_threshold, module.expert_threshold, rtol=1e-6, atol=0)


def test_an_idle_expert_has_zero_gradients(seed):
    case = BY_NAME["DSMoE"]
    module, ours, arguments = replaced(case, seed)
    for block in (module, ours):
        block.gate.e_score_correction_bias[3] = -10.0
    case.call(ours, arguments).square().sum().backward()
    assert all(not p.grad.any() for p in ours.experts.blocks[3].parameters())
    torch.testing.assert_close(case.call(ours, arguments), case.call(module, arguments), **CLOSE)


@pytest.mark.parametrize("name", ["LingBot", "DSMoE", "EC-DiT", "Hunyuan", "JiTMoE", "MAGI-2"])
def test_blocks_that_differ_in_their_place_alone_compile_once(name, seed):
    """What compiling a model block by block lives on: nothing guards on a path."""
    torch.compiler.reset()
    case, counter = BY_NAME[name], CompileCounter()
    blocks = nn.ModuleList(case.make() for _ in range(3)).to(DEVICE)
    replace_moe(blocks)
    for block in blocks:
        case.call(torch.compile(block, backend=counter, fullgraph=True), case.arguments())
    assert counter.frame_count == 1


class Net(nn.Sequential):
    """Two blocks of one class, one of them another family's."""


def test_families_beside_each_other(seed):
    net = Net(BY_NAME["Hunyuan"].make(), BY_NAME["DSMoE"].make()).to(DEVICE)
    expected = copy.deepcopy(net)
    x = BY_NAME["DSMoE"].arguments()["x"]
    assert replace_moe(net) == 2 and [family_of(b).name for b in net] == ["HunyuanImage-3.0", "DSMoE"]
    torch.testing.assert_close(net(x), expected(x), **CLOSE)
