"""Expert parallelism beside FSDP2 and DDP."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .expert_parallel import EP, ExpertParallelLayer, experts_of

Unit = TypeVar("Unit", nn.Module, list[nn.Module])
POLICIES = {"mp_policy", "offload_policy"}  # of FSDP2, about parameters


def fully_shard(module: Unit, mesh: DeviceMesh, **options: Any) -> Unit:
    """Apply FSDP2's fully_shard to a unit that may hold expert-parallel layers.

    Experts, which are split over "ep" already, are sharded over the other dimension of mesh; all other parameters over
    all its ranks. Gradients are means over the ranks of mesh. Where the other dimension is 1, FSDP2 has nothing to do
    with experts and ignores them, unless a policy says in which dtype they compute or where they lie.

    Args:
        module: the unit, or a list of modules that are one unit, after `expert_parallel`; as ever, inner units first.
        mesh: two-dimensional; one dimension is "ep".
        options: of torch.distributed.fsdp.fully_shard, but for mesh and shard_placement_fn.
    Returns: module.
    Raises: ValueError for another mesh; RuntimeError where torch cannot place parameters of one unit on two meshes.
    Source: torch.distributed.fsdp.fully_shard.
    """
    other = _other_dimension(mesh)
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError as error:
        raise RuntimeError(f"torch: got {torch.__version__}, expected 2.13 or later ({error})") from None
    if mesh[EP].size() == 1:  # one mesh for all, which FSDP2 wants to be told once
        return fsdp.fully_shard(module, mesh=mesh[other], **options)
    everybody = mesh._flatten(f"all_of_{'_'.join(mesh.mesh_dim_names)}")
    experts = _experts(module)
    if mesh[other].size() == 1 and not POLICIES & options.keys():
        ignored = options.pop("ignored_params", None) or set()
        return fsdp.fully_shard(module, mesh=everybody, ignored_params=ignored | set(experts), **options)
    ids = {id(p) for p in experts}
    placement = ShardPlacementResult(None, FSDPMeshInfo(mesh[other], shard_mesh_dim=0))

    def place(parameter: nn.Parameter) -> Any:
        return placement if id(parameter) in ids else None

    return fsdp.fully_shard(module, mesh=everybody, shard_placement_fn=place, **options)


def data_parallel(module: nn.Module, mesh: DeviceMesh, **options: Any) -> DistributedDataParallel:
    """Wrap a model with expert-parallel layers in DDP over all ranks of mesh.

    DDP does not take DTensors: it ignores the experts, and their gradients become means over the dimension of mesh that
    is not "ep" when backward has made them. In DDP's no_sync they do so, too, which changes nothing but the cost.

    Args:
        module: the whole model, after `expert_parallel`.
        mesh: of one dimension, "ep", or two; it holds the ranks of the job.
        options: of DistributedDataParallel.
    Returns: the wrapper.
    Raises: ValueError for another mesh.
    """
    names = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
    names += [name for name, _ in module.named_buffers() if name.rpartition(".")[2] == "dropped_rows"]
    at_the_root = [f".{name}" for name in names if "." not in name]  # as DDP calls those
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names + at_the_root)
    group = mesh.get_group(_other_dimension(mesh)) if mesh.ndim > 1 else None
    if group is not None and group.size() > 1:

        def average(parameter: nn.Parameter) -> None:
            distributed.all_reduce(parameter.grad.to_local().div_(group.size()), group=group)

        for parameter in _experts(module):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)
    return DistributedDataParallel(module, **options)


def _experts(module: nn.Module | list[nn.Module]) -> list[nn.Parameter]:
    modules = module if isinstance(module, list) else [module]
    layers = [layer for unit in modules for layer in unit.modules() if isinstance(layer, ExpertParallelLayer)]
    return [p for layer in layers for p in experts_of(layer).values()]


def _other_dimension(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or ()
    if len(names) != 2 or EP not in names:
        raise ValueError(f"mesh: got dimensions {names}, expected two, one of them {EP!r}")
    return next(name for name in names if name != EP)
