"""Quick launches of the Triton backend against Triton's own: the same compiled kernel, with the same arguments.

No kernel runs: they are compiled for sm_90, and what would launch them writes down what it got.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from bench.instrument.shapes import MODEL_SHAPES  # noqa: E402
from bench.machine_code.static_gate import triton as gate  # noqa: E402
from moe_kernels.backends.triton import experts, grid, launching, tiles  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels are not compiled", allow_module_level=True)


@triton.jit
def shift(x, out, index, T, step, N: tl.constexpr, TMA: tl.constexpr, NAME: tl.constexpr):
    """out_i = x_i + 1, of a tensor or a descriptor."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    if TMA:
        tl.store(out + at, x.load([tl.program_id(0) * N]) + 1, mask=at < T)
    else:
        first = 0 if index is None else tl.load(index)
        tl.store(out + at, tl.load(x + at * step + first, mask=at < T) + 1, mask=at < T)


@triton.jit
def copy(x, out):
    """out_0 = x_0: the fewest arguments there are."""
    tl.store(out, tl.load(x))


class Machine:
    """A driver of several GPUs, whose launches are written down: which kernel, on which device, with what."""

    def __init__(self) -> None:
        self.device, self.launches, self.loaded = 0, [], 0
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 << 10})
        self.utils.load_binary, self.utils.unload_module = self.load, lambda module: None

    def load(self, *_: object) -> tuple[int, ...]:
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def launcher_cls(self, src: object, metadata: object):
        return lambda *args: self.launches.append((self.device, *args))

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def machine(monkeypatch):
    """A stand-in for GPUs; `slow` counts what goes through Triton's own run. What is compiled for it is forgotten."""
    made, run, kernels = Machine(), JITFunction.run, {}
    made.slow = 0

    def counted(self, *args, **kwargs):
        made.slow += 1
        if self.fn not in kernels:
            kernels[self.fn] = self
            self.device_caches.clear()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(JITFunction, "run", counted)
    launching._compiled.clear()
    yield made
    launching._compiled.clear()
    for kernel in kernels.values():
        kernel.device_caches.clear()


def both(machine, kernel, programs, arguments) -> tuple[tuple, tuple]:
    """Return what a launch does, and what Triton's own does."""
    grid.launch(kernel, programs, arguments)
    kernel.run(grid=programs, warmup=False, enable_fp_fusion=True, **arguments)
    quick, own = machine.launches[-2:]
    return quick, own


def assert_same(quick: tuple, own: tuple) -> None:
    """Device, grid, stream, function, metadata; then, behind what hooks would get, the kernel's arguments."""
    assert quick[:7] == own[:7]
    assert len(quick) == len(own) and all(a is b or a == b for a, b in zip(quick[10:], own[10:], strict=True))


def arguments_of(dtype, offset: int, T: int, tma: bool, name: str = "a", warps: int = 4) -> dict:
    memory = torch.zeros(2 * max(T, 64) + 16, dtype=dtype)
    x = memory[offset:]
    tile = tiles.Tile(64, 64, 64, 8, warps, 3, 1, tma=tma)
    described, (x,) = grid.operands(tile, (x, (64,)))
    rest = {"T": T, "step": T, "N": 64, "TMA": described, "NAME": name, "num_warps": warps}
    return {"x": x, "out": memory, "index": None, **rest}


def cases() -> list[dict]:
    """Launches of one kernel; offset 1: addresses that are no multiple of 16."""
    dtypes = torch.bfloat16, torch.float32
    plain = [arguments_of(*of, tma=False) for of in itertools.product(dtypes, (0, 1), (1, 16, 17))]
    described = [arguments_of(dtype, offset, 17, True) for dtype in dtypes for offset in (0, 8)]
    others = [arguments_of(torch.float32, 0, 17, False, name, warps) for name, warps in (("b", 4), ("a", 8))]
    long = {**plain[0], "T": 1 << 31}  # an int64
    indexed = {**plain[0], "index": torch.zeros(1, dtype=torch.int32)}
    flag, real = {**plain[2], "step": True}, {**plain[2], "T": 17.0}  # equal to integers, and no integers
    one_aligned = {**plain[0], "out": plain[0]["out"][1:]}
    of_bf16 = {**described[-1], "x": described[0]["x"]}  # a descriptor alone is another
    return [*plain, *described, *others, long, indexed, flag, real, one_aligned, of_bf16, {**plain[0], "num_stages": 2}]


def test_a_known_launch_calls_what_triton_would_call(machine):
    launches = [(device, case) for device in (0, 1) for case in cases()]
    for round_ in range(3):
        random.Random(round_).shuffle(launches)
        before = machine.slow
        for machine.device, case in launches:
            assert_same(*both(machine, shift, (3, 2), case))
        new = machine.slow - before - len(launches)  # beside the comparisons
        assert new == (2 * 23 if round_ == 0 else 0)  # addresses that are multiples of 16 are all alike
    assert machine.loaded == 2 * 23


