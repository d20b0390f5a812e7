"""What follows backward, on each rank's own parts: the norm of gradients on several meshes, and AdamW's step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.nn.utils import get_total_norm


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step is taken on the parts that a rank owns: parameters may be plain and on any meshes.

    torch's foreach and fused steps refuse plain parameters beside DTensors, which is what expert parallelism with DDP
    has, and its loop over DTensors takes 0.1 ms of the caller for each of a dozen operators a parameter. State dicts
    and checkpoints are those of torch.optim.AdamW, whose arguments it takes.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = own_parts(tensors)
        return has_complex


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their 2-norm over all ranks is at most max_norm, whatever mesh they lie on.

    torch.nn.utils.clip_grad_norm_ refuses parameters on two meshes.

    Args:
        parameters: plain ones, the same on all ranks, and DTensors on any meshes.
        max_norm: the bound; inf to learn the norm alone.
    Returns: the norm before, the same on all ranks.
    Cost: reads the gradients once; an all-reduce of one number for each mesh and dimension over which they are sharded.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    alike: dict[Any, list[Tensor]] = {}
    for grad in grads:
        alike.setdefault((grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None, []).append(grad)
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)  # squares of fp32 overflow
    for where, tensors in alike.items():
        groups = _sharded_over(*where) if where else ()
        if where and any(placement.is_partial() for placement in where[1]):
            tensors, groups = [t.full_tensor() for t in tensors], ()
        square = get_total_norm(own_parts(tensors)).double().square()
        for group in groups:
            distributed.all_reduce(square, group=group)
        total += square.to(total.device)
    norm = total.sqrt().to(grads[0].dtype)
    if max_norm < math.inf:
        for grad in own_parts(grads):
            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1).to(grad.device))
    return norm


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's parts of tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _sharded_over(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[distributed.ProcessGroup]:
    """Return the groups whose ranks have parts of a tensor, and not copies."""
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(dim) > 1]
    return [mesh.get_group(dim) for dim in dims]
