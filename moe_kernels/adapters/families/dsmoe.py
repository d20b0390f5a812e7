"""DSMoE: sigmoid router with groups and a bias for the choice, called as it is; without a shared expert x is added."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import ops
from ..family import Family, Routed
from ..reading import Experts, Reader

KINDS = ("gate_proj", "up_proj", "down_proj")


class DSMoE(Family):
    """Its experts may have biases in all layers of a kind, or in none."""

    name = "DSMoE"
    classes = ("DSMoE",)
    attributes = (
        ("gate", nn.Module),
        ("experts.blocks", nn.ModuleList),
        ("use_shared_expert", bool),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        names = mlps_of(block)
        weights = [kind for name in names for kind in read.mlps(block, name, KINDS, biased=True)]
        return Experts(*weights, biases=read.biases(block, names, KINDS))

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        ids, weights = block.route_tokens_to_experts(block.gate(x))
        return Routed(x.reshape(-1, x.shape[-1]), ops.dispatch(ids, weights, len(block.experts.blocks), backend))

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Any) -> Tensor:
        y = super().result(block, y, x, extra)
        return y if block.use_shared_expert else y + x


def mlps_of(block: nn.Module) -> tuple[str, ...]:
    """Return where the MLPs are: those of the routed experts, and the shared one where there is one."""
    return ("experts.blocks", "shared_experts")[: 1 + block.use_shared_expert]
