"""The grouped backend: torch's grouped_mm in place of the loop over experts; no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import RoutingPlan
from .base import Request
from .eager import EagerBackend, of_rows


class GroupedBackend(EagerBackend):
    """The rooms of `eager` over grouped_mm. Its own autograd is not used: it fails on expanded gradients."""

    name = "grouped"

    def why_not(self) -> str:
        return "" if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"

    def supports(self, request: Request) -> str | None:
        if request.room not in ("experts", "moe_mlp"):
            return None
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"grouped_mm does not take {request.dtype}"
        widths = {"hidden_size": request.hidden_size, "intermediate_size": request.intermediate_size}
        for name, width in widths.items():
            if width * request.dtype.itemsize % 16:
                return f"grouped_mm needs rows of a multiple of 16 bytes; {name} = {width} in {request.dtype} is not"
        return None

    def rows_times(self, rows: Tensor, weight: Tensor, plan: RoutingPlan, bias: Tensor | None = None) -> Tensor:
        out = F.grouped_mm(rows, weight, offs=plan.expert_offsets[1:])
        return out if bias is None else (out + of_rows(bias, plan)).to(out.dtype)

    def outer_sums(self, left: Tensor, right: Tensor, plan: RoutingPlan) -> Tensor:
        return F.grouped_mm(left.T, right, offs=plan.expert_offsets[1:])
