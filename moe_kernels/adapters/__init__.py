"""Adapters: our layer inside other people's models."""

from .dit_moe import replace_moe

__all__ = ["replace_moe"]
