"""Our backends on a GPU, beyond the tests that run everywhere: real tiles, streams, graphs, large addresses, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import moe_kernels
from bench.instrument.cases import kernels_on
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels import MoELayer, TokenChoice, dispatch, dispatch_expert_choice, gating
from moe_kernels.backends import cuda
from tests.contenders import BACKENDS, DTYPES, gradients, moe_compute, moe_oracle, moe_ours, plan_of
from tests.error_rule import judge
from tests.product.test_compile import assert_same, forward_backward
from tests.product.test_determinism import assert_same_bits
from tests.trap_cases import DEVICE, Problem, Trap, make_problem

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and MOE_TEST_DEVICE=cuda")

REASONS = {info.name: info.reason or "not on this device" for info in moe_kernels.backends()}


def where_it_runs(backend: str, *values: object, **named: object):
    """Parameters that are skipped, with the reason, where the backend is not available."""
    missing = pytest.mark.skipif(backend not in BACKENDS, reason=f"{backend}: {REASONS[backend]}")
    return pytest.param(backend, *values, marks=missing, **named)


OURS = kernels_on("cuda")
each_backend = pytest.mark.parametrize("backend", [where_it_runs(backend) for backend in OURS])
each_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        where_it_runs(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in OURS
        for dtype in DTYPES[backend]
    ],
)

TOKENS = {"several tiles per expert": 1000, "one tile per expert": 130}
MODELS = ("S/2-8E2A", "XL/2-8E2A", "DSMoE-S-E48")


def model_trap(name: str, T: int) -> Trap:
    shape = MODEL_SHAPES[name]
    return Trap(name, "", T=T, H=shape.H, I=shape.I, Is=shape.Is, E=shape.E, K=shape.K)


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@each_dtype
@pytest.mark.parametrize("T", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("model", MODELS)
def test_models(model, T, backend, dtype, seed):
    """Widths that fill whole tiles take the loops without masks, which the traps' widths do not."""
    judge("model", moe_compute(model_trap(model, T), dtype), backend, dtype, seed)


@each_backend
@pytest.mark.parametrize(
    "trap", [model_trap("S/2-8E2A", 1000), Trap("ragged", "", T=301, H=296, I=264, Is=136)], ids=str
)
def test_tf32(trap, backend, seed):
    """No worse than torch's own TF32, where both are allowed it, and exact where they are not."""
    compute = moe_compute(trap, torch.float32)
    exact = compute(seed, backend)
    with tf32():
        judge("tf32", compute, backend, torch.float32, seed)
        assert not torch.equal(compute(seed, backend)["out"], exact["out"]), "float32 was not rounded to TF32"
    assert_same_bits(compute(seed, backend), exact)


@each_dtype
def test_same_bits_twice_at_the_size_of_a_model(backend, dtype, seed):
    compute = moe_compute(model_trap("S/2-8E2A", 4099), dtype)
    first = compute(seed, backend)
    for _ in range(3):
        assert_same_bits(compute(seed, backend), first)


@pytest.mark.parametrize("dtype", DTYPES["cuda"])
@pytest.mark.parametrize("backend", [where_it_runs("cuda")])
@pytest.mark.parametrize("T", [130, 4099])
def test_same_bits_where_kernels_start_early(T, backend, dtype, seed):
    """What reads before its predecessor has written finds torch's memory of the call before: other numbers."""
    compute = moe_compute(model_trap("S/2-8E2A", T), dtype)
    with cuda.early_starts(False):
        expected = [compute(number, backend) for number in (seed, seed + 1)]
    with cuda.early_starts():
        for _ in range(3):
            for number, wanted in zip((seed, seed + 1), expected, strict=True):
                assert_same_bits(compute(number, backend), wanted)


