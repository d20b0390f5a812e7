"""How tensors reach the extension modules: address, dtype, sizes, strides and the bytes that may be read."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..plan import RoutingPlan


class _Tags(dict):  # a dtype that slipped through the ops is told by name, at no cost for the others
    def __missing__(self, dtype: torch.dtype) -> int:
        raise TypeError(f"tensor: got {dtype}, expected one of {', '.join(map(str, self))}")


TAGS = _Tags(
    {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.bool: 4}
)  # csrc/core/dtype.h


def view(module: ModuleType, t: Tensor | None):
    """Return the module's view of a tensor, None for None."""
    if t is None:
        return None
    readable = t.nbytes
    if not t.is_contiguous():
        readable = t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()
    return module.Tensor(t.data_ptr(), TAGS[t.dtype], t.shape, t.stride(), readable)


def empty_plan(device: torch.device, num_tokens: int, num_experts: int, num_rows: int) -> RoutingPlan:
    """Return a plan to be filled."""
    E, T, R = num_experts, num_tokens, num_rows
    row_weight = torch.empty(R, dtype=torch.float32, device=device)
    counts = torch.empty(E, dtype=torch.int32, device=device)
    integers = counts.new_empty  # half the time of torch.empty
    return RoutingPlan(row_weight, counts, integers(E + 1), integers(R), integers(R), integers(T + 1), integers(R))
