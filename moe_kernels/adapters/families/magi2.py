"""MAGI-2: each token is cut into heads, each head has experts of its own, with clamped SwiGLU and (in, out) stacks.

One layer of heads * S tokens as wide as a head and heads * E experts. Its forward finds its module by a number in a
registry, so a copy would compute with the weights of what it was copied from: no trial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...activation import ClampedSwiGLU
from ..family import Family, Routed
from ..linear import NotUnderstoodError
from ..reading import Experts, Reader

SWIGLU7 = str(ClampedSwiGLU())


class MAGI2(Family):
    name = "MAGI-2"
    classes = ("CoreMultiHeadMoE",)
    parts = ("gate", "W_gate", "W_up", "W_down", "router")
    attributes = (
        ("gate", Tensor),
        ("W_gate", Tensor),
        ("W_up", Tensor),
        ("W_down", Tensor),
        ("router.expert_bias", Tensor),
        ("num_heads", int),
        ("num_experts", int),
        ("ep_size", int),
    )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        if block.ep_size != 1:
            raise NotUnderstoodError(
                f"{read.where('ep_size')}: got {block.ep_size}, expected 1: all heads on this rank"
            )
        stacks = [read.parameter(block, name) for name in ("W_gate", "W_up", "W_down")]
        in_out = not all(stack.transpose(1, 2).is_contiguous() for stack in stacks)
        gate, up, down = (stack if in_out else stack.transpose(1, 2) for stack in stacks)
        layout = "gate_up_in_out" if in_out else "gate_up"
        return Experts([gate, up], [down], activation=SWIGLU7, layout=layout)

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        heads, E = block.num_heads, block.num_experts
        x_heads = x.reshape(-1, heads, x.shape[-1] // heads)
        weights, ids = (t.transpose(0, 1) for t in block._route(x_heads))  # (S, heads, K), ids within a head
        ids = ids + torch.arange(0, heads * E, E, device=ids.device)[:, None]
        return Routed(x_heads.flatten(0, 1), ops.dispatch(ids.flatten(0, 1), weights.flatten(0, 1), heads * E, backend))

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Any) -> Tensor:
        return y.view(-1, x.shape[-1]).to(x.dtype)

    def trial(self, block: nn.Module, x: Tensor) -> None:
        return None
