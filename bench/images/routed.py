"""The family's other rules in the main job: what the oracle's rules are in the product, and the parity ladder for them.

Every rule routes an image by itself in eval mode, so a probe is whole images with all that the layer was called with.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from bench.images import parity
from bench.images.hooks import looking_at
from bench.instrument.verify import whole_error
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
from reference import rooms
from reference.dit import DiTMoE
from reference.family import RoutedMoE, Rule

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
Call = dict[str, Any]


def as_layer(block: RoutedMoE, rule: str, backend: str) -> MoELayer:
    """Return our layer on the oracle's parameters and buffers, which carry the same names."""
    E, H, I = block.down_proj.shape
    with torch.device("meta"):
        router = ROUTERS[rule](block.router)
        layer = MoELayer(H, I, E, block.router.K, block.shared_down_proj.shape[1], router=router, backend=backend)
    layer.load_state_dict(block.state_dict(), assign=True)
    return layer.train(block.training)


def replaced(model: DiTMoE, backend: str) -> DiTMoE:
    """Return a copy of the model with our layers in the place of the oracle's."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.moe = as_layer(block.moe, model.config.router, backend)
    return model


def ladder(model: DiTMoE, *settings: Any) -> parity.Ladder:
    """Return the ladder for a model's rule; arguments as those of `parity.Ladder`."""
    kind = parity.Ladder if model.config.router == "token_choice" else RoutedLadder
    return kind(model, *settings)


def plan_of(layer: MoELayer, x: Tensor, router_input: Tensor, conditioning: Call) -> RoutingPlan:
    """Return the plan that our layer's router makes for images x (B, L, H)."""
    call = RouterCall(
        x.flatten(0, 1), layer.gate_weight, layer.backend, tokens_per_image=x.shape[1], with_aux=False,
        router_input=router_input, conditioning=conditioning,
    )  # fmt: skip
    return layer.router.plan(call)[0]


