"""The Triton backend, as far as no GPU is needed: launches, tiles, what stands in for devices, bad logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.instrument import workloads
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.verify import whole_error
from moe_kernels import dispatch, modulated_gating
from moe_kernels.backends import preferred, registry
from moe_kernels.backends.base import Request
from moe_kernels.backends.eager import EagerBackend
from moe_kernels.weights import MoEWeights
from tests.contenders import BACKENDS, gradients, moe_compute, moe_ours
from tests.trap_cases import BY_NAME, DEVICE, draw_router, make_problem

triton_backend = pytest.importorskip("moe_kernels.backends.triton.backend", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from moe_kernels.backends.triton import gating, grid, sums, tiles  # noqa: E402
from moe_kernels.backends.triton.experts import rounded  # noqa: E402

where_it_runs = pytest.mark.skipif(
    "triton" not in BACKENDS, reason="needs TRITON_INTERPRET=1, or a GPU and MOE_TEST_DEVICE=cuda"
)
PRECISIONS = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # bytes of an element
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # of a block


def count_launches(shape, T, monkeypatch) -> tuple[int, int]:
    """Return the launches of a layer of that shape, forward and backward, on tensors that stand for an H200."""
    counts, backend = [0, 0], triton_backend.TritonBackend()

    def new(*sizes, dtype=torch.bfloat16):
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, gate_weight = new(T, shape.H), new(shape.E, shape.H)
    shared = (new(2 * shape.Is, shape.H), new(shape.H, shape.Is)) if shape.Is else ()
    w = MoEWeights(new(shape.E, 2 * shape.I, shape.H), new(shape.E, shape.H, shape.I), *shared)

    def counting(way):
        def launch(kernel, programs, arguments):
            counts[way] += all(programs)

        return launch

    monkeypatch.setattr(grid, "launch", counting(0))
    topk_weights, topk_ids, probs = backend.gating(x, gate_weight, shape.K)
    plan = backend.dispatch(topk_ids, topk_weights, shape.E)
    _, *saved = backend.moe_mlp(x, plan, w, "swiglu", True)
    monkeypatch.setattr(grid, "launch", counting(1))
    _, drow_weight, *_ = backend.moe_mlp_bwd(x, x, plan, w, *saved, "swiglu")
    backend.dispatch_bwd(drow_weight, plan.row_pick, T * shape.K)
    backend.gating_bwd(drow_weight.view(T, shape.K), probs, x, gate_weight, topk_ids, probs)
    return counts[0], counts[1]


@pytest.mark.parametrize("T", [512, 65536])
@pytest.mark.parametrize("shape", MODEL_SHAPES.values(), ids=lambda shape: shape.name)
def test_a_layer_takes_few_launches(shape, T, monkeypatch):
    """Each costs some 3 us of the host, against 100 us of a forward on the GPU.

    Backward: 5 for the experts, 1 for the picks' weights, and sums of partial weight gradients, two tensors a launch:
    of the shared expert's two, and in a model as small as `digits` of the routed experts' two. The router takes 2 more.
    """
    forward, backward = count_launches(shape, T, monkeypatch)
    assert forward <= 6 and backward <= 2 + (8 if shape.name == "digits" else 7)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tile_fits_into_shared_memory(precision, capability):
    for shape in MODEL_SHAPES.values():
        widths = {"up": (shape.I, shape.H), "dact": (shape.I, shape.H), "dweight": (2 * shape.I, shape.H)}
        for kernel, (n, k) in (*widths.items(), ("rows_times", (shape.H, shape.I)), ("dweight", (shape.H, shape.I))):
            for rows in (1, 16, 64, 128, 1024, 65536):
                device = tiles.Device("unknown", capability, 100)
                tile = tiles.choose(kernel, device, precision, rows, n, k)
                parts = 2 if kernel == "up" else 1
                needed = tile.stages * (tile.m + parts * tile.n) * tile.k * PRECISIONS[precision]
                assert needed <= SHARED_BYTES[capability], f"{kernel} {shape.name} rows {rows}: {tile}"


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A tiles.json with one entry, for the H200."""
    entry = tiles.Tile(64, 32, 16, 4, 2, 5, 1, True, False)
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"NVIDIA H200": {tiles.key("up", "bf16", 256, 1536, 384): entry}}))
    monkeypatch.setattr(tiles, "FILE", file)
    forget()
    yield entry
    forget()


def forget():
    tiles.table.cache_clear()
    tiles.choose.cache_clear()


def test_a_tuned_tile_comes_before_the_heuristic(tuned):
    """For its device and its class of shapes alone: rows count by their next power of two."""
    device = tiles.device_of(torch.empty(0, device="meta"))
    assert [tiles.choose("up", device, "bf16", rows, 1536, 384) for rows in (129, 200, 256)] == [tuned] * 3
    for changed in (
        ("up", device, "bf16", 257, 1536, 384),
        ("up", device, "fp16", 256, 1536, 384),
        ("dact", device, "bf16", 256, 1536, 384),
        ("up", device, "bf16", 256, 1536, 768),
        ("up", device._replace(name="NVIDIA H100"), "bf16", 256, 1536, 384),
    ):
        kernel, where, precision, rows, n, _ = changed
        assert tiles.choose(*changed) == tiles.heuristic(kernel, where.capability, precision, rows, n) != tuned


