"""Families that are recognised, and refused by name: what they compute, the kernels have not got."""

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
    reason = "its experts have biases and the tanh form of GELU, expected bias-free SwiGLU or GELU"


class DiffMoE(Refused):
    name = "DiffMoE"
    marks = ("gate_weight", "capacity_predictor")
    reason = "how many tokens an expert gets depends on the values, expected sizes that shapes tell; biases, tanh GELU"


class MAGI2(Refused):
    name = "MAGI-2"
    marks = ("W_gate", "W_up", "W_down")
    reason = "its experts clamp gate and up, expected plain SwiGLU or GELU"

    def finds(self, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, mark, None), nn.Parameter) for mark in self.marks)
