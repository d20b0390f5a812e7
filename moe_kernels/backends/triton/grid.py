"""From tensors to launches: what the launchers beside the kernels share, such as grids, and operands of the products.

Launches go to the current device and stream. Sizes follow from shapes alone: nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .launching import launch as launch  # what every launcher calls

# What is launched with numbers of tokens T or images B is compiled once for all of them; triton.jit alone would compile
# it again for 1 and for multiples of 16.
kernel = triton.jit(do_not_specialize=("T", "B"))

Pair = tuple[Tensor, Tensor | None]  # of the routed experts and of the shared one
MOST_DESCRIPTORS = 1024
_descriptors: dict[tuple, dict[str, Any] | None] = {}  # what they say beside their tensors
Weight = tuple[Tensor, Tensor | None, Tensor | None]  # a kind of MoEWeights: the two memories, and the index


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own, which kernels may call as well, takes ten times as long on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def padded(n: int) -> int:
    """Return the power of two that a block of n elements takes; products want at least 16."""
    return max(16, power_of_2(n)) if n else 16


def width(shared: Tensor | None) -> int:
    """Return the last size of a tensor, 0 of one that is not there."""
    return 0 if shared is None else shared.shape[-1]


def given(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return what a kernel gets for a tensor that may not be there, and that it will not touch then."""
    return stand_in if t is None else t


def tile_of(kernel: str, x: Tensor, plan, n: int, k: int) -> tiles.Tile:
    """Return the tile of a product over the rows of a plan, see `tiles.choose`."""
    rows = plan.num_rows // plan.num_experts
    return tiles.choose(kernel, tiles.device_of(x), tiles.precision(x.dtype), rows, n, k)


def input_precision(x: Tensor) -> str:
    """Return what kernels call PRECISION."""
    return "tf32" if tiles.precision(x.dtype) == "tf32" else "ieee"


def programs_of(x: Tensor, plan, tile: tiles.Tile, num_n: int, shared_num_n: int) -> tuple[int]:
    """Return the number of programs: at most what runs at once, at most the tiles that any routing can give."""
    R, E = plan.num_rows, plan.num_experts
    most = (R // tile.m + min(E, R)) * num_n + cdiv(x.shape[0], tile.m) * shared_num_n
    return (min(most, tile.programs * tiles.device_of(x).processors),)


def operands(tile: tiles.Tile, *wanted: tuple[Tensor | None, tuple[int, ...]]) -> tuple[bool, list[Any]]:
    """Return whether descriptors are used, and what a kernel gets for each (tensor, block) or (None, block): its
    descriptor, or itself; what is None looks like the one before.

    The copy engine wants rows and addresses of 16 bytes: where a tensor has others, all go as tensors.
    """
    tensors, described = [], []
    for t, block in wanted:
        tensors.append(tensors[-1] if t is None else t)
        described.append(described[-1] if t is None else _descriptor(t, block) if tile.tma else None)
    tma = all(described)  # `None in` would compare descriptors, field by field
    return tma, described if tma else tensors


def _descriptor(t: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """Describe a tensor as blocks of its last sizes, ones in front if it lacks sizes; None where TMA cannot read it.

    Triton checks and copies what it is given, 10 us: here that is done once for each shape, but for the address.
    """
    if t.data_ptr() % 16:
        return None
    key = t.shape, t.stride(), t.dtype, block
    known = _descriptors.get(key, key)
    if known is key:
        if len(_descriptors) == MOST_DESCRIPTORS:
            _descriptors.clear()
        known = _descriptors[key] = _described(t, block)
    if known is None:
        return None
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**known, "base": t}
    return descriptor


def _described(t: Tensor, block: tuple[int, ...]) -> dict[str, Any] | None:
    if not t.numel() or t.shape[-1] * t.element_size() % 16:
        return None
    missing = len(block) - t.dim()
    sizes, strides = [1] * missing + list(t.shape), [t.numel()] * missing + list(t.stride())
    described = vars(TensorDescriptor(t, sizes, strides, list(block)))
    return {**described, "base": None, "kind": (t.dtype, block)}  # kind: what a kernel is compiled for


def place_of(weight: Weight, tma: bool) -> dict[str, Any]:
    """Return how kernels find the matrices of a weight.

    Steps are 0 with descriptors, which know them: another value might compile the kernel anew.
    """
    memory, shared, index = weight
    return {
        "index": given(index, memory),
        "step": 0 if tma or memory.dim() < 3 else memory.stride(0),
        "shared_step": 0 if tma or shared is None or shared.dim() < 3 else shared.stride(0),
        "INDEXED": index is not None,
        "TMA": tma,
    }
