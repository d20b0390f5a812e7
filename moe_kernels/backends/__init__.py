"""Backends: the same rooms computed in different ways."""

from .base import Backend, Case, MoEWeights
from .registry import BackendInfo, backends

__all__ = ["Backend", "BackendInfo", "Case", "MoEWeights", "backends"]
