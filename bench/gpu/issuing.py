"""What a call of the backends for GPUs costs the CPU, on a machine without one: kernels do nothing, all else is real.

`triton`: its kernels are compiled for sm_90 and launched by Triton's own launcher, into a driver that does nothing
(driverless.py). `cuda`: the sources on fibers (`make fibers`, its path in MOE_KERNELS_FIBERS), whose threads return at
once. No result can be right, and none is looked at: that the same calls compute the right thing is what tests show.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.gpu import driverless
from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels import MoELayer, _checks
from moe_kernels.backends import cuda, registry

CASE = Case("layer", "any", MODEL_SHAPES["digits"], "uniform", 16, "bf16", "fwd")  # small: its memory is not touched
BLOCKS = 12  # of the model
ALLOCATING = ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like", "clone")
EXTENSIONS = ("_cuda_fibers", "moe_kernels._cuda")
Count = Callable[[], int]
Run = Callable[[], Any]


def why_not(backend: str) -> str | None:
    """Say why the launches of a backend cannot be tried here, or None."""
    if backend == "triton":
        return driverless.why_not() if importlib.util.find_spec("triton") else "not available: no package triton"
    return None if os.environ.get(cuda.FIBERS) else f"needs {cuda.FIBERS}, the module that `make fibers` builds"


@contextmanager
def empty_kernels(backend: str) -> Iterator[Count]:
    """Let a backend run on CPU tensors with kernels that do nothing; yield what counts its launches so far."""
    switch = _empty_triton() if backend == "triton" else _empty_fibers()
    registry._choose.cache_clear(), registry._load.cache_clear()
    try:
        unread = mock.patch.multiple(_checks, ids=_nothing, finite=_nothing)  # of contents: made on CPUs only
        with switch as count, unread, mock.patch.object(cuda, "_expect_finite", _nothing):
            yield count
    finally:
        registry._choose.cache_clear(), registry._load.cache_clear()


def _nothing(*_: object) -> None:
    pass


@contextmanager
def _empty_triton() -> Iterator[Count]:
    from moe_kernels.backends.triton import backend, tiles

    with (
        driverless.driver() as launches,
        mock.patch.object(backend, "_INTERPRETED", True),  # takes CPU tensors
        mock.patch.object(tiles, "CPU", tiles.META),
    ):
        yield launches


@contextmanager
def _empty_fibers() -> Iterator[Count]:
    with mock.patch.dict(os.environ, MOE_FIBER_ORDER="none"):
        yield cuda._c.launches


def _layer(backend: str) -> MoELayer:
    s = CASE.shape
    return MoELayer(s.H, s.I, s.E, s.K, s.Is, backend=backend, dtype=CASE.torch_dtype)


class _Model(nn.Module):
    """Blocks of nothing but a layer and a residual: what else a model has is not ours."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_layer(backend) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class _Bare(torch.autograd.Function):
    """A node of autograd with the inputs of a layer, and an empty tensor for each result: what no layer goes below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return tuple([torch.empty_like(t) for t in ctx.saved_tensors])


class _BareLayer(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.own = nn.ParameterList(_layer(backend).parameters())
        self.given = list(self.own)

    def forward(self, x: Tensor) -> Tensor:
        return _Bare.apply(x, *self.given)


def _steps(module: nn.Module) -> dict[str, Run]:
    """Return a forward without gradients, and a forward with the backward of all parameters and of the tokens."""
    x = torch.zeros(1, CASE.T, CASE.shape.H, dtype=CASE.torch_dtype, requires_grad=True)
    wanted, dout = (x, *module.parameters()), torch.zeros_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    return {"forward": forward, "step": lambda: torch.autograd.grad(module(x), wanted, dout)}


def counted(run: Run, launches: Count) -> dict[str, int]:
    """Return what a run needs: launches, functions called (Python's and C's), and among them tensors allocated and
    functions of the extension."""
    calls = allocations = bindings = 0

    def watch(frame: object, event: str, what: object) -> None:
        nonlocal calls, allocations, bindings
        calls += event in ("call", "c_call")
        allocations += event == "c_call" and getattr(what, "__name__", "") in ALLOCATING
        bindings += event == "c_call" and getattr(what, "__module__", None) in EXTENSIONS

    run()  # caches are filled
    before = launches()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {"launches": launches() - before, "calls": calls, "allocations": allocations, "bindings": bindings}


def row(backend: str, yardstick: Run, seconds: float) -> dict:
    """Return a row of kind "issuing": microseconds and what `counted` returns of dispatch and the fused layer on given
    picks (forward, forward_backward), of MoELayer (layer_...), a model of twelve (model_...) and a layer that does
    nothing (bare_...)."""
    with empty_kernels(backend) as launches:
        modes = {"forward": "fwd", "forward_backward": "fwdbwd"}
        runs = {name: workloads.build(replace(CASE, backend=backend, mode=mode)).run for name, mode in modes.items()}
        modules = {"layer": _layer(backend), "model": _Model(backend), "bare": _BareLayer(backend)}
        for kind, module in modules.items():
            runs |= {f"{kind}_{name}": run for name, run in _steps(module).items()}
        counts = {f"{name}_{what}": n for name, run in runs.items() for what, n in counted(run, launches).items()}
        samples = measure.interleave({**runs, "torch.add": yardstick}, 15, seconds)
    figures = {f"{name}_us": s.summary().median * 1e6 for name, s in samples.items()}
    return store.row("issuing", case=replace(CASE, backend=backend).id, figures=figures | counts, wrong=None)
