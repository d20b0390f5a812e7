"""Experts on rows that somebody else has brought and sorted: the joint to frameworks with dispatchers of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import _checks, ops


def experts_on_rows(
    rows: Tensor, rows_per_expert: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, backend: str = "auto"
) -> Tensor:
    """Run SwiGLU experts over rows that lie in the order of their experts.

    y_r = down_e (silu(gate_e x_r) up_e x_r), e the expert of row r.

    Args:
        rows: (R, H): those of expert 0, then those of expert 1 ...; behind the last expert's there may be others.
        rows_per_expert: (E,) integers.
        gate_proj, up_proj: (E, I, H); down_proj: (E, H, I); in torchtitan w1, w3 and w2. Of DTensors a rank's own part
            is taken, and E counts the experts in it.
        backend: "auto" or a name out of `backends()`.
    Returns: (R, H) in the order and the dtype of rows; zeros behind the last expert's.
    Raises: TypeError, ValueError naming the argument.
    Cost: as `moe_mlp` with K = 1; weights are read where they lie; no host syncs on a GPU.
    Source: the published interface of torchtitan's GroupedExperts.
    """
    gate_proj, up_proj, down_proj = (
        w.to_local() if isinstance(w, DTensor) else w for w in (gate_proj, up_proj, down_proj)
    )
    _checks.tensor("rows", rows, "R,H")
    _checks.tensor("rows_per_expert", rows_per_expert, "E", _checks.INTEGERS, like=rows)
    R, E = rows.shape[0], rows_per_expert.shape[0]
    for name, weight, meaning in (("gate_proj", gate_proj, "E,I,H"), ("down_proj", down_proj, "E,H,I")):
        _checks.tensor(name, weight, meaning, like=rows)
        _checks.shape(name, weight.shape, (E, *weight.shape[1:]), meaning)
    _checks.tensor("up_proj", up_proj, "E,I,H", like=rows)
    _checks.shape("up_proj", up_proj.shape, gate_proj.shape, "E,I,H")
    place = torch.arange(R, device=rows.device)
    expert = torch.searchsorted(rows_per_expert.cumsum(0), place, right=True)  # E: behind the last expert's
    ones = torch.ones(R, dtype=_checks.accumulator(rows.dtype), device=rows.device)
    plan = ops.dispatch_rows(ones, place, expert, R, E)
    return ops.moe_mlp(rows, plan, [gate_proj, up_proj], down_proj, backend=backend).to(rows.dtype)
