"""What a call of the backends for GPUs costs the CPU, on a machine without one: kernels do nothing, all else is real.

`triton`: its launcher is replaced, so that the time of Triton's own is not in it. `cuda`: the sources on fibers (`make
fibers`, its path in MOE_KERNELS_FIBERS), whose threads return at once. No result can be right, and none is looked at:
that the same calls compute the right thing is what tests show.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels.backends import cuda, registry

CASE = Case("layer", "any", MODEL_SHAPES["digits"], "uniform", 16, "bf16", "fwd")  # small: its memory is not touched
Count = Callable[[], int]


def why_not(backend: str) -> str | None:
    """Say why the launches of a backend cannot be tried here, or None."""
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "not available: no package triton"
    return None if os.environ.get(cuda.FIBERS) else f"needs {cuda.FIBERS}, the module that `make fibers` builds"


@contextmanager
def empty_kernels(backend: str) -> Iterator[Count]:
    """Let a backend run on CPU tensors with kernels that do nothing; yield what counts its launches so far."""
    switch = _empty_triton() if backend == "triton" else _empty_fibers()
    registry._choose.cache_clear(), registry._load.cache_clear()
    try:
        with switch as count:
            yield count
    finally:
        registry._choose.cache_clear(), registry._load.cache_clear()


@contextmanager
def _empty_triton() -> Iterator[Count]:
    from moe_kernels.backends.triton import backend, grid, tiles

    launches = 0

    def launch(*_: object, **__: object) -> None:
        nonlocal launches
        launches += 1

    with (
        mock.patch.object(backend, "_INTERPRETED", True),
        mock.patch.object(grid, "launch", launch),
        mock.patch.object(tiles, "CPU", tiles.META),
    ):
        yield lambda: launches


@contextmanager
def _empty_fibers() -> Iterator[Count]:
    with mock.patch.dict(os.environ, MOE_FIBER_ORDER="none"):
        yield cuda._c.launches


def row(backend: str, yardstick: Callable[[], object], seconds: float) -> dict:
    """Return a row of kind "issuing": microseconds and launches of dispatch and the fused layer, on given picks."""
    with empty_kernels(backend) as count:
        cases = {"forward": "fwd", "forward_backward": "fwdbwd"}
        runs = {name: workloads.build(replace(CASE, backend=backend, mode=mode)).run for name, mode in cases.items()}
        launches = {}
        for name, run in runs.items():
            before = count()
            run()
            launches[f"{name}_launches"] = count() - before
        samples = measure.interleave({**runs, "torch.add": yardstick}, 15, seconds)
    figures = {f"{name}_us": s.summary().median * 1e6 for name, s in samples.items()}
    return store.row("issuing", case=replace(CASE, backend=backend).id, figures=figures | launches, wrong=None)
