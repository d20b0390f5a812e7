"""What backward reads of token choice in one call: pieces of one memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import FIELDS, RoutingPlan

_TOPK_IDS, _PROBS, _GATE_UP, _SHARED_GATE_UP = range(len(FIELDS), len(FIELDS) + 4)
_EXPERT_COUNTS = FIELDS.index("expert_counts")


class Kept(NamedTuple):
    """A RoutingPlan's fields in their order, topk_ids, probs, gate_up and shared_gate_up (csrc/cuda/token_choice.h)."""

    memory: Tensor  # int32
    offsets: Sequence[int]  # of those pieces, in bytes

    def expert_counts(self, E: int) -> Tensor:
        """Return (1, E)."""
        return self.memory.as_strided((1, E), (E, 1), self.memory.storage_offset() + self.offsets[_EXPERT_COUNTS] // 4)

    def probs(self, T: int, E: int) -> Tensor:
        return self._piece(_PROBS, T, E, dtype=torch.float32)

    def topk_ids(self, T: int, K: int) -> Tensor:
        return self._piece(_TOPK_IDS, T, K)

    def plan(self, T: int, E: int, R: int) -> RoutingPlan:
        sizes = R, E, E + 1, R, R, T + 1, R
        row_weight, *indices = (self._piece(number, size) for number, size in enumerate(sizes))
        return RoutingPlan(row_weight.view(torch.float32), *indices)

    def gate_up(self, R: int, width: int, T: int, shared_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gate_up (R, width) and shared_gate_up (T, shared_width), (0,) without a shared expert."""
        shared = (T, shared_width) if shared_width else (0,)
        return self._piece(_GATE_UP, R, width, dtype=dtype), self._piece(_SHARED_GATE_UP, *shared, dtype=dtype)

    def _piece(self, number: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        start, words = self.offsets[number] // 4, math.prod(shape) * dtype.itemsize // 4
        piece = self.memory[start : start + words]
        return piece.view(dtype).view(shape)
