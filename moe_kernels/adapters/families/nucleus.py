"""Nucleus-Image: expert choice per image, by timestep and unmodulated tokens; weights normalised per token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import dispatch_rows
from ..family import Family, Routed
from ..reading import Experts, Reader
from .transformers import stacked


class Nucleus(Family):
    name = "Nucleus-Image"
    classes = ("NucleusMoELayer",)
    parts = ("gate", "experts", "shared_expert")
    attributes = (
        ("gate", nn.Module),
        ("experts.gate_up_proj", Tensor),
        ("experts.down_proj", Tensor),
        ("shared_expert.net", nn.ModuleList),
        ("num_experts", int),
        ("capacity_factor", (int, float)),
        ("use_sigmoid", bool),
        ("route_scale", (int, float)),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        gate_up, down = (read.parameter(block, f"experts.{name}") for name in ("gate_up_proj", "down_proj"))
        routed = stacked(gate_up, down, in_out=True)
        read.check(read.find(block, "shared_expert"), read.where("shared_expert"))
        up, gate = read.linear(block, "shared_expert.net.0.proj").chunk(2)  # in the other order than the experts'
        down = read.linear(block, "shared_expert.net.2")
        if "in_out" in routed.layout:
            gate, up, down = gate.T, up.T, down.T
        return routed._replace(shared_gate_up=[gate, up], shared_down=[down])

    def route(
        self,
        block: nn.Module,
        backend: str,
        x: Tensor,
        hidden_states_unmodulated: Tensor,
        timestep: Tensor | None = None,
    ) -> Routed:
        """Scores and sums stay in the dtypes that the original rounds to, so picks are its picks to the bit."""
        B, S, H = x.shape
        routed_by = hidden_states_unmodulated
        if timestep is not None:
            routed_by = torch.cat([timestep[:, None].expand(-1, S, -1), routed_by], -1)
        logits = block.gate(routed_by)
        scores = (logits.float().sigmoid() if block.use_sigmoid else logits.float().softmax(-1)).to(logits.dtype)
        E = block.num_experts
        weight, token = scores.mT.topk(max(1, math.ceil(block.capacity_factor * S / E)), -1)  # (B, E, C)
        token = token + torch.arange(0, B * S, S, device=token.device)[:, None, None]
        expert = torch.arange(E, device=token.device)[:, None, None].expand(E, B, token.shape[2]).flatten()
        weight, token = (t.transpose(0, 1).flatten() for t in (weight, token))
        total = weight.new_zeros(B * S).scatter_add(0, token, weight)
        weight = weight / (total[token] + 1e-12) * block.route_scale
        return Routed(x.reshape(-1, H), dispatch_rows(weight, token, expert, B * S, E))

    def trial(self, block: nn.Module, x: Tensor) -> tuple[Any, ...]:
        return x, x.flip(-1), x[:, 0]
