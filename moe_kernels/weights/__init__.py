"""Weights: layouts that kernels read, state dicts, safetensors. Layouts are converted here and nowhere else."""

from .biases import Biases
from .layouts import LAYOUTS, LayerWeights, Layout, Matrices, MoEWeights, own_storage
from .state_dicts import load, save, stack_dit_moe, unstack_dit_moe

__all__ = [
    "LAYOUTS",
    "Biases",
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
