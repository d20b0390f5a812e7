"""Checks that what all ranks must share is equal: nothing else reports that replicas drift apart."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_in_sync(module: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Check that the modules, and all parameters and buffers that are not DTensors, are the same on all ranks of mesh.

    Collective. Sums of bits are compared; tensors on meta devices by shape and dtype.

    Args:
        module: a layer or a model; what is sharded, hence not to be the same, is left out.
        mesh: of any dimensions; None for all ranks of the job.
    Raises: ValueError naming the first difference, on all ranks.
    Cost: reads the parameters once; one all_gather_object for each dimension.
    """
    found = [{"modules": str(module)} | {name: _fingerprint(t) for name, t in _replicated(module)}]
    for group in [None] if mesh is None else mesh.get_all_groups():
        gathered = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(gathered, found, group)
        found = [description for part in gathered for description in part]
    first, *others = found
    for other in others:
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                got = " and ".join(" ".join(str(of.get(name, "nothing")).split()) for of in (first, other))
                raise ValueError(f"module: got different {name} on the ranks ({got}), expected the same on all of them")


def _replicated(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, t) for name, t in named if not isinstance(t, DTensor) and not name.endswith("dropped_rows")]


def _fingerprint(t: Tensor) -> tuple:
    bits = None
    if not t.is_meta:
        bits = int(t.detach().contiguous().view(-1).view(INTEGERS[t.element_size()]).sum(dtype=torch.int64))
    return tuple(t.shape), str(t.dtype), bits
