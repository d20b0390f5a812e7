"""JiTMoE: a DSMoE whose experts have gate and up in one layer, halves [gate; up], biases, and a dropout."""

from __future__ import annotations

from torch import nn

from ..reading import Experts, Reader, halves
from .dsmoe import DSMoE, mlps_of

KINDS = ("w12", "w3")


class JiTMoE(DSMoE):
    """While its dropout (0.2 in the largest model) is at work, in training, the original computes."""

    name = "JiTMoE"
    expected = "class DSMoE with w12 and w3 in its experts"
    dropouts = ("ffn_dropout",)

    def finds(self, module: nn.Module) -> bool:
        experts = getattr(getattr(module, "experts", None), "blocks", ())
        return super().finds(module) and any("w12" in expert._modules for expert in experts)

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        names, weights = mlps_of(block), []
        for name in names:
            both, down = read.mlps(block, name, KINDS, biased=True)
            read.refuse_dropout(block, name, self.dropouts[0])
            weights += [halves(both), down]
        biases = read.biases(block, names, KINDS)
        if biases is not None:
            parts = {"gate_up": biases.gate_up, "shared_gate_up": biases.shared_gate_up}
            biases = biases._replace(**{kind: both and halves(both) for kind, both in parts.items()})
        return Experts(*weights, biases=biases)