def dense(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """Return a plan's weights (T, E) and picks (T, E) bool."""
    counts = plan.expert_offsets.diff().long()
    expert, rows = torch.arange(len(counts)).repeat_interleave(counts), int(counts.sum())
    at = plan.row_token[:rows].long(), expert
    picks = torch.zeros(plan.num_tokens, len(counts), dtype=torch.bool).index_put(at, torch.ones(rows).bool())
    weights = torch.zeros(picks.shape, dtype=plan.row_weight.dtype)
    return weights.index_put(at, plan.row_weight[:rows].detach()), picks


def cast(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a call's arguments with every real tensor changed."""
    if isinstance(value, dict):
        return {name: cast(v, change) for name, v in value.items()}
    return change(value) if value.is_floating_point() else value


class RoutedLadder(parity.Ladder):
    """The ladder for a model of RoutedMoE layers; a probe is (layer, x (B, L, H), what else the layer was called with).

    Rung 1 compares who was picked, and the weights; the plan's own rules are checked by its `validate`.
    """

    @property
    def sabotages(self) -> dict[str, Callable[[nn.Module], nn.Module]]:
        return SABOTAGES

    def replaced(self, model: nn.Module, backend: str) -> nn.Module:
        return replaced(model, backend)

    def _probed(self, model: nn.Module, count: int | None) -> tuple[Tensor, Tensor, list, int]:
        seen, kept = [0] * len(model.blocks), []
        calls = self._calls

        def look(layer: int, args: tuple[Tensor, ...], _: object, **call: Any) -> None:
            if seen[layer] in calls:
                kept.append((layer, *self._some(layer + seen[layer], args[0], call)))
            seen[layer] += 1

        with looking_at((block.moe for block in model.blocks), look):
            samples, routing = self.draw(model, count)
        probes, ties = [], 0
        for layer, x, call in kept:
            clear = clear_images(exact_of(model, layer), x, call)
            ties += int((~clear).sum()) * x.shape[1]
            probes.append((layer, x[clear], take(call, clear)))
        return samples, routing, probes, ties

    def _some(self, seed: int, x: Tensor, call: Call) -> tuple[Tensor, Call]:
        """Keep as many random images of a call as make up the case's number of tokens."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=generator)[: max(1, self.case.probe_tokens // 3 // x.shape[1])]
        return x[chosen], take(call, chosen)

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect a bit mask of picked experts (images, tokens) for call, by the oracle's float32 rule for all."""
        masks: list[Tensor] = []

        def look(layer: int, args: tuple[Tensor, ...], _: object, **call: Any) -> None:
            x, rule = args[0], self.model.blocks[layer].moe
            picks = rule.route(x.float(), **cast(call, lambda t: t.float()))[1]
            bits = (picks.long() << torch.arange(picks.shape[1])).sum(-1)
            masks.append(bits.view(x.shape[:2]).to(torch.uint8 if picks.shape[1] <= 8 else torch.int64))

        with looking_at((block.moe for block in model.blocks), look):
            yield masks

    @torch.no_grad()
    def plans(self, model: nn.Module, baseline: parity.Baseline) -> dict:
        same, worst = True, 0.0
        for layer, x, call in baseline.probes:
            weights, picks, _ = exact_of(baseline.model, layer).route(x.double(), **cast(call, Tensor.double))
            plan = plan_of(model.blocks[layer].moe, x, **call)
            plan.validate()
            (ours, mine), (theirs, _) = dense(plan), dense(plan_of(baseline.rival.blocks[layer].moe, x, **call))
            same &= torch.equal(mine, picks)
            if same:
                worst = max(worst, parity.ratio(ours, theirs, torch.where(picks, weights, 0)))
        passed = same and worst <= 2
        verdict = parity.PASS if passed else parity.FAIL
        return {"plans": verdict, "plans_equal": same, "weights_ratio": worst, "ties": baseline.ties}

    @torch.no_grad()
    def layers(self, model: nn.Module, baseline: parity.Baseline) -> dict:
        outputs, slices, error = 0.0, 0.0, 0.0
        for layer, x, call in baseline.probes:
            block, wide = exact_of(baseline.model, layer), cast(call, Tensor.double)
            exact = block(x.double(), **wide).flatten(0, 1)
            layers = [m.blocks[layer].moe for m in (model, baseline.rival)]
            ours, theirs = (moe(x, **call).double().flatten(0, 1) for moe in layers)
            error = max(error, parity.quotient(whole_error(ours, exact), 1.0))
            outputs = max(outputs, parity.ratio(ours, theirs, exact), parity.rows_ratio(ours, theirs, exact))
            slices = max(slices, experts_ratio(layers, x.flatten(0, 1), block, model.config.top_k))
        verdict = parity.PASS if max(outputs, slices) <= 2 else parity.FAIL
        return {"layers": verdict, "e_ours": error, "outputs_ratio": outputs, "experts_ratio": slices}


def experts_ratio(layers: list[MoELayer], x: Tensor, exact: RoutedMoE, top_k: int) -> float:
    """Return the largest error of one expert's rows, ours over the rival's, on a plan that reaches all experts."""
    plan = parity.even_plan(len(x), top_k, len(exact.down_proj))
    counts = plan.expert_counts.tolist()
    wide = rooms.experts(x.double(), plan, exact.gate_up_proj, exact.down_proj).split(counts)
    rows = [
        moe_kernels.experts(x, plan, moe.gate_up_proj, moe.down_proj, backend=moe.backend).double().split(counts)
        for moe in layers
    ]
    return max(parity.ratio(*parts) for parts in zip(*rows, wide, strict=True))


def exact_of(model: nn.Module, layer: int) -> RoutedMoE:
    """Return a layer of the oracle's in float64."""
    return copy.deepcopy(model.blocks[layer].moe).double()


def take(call: Call, images: Tensor) -> Call:
    """Return what a call says of some of its images."""
    return {name: take(v, images) if isinstance(v, dict) else v[images] for name, v in call.items()}


@torch.no_grad()
def clear_images(block: RoutedMoE, x: Tensor, call: Call) -> Tensor:
    """Mark the images (B,) whose picks stay when all that is scored is moved by TIE of its size."""
    generator = torch.Generator().manual_seed(0)
    picks = []
    for sign in (0.0, 1.0, -1.0):

        def moved(t: Tensor, sign: float = sign) -> Tensor:
            t = t.double()
            return t + sign * parity.TIE * t.std() * torch.randn(t.shape, generator=generator, dtype=t.dtype)

        picks.append(block.route(moved(x), **cast(call, moved))[1].view(len(x), -1))
    return ((picks[0] == picks[1]) & (picks[0] == picks[2])).all(1)


def _renormalise(model: nn.Module) -> nn.Module:
    """Let a token's weights sum to one."""
    for block in model.blocks:
        router = block.moe.router
        object.__setattr__(router, "__class__", _renormalised(type(router)))
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
    for block in model.blocks:
        block.moe.shared_down_proj.zero_()
    return model


@torch.no_grad()
def _disturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layer = model.blocks[0].moe
    for weight in (layer.gate_up_proj[0], layer.down_proj[0]):
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


SABOTAGES = dict(zip(parity.SABOTAGES, (_renormalise, _drop_shared, _disturb), strict=True))
