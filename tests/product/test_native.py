"""The native extension as a citizen of the process: instruction-set levels, fork, threads, memory, one OpenMP pool."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import moe_kernels
from moe_kernels import _C
from moe_kernels.backends import registry

LAYER_ERROR = """
import torch, moe_kernels
from moe_kernels import _C
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)):
    for activation in ("swiglu", "gelu", "gelu_tanh", moe_kernels.ClampedSwiGLU()):
        how = {"activation": activation, "bias": activation != "gelu"}
        layer = moe_kernels.MoELayer(40, 56, 5, 2, 24, **how, backend="native").to(dtype)
        for bias in (p for name, p in layer.named_parameters() if name.endswith("bias")):
            torch.nn.init.normal_(bias)
        exact = moe_kernels.MoELayer(40, 56, 5, 2, 24, **how, backend="eager").double()
        exact.load_state_dict(layer.state_dict())
        x = torch.randn(53, 40).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        layer(x).square().sum().backward()
        exact(wide).square().sum().backward()
        oracles = [p.grad for p in exact.parameters()]
        for ours, oracle in zip((x.grad, *(p.grad for p in layer.parameters())), (wide.grad, *oracles)):
            assert (ours.double() - oracle).norm() < bound * oracle.norm(), (dtype, activation)
print(_C.isa_level())
"""


LAYER_BITS = """
import hashlib, torch, moe_kernels
from moe_kernels import _C
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    layer = moe_kernels.MoELayer(200, 300, 3, 2, 100, backend="native", dtype=dtype)
    x = torch.randn(1100, 200, dtype=dtype, requires_grad=True)  # experts of more than a chunk of rows
    y = layer(x)
    y.square().sum().backward()
    for tensor in (y, x.grad, layer.gate_up_proj.grad, layer.down_proj.grad, layer.shared_down_proj.grad):
        digest.update(tensor.detach().view(torch.uint8).numpy().tobytes())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("level", _C.isa_levels())
def test_every_level_of_this_cpu_is_right(level):
    done = run_python(LAYER_ERROR, MOE_KERNELS_ISA=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


def test_an_unknown_level_is_named():
    done = run_python("from moe_kernels import _C; _C.isa_level()", MOE_KERNELS_ISA="avx1024")
    assert "avx1024" in done.stderr and "portable" in done.stderr


@pytest.mark.parametrize("caches", ["16,256,2048", "48,2048,262144"])
def test_caches_do_not_change_a_bit(caches):
    code = LAYER_BITS + "print(digest.hexdigest(), _C.blocking()['panel_bytes'])"
    runs = [run_python(code, MOE_KERNELS_CACHES=sizes) for sizes in (caches, "32,1024,32768")]
    assert all(run.returncode == 0 for run in runs), runs
    (bits, panels), (other_bits, other_panels) = (run.stdout.split() for run in runs)
    assert bits == other_bits and panels != other_panels


def test_caches_that_cannot_be_read_are_named():
    done = run_python("from moe_kernels import _C; _C.blocking()", MOE_KERNELS_CACHES="32K,512K,32M")
    assert "MOE_KERNELS_CACHES=32K,512K,32M" in done.stderr and "32,512,32768" in done.stderr


def layer_and_input():
    torch.manual_seed(1)
    return moe_kernels.MoELayer(32, 64, 4, 2, 32, backend="native"), torch.randn(300, 32)


def test_a_forked_child_computes_the_same():
    layer, x = layer_and_input()
    expected = layer(x).detach()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # libgomp's threads are gone here: the child must not wait for them
        same = torch.equal(registry.get("native").moe_mlp(*fused_arguments(layer, x))[0], expected)
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)


def fused_arguments(layer, x):
    from moe_kernels.weights import LayerWeights

    native = registry.get("native")
    topk_weights, topk_ids, _ = native.gating(x, layer.gate_weight.detach(), 2)
    plan = native.dispatch(topk_ids, topk_weights, 4)
    names = "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"
    return x, plan, LayerWeights(*([getattr(layer, name).detach()] for name in names)), "swiglu", False


