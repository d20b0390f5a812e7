"""What a worker builds: one case that is ready to run, and the ceiling that all are held against."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable

import torch

from bench.instrument import measure, workloads
from bench.instrument.cases import Case

PEAK_S = 0.03
WARM_S = 0.2  # longer calls are not preceded by an untimed one: they fill the caches (32 MB) in less than a hundredth


class Seat:
    """A case that is ready to run."""

    def __init__(self, case: Case, build: Callable[[Case], workloads.Workload], version: str = ""):
        gc.collect()
        torch.set_num_threads(case.threads)
        self.case, self.work, self.call_s, self._version = case, build(case), 0.0, version

    def version(self) -> str:
        return self._version

    def save(self, path: str, known: str = "") -> str:
        """Run once and leave the result, tensors by name, in a file; return its digest.

        A result that has the `known` digest was judged before, and is not written.
        """
        self.call_s, _, result = measure.time_calls(self.work.run)
        named = {name: tensor.detach().contiguous() for name, tensor in self.work.named(result).items()}
        digest = hashlib.sha256()
        for tensor in named.values():
            digest.update(tensor.view(torch.uint8).numpy())
        if digest.hexdigest() != known:
            torch.save(named, path)
        return digest.hexdigest()

    def time(self, calls: int) -> tuple[float, float]:
        """Return wall and CPU seconds per call, after one call that is not timed, unless calls are long."""
        gc.disable()
        if self.call_s < WARM_S:
            self.work.run()
        self.call_s, cpu, _ = measure.time_calls(self.work.run, calls)
        return self.call_s, cpu


class Peak:
    """The register-only loop as a contender whose call is 1 GFLOP: timed in the same rounds, on the threads' clocks."""

    def __init__(self, case: str):
        case = Case.from_id(case)
        self.dtype, self.threads = case.dtype, case.threads
        if measure.peak_gflops(self.dtype, 1, 1e-3) is None:
            raise RuntimeError("the extension is not built, so there is no peak to compare with")

    def time(self, calls: int) -> tuple[float, float]:
        wall = 1 / measure.peak_gflops(self.dtype, self.threads, PEAK_S)
        return wall, wall * self.threads
