"""Where picks are made: the gates of the oracle and of the authors, replaced blocks, MoELayer with any router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.images.analysis.counts import Counter
from bench.images.layers import reroute
from moe_kernels import ExpertChoice, MoELayer, RoutingPlan
from moe_kernels.adapters.block import MoEBlock
from reference.family import RoutedMoE
from reference.moe import ExpertChoiceMoE
from reference.routing import expert_choice, take_tokens


def routed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that route, in its order; ValueError where there are none."""
    found = [
        module for module in model.modules() if isinstance(module, (MoEBlock, MoELayer, ExpertChoiceMoE, RoutedMoE))
    ]
    found = found or [
        m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.ModuleList) and hasattr(m, "gate")
    ]
    if not found:
        raise ValueError(
            f"model: found no routed layer in {type(model).__name__}, expected blocks with gate and experts"
        )
    return found


@contextmanager
def watch(model: nn.Module, counter: Counter) -> Iterator[Counter]:
    """Hand every pick of a model's routed layers to the counter; the model is as before afterwards.

    Replaced blocks and MoELayers: from the plan that the router makes, whatever the router. Other blocks with a gate:
    from what the gate returns, ids being what is an integer. The oracle's other rules: routed again from their input.
    Raises: ValueError for a model with another number of routed layers than the counter has.
    """
    layers = routed_layers(model)
    if len(layers) != counter.L:
        raise ValueError(f"counter: made for {counter.L} layers, but the model has {len(layers)}")
    undo = [_watch(module, partial(counter.take, layer)) for layer, module in enumerate(layers)]
    try:
        yield counter
    finally:
        for restore in undo:
            restore()


@contextmanager
def try_bfloat16(model: nn.Module, counter: Counter) -> Iterator[None]:
    """Route every input of the layers in bfloat16, too, and count which conditional picks come out again.

    Logits are a bfloat16 product of what the layer routes and its gate, rounded as torch rounds it; the softmax is
    float32. The layer's own picks are those of the weights' dtype. Cost: a second gating.
    """
    handles = [
        module.register_forward_pre_hook(partial(_try, counter, layer))
        for layer, module in enumerate(routed_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, take: Callable[..., None]) -> Callable[[], Any]:
    """Let `take` have what a layer picks, as T, E, cells and weights (Counter.take); return what ends it."""
    if isinstance(module, (MoEBlock, MoELayer)):
        return reroute(module, lambda router_class: _watched(router_class, take))
    if isinstance(module, RoutedMoE):
        hook = lambda m, args, call, output: take(*_dense(*m.route(args[0].detach(), **call)[:2]))  # noqa: E731
        return module.register_forward_hook(hook, with_kwargs=True).remove
    if isinstance(module, ExpertChoiceMoE):
        return module.register_forward_hook(lambda m, args, output: take(*_dense(*_expert_choice(m, args[0])))).remove
    return module.gate.register_forward_hook(lambda m, args, output: take(*_topk(m, output))).remove


def _watched(router_class: type, take: Callable[..., None]) -> type:
    """Return a subclass of a router's class that shows each plan it makes."""

    def plan(self, *args, **kwargs) -> tuple[RoutingPlan, Tensor | None]:
        made = super(watched, self).plan(*args, **kwargs)
        take(*_of_plan(made[0]))
        return made

    watched = type(router_class.__name__, (router_class,), {"plan": plan})
    return watched


def _of_plan(plan: RoutingPlan) -> tuple[int, int, Tensor, Tensor]:
    T, E = plan.num_tokens, plan.num_experts
    rows = torch.arange(plan.num_rows, device=plan.row_token.device, dtype=torch.int32)
    expert = torch.searchsorted(plan.expert_offsets[1:].contiguous(), rows, right=True, out_int32=True)
    cells = (plan.row_token.long() * E + expert).masked_fill_(expert == E, T * E)  # behind the rows: nobody's
    return T, E, cells, plan.row_weight


def _topk(gate: nn.Module, output: tuple[Tensor, ...]) -> tuple[int, int, Tensor, Tensor]:
    """Read a gate's ids and weights (T, K), in whichever order it returns them."""
    first, second = output[:2]
    ids, weights = (second, first) if first.is_floating_point() else (first, second)
    T, E = len(ids), gate.weight.shape[0]
    return T, E, torch.arange(T, device=ids.device)[:, None] * E + ids, weights


def _dense(weights: Tensor, picks: Tensor) -> tuple[int, int, Tensor, Tensor]:
    cells = picks.flatten().nonzero().squeeze(1)
    return *weights.shape, cells, weights.flatten()[cells]


def _expert_choice(module: ExpertChoiceMoE, x: Tensor) -> tuple[Tensor, Tensor]:
    group = module.tokens_per_group or x.shape[-2]
    return expert_choice(x.detach().flatten(0, -2), module.gate_weight, module.capacity_factor, group)


def _try(counter: Counter, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0].detach()
    gate = module.gate_weight if hasattr(module, "gate_weight") else module.gate.weight
    tokens = x.reshape(-1, x.shape[-1])
    if counter.guided:
        tokens = tokens[: len(tokens) // 2]
    exact, rounded = (
        nn.functional.linear(tokens.to(dtype), gate.detach().to(dtype)).float().softmax(-1)
        for dtype in (torch.promote_types(gate.dtype, torch.float32), torch.bfloat16)
    )
    rule = _rule(module, x.shape[-2])
    a, b = (rule(probs)[: counter.counted * x.shape[-2]] for probs in (exact, rounded))
    counter.survive(layer, a.sum(), (a & b).sum())


def _rule(module: nn.Module, tokens_per_image: int) -> Callable[[Tensor], Tensor]:
    """Return what makes of probabilities (T, E) the picks (T, E) bool, as the layer does."""
    router = getattr(module, "router", None)
    router = router() if isinstance(module, MoEBlock) else router
    choice = module if isinstance(module, ExpertChoiceMoE) else router
    if isinstance(choice, (ExpertChoiceMoE, ExpertChoice)):
        group = choice.tokens_per_group or tokens_per_image
        return lambda p: take_tokens(p, max(1, int(group * choice.capacity_factor / p.shape[1])), group)
    K = router.top_k if router is not None else module.num_experts_per_tok
    return lambda p: torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(K, dim=-1).indices, True)
