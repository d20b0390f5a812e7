"""The MoE layers of a model in the main job: the oracle's, of any rule, and ours in their place, asked alike.

Ours are made as a user makes them: token choice by `replace_moe`, the family's other rules as MoELayers on the oracle's
parameters. A call is what a layer was called with besides its images x (B, L, H).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from moe_kernels import (
    DiffMoE,
    ExpertChoice,
    ExpertRace,
    GroupLimitedChoice,
    MoELayer,
    ProMoE,
    Router,
    RouterCall,
    RoutingPlan,
    Scores,
    TokenChoice,
)
from moe_kernels.weights import stack_dit_moe
from reference import rooms
from reference.dit import DiTMoE
from reference.family import RoutedMoE, Rule
from reference.moe import spread_picks

ROUTERS: dict[str, Callable[[Rule], Router]] = {  # the rules of reference.family
    "token_choice": lambda rule: TokenChoice(rule.K),
    "expert_choice": lambda rule: ExpertChoice(rule.K),
    "nucleus": lambda rule: ExpertChoice(
        rule.K, scores=Scores("timestep_and_unmodulated"), rounding="ceil", renormalise=True, route_scale=2.5
    ),
    "dsmoe": lambda rule: GroupLimitedChoice(rule.K, rule.E, route_scale=2.0),
    "switch_dit": lambda rule: GroupLimitedChoice(rule.K, rule.E, scores=Scores("timestep"), renormalise=False),
    "expert_race": lambda rule: ExpertRace(rule.K),
    "diffmoe": lambda rule: DiffMoE(rule.E, rule.H, rule.K, sampling="token"),
    "promoe": lambda rule: ProMoE(rule.K, null_label=rule.null),
}


def replaced(model: DiTMoE, backend: str) -> DiTMoE:
    """Return a copy of the model whose MoE layers are ours, on `backend`."""
    model = copy.deepcopy(model)
    if model.config.router == "token_choice":
        moe_kernels.replace_moe(model, backend=backend)
        return model
    for block in model.blocks:
        block.moe = _as_layer(block.moe, ROUTERS[model.config.router], backend)
    return model


def _as_layer(block: RoutedMoE, router_of: Callable[[Rule], Router], backend: str) -> MoELayer:
    """Return our layer on the oracle's parameters and buffers, which carry the same names."""
    E, H, I = block.down_proj.shape
    with torch.device("meta"):
        router = router_of(block.router)
        layer = MoELayer(H, I, E, block.router.K, block.shared_down_proj.shape[1], router=router, backend=backend)
    layer.load_state_dict(block.state_dict(), assign=True)
    return layer.train(block.training)


def exact(model: nn.Module, layer: int) -> nn.Module:
    """Return a layer of the oracle's in float64."""
    return copy.deepcopy(model.blocks[layer].moe).double()


def route(block: nn.Module, x: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Return the weights (T, E) and picks (T, E) bool of a layer of the oracle's."""
    if isinstance(block, RoutedMoE):
        return block.route(x, **call)[:2]
    weights, ids, probs = rooms.gating(x.flatten(0, 1), block.gate.weight.to(x.dtype), block.num_experts_per_tok)
    return spread_picks(weights, ids, probs.shape[1])


def plan_of(layer: nn.Module, x: Tensor, **call: Any) -> RoutingPlan:
    """Return the plan that a layer of ours makes."""
    stacked = isinstance(layer, MoELayer)
    router, gate_weight = (layer.router, layer.gate_weight) if stacked else (layer.router(), layer.gate.weight)
    how = {"tokens_per_image": x.shape[1], "with_aux": False, **call}
    return router.plan(RouterCall(x.flatten(0, 1), gate_weight, backend_of(layer), **how))[0]


def reroute(layer: nn.Module, subclass: Callable[[type[Router]], type[Router]]) -> Callable[[], None]:
    """Let a layer of ours route by a subclass of its router's class; return what puts the old router back."""
    if isinstance(layer, MoELayer):
        router, layer.router = layer.router, copy.copy(layer.router)
        object.__setattr__(layer.router, "__class__", subclass(type(router)))
        return partial(setattr, layer, "router", router)
    config = layer.moe_config
    layer.moe_config = dataclasses.replace(config, router_class=subclass(config.router_class))
    return partial(setattr, layer, "moe_config", config)


def backend_of(layer: nn.Module) -> str:
    return layer.backend if isinstance(layer, MoELayer) else layer.moe_config.backend


def dense(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """Return a plan's weights (T, E) and picks (T, E) bool."""
    counts = plan.expert_offsets.diff().long()
    expert, rows = torch.arange(len(counts)).repeat_interleave(counts), int(counts.sum())
    at = plan.row_token[:rows].long(), expert
    picks = torch.zeros(plan.num_tokens, len(counts), dtype=torch.bool).index_put(at, torch.ones(rows).bool())
    weights = torch.zeros(picks.shape, dtype=plan.row_weight.dtype)
    return weights.index_put(at, plan.row_weight[:rows].detach()), picks


def expert_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return gate_up_proj (E, 2I, H) and down_proj (E, H, I) of any of these layers."""
    state = layer.state_dict()
    state = state if "down_proj" in state else stack_dit_moe(state)
    return state["gate_up_proj"], state["down_proj"]


def _renormalise(model: nn.Module) -> nn.Module:
    """Let a token's weights sum to one: what most MoE kernels do, and DiT-MoE does not."""
    for block in model.blocks:
        reroute(block.moe, _renormalised)
    return model


def _renormalised(router_class: type[Router]) -> type[Router]:
    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        plan, aux = super(renormalised, self).plan(call)
        rows = int(plan.expert_offsets[-1])
        token, weight = plan.row_token[:rows].long(), plan.row_weight.clone()
        weight[:rows] /= torch.zeros(plan.num_tokens, dtype=weight.dtype).index_add(0, token, weight[:rows])[token]
        return dataclasses.replace(plan, row_weight=weight), aux

    renormalised = type(router_class.__name__, (router_class,), {"plan": plan})
    return renormalised


@torch.no_grad()
def _drop_shared(model: nn.Module) -> nn.Module:
    for layer in (block.moe for block in model.blocks):
        shared = layer.shared_down_proj if isinstance(layer, MoELayer) else layer.shared_experts.down_proj.weight
        shared.zero_()
    return model


@torch.no_grad()
def _disturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layer = model.blocks[0].moe
    stacked = isinstance(layer, MoELayer)
    for weight in (layer.gate_up_proj[0], layer.down_proj[0]) if stacked else layer.experts[0].parameters():
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


SABOTAGES: dict[str, Callable[[nn.Module], nn.Module]] = {  # negative controls, each breaks a replaced model in place
    "renormalised top-k": _renormalise,
    "dropped shared expert": _drop_shared,
    "1 % error in one expert": _disturb,
}
