"""How a model lies on the ranks: whole on each (DDP), in parts (FSDP2), or with experts divided beside either."""

from __future__ import annotations

from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bench.training.processes import Ranks
from moe_kernels.distributed import data_parallel, expert_parallel, fully_shard
from moe_kernels.distributed.optimizer import own_parts

LAYOUTS = ("ddp", "fsdp", "ep", "ep-ddp")
UNIT_BYTES = 25 << 20  # as DDP sends gradients


def check(parallel: str | None, ep: int | None, num_experts: int, batch: int, ranks: Ranks) -> int:
    """Return how many ranks share a layer's experts: 1, or with "ep" and "ep-ddp" --ep, by default all.

    Raises: ValueError naming the argument, what came and what was expected.
    """
    if batch < ranks.world:
        raise ValueError(f"--batch: got {batch}, expected at least one image for each of the {ranks.world} processes")
    if parallel not in ("ep", "ep-ddp"):
        if ep:
            raise ValueError(f"--ep: got {ep} with --parallel {parallel}, expected --parallel ep or ep-ddp")
        return 1
    sharing = ep or ranks.world
    if ranks.world % sharing:
        raise ValueError(f"--ep: got {sharing}, expected a divisor of the {ranks.world} processes")
    if num_experts % sharing:
        raise ValueError(f"--ep: got {sharing}, expected a divisor of the model's {num_experts} experts")
    return sharing


def distribute(model: nn.Module, parallel: str | None, sharing: int, ranks: Ranks) -> nn.Module:
    """Distribute a DiTMoE with stacked experts; None with one process leaves it as it is. Collective."""
    kind = ranks.device.type
    if parallel is None:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp":
        mesh = init_device_mesh(kind, (ranks.world,), mesh_dim_names=("dp",))
        for unit in (*units(model), model):
            fsdp.fully_shard(unit, mesh=mesh)
        return model
    mesh = init_device_mesh(kind, (ranks.world // sharing, sharing), mesh_dim_names=("dp", "ep"))
    expert_parallel(model, mesh)
    if parallel == "ep-ddp":
        return data_parallel(model, mesh)
    for unit in (*units(model, mesh["dp"].size() > 1), model):
        fully_shard(unit, mesh)
    return model


def units(model: nn.Module, experts: bool = True) -> list[list[nn.Module]]:
    """Return which consecutive blocks FSDP2 gathers together: at least UNIT_BYTES, with or without divided experts.

    The last ones, where they hold less, are left to the model's own unit, which is gathered once a step. So a small
    model is one unit: a unit costs gathers, a reduction and hooks, however little it holds.
    """
    found, unit, held = [], [], 0
    for block in model.blocks:
        unit.append(block)
        gathered = [p for p in block.parameters() if experts or not isinstance(p, DTensor)]
        held += sum(part.nbytes for part in own_parts(gathered))
        if held >= UNIT_BYTES:
            found.append(unit)
            unit, held = [], 0
    return found