def test_committed_tiles_are_tiles():
    for device, entries in tiles.table().items():
        for key, fields in entries.items():
            tile = tiles.Tile(*fields)
            assert len(fields) == len(tile) and min(tile[:-2]) > 0, f"{device} {key}: {fields}"


def test_meta_tensors_stand_for_an_h200():
    assert tiles.device_of(torch.empty(0, device="meta")) == ("NVIDIA H200", 90, 132)


UNAVAILABLE = """
import torch, moe_kernels
x = torch.zeros(1, 16)
print({info.name: info.reason for info in moe_kernels.backends()}["triton"])
try:
    moe_kernels.gating(x, x, 1, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_a_gpu_and_an_interpreter_it_says_why_it_cannot_run():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    done = subprocess.run([sys.executable, "-c", UNAVAILABLE], env=env, capture_output=True, text=True)
    reason, raised = done.stdout.splitlines()
    assert reason.startswith("no CUDA device") and "TRITON_INTERPRET=1" in reason, done.stderr
    assert raised == f"backend 'triton' is not available: {reason}"


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine that has a GPU, as far as the registry can see."""
    monkeypatch.setattr(triton_backend.TritonBackend, "why_not", lambda self: "")
    monkeypatch.setattr(triton_backend, "_INTERPRETED", False)
    monkeypatch.setattr(triton_backend, "unfit_devices", lambda least: None)
    monkeypatch.setattr(preferred, "table", dict)
    for cached in (registry._load, registry._choose):
        cached.cache_clear()
    yield
    for cached in (registry._load, registry._choose):
        cached.cache_clear()


@pytest.mark.parametrize("room", ["gating", "dispatch", "experts", "combine", "moe_mlp"])
def test_auto_is_triton_on_a_gpu(room, with_gpu):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert registry.choose("auto", Request(room, dtype, "cuda", 8, 384, 1536)).name == "triton"
        assert registry.choose("auto", Request(room, dtype, "cpu", 8, 384, 1536)).name != "triton"
    assert registry.choose("auto", Request(room, torch.float64, "cuda", 8, 384, 1536)).name not in ("triton", "native")


@where_it_runs
@pytest.mark.parametrize("trap", ["plain", "empty_experts", "gelu", "no_shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_descriptors_and_pointers_give_the_same_bits(dtype, trap, monkeypatch, seed):
    """The same sums in the same order, however the operands come; poison lies around every tensor.

    Triton does not specialise 64 x 64 in float16 on sm_90: it fails to compile.
    """
    problem, leaves = make_problem(replace(BY_NAME[trap], layout="poisoned_ends"), seed, dtype).with_leaves()
    choose, results = tiles.choose, []
    ways = [{"tma": False}, {"tma": True}, {"tma": True, "specialize": True}]
    for fields in ways[:2] if tiles.device_of(problem.x).capability // 10 == 9 else ways:
        monkeypatch.setattr(tiles, "choose", lambda *args, fields=fields: choose(*args)._replace(**fields))
        results.append(gradients(moe_ours(problem, "triton"), leaves, problem.dout))
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())


@triton.jit
def round_to_tf32(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, rounded(tl.load(x + i, mask=i < n), "tf32"), mask=i < n)


@where_it_runs
def test_rounding_to_tf32():
    """Ten bits of mantissa, ties away from zero; what is no number stays none, whatever its bits."""
    ulp = 2.0**-10
    pairs = {
        1 + 0.49 * ulp: 1.0, 1 + 0.5 * ulp: 1 + ulp, -(1 + 0.5 * ulp): -(1 + ulp), 2 - 2.0**-20: 2.0, -0.0: -0.0,
        float("inf"): float("inf"),
    }  # fmt: skip
    x = torch.tensor([*pairs, 0.0, 0.0], dtype=torch.float32)
    x.view(torch.int32)[-2:] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)
    out = torch.empty_like(x)
    round_to_tf32[(1,)](x, out, x.numel(), 16)
    assert out[:-2].tolist() == list(pairs.values()) and out[-2:].isnan().all()


@where_it_runs
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU: tests/product/test_gpu_backends.py, against torch's own")
def test_all_operands_in_tf32_are_rounded(seed):
    """Tensor cores cut off, which errs twice as much. The interpreter does not: rounding in the kernels must show."""
    compute = moe_compute(BY_NAME["plain"], torch.float32)
    exact, ieee = compute(seed, "oracle"), compute(seed, "triton")
    with workloads.arithmetic("tf32"):
        got = compute(seed, "triton")
    errors = {name: whole_error(got[name], t) for name, t in exact.items() if name != "drow_weight"}
    for name, error in errors.items():
        assert 2e-4 < error < 9e-4 and whole_error(ieee[name], exact[name]) < 2e-6, name


