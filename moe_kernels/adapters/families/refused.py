"""Families that are recognised, and refused by name: what they do around their experts, no adapter does yet."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..family import Family
from ..reading import Reader


class Refused(Family):
    """A family with its reason instead of a structure."""

    marks: ClassVar[tuple[str, ...]]  # attributes that a block of this family has, and no other's
    reason: ClassVar[str]

    @property
    def expected(self) -> str:
        return "refused"

    def finds(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in self.marks)

    def check(self, block: nn.Module, read: Reader) -> None:
        raise ValueError(f"{read.path}: got a {type(block).__name__} of {self.name}: {self.reason}")


class ProMoE(Refused):
    name = "ProMoE"
    marks = ("cluster_centers", "experts")
    reason = (
        "its forward also returns a loss of its own router; its parts are here: "
        "MoELayer(..., activation='gelu_tanh', bias=True, router=moe_kernels.ProMoE(...))"
    )


class DiffMoE(Refused):
    name = "DiffMoE"
    marks = ("gate_weight", "capacity_predictor")
    reason = (
        "in eval how many tokens an expert gets depends on the values, expected sizes that shapes tell; its parts are "
        "here: MoELayer(..., activation='gelu_tanh', bias=True, router=moe_kernels.DiffMoE(...))"
    )


class MAGI2(Refused):
    name = "MAGI-2"
    marks = ("W_gate", "W_up", "W_down")
    reason = (
        "its tokens are cut into heads, each with experts of its own, which no adapter does yet; its clamped experts "
        "are here: MoELayer(..., activation=moe_kernels.ClampedSwiGLU())"
    )

    def finds(self, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, mark, None), nn.Parameter) for mark in self.marks)
