"""The ceilings of a device, measured in the run, and what share of them and of its floor a case reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.gpu.floors import floor_s
from bench.instrument import measure, workloads
from bench.instrument.cases import DTYPES, Case


def ceilings(device: str, side: int, seconds: float) -> dict[str, float]:
    """Measure what a device reaches in this run.

    Args:
        side: of the square matrices that torch.mm multiplies, random data; 8 side^2 floats are copied.
        seconds: for everything together.
    Returns: FLOP/s by dtype, and "copy" in bytes read and written per second.
    """
    names = ("bf16", "fp16", "tf32", "fp32") if device == "cuda" else ("bf16", "fp32")
    source = torch.randn(8 * side * side, device=device)
    target = torch.empty_like(source)
    tasks: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name in names:
        tasks[name] = _product(name, *torch.randn(2, side, side, device=device).to(DTYPES[name]))
    work = {"copy": 2 * source.nbytes} | dict.fromkeys(names, 2 * side**3)
    samples = measure.interleave(tasks, 5, seconds, device=device)
    return {name: work[name] / s.summary().median for name, s in samples.items()}


def _product(dtype: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    out = torch.empty_like(a)

    def multiply() -> torch.Tensor:
        with workloads.arithmetic(dtype):
            return torch.mm(a, b, out=out)

    return multiply


def shares(case: Case, s: measure.Samples, roof: Mapping[str, float]) -> dict[str, float | None]:
    """Return the share of the GEMM ceiling, the floor, and how many times the floor it took.

    Args: roof: what `ceilings` returned.
    """
    seconds, ceiling = s.summary().median, roof.get(case.dtype)
    floor = floor_s(case, ceiling, roof["copy"]) if ceiling else None
    return {
        "ceiling_share": case.flops / seconds / ceiling if ceiling else None,
        "floor_us": floor * 1e6 if floor else None,
        "x_floor": seconds / floor if floor else None,
    }
