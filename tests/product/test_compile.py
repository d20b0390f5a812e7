"""What torch does around the layer: compile, opcheck, autocast, checkpointing, copies, two processes."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle

import pytest
import torch
import torch.multiprocessing
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from moe_kernels import (
    ExpertChoice,
    MoELayer,
    TokenChoice,
    combine,
    dispatch_mask,
    dispatch_rows,
    experts,
    gating,
    moe_mlp,
    replace_moe,
    select_experts,
    select_top,
)
from reference.moe import SparseMoeBlock
from tests.contenders import BACKENDS, each_backend, moe_compute, plan_of
from tests.error_rule import judge
from tests.trap_cases import DEVICE, PLAIN, make_problem


def make_layer(backend, router=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    return MoELayer(32, 24, 5, 2, shared_intermediate_size=16, router=router, backend=backend, **kwargs)


def forward_backward(module, x):
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class AdaLN(torch.nn.Module):
    """The layer with what adaLN puts around it, the vectors of two images being parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.modulation = torch.nn.Parameter(torch.randn(3, 2, 32))

    def forward(self, x):
        return self.layer.forward_adaln(x, *self.modulation)


def replaced_block(backend):
    torch.manual_seed(0)
    block = SparseMoeBlock(32, 24, 5, 2, 16)
    replace_moe(block, backend=backend)
    return block


MODULES = {
    "token_choice": make_layer,
    "scaled": lambda backend: make_layer(backend, TokenChoice(2, aux_loss_mode="scaled")),
    "expert_choice": lambda backend: make_layer(backend, ExpertChoice()),
    "replaced": replaced_block,
    "adaln": lambda backend: AdaLN(make_layer(backend)),
}
each_module = pytest.mark.parametrize("module", MODULES)


@pytest.mark.unpoisoned
@each_backend
@each_module
def test_compiles_as_one_graph(module, backend):
    """Same bits as without compiling; another number of tokens needs no graph break either."""
    if (backend, DEVICE) == ("triton", "cpu") and module != "token_choice":
        pytest.skip("the same kernels, interpreted for half a minute again")
    torch.compiler.reset()
    module = MODULES[module](backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (6, 10, 14):
        x = torch.randn(2, tokens, 32)
        assert_same(forward_backward(compiled, x), forward_backward(module, x))


@pytest.mark.unpoisoned
@each_backend
def test_compiles_with_inductor(backend):
    """The same bits: all that it generates is one addition and one multiplication, each by itself."""
    torch.compiler.reset()
    layer, x = make_layer(backend), torch.randn(2, 6, 32)
    expected = forward_backward(layer, x)
    assert_same(forward_backward(torch.compile(layer, fullgraph=True), x), expected)


class Recorder(TorchDispatchMode):
    """Keeps the names of all ops, and the arguments of one call of every op of ours."""

    def __init__(self):
        super().__init__()
        self.names, self.calls = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        if func.namespace == "moe_kernels":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def leaf(tensor, requires_grad):
    return tensor.detach().clone().requires_grad_(requires_grad and tensor.is_floating_point())


@each_backend
@each_module
def test_nothing_between_the_ops_waits_for_the_device(module, backend):
    """Sizes follow from shapes alone: no .item(), no nonzero, no boolean mask between our ops, forward and backward."""
    made = MODULES[module](backend)
    with Recorder() as recorder:
        forward_backward(made, torch.randn(2, 6, 32))
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "index.Tensor")
    assert not [name for name in recorder.names if any(word in name for word in waiting)]


@pytest.mark.unpoisoned
@each_backend
def test_opcheck_on_every_op(backend):
    with Recorder() as recorder:
        for module in (make_layer(backend), make_layer(backend, ExpertChoice()), AdaLN(make_layer(backend))):
            forward_backward(module, torch.randn(2, 6, 32))
        problem, _ = make_problem(PLAIN, 0, torch.float32).with_leaves()
        plan = plan_of(problem, backend)
        rows = experts(problem.x, plan, problem.gate_up_proj, problem.down_proj, backend=backend)
        combine(rows, plan, problem.x, backend=backend).sum().backward()
        weights = torch.randn(7, 5, requires_grad=True)
        dispatch_mask(weights, weights > 0, 30).row_weight.sum().backward()
        select_top(weights[None], 3, backend)
        select_experts(weights, 2, backend=backend)
        dispatch_rows(weights[:, 0], torch.arange(7), torch.tensor([5, 0, 4, 5, 1, 0, 4]), 7, 5)
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_kernels::")}
    assert {func.name() for func in recorder.calls} == names
    check_ops(recorder)


@pytest.mark.unpoisoned
@each_backend
@pytest.mark.parametrize("layout", ["gate_up", "gate_up_in_out"])
def test_opcheck_of_gate_and_up_in_two_stacks(layout, backend):
    problem, _ = make_problem(PLAIN, 0, torch.float32).with_leaves()
    weights = problem.gate_up_proj.chunk(2, 1), problem.down_proj
    if layout == "gate_up_in_out":
        weights = [stack.mT for stack in weights[0]], weights[1].mT
    with Recorder() as recorder:
        for call in (experts, moe_mlp):
            call(problem.x, plan_of(problem, backend), *weights, backend=backend, layout=layout).sum().backward()
    recorder.calls = {func: args for func, args in recorder.calls.items() if func.name() in OF_WEIGHTS}
    assert len(recorder.calls) == 4
    check_ops(recorder)


