"""The CUDA C++ backend where no GPU is: its sources on the CPU (csrc/tests/fibers.h), launches, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pybind11
import pytest
import torch
from torch import Tensor

from moe_kernels import ExpertChoice, MoELayer, dispatch, gating, moe_mlp
from moe_kernels.backends import cuda, registry
from moe_kernels.backends.eager import EagerBackend
from moe_kernels.weights import MoEWeights
from tests.contenders import BACKENDS, judge_trap, moe_compute
from tests.error_rule import judge
from tests.trap_cases import DEVICE, PLAIN, Trap, make_problem

on_fibers = pytest.mark.skipif("cuda" not in BACKENDS or DEVICE != "cpu", reason=f"needs {cuda.FIBERS}: make test-cuda")
ROOT = Path(__file__).parents[2]
ENGINES = ("simt", "sm80", "sm90", "sm90_middle", "sm90_wide")
LONG = (
    Trap("ring", "more steps of a sum than stages of any ring", T=9, H=584, I=16, Is=8, E=2),
    Trap("long_group", "a weight's gradient over more rows than a ring holds", T=520, H=16, I=16, Is=8, E=2, K=1),
    Trap("split", "rows of a weight's gradient in several parts", T=400, H=8, I=8, Is=8, E=1, K=1),
    Trap("two_blocks_wide", "widths of several tiles", T=6, H=136, I=264, Is=272, E=2, K=1),
)


@pytest.fixture
def tf32() -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@on_fibers
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trap", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_long_sums(trap, engine, dtype, seed, monkeypatch):
    monkeypatch.setenv("MOE_FIBER_ENGINE", engine)
    judge_trap("moe_mlp", lambda trap, dtype, scale: moe_compute(trap, dtype, scale), trap, 1.0, "cuda", dtype, seed)


@on_fibers
@pytest.mark.parametrize("trap", [PLAIN, *LONG[:2]], ids=str)
def test_tf32_products_have_the_error_of_tf32(trap, seed, monkeypatch, tf32):
    """10 bits of mantissa, so the rival is float16 with the same inputs; torch has no TF32 on a CPU."""
    exactly = moe_compute(trap, torch.float32)

    def compute(seed, how):
        if how != "eager":
            return exactly(seed, how)
        return {name: t.float() for name, t in moe_compute(trap, torch.float16)(seed, how).items()}

    monkeypatch.setenv("MOE_FIBER_ENGINE", "simt")
    in_float32 = exactly(seed, "cuda")
    monkeypatch.setenv("MOE_FIBER_ENGINE", "sm80")
    judge("tf32", compute, "cuda", torch.float32, seed)
    for name, rounded in compute(seed, "cuda").items():
        assert not torch.equal(rounded, in_float32[name]), f"{name} was not rounded to TF32"


@on_fibers
def test_a_layer_takes_few_launches(monkeypatch):
    """Forward: router, 2 of dispatch, up, down, combine. Backward: dact, 2 weights, their sums, dx, combine."""
    layer = MoELayer(32, 24, 5, 2, shared_intermediate_size=16, backend="cuda")
    x = torch.randn(1, 37, 32, requires_grad=True)
    before = cuda._c.launches()
    out = layer(x)
    forward = cuda._c.launches() - before
    out.sum().backward()
    assert forward == 6
    assert cuda._c.launches() - before - forward == 6 + 2  # of the router


@on_fibers
def test_expert_choice_takes_as_few():
    """The selection and the rows of each token: as many as dispatch takes."""
    layer = MoELayer(32, 24, 5, 2, router=ExpertChoice(2.0), backend="cuda")
    before = cuda._c.launches()
    layer(torch.randn(2, 24, 32))
    assert cuda._c.launches() - before == 6


@on_fibers
def test_what_is_misaligned_is_copied(seed):
    x = torch.empty(37 * 32 + 1)[1:].view(37, 32).normal_()
    weight = torch.randn(5, 32)
    assert x.data_ptr() % cuda.ALIGNMENT
    for got, expected in zip(gating(x, weight, 2, "cuda"), gating(x.clone(), weight, 2, "cuda"), strict=True):
        assert torch.equal(got, expected)


@on_fibers
def test_bindings_check_what_they_get():
    x, weight, probs = torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4, 3)
    picks = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int32)

    def call(*tensors):
        cuda._c.gating_fwd(*tensors, 0)

    with pytest.raises(ValueError, match="gate_weight: size 16 in dimension 1, expected 8"):
        call(x, torch.zeros(3, 16), probs, *picks)
    with pytest.raises(ValueError, match=r"x: address .* expected a multiple of 16"):
        call(torch.zeros(33)[1:].view(4, 8), weight, probs, *picks)
    with pytest.raises(TypeError, match=r"tensor: got torch\.float64, expected one of"):
        call(x.double(), weight, probs, *picks)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(x.numpy(), weight, probs, *picks)
    with pytest.raises(ValueError, match="x: 12, expected a multiple of 8"):
        call(torch.zeros(4, 12), torch.zeros(3, 12), probs, *picks)
    with pytest.raises(ValueError, match="workspace: 4 bytes, expected at least"):
        plan = cuda.empty_plan(torch.device("cpu"), 4, 3, 8)
        ids, weights = picks[1], picks[0]
        cuda._c.dispatch(ids, weights, 3, plan.tensors(), torch.zeros(1), 0)


@on_fibers
def test_weights_by_themselves_come_with_an_index(monkeypatch):
    seen, forward = [], cuda.CudaBackend._forward

    def watched(self, x, plan, w, *rest):
        seen.append(w)
        return forward(self, x, plan, w, *rest)

    monkeypatch.setattr(cuda.CudaBackend, "_forward", watched)
    gate_up, down = torch.randn(4, 64, 8), torch.randn(2, 8, 64)
    plan = dispatch(torch.tensor([[0], [1]], dtype=torch.int32), torch.ones(2, 1), 2, backend="cuda")
    moe_mlp(torch.randn(2, 8), plan, [gate_up[i] for i in (2, 0, 3, 1)], [down[1], down[0]], backend="cuda")
    (w,) = seen
    assert w.gate_up_index.tolist() == [2, 0, 3, 1]
    assert w.down_index.tolist() == [1, 0]
    assert w.gate_up_proj.data_ptr() == gate_up.data_ptr()


def indexed_weights(I: int = 64) -> MoEWeights:
    """Two experts and a shared one, H = 8, Is = 64: eight slices that overlap."""
    memory = torch.zeros(16 * 7 + 64 * 8)
    gate_up, down = (memory.as_strided((8, *shape), (16, shape[1], 1)) for shape in ((I, 8), (8, I)))
    shared = (memory.as_strided((8, *shape), (16, shape[1], 1)) for shape in ((64, 8), (8, 64)))
    return MoEWeights(gate_up, down, *shared, torch.zeros(6, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))


def cut(t: Tensor, nbytes: int) -> Tensor:
    """Return zeros of the sizes and strides of t that end too early."""
    out = torch.zeros(t.untyped_storage().nbytes() // 4).as_strided(t.shape, t.stride())
    out.untyped_storage().resize_(nbytes)
    return out


def bytes_for(w: MoEWeights) -> int:
    """Ask for the workspace of a forward, which checks all arguments and computes nothing."""
    plan = cuda.empty_plan(torch.device("cpu"), 4, 2, 8)
    return cuda._c.moe_mlp_fwd_workspace_bytes(torch.zeros(4, 8), plan.tensors(), w.matrices, "swiglu", False)


@on_fibers
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("gate_up_index", lambda t: t[:5], "gate_up_index: size 5 in dimension 0, expected 6"),
        ("gate_up_index", lambda t: t.float(), "gate_up_index: dtype tag 0, expected 3"),
        ("down_index", lambda t: t.repeat(2)[::2], "down_index: stride 2 in dimension 0, expected 1"),
        ("gate_up_index", lambda t: None, r"gate_up_proj: size 8 in dimension 0, expected 2"),
        ("gate_up_proj", lambda t: t.bfloat16(), "gate_up_proj: dtype tag 1, expected 0"),
        ("gate_up_proj", lambda t: t[:, :56], "gate_up_proj: size 56 in dimension 1, expected 64"),
        ("gate_up_proj", lambda t: t[0], "gate_up_proj: 2 dimensions, expected 3"),
        ("gate_up_proj", lambda t: t[:0], "gate_up_proj: buffer of 0 bytes"),
        ("gate_up_proj", lambda t: t.as_strided(t.shape, (16, 1, 64)), "gate_up_proj: stride 64 in dimension 2, exp"),
        ("gate_up_proj", lambda t: t.as_strided(t.shape, (2, 8, 1)), "stride 2 in dimension 0, expected a multiple of"),
        ("shared_down_proj", lambda t: t.as_strided(t.shape, (0, 64, 1)), "shared_down_proj: stride 0 in dimension 0"),
        ("down_proj", lambda t: cut(t, 2480), "down_proj: 8 slices, expected 1 to 7 in 2480 bytes"),
        ("down_proj", lambda t: cut(t, 2032), "down_proj: buffer of 2032 bytes, expected at least 2048"),
        ("down_proj", lambda t: t.as_strided((7, 8, 64), (16, 64, 1), 1), "down_proj: address .* multiple of 16"),
        ("shared_gate_up_proj", lambda t: None, "shared weights: one of two, expected both or none"),
    ],
)
def test_bindings_check_weights_with_an_index(name, change, match):
    w = indexed_weights()
    assert bytes_for(w) > 0
    with pytest.raises(ValueError, match=match):
        bytes_for(w._replace(**{name: change(getattr(w, name))}))


@on_fibers
def test_an_index_needs_whole_steps():
    with pytest.raises(ValueError, match="gate_up_index: widths of 56 and 64, expected multiples of 64"):
        bytes_for(indexed_weights(I=56))


@on_fibers
@pytest.mark.parametrize(
    ("capacity", "group", "words", "match"),
    [
        (2, 3, 12, "tokens_per_group: 3, expected a divisor of 4 tokens"),
        (2, 0, 12, "tokens_per_group: 0, expected a divisor of 4 tokens"),
        (0, 2, 12, r"capacity: 0, expected 1\.\.2"),
        (3, 2, 12, r"capacity: 3, expected 1\.\.2"),
        (2, 4, 12, "plan: size 12 in dimension 0, expected 6"),
        (2, 2, 11, "workspace: 44 bytes, expected at least 48"),
    ],
)
def test_bindings_check_expert_choice(capacity, group, words, match):
    plan = cuda.empty_plan(torch.device("cpu"), 4, 3, 12)
    with pytest.raises(ValueError, match=match):
        cuda._c.dispatch_expert_choice(torch.zeros(4, 3), capacity, group, plan.tensors(), torch.zeros(words), 0)


@on_fibers
def test_ids_out_of_range_are_clamped():
    """A GPU cannot raise; every row of the plan is written all the same."""
    ids = torch.tensor([[0, 7], [-3, 1]], dtype=torch.int32)
    plan = cuda.CudaBackend().dispatch(ids, torch.ones(2, 2), 3)
    assert plan.expert_counts.tolist() == [2, 1, 1]
    plan.validate()


@on_fibers
def test_affinities_that_are_no_numbers_leave_the_plan_whole(seed):
    affinities = torch.rand(48, 3, generator=torch.Generator().manual_seed(seed))
    affinities[::5, 0], affinities[:, 1], affinities[7, 2] = torch.nan, -torch.nan, torch.inf
    plan = cuda.CudaBackend().dispatch_expert_choice(affinities, 5, 16)
    expected = EagerBackend().dispatch_expert_choice(affinities, 5, 16)  # NaN is the largest there, too
    for got, want in zip(plan.tensors(), expected.tensors(), strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@on_fibers
def test_an_unknown_engine_is_an_error(monkeypatch):
    monkeypatch.setenv("MOE_FIBER_ENGINE", "sm70")
    problem = make_problem(PLAIN, 0, torch.bfloat16)
    plan = dispatch(problem.topk_ids, problem.routing, PLAIN.E, backend="cuda")
    with pytest.raises(ValueError, match="MOE_FIBER_ENGINE: 'sm70', expected simt, sm80, sm90, sm90_middle"):
        moe_mlp(problem.x, plan, problem.gate_up_proj, problem.down_proj, backend="cuda")


@on_fibers
@pytest.mark.parametrize(
    ("given", "said"),
    [("", "expected 0 or 1"), ("0", "False"), ("1", "True"), ("yes", "MOE_KERNELS_PDL: 'yes', expected 0 or 1")],
)
def test_the_environment_says_whether_kernels_start_early(given, said):
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('_cuda_fibers', {!r}); m = u.module_from_spec(s); "
    )
    code = code.format(os.environ[cuda.FIBERS]) + "s.loader.exec_module(m); print(m.early_starts())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MOE_KERNELS_PDL": given}, capture_output=True, text=True
    )
    assert said in done.stdout + done.stderr


@on_fibers
def test_early_starts_end_with_their_block():
    with pytest.raises(ZeroDivisionError), cuda.early_starts():
        assert cuda._c.early_starts()
        with cuda.early_starts(False):
            assert not cuda._c.early_starts()
        assert cuda._c.early_starts()
        1 / 0  # noqa: B018
    assert not cuda._c.early_starts()


@pytest.mark.skipif(cuda.FIBERS in os.environ or torch.cuda.is_available(), reason="it is available here")
def test_where_it_does_not_run_it_says_why():
    info = {info.name: info for info in registry.backends()}["cuda"]
    assert not info.available
    assert info.reason == "built, no device" or info.reason.startswith("built without CUDA (pip install")


def configure(tmp_path, path: str, *options: str) -> str:
    """Return what CMake says when the CUDA backend is asked for."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    done = subprocess.run(
        [
            *(cmake, "-S", ROOT, "-B", tmp_path, "-DMOE_KERNELS_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options),
        ],
        env={**os.environ, "PATH": path, "CUDACXX": "", "LD_PRELOAD": ""},  # nvcc fails under a sanitizer
        capture_output=True,
        text=True,
    )
    assert done.returncode
    return " ".join(done.stderr.split())


def test_asked_for_without_a_compiler_is_an_error(tmp_path):
    path = ":".join(d for d in os.environ["PATH"].split(":") if not (Path(d) / "nvcc").exists())
    if shutil.which("c++", path=path) is None:
        pytest.skip("nvcc lies beside the C++ compiler")
    assert "MOE_KERNELS_CUDA=ON: no CUDA compiler; put nvcc" in configure(tmp_path, path)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_asked_for_without_headers_is_an_error(tmp_path):
    said = configure(tmp_path, os.environ["PATH"], f"-DMOE_CUTLASS_INCLUDE={tmp_path}")
    assert f"MOE_KERNELS_CUDA=ON: no CUTLASS headers in '{tmp_path}'; pip install --no-deps nvidia-cutlass" in said
