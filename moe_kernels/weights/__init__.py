"""Weights: layouts that kernels read, state dicts, safetensors. Layouts are converted here and nowhere else."""

from .layouts import LAYOUTS, WHOLE, LayerWeights, Layout, Matrices, MoEWeights, own_storage
from .state_dicts import load, save, stack_dit_moe, unstack_dit_moe

__all__ = [
    "LAYOUTS",
    "WHOLE",
    "LayerWeights",
    "Layout",
    "Matrices",
    "MoEWeights",
    "load",
    "own_storage",
    "save",
    "stack_dit_moe",
    "unstack_dit_moe",
]
