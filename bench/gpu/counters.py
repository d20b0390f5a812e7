"""What a call costs besides time: kernels launched, waits for the device, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SYNC = "called a synchronizing CUDA operation"


def count(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """Return launches, host_syncs and peak_mib of one call: None on a CPU, and with `uncounted` where that failed."""
    figures: dict[str, Any] = dict.fromkeys(("launches", "host_syncs", "peak_mib"))
    if device == "cpu":
        return figures
    try:
        counted = {"launches": len(events(run, device)), "host_syncs": host_syncs(run), "peak_mib": _peak_mib(run)}
    except Exception as error:  # a profiler that may not run costs no timing
        return {**figures, "uncounted": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    return figures | counted


def events(run: Callable[[], Any], device: str) -> list[Any]:
    """Return the profiler's events of one call: kernels on a GPU, ATen operators on a CPU."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        found = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        return [e for e in found if not e.name.startswith(("Memcpy", "Memset"))]
    return [e for e in profiler.events() if e.name.startswith("aten::")]


def host_syncs(run: Callable[[], Any]) -> int:
    """Return how often one call waits for the GPU, as far as torch's debug mode sees it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in seen)


def _peak_mib(run: Callable[[], Any]) -> float:
    """Return how much more memory a call needs than lay allocated before it, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
