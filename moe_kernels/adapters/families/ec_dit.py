"""EC-DiT as the repositories of DiffMoE and ProMoE have it: expert choice per image, of softmax over experts.

An expert takes int(S / E * capacity) tokens, which may be none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import dispatch_rows
from ..family import Family, Routed
from ..reading import Experts, Reader

KINDS = ("gate_proj", "up_proj", "down_proj")
MLP = ("fc1", "fc2")  # timm's, with biases; `act` between them


class ECDiT(Family):
    """Its experts are MLPs with biases and GELU in either form, or SwiGLU."""

    name = "EC-DiT"
    expected = "modules with gate_weight, capacity and experts of gate_proj, up_proj and down_proj, or of fc1 and fc2"
    parts = ("gate_weight", "experts", "shared_experts")
    attributes = (
        ("capacity", (int, float)),
        ("num_experts", int),
    )

    def finds(self, module: nn.Module) -> bool:
        own = module.__dict__
        has_weight = "gate_weight" in own["_parameters"] and "capacity" in own
        return has_weight and "experts" in own["_modules"] and not hasattr(module, "capacity_predictor")

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        names = "experts", "shared_experts"
        kinds = MLP if "fc1" in block.experts[0]._modules else KINDS
        weights = [kind for name in names for kind in read.mlps(block, name, kinds, biased=True)]
        activation = read.gelu(block, names, "act") if kinds == MLP else "swiglu"
        return Experts(*weights, activation=activation, biases=read.biases(block, names, kinds))

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        B, S, H = x.shape
        E = block.num_experts
        scores = F.linear(x, block.gate_weight).softmax(-1).mT
        weight, token = scores.topk(int(S / E * block.capacity), -1, sorted=False)  # (B, E, C)
        token = token + torch.arange(0, B * S, S, device=x.device)[:, None, None]
        expert = torch.arange(E, device=x.device)[:, None].expand(B, E, token.shape[2])
        rows = weight.flatten(), token.flatten(), expert.flatten()
        return Routed(x.reshape(-1, H), dispatch_rows(*rows, B * S, E))
