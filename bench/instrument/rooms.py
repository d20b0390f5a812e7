"""How the rooms and the layer are called: one function each, for a backend of ours and for the oracle's code alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import moe_kernels
import reference.moe
import reference.rooms
from bench.instrument.shapes import MoEShape
from reference import routers

PLAN = reference.rooms.Plan._fields
ROOMS = ("gating", "dispatch", "dispatch_expert_choice", "experts", "combine")


@dataclass(frozen=True)
class Op:
    """How a room, or the layer, is called on inputs p: call(p, ours(backend)) and call(p, PLAIN) return the outputs."""

    call: Callable[[SimpleNamespace, Any], Sequence[Tensor]]
    leaves: tuple[str, ...]
    outputs: tuple[str, ...]


def gating(p: SimpleNamespace, rooms: Any) -> Sequence[Tensor]:
    return rooms.gating(p.x, p.gate_weight, p.shape.K)


def dispatch(p: SimpleNamespace, rooms: Any) -> Sequence[Tensor]:
    if p.affinities is None:
        plan = rooms.dispatch(p.topk_ids, p.topk_weights, p.shape.E)
    elif p.rule == "race":
        plan = rooms.race(p.affinities, p.affinities.shape[0] * p.shape.K)
    elif p.rule == "group_limited":
        groups = 4 if p.shape.E % 4 == 0 else 1
        plan = rooms.group_limited(p.affinities, p.shape.K, groups, (groups + 1) // 2)
    else:
        plan = rooms.dispatch_expert_choice(p.affinities, *_capacity(p.shape))
    return [getattr(plan, name) for name in PLAN]


def _capacity(shape: MoEShape) -> tuple[int, int]:
    """Return tokens per expert and image, such that a token is taken K times on average, and tokens per image."""
    return max(1, shape.tokens_per_image * shape.K // shape.E), shape.tokens_per_image


def experts(p: SimpleNamespace, rooms: Any) -> Sequence[Tensor]:
    return [rooms.experts(p.x, p.plan, p.gate_up_proj, p.down_proj, p.shape.activation)]


def combine(p: SimpleNamespace, rooms: Any) -> Sequence[Tensor]:
    return [rooms.combine(p.y_rows, replace(p.plan, row_weight=p.row_weight), p.shared)]


def layer(p: SimpleNamespace, rooms: Any) -> Sequence[Tensor]:
    weights = p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj
    return [rooms.moe(p.x, p.topk_weights, p.topk_ids, *weights, p.shape.activation)]


@cache
def ours(backend: str) -> SimpleNamespace:
    """Return our rooms, and the layer on given picks, on a backend: names as in PLAIN, every argument by position."""

    def on_backend(room: str) -> Callable:
        # Looked up when it is called: of two revisions that are compared one may lack a room.
        return lambda *args: getattr(moe_kernels, room)(*args, backend)

    def moe(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, *weights: Any) -> Tensor:
        plan = moe_kernels.dispatch(topk_ids, topk_weights, gate_up_proj.shape[0], backend)
        return moe_kernels.moe_mlp(x, plan, gate_up_proj, *weights, backend=backend)

    def race(scores: Tensor, count: int) -> moe_kernels.RoutingPlan:
        picks, _ = moe_kernels.ops.select_top(scores.view(1, -1, 1), count, backend)
        return moe_kernels.dispatch_mask(scores, picks.view(scores.shape), count, backend)

    def group_limited(scores: Tensor, top_k: int, groups: int, taken: int) -> moe_kernels.RoutingPlan:
        topk_ids = moe_kernels.ops.select_experts(scores, top_k, groups, taken, backend)
        return moe_kernels.dispatch(topk_ids, scores.gather(1, topk_ids.long()), scores.shape[1], backend)

    return SimpleNamespace(
        moe=moe, race=race, group_limited=group_limited, **{room: on_backend(room) for room in ROOMS}
    )


def _race(scores: Tensor, count: int) -> reference.rooms.Plan:
    return reference.rooms.dispatch_mask(scores, routers.race(scores, count, scores.shape[0]))


def _group_limited(scores: Tensor, top_k: int, groups: int, taken: int) -> reference.rooms.Plan:
    _, picks = routers.group_limited_choice(scores, top_k, groups, taken)
    best = scores.masked_fill(~picks, -math.inf).sort(dim=-1, descending=True, stable=True)
    return reference.rooms.dispatch(best.indices[:, :top_k], best.values[:, :top_k], scores.shape[1])


PLAIN = SimpleNamespace(
    moe=reference.moe.moe,
    race=_race,
    group_limited=_group_limited,
    **{room: getattr(reference.rooms, room) for room in ROOMS},
)
OPS = {
    "gating": Op(gating, ("x", "gate_weight"), ("topk_weights", "topk_ids", "probs")),
    "dispatch": Op(dispatch, (), PLAN),
    "experts": Op(experts, ("x", "gate_up_proj", "down_proj"), ("y_rows",)),
    "combine": Op(combine, ("y_rows", "row_weight", "shared"), ("out",)),
    "layer": Op(
        layer,
        ("x", "topk_weights", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"),
        ("out",),
    ),
}
