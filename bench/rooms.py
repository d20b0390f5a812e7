"""How the rooms and the layer are called: by their public function on a backend, and by the oracle's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

import moe_kernels
import reference.moe
import reference.routing
from bench.shapes import MoEShape

PLAN = ("expert_counts", "row_token", "row_weight", "row_pick", "token_rows")


@dataclass(frozen=True)
class Op:
    """How a room, or the layer, is called on inputs p: ours(p, backend) and plain(p) both return the outputs."""

    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    ours: Callable[[SimpleNamespace, str], Sequence[Tensor]]
    plain: Callable[[SimpleNamespace], Sequence[Tensor]]


def _plain_gating(p: SimpleNamespace) -> Sequence[Tensor]:
    wide = torch.promote_types(p.x.dtype, torch.float32)
    return reference.routing.token_choice(p.x.to(wide), p.gate_weight.to(wide), p.shape.K)


def _plain_dispatch(p: SimpleNamespace) -> Sequence[Tensor]:
    if p.affinities is not None:
        return _plain_expert_choice(p.affinities, *_capacity(p.shape))
    flat = p.topk_ids.long().flatten()
    row_pick = flat.argsort(stable=True)
    row_token = row_pick // p.shape.K
    counts = flat.bincount(minlength=p.shape.E)
    return counts, row_token, p.topk_weights.flatten()[row_pick], row_pick, row_token.argsort(stable=True)


def _plain_expert_choice(affinities: Tensor, capacity: int, tokens_per_image: int) -> Sequence[Tensor]:
    images = affinities.view(-1, tokens_per_image, affinities.shape[1])
    best = images.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    picks = torch.zeros_like(images, dtype=torch.bool).scatter_(1, best, True).view_as(affinities)
    expert, row_token = picks.T.nonzero().unbind(1)
    row_pick = row_token * affinities.shape[1] + expert
    return picks.sum(0), row_token, affinities.flatten()[row_pick], row_pick, row_token.argsort(stable=True)


def _capacity(shape: MoEShape) -> tuple[int, int]:
    """Return tokens per expert and image, such that a token is taken K times on average, and tokens per image."""
    return max(1, shape.tokens_per_image * shape.K // shape.E), shape.tokens_per_image


def _ours_dispatch(p: SimpleNamespace, backend: str) -> Sequence[Tensor]:
    if p.affinities is None:
        plan = moe_kernels.dispatch(p.topk_ids, p.topk_weights, p.shape.E, backend)
    else:
        plan = moe_kernels.dispatch_expert_choice(p.affinities, *_capacity(p.shape), backend)
    return [getattr(plan, name) for name in PLAN]


def _plain_experts(p: SimpleNamespace) -> Sequence[Tensor]:
    rows = p.x[p.plan.row_token.long()].split(p.plan.expert_counts.tolist())
    weights = zip(rows, p.gate_up_proj, p.down_proj, strict=True)
    return [torch.cat([reference.moe.expert_mlp(*args, p.shape.activation) for args in weights])]


def _plain_combine(p: SimpleNamespace) -> Sequence[Tensor]:
    weighted = p.row_weight[:, None] * p.y_rows
    out = torch.zeros_like(p.shared, dtype=weighted.dtype).index_add(0, p.plan.row_token.long(), weighted)
    return [(p.shared + out).to(p.y_rows.dtype)]


def _ours_layer(p: SimpleNamespace, backend: str) -> Sequence[Tensor]:
    plan = moe_kernels.dispatch(p.topk_ids, p.topk_weights, p.shape.E, backend)
    return [moe_kernels.moe_mlp(p.x, plan, *_weights(p), activation=p.shape.activation, backend=backend)]


def _weights(p: SimpleNamespace) -> Sequence[Tensor | None]:
    return p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj


OPS = {
    "gating": Op(
        ("x", "gate_weight"),
        ("topk_weights", "topk_ids", "probs"),
        lambda p, backend: moe_kernels.gating(p.x, p.gate_weight, p.shape.K, backend),
        _plain_gating,
    ),
    "dispatch": Op((), PLAN, _ours_dispatch, _plain_dispatch),
    "experts": Op(
        ("x", "gate_up_proj", "down_proj"),
        ("y_rows",),
        lambda p, backend: [moe_kernels.experts(p.x, p.plan, *_weights(p)[:2], p.shape.activation, backend)],
        _plain_experts,
    ),
    "combine": Op(
        ("y_rows", "row_weight", "shared"),
        ("out",),
        lambda p, backend: [moe_kernels.combine(p.y_rows, replace(p.plan, row_weight=p.row_weight), p.shared, backend)],
        _plain_combine,
    ),
    "layer": Op(
        ("x", "topk_weights", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"),
        ("out",),
        _ours_layer,
        lambda p: [reference.moe.moe(p.x, p.topk_weights, p.topk_ids, *_weights(p), p.shape.activation)],
    ),
}
