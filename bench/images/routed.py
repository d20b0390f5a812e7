"""The family's rules and their ladder, by the names that the main job and `bench routers` know them by."""

from bench.images.layers import ROUTERS, replaced
from bench.images.parity import Ladder as ladder

__all__ = ["ROUTERS", "ladder", "replaced"]