@where_it_runs
def test_operands_that_the_copy_engine_cannot_take_go_as_pointers():
    tile = tiles.Tile(16, 16, 16, 1, 4, 1, 1, tma=True)
    weight = torch.zeros(2 * 16 * 32 + 1, device=DEVICE)
    even, odd = weight[:-1].view(2, 16, 32), weight[1:].view(2, 16, 32)
    narrow, empty = torch.zeros(2, 16, 3, device=DEVICE), even[:0]
    for pair, tma in (((even, None), True), ((even, odd[0]), False), ((narrow, None), False), ((empty, None), False)):
        used, operands = grid.operands(tile, *((t, (1, 16, 16)) for t in pair))
        assert used == tma and all(isinstance(operand, torch.Tensor) != tma for operand in operands)


@where_it_runs
@pytest.mark.skipif(DEVICE != "cpu", reason="looks at what the interpreter is asked for")
def test_nothing_of_router_and_moments_is_divided_approximately(monkeypatch, seed):
    """On a GPU `/` and tl.sqrt err by 2 ulp; in a token's deviation that is 2 ulp of all of its dx."""
    builder = triton.runtime.interpreter.InterpreterBuilder

    def refuse(*_):
        raise AssertionError("expected div_rn and sqrt_rn")

    for name in ("create_fdiv", "create_sqrt"):
        monkeypatch.setattr(builder, name, refuse)
    torch.manual_seed(seed)
    inputs = [torch.randn(*sizes, requires_grad=True) for sizes in ((2, 5, 40), (2, 40), (2, 40), (8, 40))]
    tokens, weights, _, probs = modulated_gating(*inputs, 2, backend="triton")
    torch.autograd.grad(tokens.sum() + weights.sum() + probs.square().sum(), inputs)


@where_it_runs
def test_sums_of_many_lose_fewer_bits_than_one_after_the_other(seed):
    torch.manual_seed(seed)
    shapes = (600, 3, 70), (300, 130), (16, 5, 4), (1, 2100)
    jobs = [(torch.rand(shape, device=DEVICE), torch.empty(shape[1:], device=DEVICE)) for shape in shapes]
    sums.sum_in_order(*jobs)
    for partials, out in jobs:
        serial, exact = torch.zeros_like(out), partials.double().sum(0)
        for partial in partials:
            serial += partial
        if len(partials) > 16:
            assert (out - exact).norm() < 0.6 * (serial - exact).norm()
        else:
            assert torch.equal(out, serial)


@where_it_runs
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_leave_the_plan_whole(value, seed):
    """On a GPU nothing raises, for it would have to be waited for: the picks must stay such that no kernel goes astray.

    NaN comes out of the token itself, and everything else is as without it.
    """
    T, E, K = 37, 5, 2
    x, gate_weight = draw_router(T, 32, E, K, torch.float32, 1.0, seed)
    expected = gating.forward(x, gate_weight, K)
    x[11] = value
    weights, ids, probs = gating.forward(x, gate_weight, K)
    others = torch.arange(T) != 11
    for got, good in zip((weights, ids, probs), expected, strict=True):
        assert torch.equal(got[others], good[others])
    assert weights[11].isnan().all() and probs[11].isnan().all()
    assert ((ids >= 0) & (ids < E)).all() and ids[11].unique().numel() == K
    dispatch(ids, weights.nan_to_num(), E, backend="triton").validate()


@where_it_runs
def test_ids_out_of_range_leave_the_plan_whole():
    """A GPU cannot raise without waiting, and a row that nobody wrote would be an address."""
    topk_ids = torch.tensor([[0, -1], [2**31 - 1, 1], [-(2**31), 3]], dtype=torch.int32, device=DEVICE)
    plan = triton_backend.TritonBackend().dispatch(topk_ids, torch.rand(3, 2, device=DEVICE), 4)
    plan.validate()
    assert plan.expert_counts.tolist() == [3, 1, 0, 2]


@where_it_runs
def test_affinities_that_are_no_numbers_leave_the_plan_whole(seed):
    affinities = torch.rand(48, 3, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)
    affinities[::5, 0], affinities[:, 1], affinities[7, 2] = torch.nan, -torch.nan, torch.inf
    plan = triton_backend.TritonBackend().dispatch_expert_choice(affinities, 5, 16)
    expected = EagerBackend().dispatch_expert_choice(affinities, 5, 16)  # NaN is the largest there, too
    for got, want in zip(plan.tensors(), expected.tensors(), strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@where_it_runs
def test_dispatch_of_more_picks_than_a_block_of_every_program(seed):
    """Then a program walks several blocks of picks, and carries on counting."""
    g = torch.Generator().manual_seed(seed)
    topk_ids = torch.randint(0, 40, (1300, 3), generator=g, dtype=torch.int32, device="cpu").to(DEVICE)
    weights = torch.rand(1300, 3, generator=g, device="cpu").to(DEVICE)
    ours, eager = (dispatch(topk_ids, weights, 40, backend=name) for name in ("triton", "eager"))
    ours.validate()
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), eager.tensors(), strict=True))
