"""HunyuanImage-3.0: router in float32, its short path called as it is; gate and up in one layer, halves [up; gate]."""

from __future__ import annotations

from torch import Tensor, nn

from ... import ops
from ..family import Family, Routed
from ..linear import NotUnderstoodError
from ..reading import Experts, Reader, halves


class HunyuanImage(Family):
    name = "HunyuanImage-3.0"
    classes = ("HunyuanMoE",)
    parts = ("gate", "experts", "shared_mlp")
    attributes = (
        ("gate", nn.Module),
        ("gate.wg", nn.Module),
        ("experts", nn.ModuleList),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        if getattr(block.gate, "drop_tokens", False):
            raise NotUnderstoodError(f"{read.path}.gate.drop_tokens: got True, expected False: no token is dropped")
        return Experts(*_mlps(block, "experts", read), *_mlps(block, "shared_mlp", read))

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        weights, ids = block.gate(x, topk_impl="easy")
        return Routed(x.reshape(-1, x.shape[-1]), ops.dispatch(ids, weights, len(block.experts), backend))


def _mlps(block: nn.Module, name: str, read: Reader) -> tuple[list[Tensor], list[Tensor]] | tuple[None, None]:
    both, down = read.mlps(block, name, ("gate_and_up_proj", "down_proj"))
    if both is None:
        return None, None
    return halves(both, up_first=True), down