def make_layer(backend: str, **kwargs) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(96, 72, 5, 2, shared_intermediate_size=40, backend=backend, **kwargs)


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """As far as torch sees it: it does not look into other people's kernels."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_nothing_waits_for_the_gpu(backend):
    """Forward and backward of the layer; the loop of `eager`, which does wait, shows that it would be noticed."""
    x, layers = torch.randn(3, 50, 96), {name: make_layer(name) for name in (backend, "eager")}
    for layer in layers.values():
        forward_backward(layer, x)  # compiles
    with waiting_forbidden():
        forward_backward(layers[backend], x)
        with pytest.raises(RuntimeError, match="synchroniz"):
            forward_backward(layers["eager"], x)


@each_backend
def test_calls_return_before_the_gpu_begins(backend):
    """Whatever waits, in C++ too, would return after the sleep that lies in front of it."""
    x, layer = torch.randn(3, 50, 96), make_layer(backend)
    for _ in range(2):
        expected = forward_backward(layer, x)  # compiles, and takes its memory from the driver
    torch.cuda.synchronize()
    awake = torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)  # clocks: about a second
    awake.record()
    got = forward_backward(layer, x)
    assert not awake.query()
    assert_same(got, expected)


@pytest.mark.apart
@each_backend
def test_memory_is_torchs_and_goes_back(backend):
    """Results and workspaces come from torch's allocator on the tensors' device; nothing is taken from the driver."""
    x, layer = torch.randn(3, 50, 96), make_layer(backend)
    for _ in range(3):
        forward_backward(layer, x)
    layer.zero_grad()
    torch.cuda.synchronize()
    free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    forward_backward(layer, x)
    layer.zero_grad()
    torch.cuda.synchronize()
    assert (torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()) == (free, held)


@each_backend
def test_expert_choice_does_not_wait_for_the_gpu(backend):
    affinities = torch.rand(64, 5)
    dispatch_expert_choice(affinities, 7, 32, backend=backend)
    with waiting_forbidden():
        dispatch_expert_choice(affinities, 7, 32, backend=backend)


def expert_counts(layer: MoELayer, x: torch.Tensor, backend: str) -> list[int]:
    weights, ids, _ = gating(x.flatten(0, -2), layer.gate_weight, 2, backend=backend)
    return dispatch(ids, weights, 5, backend=backend).expert_counts.tolist()


@each_dtype
def test_a_captured_graph_replays_with_other_routing(backend, dtype):
    """Gating, dispatch, moe_mlp and their backward as one graph: what it does must follow from its inputs alone."""
    layer = make_layer(backend, dtype=dtype)
    inputs = [torch.randn(3, 50, 96, dtype=dtype) * scale for scale in (1, 3, 0)]
    inputs[2] += layer.gate_weight.detach()[1] * 8  # all tokens alike
    assert len({tuple(expert_counts(layer, x, backend)) for x in inputs}) == 3
    expected = [forward_backward(layer, x) for x in inputs]
    static, side = inputs[0].clone().requires_grad_(), torch.cuda.Stream()

    def run() -> list[torch.Tensor]:
        y = layer(static)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [static, *layer.parameters()])]

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for x, wanted in (*zip(inputs, expected, strict=True), (inputs[0], expected[0])):
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        assert_same(results, wanted)


@pytest.mark.unpoisoned
@each_backend
def test_inductor_with_graphs(backend):
    """Other numbers of tokens and other routing after the first recording.

    The same bits, since Inductor only adds between our ops; it may round an auxiliary loss with T unknown otherwise.
    """
    torch.compiler.reset()
    layer = make_layer(backend, router=TokenChoice(2, aux_loss_alpha=0.0))
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for tokens in (50, 50, 50, 34):
        x = torch.randn(3, tokens, 96)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(forward_backward(compiled, x), forward_backward(layer, x))


@each_backend
def test_launches_follow_the_current_stream(backend):
    """x becomes what it is behind a long wait on that stream: a launch on any other one reads zeros."""
    layer, real = make_layer(backend), torch.randn(3, 50, 96)
    expected, x, stream = forward_backward(layer, real), torch.zeros_like(real), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # clocks: some 50 ms
        x.copy_(real)
        got = forward_backward(layer, x)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("backend", [where_it_runs("cuda")])
def test_a_thread_without_a_context(backend):
    """What it runs first is a product, which describes its operands to the driver; all memory is at hand.

    A runtime remembers threads' devices without binding a context to them, so a thread of autograd may look like this.
    """
    p = make_problem(Trap("thread", "", T=300, H=64, I=64, Is=64, E=4), 0, torch.bfloat16)
    weights = p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj
    call = partial(moe_kernels.moe_mlp, p.x, plan_of(p, backend), *weights, backend=backend)
    expected = call()
    call()  # leaves memory for the third call
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(call).result()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_backend
def test_tensors_on_another_device_than_the_current_one(backend):
    x, layer = torch.randn(3, 50, 96), make_layer(backend)
    expected = forward_backward(layer, x)
    got = forward_backward(layer.to("cuda:1"), x.to("cuda:1"))
    assert {t.device.index for t in got} == {1} and torch.cuda.current_device() == 0
    assert_same([t.to(x.device) for t in got], expected)


FAR = {  # T, H, I; K = 1
    "x, out and their gradients": (2**21 + 77, 1024, 16),
    "gate_up, act and their gradients": (2**18 + 77, 32, 4096),
}


def far_problem(near: Problem, T: int) -> Problem:
    """The same tokens behind zeros that make T of them: the same gradients of the weights, and the last rows."""
    (n, H), E = near.x.shape, near.trap.E

    def behind(zeros: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        zeros[-n:] = last
        return zeros

    ids = (torch.arange(T, dtype=torch.int32) % E)[:, None]
    return dataclasses.replace(
        near,
        trap=dataclasses.replace(near.trap, T=T),
        x=behind(near.x.new_zeros(T, H), near.x),
        routing=behind(near.routing.new_ones(T, 1), near.routing),
        topk_ids=behind(ids, near.topk_ids),
        dout=behind(near.dout.new_zeros(T, H), near.dout),
    )


@pytest.mark.apart
@each_backend
@pytest.mark.parametrize(("T", "H", "I"), FAR.values(), ids=FAR)
def test_rows_times_stride_beyond_2_31(T, H, I, backend, seed):
    """The tokens that matter come last: an address of 32 bits would read zeros in their place, or write elsewhere."""
    assert T * max(H, 2 * I) > 2**31
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    trap = Trap("far", "", T=37, H=H, I=I, Is=16, E=5, K=1)

    def compute(seed, how):
        near = make_problem(trap, seed, torch.bfloat16)
        problem = far_problem(near, T) if how == backend else near
        problem, leaves = (problem.double() if how == "oracle" else problem).with_leaves()
        out = moe_oracle(problem) if how == "oracle" else moe_ours(problem, how)
        results = gradients(out, leaves, problem.dout)
        return {name: t[-trap.T :].clone() if t.shape[0] == T else t for name, t in results.items()}

    judge("far", compute, backend, torch.bfloat16, seed)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_let_through(value, backend):
    """Raising would wait for the GPU; NaN comes out of that token alone, and no kernel goes astray."""
    layer, x = make_layer(backend), torch.randn(50, 96)
    expected = layer(x)
    x[11] = value
    y = layer(x)
    others = torch.arange(50) != 11
    assert y[11].isnan().all()
    assert torch.equal(y[others], expected[others])
