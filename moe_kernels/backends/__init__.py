"""Backends: the same rooms computed in different ways."""

from .base import Backend, Case
from .registry import BackendInfo, backends

__all__ = ["Backend", "BackendInfo", "Case", "backends"]
