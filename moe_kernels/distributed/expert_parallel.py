"""Expert parallelism: each rank keeps some of a layer's experts, and tokens travel to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .. import _checks, ops
from ..adapters.block import MoEBlock
from ..layer import MoELayer
from ..plan import RoutingPlan
from ..weights import Biases
from .dispatchers import Dispatcher, ExactDispatcher
from .in_sync import check_in_sync

EP = "ep"
EXPERTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")  # biases where a layer has them


class ExpertParallelLayer(MoELayer):
    """A MoELayer whose class `expert_parallel` has changed; same arguments, results and parameter names.

    The routed experts' matrices and biases are DTensors, Shard(0) over the mesh dimension "ep"; the rest is as it was.
    Their gradients are means over the ranks' losses, as those of DDP and FSDP2: the sum over the ranks whose tokens
    came, divided by the ranks of "ep".

    dropped_rows: int64, how many rows of this rank a BoundedDispatcher with overflow "drop" has dropped so far.
    """

    ep_mesh: DeviceMesh
    dispatcher: Dispatcher
    dropped_rows: Tensor

    def _mlp(
        self,
        x: Tensor,
        plan: RoutingPlan,
        gate_up_proj: DTensor,
        down_proj: DTensor,
        shared_gate_up_proj: Tensor | None,
        shared_down_proj: Tensor | None,
        activation: str,
        layout: str,
        backend: str,
        recompute: bool,
        biases: Biases | None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Compute what `moe_mlp` documents."""
        x = x.to(_checks.compute_dtype(x))
        plan = _checks.plan(plan, x.shape[0], x)
        biases = Biases() if biases is None else biases
        how = {"activation": activation, "layout": layout, "backend": backend}

        def take(plan: RoutingPlan) -> Tensor:
            return TakeRows.apply(x, backend, *plan.tensors())

        arrived = self.dispatcher.send(take, plan, self.ep_mesh)
        shared = None
        if shared_down_proj is not None:  # before anybody waits for the rows
            one = shared_gate_up_proj[None], shared_down_proj[None]
            shared = ops.experts(x, _all_to_one(x), *one, biases=_each(lambda bias: bias[None], biases[2:]), **how)
        if arrived.dropped is not None:
            self.dropped_rows += arrived.dropped
        weights = self._own(gate_up_proj), self._own(down_proj)
        own = _plan_of_rows(arrived.expert_ids, x, len(weights[0]), backend)
        of_own = _each(self._own, biases[:2])
        y = ops.moe_mlp(arrived.rows(), own, *weights, recompute=recompute, biases=of_own, **how)
        y = arrived.back(y)
        y = ops.combine(y, plan.first(len(y)), shared, backend)
        return y if residual is None else add_gated(residual, gate, y)

    def _own(self, whole: DTensor) -> Tensor:
        """Return what this rank has of a parameter of all experts."""
        return MeanGradient.apply(whole.to_local(), self.ep_mesh.size())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ep={self.ep_mesh.size()}, dispatcher={self.dispatcher}"


class TakeRows(torch.autograd.Function):
    """x[row_token]; backward sums a token's rows in the accumulation dtype and in a fixed order, as `combine` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str, *plan: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*plan)
        return x.index_select(0, RoutingPlan(*plan).row_token)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked once: under activation checkpointing they are gone then
        plan = RoutingPlan(torch.ones_like(saved[0]), *saved[1:])
        return ops.combine(drows, plan, backend=ctx.backend), None, *(None for _ in saved)


class MeanGradient(torch.autograd.Function):
    """The identity; its gradient, a sum over ranks, becomes their mean."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        return dweight / ctx.ranks, None