def test_concurrent_calls_do_not_share_scratch():
    layer, x = layer_and_input()
    inputs = [x * (i + 1) for i in range(4)]
    expected = [layer(value).detach() for value in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(layer(inputs[i]).detach(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_memory_is_reported_and_released():
    layer, x = layer_and_input()
    layer(x)
    assert _C.workspace_bytes() > 0
    _C.release_workspace()
    assert _C.workspace_bytes() == 0


ONE_POOL = """
import torch, moe_kernels
moe_kernels.MoELayer(32, 64, 4, 2, backend="native")(torch.randn(300, 32))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""


def test_one_openmp_pool_with_torch():
    """A process of its own: other packages of the suite bring their own libgomp."""
    pools = run_python(ONE_POOL).stdout.split()
    if not any("torch" in pool for pool in pools):
        pytest.skip("this torch brings no libgomp of its own")
    assert len(pools) == 1, pools


def test_buffers_are_checked_before_they_are_read():
    x = torch.zeros(4, 8)
    short = _C.Tensor(x.data_ptr(), 0, [4, 16], [16, 1], x.nbytes)
    weight, ids = torch.zeros(2, 16), torch.zeros(4, 1, dtype=torch.int32)

    def view(t, tag=0):
        return _C.Tensor(t.data_ptr(), tag, t.shape, t.stride(), t.nbytes)

    outputs = view(torch.zeros(4, 2)), view(torch.zeros(4, 1)), view(ids, 3)
    with pytest.raises(ValueError, match=r"x: buffer of 128 bytes, expected at least 256"):
        _C.gating_fwd(short, view(weight), *outputs, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"addresses": [64, 0]}, "addresses: 0 at 1, expected an address"),
        ({"addresses": []}, "addresses: none, expected one a matrix"),
        ({"ld": 7}, "ld: 7, expected at least the 8 elements of a stored row"),
        ({"ld": 8, "transposed": True, "rows": 9}, "ld: 8, expected at least the 9 elements of a stored row"),
        ({"rows": -1}, "matrices: -1 x 8, expected no negative size"),
        ({"dtype_tag": 3}, r"dtype tag: 3, expected 0 \(fp32\), 1 \(bf16\) or 2 \(fp16\)"),
    ],
)
def test_matrices_are_checked(changed, message):
    good = {"addresses": [64, 128], "rows": 4, "columns": 8, "ld": 8, "transposed": False, "dtype_tag": 0}
    _C.Matrices(**good)
    with pytest.raises(ValueError, match=message):
        _C.Matrices(**good | changed)


def matrices(tensors: list[torch.Tensor], transposed: bool = False):
    rows, columns = tensors[0].T.shape if transposed else tensors[0].shape
    return _C.Matrices([t.data_ptr() for t in tensors], rows, columns, tensors[0].stride(0), transposed, 0)


ZEROS = torch.zeros(32 * 32)


def kinds(shapes: list[tuple[int, int, int]]) -> list:
    """The six kinds from (matrices, rows, columns) of each, all at one address."""
    return [_C.Matrices([ZEROS.data_ptr()] * n, r, c, c, False, 0) if n else None for n, r, c in shapes]


SIX = [(4, 16, 8), (4, 16, 8), (4, 8, 16), (1, 12, 8), (1, 12, 8), (1, 8, 12)]


@pytest.mark.parametrize(
    ("changed", "activation", "message"),
    [
        ({0: (0, 0, 0)}, "swiglu", r"weights.gate: None, expected 4 matrices"),
        ({}, "gelu", r"weights.gate: 4 matrices, expected None"),
        ({1: (3, 16, 8)}, "swiglu", r"weights.up: 3 matrices, expected 4"),
        ({1: (4, 17, 8)}, "swiglu", r"weights.up: 17 x 8, expected 16 x 8"),
        ({2: (0, 0, 0)}, "swiglu", r"weights.down: None, expected a matrix for each expert"),
        ({3: (1, 13, 8)}, "swiglu", r"weights.shared_gate: 13 x 8, expected 12 x 8"),
        ({4: (0, 0, 0)}, "swiglu", r"weights.shared_up: None, expected 1 matrices"),
        ({5: (0, 0, 0)}, "swiglu", r"weights.shared_gate: 1 matrices, expected None"),
        ({5: (1, 9, 12)}, "swiglu", r"weights.shared_down: 9 x 12, expected 8 x 12"),
    ],
)
def test_tables_of_weights_are_checked(changed, activation, message):
    _C.PackedWeights(kinds(SIX), "swiglu", 1)
    with pytest.raises(ValueError, match=message):
        _C.PackedWeights(kinds([changed.get(i, shape) for i, shape in enumerate(SIX)]), activation, 1)


def test_a_short_table_is_named():
    with pytest.raises(ValueError, match=r"weights: 3 entries, expected 6 \(gate, up, down, shared_gate"):
        _C.PackedWeights(kinds(SIX)[:3], "swiglu", 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_in_separate_memory_give_the_same_bits(transposed):
    layer, x = layer_and_input()
    native = registry.get("native")
    x, plan, w, activation, _ = fused_arguments(layer, x)
    out, gate_up, shared_gate_up = native.moe_mlp(x, plan, w, activation, True)
    dx, drow_weight, (dgate_up,), (ddown,), (dshared_gate_up,), (dshared_down,) = native.moe_mlp_bwd(
        x, x, plan, w, gate_up, shared_gate_up, activation, (True,) * 8
    )
    w = w.stacked()

    def halves(t):
        return [[m.contiguous() for m in half] for half in t.reshape(-1, *t.shape[-2:]).chunk(2, 1)]

    def apart(tensors):  # rows of one more element
        tensors = [t.T if transposed else t for t in tensors]
        return [torch.nn.functional.pad(t, (0, 1))[:, :-1] for t in tensors]

    plain = [*halves(w.gate_up_proj), list(w.down_proj), *halves(w.shared_gate_up_proj), [w.shared_down_proj]]
    expected = [*halves(dgate_up), list(ddown), *halves(dshared_gate_up), [dshared_down]]
    weights = [apart(tensors) for tensors in plain]
    grads = [apart([torch.full_like(t, torch.nan) for t in tensors]) for tensors in plain]
    to = [matrices(tensors, transposed) for tensors in grads]
    frozen = 1, 5
    for i in frozen:
        to[i] = None
    table = [matrices(tensors, transposed) for tensors in weights]
    again = [torch.full_like(t, torch.nan) for t in (out, dx, drow_weight)]

    def view(t):
        return _C.Tensor(t.data_ptr(), 3 if t.dtype == torch.int32 else 0, t.shape, t.stride(), t.nbytes)

    views = [view(t) for t in plan.tensors()]
    _C.moe_mlp_fwd(view(x), views, table, activation, [], None, view(again[0]), None, None, 2)
    _C.moe_mlp_bwd(
        view(x), view(x), views, table, view(gate_up), view(shared_gate_up), activation, [], view(again[1]),
        view(again[2]), to, [], 2,
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(again, (out, dx, drow_weight), strict=True))
    for i, (got, want) in enumerate(zip(grads, expected, strict=True)):
        for a, b in zip(got, want, strict=True):
            assert a.isnan().all() if i in frozen else torch.equal(a.T if transposed else a, b), i


def test_peak_is_plausible():
    # No bound on the gain of a second thread: two CPUs of a virtual machine may be one core.
    for threads in (1, 2):
        assert 1 < _C.peak_gflops("float32", threads=threads, seconds=0.05) < 2000 * threads
