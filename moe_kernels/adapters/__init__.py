"""Adapters: our experts inside other people's models."""

from .block import MoEBlock
from .families import experts_forward  # the package registers every family
from .family import Family, Routed, known_families, register_family
from .linear import NotUnderstoodError
from .reading import Experts, Reader
from .replace import replace_moe, restore_moe

__all__ = [
    "Experts",
    "Family",
    "MoEBlock",
    "NotUnderstoodError",
    "Reader",
    "Routed",
    "experts_forward",
    "known_families",
    "register_family",
    "replace_moe",
    "restore_moe",
]
