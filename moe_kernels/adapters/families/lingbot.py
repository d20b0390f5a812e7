"""LingBot-Video: gate and up as two stacks, router called as it is, padded tokens weigh nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..family import Family, Routed
from ..reading import Experts, Reader

KINDS = ("gate_proj", "up_proj", "down_proj")


class LingBot(Family):
    name = "LingBot-Video"
    classes = ("LingBotVideoSparseMoeBlock",)
    parts = ("router", "experts", "shared_experts")
    attributes = (
        ("router", nn.Module),
        ("router.route_scale", (int, float)),
        ("experts.w1", Tensor),
        ("experts.w2", Tensor),
        ("experts.w3", Tensor),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        gate, up, down = (read.parameter(block, f"experts.{name}") for name in ("w1", "w3", "w2"))
        return Experts([gate, up], [down], *read.mlps(block, "shared_experts", KINDS))

    def route(self, block: nn.Module, backend: str, x: Tensor, padding_mask: Tensor | None = None) -> Routed:
        tokens = x.reshape(-1, x.shape[-1])
        ids, weights = block.router(tokens)[:2]
        if padding_mask is not None:
            weights = weights * padding_mask[:, None].to(weights.dtype)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-9) * block.router.route_scale
        return Routed(tokens, ops.dispatch(ids, weights, block.experts.w1.shape[0], backend))

    def trial(self, block: nn.Module, x: Tensor) -> tuple[Any, ...]:
        return x, torch.arange(x.shape[0] * x.shape[1], device=x.device) % 5 > 0