OF_WEIGHTS = [f"moe_kernels::{op}" for op in ("experts", "experts_bwd", "moe_mlp", "moe_mlp_bwd")]


def check_ops(recorder: Recorder) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for func, args in recorder.calls.items():
        differentiable = not (func.name().endswith("_bwd") or "::select_" in func.name())
        leaves = tree_map_only(torch.Tensor, lambda t: leaf(t, differentiable), args)  # noqa: B023
        torch.library.opcheck(func, leaves, test_utils=tests)


@pytest.mark.unpoisoned
@each_backend
def test_fakes_of_inputs_that_lie_by_columns_have_the_strides_of_results(backend):
    problem = make_problem(PLAIN, 0, torch.float32)
    plan, by_columns = plan_of(problem, backend), problem.x.t().contiguous().t()
    rows = torch.randn(problem.x.shape[1], plan.num_rows).t()
    ops, of_experts = torch.ops.moe_kernels, ([problem.gate_up_proj], [problem.down_proj])
    calls = (
        (ops.combine.default, (rows, plan.tensors(), by_columns, backend)),
        (ops.combine_bwd.default, (by_columns, rows, plan.tensors(), backend)),
        (ops.experts.default, (by_columns, plan.tensors(), *of_experts, [], [], "swiglu", "gate_up", True, backend)),
    )
    for func, args in calls:
        torch.library.opcheck(func, args, test_utils="test_faketensor")


@each_backend
def test_autocast(backend, seed):
    """fp32 weights and tokens, bf16 arithmetic: no worse than plain torch under autocast, gradients in fp32."""
    in_fp32 = moe_compute(PLAIN, torch.float32)

    def compute(seed, how):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how != "oracle"):
            result = in_fp32(seed, how if how != "eager" or backend == "eager" else "loop")
        assert how in ("oracle", "loop") or all(t.dtype == torch.float32 for n, t in result.items() if n != "out")
        return {name: t.double() for name, t in result.items()}

    judge("autocast", compute, backend, torch.bfloat16, seed)


@each_backend
def test_autocast_of_the_layer_routes_in_fp32(backend):
    layer, x = make_layer(backend), torch.randn(40, 32)
    _, ids, probs = gating(x, layer.gate_weight, 2, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        again = gating(x, layer.gate_weight, 2, backend=backend)
        y = layer(x)
    assert torch.equal(again[1], ids) and torch.equal(again[2], probs) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@each_backend
@each_module
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant, module, backend):
    module, x = MODULES[module](backend), torch.randn(2, 6, 32)
    expected = forward_backward(module, x)
    wrapped = nn.Module()
    wrapped.inner = module
    wrapped.forward = lambda x: checkpoint(module, x, use_reentrant=use_reentrant)
    assert_same(forward_backward(wrapped, x), expected)


def saved_and_loaded(module):
    torch.save(module, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(module):
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    return module


def with_new_data(module):
    """What EMA code does."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "assign": assigned,
    ".data": with_new_data,
    ".to": lambda module: module.to(torch.float64).to(torch.float32),
}


@each_backend
@pytest.mark.parametrize("module", ["token_choice", "replaced"])
@pytest.mark.parametrize("way", WAYS)
def test_copies_compute_the_same(way, module, backend):
    """Each way re-allocates the weights: stale ones are never used."""
    module, x = MODULES[module](backend), torch.randn(7, 32)
    expected = forward_backward(module, x)
    copied = WAYS[way](module)
    assert_same(forward_backward(copied, x), expected)
    for parameter in copied.parameters():
        parameter.data = parameter.data * 2
    assert not torch.equal(copied(x), expected[0])


@each_backend
def test_pure_bfloat16_trains(backend):
    layer = make_layer(backend).to(torch.bfloat16)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(40, 32, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    assert all(
        not torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(layer.parameters(), before, strict=True)
    )


@each_backend
def test_several_transforms_are_refused_by_name(backend):
    layer, x = make_layer(backend), torch.randn(3, 5, 32)
    with pytest.raises(RuntimeError, match="moe_kernels: vmap"):
        torch.func.vmap(layer)(x)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
        torch.func.jvp(layer, (x[0],), (x[0],))


def ddp_worker(rank: int, path: str) -> None:
    """Two ranks, each with half the tokens and a replaced block; the mean gradient must be that of both halves."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(7))
    for backend in BACKENDS:
        for module in (make_layer(backend, TokenChoice(2, 0.0)), replaced_block(backend)):
            alone = copy.deepcopy(module)
            mean = [g / 2 for g in grads_of(alone, x[:4])]
            mean = [m + g / 2 for m, g in zip(mean, grads_of(alone, x[4:]), strict=True)]
            parallel = DistributedDataParallel(module)
            for _ in range(2):
                got = grads_of(parallel, x[:4] if rank == 0 else x[4:])
            assert_same(got, mean)
            del parallel  # its reducer holds the group: gloo aborts now and then when that dies first
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def grads_of(module, x):
    module.zero_grad()
    module(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.skipif(DEVICE != "cpu", reason="its processes compute on the CPU")
def test_ddp_with_two_processes(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path / "rendezvous"),), nprocs=2)