def test_all_kernels_of_the_backend_are_launched_as_triton_would(machine, monkeypatch):
    """A call of every room, its tensors without memory, until nothing is new; then the same through Triton."""
    for direct, slow in ((True, None), (True, 0), (False, "all")):
        monkeypatch.setattr(launching, "DIRECT", direct)
        machine.launches.clear()
        before = machine.slow
        gate.launch_all(MODEL_SHAPES["digits"], 256, "bf16")
        assert slow is None or machine.slow - before == (slow and len(machine.launches))
        if direct:
            quick = list(machine.launches)
    assert len(quick) == len(machine.launches) > 50
    for ours, own in zip(quick, machine.launches, strict=True):
        assert ours[:7] == own[:7] and [*map(told, ours[10:])] == [*map(told, own[10:])]


def test_a_product_is_compiled_once_for_all_numbers_of_tokens(machine):
    def new(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    plan = SimpleNamespace(num_rows=2000, num_experts=2, expert_offsets=new(3, dtype=torch.int32))
    for T in (1, 1000, 1001, 1008):  # as Triton would have it: three kinds
        experts.rows_times((new(2000, 64), None), (new(2, 64, 64), None, None), plan, new(T, 64), k_inner=True)
    assert len(machine.launches) == 4 and machine.loaded == 1


def told(value: object) -> object:
    """Return what can be compared of an argument that was made anew."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *map(tuple, (value.shape, value.strides, value.block_shape))
    return value


def test_of_kernels_of_few_arguments_and_one_program_axis(machine):
    for x in (torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.nn.Parameter(torch.zeros(4))) * 2:
        assert_same(*both(machine, copy, (5,), {"x": x, "out": x}))
    assert machine.slow == 6 + 2  # a Parameter is a tensor like any other
    grid.launch(copy, (5, 0), {"x": x, "out": x})
    assert len(machine.launches) == 12  # nothing to do


def test_kinds_are_forgotten_where_there_are_many(machine, monkeypatch):
    monkeypatch.setattr(launching, "MOST_KINDS", 4)
    for T in range(17, 27):
        assert_same(*both(machine, shift, (1,), arguments_of(torch.float32, 0, T, False)))
    assert len(launching._compiled) == 2 and machine.loaded == 1


def hooks():
    runtime, seen = triton.knobs.runtime, []
    yield "hook", lambda patch: patch.setattr(runtime.launch_enter_hook, "calls", [seen.append])
    yield "exit hook", lambda patch: patch.setattr(runtime.launch_exit_hook, "calls", [seen.append])
    yield "pre-run hook", lambda patch: patch.setattr(copy, "pre_run_hooks", [lambda *_, **__: None])
    yield "another hook", lambda patch: patch.setitem(vars(runtime), "launch_enter_hook", seen.append)
    yield "debug", lambda patch: patch.setitem(vars(runtime), "debug", True)
    yield "knob", lambda patch: patch.setitem(vars(triton.knobs.compilation), "instrumentation_mode", "")
    yield "interpreter, or an unknown Triton", lambda patch: patch.setattr(launching, "DIRECT", False)


@pytest.mark.parametrize("turn_on", [pytest.param(turn_on, id=name) for name, turn_on in hooks()])
def test_where_somebody_watches_all_goes_through_triton(machine, monkeypatch, turn_on):
    x = torch.zeros(4)
    for _ in range(3):
        grid.launch(copy, (1,), {"x": x, "out": x})
    assert machine.slow == 1
    with monkeypatch.context() as patch:
        turn_on(patch)
        for _ in range(3):
            grid.launch(copy, (1,), {"x": x, "out": x})
        assert machine.slow == 4 and len(machine.launches) == 6
    grid.launch(copy, (1,), {"x": x, "out": x})
    assert machine.slow == 4 and len(machine.launches) == 7


@pytest.mark.parametrize(
    ("version", "direct"), [("3.6.0", True), ("3.9.0+git", True), ("3.10.0", False), ("4.0", False)]
)
def test_an_unknown_triton_launches_itself_and_it_is_said(monkeypatch, recwarn, version, direct):
    monkeypatch.setattr(triton, "__version__", version)
    spec = importlib.util.find_spec(launching.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.DIRECT == direct
    said = [str(warning.message) for warning in recwarn]
    assert not said if direct else said[0].startswith(f"triton: got {version}, expected 3.6, ")


def test_arguments_that_a_kernel_lacks_are_refused(machine):
    x = torch.zeros(4)
    with pytest.raises(TypeError, match=r"got \['x', 'out', 'other'\], expected the parameters \('x', 'out'\)"):
        grid.launch(copy, (1,), {"x": x, "out": x, "other": 1})
    with pytest.raises(KeyError, match="out"):
        grid.launch(copy, (1,), {"x": x})
    with pytest.raises(TypeError, match="launch_key: expected a dict, two tuples of names, two types"):
        launching._C.launch_key([], ("x",), (), torch.Tensor, TensorDescriptor)
    with pytest.raises(AttributeError, match="kind"):  # a descriptor of somebody else
        described = TensorDescriptor(torch.zeros(16), [16], [1], [16])
        launching._C.launch_key({"x": described}, ("x",), (), torch.Tensor, TensorDescriptor)
