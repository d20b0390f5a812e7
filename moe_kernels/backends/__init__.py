"""Backends: the same rooms computed in different ways."""

from .base import Backend, Request
from .registry import BackendInfo, backends

__all__ = ["Backend", "BackendInfo", "Request", "backends"]
