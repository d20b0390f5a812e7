"""The Triton backend: every room and the fused layer on NVIDIA GPUs, sm_80 and newer, never waiting for the device.

backend.py is the adapter to the rest of the product. A room's file (gating, dispatch, experts, experts_bwd, combine,
adaln) holds its kernels and, under each, what launches it. What they share: grid.py goes from tensors to launches,
tiles.py holds sizes, groups.py says which tile a program computes, sums.py adds in a fixed order.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
