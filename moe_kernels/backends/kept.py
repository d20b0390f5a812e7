"""What backward reads of token choice in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import FIELDS, RoutingPlan

_TOPK_IDS, _PROBS, _GATE_UP, _SHARED_GATE_UP = range(len(FIELDS), len(FIELDS) + 4)


class Kept(NamedTuple):
    """topk_ids, probs, gate_up, shared_gate_up and a RoutingPlan's fields, as tensors; or, with offsets, in one.

    That one has the plan's fields first, and behind shared_gate_up what only the extension reads
    (csrc/cuda/token_choice.h).
    """

    tensors: Sequence[Tensor]
    offsets: Sequence[int] | None = None  # of the pieces in one int32 tensor, in bytes

    def probs(self, T: int, E: int) -> Tensor:
        return self.tensors[1] if self.offsets is None else self._piece(_PROBS, T, E, dtype=torch.float32)

    def apart(
        self, T: int, E: int, K: int, widths: tuple[int, int] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, RoutingPlan]:
        """Return topk_ids, probs, gate_up, shared_gate_up and the plan.

        widths: of gate_up and shared_gate_up, which are (0,) without; 0 for a shared expert that is not there.
        """
        if self.offsets is None:
            topk_ids, probs, gate_up, shared_gate_up, *plan = self.tensors
            return topk_ids, probs, gate_up, shared_gate_up, RoutingPlan(*plan)
        routed, shared = widths or (0, 0)
        gate_up = self._piece(_GATE_UP, *(T * K, routed) if routed else (0,), dtype=dtype)
        shared_gate_up = self._piece(_SHARED_GATE_UP, *(T, shared) if shared else (0,), dtype=dtype)
        return self._piece(_TOPK_IDS, T, K), self.probs(T, E), gate_up, shared_gate_up, self._plan(T, E, T * K)

    def _plan(self, T: int, E: int, R: int) -> RoutingPlan:
        sizes = R, E, E + 1, R, R, T + 1, R
        row_weight, *indices = (self._piece(number, size) for number, size in enumerate(sizes))
        return RoutingPlan(row_weight.view(torch.float32), *indices)

    def _piece(self, number: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        start, words = self.offsets[number] // 4, math.prod(shape) * dtype.itemsize // 4
        piece = self.tensors[0][start : start + words]
        return piece.view(dtype).view(shape)
