"""What a revision's worker builds: one case, run by that revision's package under the instrument that compares."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels
from bench.instrument import workloads
from bench.instrument.cases import Case
from bench.instrument.seat import Seat


class RevisionSeat(Seat):
    """A case that is ready to run on the package under `folder`.

    Raises: LookupError when the package lacks what the case needs; RuntimeError when it is another than asked for.
    """

    def __init__(self, case: str, folder: str):
        if not Path(moe_kernels.__file__).is_relative_to(folder):
            raise RuntimeError("the worker imported another moe_kernels than that of its revision")
        if reason := workloads.why_not(Case.from_id(case)):
            raise LookupError(reason)
        try:
            super().__init__(Case.from_id(case), workloads.build)
            self.work.run()
        except (AttributeError, ImportError) as error:
            raise LookupError(f"{type(error).__name__}: {error}") from None

    def fixed(self) -> dict[str, int]:
        """Return what one call does that no neighbour can change: ATen calls, and in training bytes kept for backward.

        A tensor that is kept twice, or a view of one that is, counts once.
        """
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
            return tensor

        with Calls() as calls, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.work.run()
        found = {"aten_calls": calls.count}
        if self.case.mode == "fwdbwd":
            found["saved_bytes"] = sum(storage.nbytes() for storage in kept.values())
        return found


class Calls(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