def expert_parallel(module: nn.Module, mesh: DeviceMesh, dispatcher: Dispatcher | None = None) -> nn.Module:
    """Distribute the experts of every MoELayer in `module` over the mesh dimension "ep", in place.

    Rank r of n keeps the experts r E/n to (r+1) E/n; rows travel by all-to-all, and the shared expert is computed
    meanwhile. Outputs and gradients are those of one process that computes each rank's batch by itself and takes the
    mean of the losses: token choice, and expert choice with groups inside a rank. Ranks may have batches of different
    sizes, or none.

    Args:
        module: a MoELayer, a block or a model; all ranks have the same weights (checked, except on meta devices).
        mesh: has a dimension "ep"; along others, experts are replicated: see `fully_shard` and `data_parallel` here.
        dispatcher: ExactDispatcher() by default, or a BoundedDispatcher.
    Returns: module. Call it before `fully_shard`, DDP, torch.compile and the making of an optimizer.
    Raises: TypeError, ValueError naming the argument; ValueError where ranks differ, on all of them.
    Cost: forward and backward each send 2 R H elements per layer, (n-1)/n of it to other ranks if experts are evenly
        used; ExactDispatcher waits for the device once.
    Source: GShard (arXiv 2006.16668).
    """
    ep = _ep_mesh(mesh)
    layers = _layers(module)
    dispatcher = ExactDispatcher() if dispatcher is None else dispatcher
    if not callable(getattr(dispatcher, "send", None)):
        raise TypeError(f"dispatcher: got {type(dispatcher).__name__}, expected one with a method send")
    for name, layer in layers.items():
        E = layer.down_proj.shape[0]
        if isinstance(layer, ExpertParallelLayer) or isinstance(layer.down_proj, DTensor):
            raise ValueError(f"module: got {name} with distributed weights, expected one that holds all its experts")
        if E % ep.size():
            raise ValueError(
                f"module: got num_experts = {E} in {name}, expected a multiple of the {ep.size()} ranks of mesh {EP!r}"
            )
    check_in_sync(module, mesh)
    for layer in layers.values():
        layer.__class__ = _class_of(type(layer))
        layer.ep_mesh, layer.dispatcher = ep, dispatcher
        zero = torch.zeros((), dtype=torch.int64, device=layer.gate_weight.device)
        layer.register_buffer("dropped_rows", zero, persistent=False)
        for name, whole in experts_of(layer).items():
            own = whole.detach().chunk(ep.size())[ep.get_local_rank()].clone()
            own = DTensor.from_local(own, ep, [Shard(0)], run_check=False)
            setattr(layer, name, nn.Parameter(own, requires_grad=whole.requires_grad))
    return module


def experts_of(layer: MoELayer) -> dict[str, nn.Parameter]:
    """Return the parameters of the routed experts, by name: what is split over "ep"."""
    return {name: p for name in EXPERTS if (p := getattr(layer, name)) is not None}


def _class_of(cls: type[MoELayer]) -> type[MoELayer]:
    """Return ExpertParallelLayer, in front of a class of the user's own."""
    return ExpertParallelLayer if cls is MoELayer else type(cls.__name__, (ExpertParallelLayer, cls), {})


def _ep_mesh(mesh: DeviceMesh) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: got {type(mesh).__name__}, expected a DeviceMesh")
    if EP not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"mesh: got dimensions {mesh.mesh_dim_names}, expected one called {EP!r}")
    return mesh[EP]


def _layers(module: nn.Module) -> dict[str, MoELayer]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected an nn.Module")
    for name, child in module.named_modules():
        if isinstance(child, MoEBlock):
            raise ValueError(
                f"module: got a replaced block at {name or 'the root'}, expected MoELayer: its experts are modules of "
                "their own, and none can be split over ranks; `stack_experts` makes MoELayers of DiT-MoE's blocks"
            )
    layers = {name or "the root": child for name, child in module.named_modules() if isinstance(child, MoELayer)}
    if not layers:
        raise ValueError(f"module: got {type(module).__name__} without a MoELayer, expected one or more")
    return layers


def _plan_of_rows(expert_ids: Tensor, x: Tensor, num_experts: int, backend: str) -> RoutingPlan:
    ones = torch.ones(expert_ids.shape[0], 1, dtype=_checks.accumulator(x.dtype), device=x.device)
    return ops.dispatch(expert_ids[:, None], ones, num_experts, backend)


def _each(of: Callable[[Tensor], Tensor], biases: Sequence[Tensor | None]) -> Biases:
    """Return a function of two biases, of which any may be missing, as those of routed experts."""
    return Biases(*(bias if bias is None else of(bias) for bias in biases))


def _all_to_one(x: Tensor) -> RoutingPlan:
    """Return the plan of one expert that gets every token of x (T, H), without the call that dispatches."""
    tokens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    ones = torch.ones(x.shape[0], dtype=_checks.accumulator(x.dtype), device=x.device)
    each, all_of_them = tokens[:-1], tokens[-1:]
    return RoutingPlan(ones, all_of_them, torch.cat([tokens[:1], all_of_them]), each, each, tokens, each)


def add_gated(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return residual + gate_b y (T, H), b the image of a token, in the dtype of residual."""
    wide = _checks.accumulator(residual.dtype)
    images = y.view(gate.shape[0], -1, y.shape[1])
    return (residual + (images.to(wide) * gate[:, None].to(wide)).view(y.shape)).to(residual.dtype)
