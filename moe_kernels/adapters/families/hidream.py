"""HiDream-I1 and -E1: experts w2(silu(w1 x) w3 x), one shared, gate called as it is.

Its own forward gives the routed experts no gradients in eval, nor with _force_inference_output; ours does.
"""

from __future__ import annotations

from torch import Tensor, nn

from ... import ops
from ..family import Family, Routed
from ..reading import Experts, Reader

KINDS = ("w1", "w3", "w2")


class HiDream(Family):
    name = "HiDream-I1"
    classes = ("MOEFeedForwardSwiGLU",)
    attributes = (
        ("gate", nn.Module),
        ("gate.weight", Tensor),
        ("experts", nn.ModuleList),
        ("shared_experts", nn.Module),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        return Experts(*read.mlps(block, "experts", KINDS), *read.mlps(block, "shared_experts", KINDS))

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        ids, weights, _ = block.gate(x)  # the third is a loss that the original drops, too
        return Routed(x.reshape(-1, x.shape[-1]), ops.dispatch(ids, weights, len(block.experts), backend))

    def differentiates(self, block: nn.Module) -> bool:
        return block.training and not getattr(block, "_force_inference_output", False)
