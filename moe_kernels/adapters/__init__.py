"""Adapters: our layer inside other people's models."""

from .block import MoEBlock
from .replace import replace_moe, restore_moe

__all__ = ["MoEBlock", "replace_moe", "restore_moe"]
