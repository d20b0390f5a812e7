"""Tile sizes as data: tiles.json by device and case, else a heuristic. Nothing is tuned at run time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._device import tf32_allowed

FILE = Path(__file__).with_name("tiles.json")
INTERPRETED = "interpreter"


class Tile(NamedTuple):
    """Sizes of one program's tile and how Triton is to run it."""

    m: int
    n: int
    k: int
    group: int  # tiles in m that share a band, see groups.swizzle
    warps: int
    stages: int
    programs: int  # on a processor at once: more would wait for others to end, and undo the order of tiles
    tma: bool = False  # weights, and rows that are not gathered, through tensor descriptors; not of "dweight"
    specialize: bool = False  # some warps load while others multiply; not of "dweight"

    def arguments(self) -> dict[str, int]:
        """Return what every launch of a product takes as keyword arguments."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@cache
def table() -> dict[str, dict[str, list[int]]]:
    """Return tiles.json: device name -> key of `choose` -> the fields of Tile. `python -m bench tune` writes it."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


class Device(NamedTuple):
    """What a launch has to know of where it runs."""

    name: str  # as torch calls the GPU
    capability: int  # 90 for sm_90
    processors: int


CPU = Device(INTERPRETED, 0, 3)  # few processors, so that each interpreted program walks several tiles
META = Device("NVIDIA H200", 90, 132)  # what meta tensors stand for: kernels compiled for a GPU that is not there


def device_of(t: Tensor) -> Device:
    """Return the device of a tensor."""
    if t.is_cuda:
        return _gpu(t.device.index)
    return META if t.is_meta else CPU


@cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def precision(dtype: torch.dtype) -> str:
    """Return what `choose` calls the arithmetic of a product: bf16, fp16, tf32 (where torch allows it) or fp32."""
    if dtype == torch.float32:
        return "tf32" if tf32_allowed() else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@cache
def choose(kernel: str, device: Device, precision: str, rows: int, n: int, k: int) -> Tile:
    """Return the tile of a grouped product.

    Args:
        kernel: "up", "rows_times", "dact" or "dweight".
        precision: see `precision`.
        rows: mean rows per expert; only its power of two counts.
        n, k: width of the result and of what is summed over; of "dweight" the two widths of the result.
    """
    if device.name == INTERPRETED:
        return Tile(64 if kernel == "dweight" else 16, 64, 32, 2, 4, 1, 2, tma=True)
    rows = triton.next_power_of_2(max(rows, 1))
    if found := table().get(device.name, {}).get(key(kernel, precision, rows, n, k)):
        return Tile(*found)
    return heuristic(kernel, device.capability, precision, rows, n)


def key(kernel: str, precision: str, rows: int, n: int, k: int) -> str:
    """Return the name of a shape class in tiles.json."""
    return f"{kernel}-{precision}-R{rows}-N{n}-K{k}"


def heuristic(kernel: str, capability: int, precision: str, rows: int, n: int) -> Tile:
    """Return a tile for a shape that nobody tuned: as large as fits, without spills (`bench static-gate` checks it).

    A depth of 128 bytes fills a line of shared memory as the tensor cores read it. Two products at once ("up"), or an
    epilogue with many operands ("dact"), leave registers for two groups of four warps only. Warps specialise where
    nothing is gathered and Triton can: of 3.6 and 3.9 neither does it for sm_90 at eight warps.
    """
    depth = 32 if precision in ("tf32", "fp32") else 64
    if precision == "fp32":  # no tensor cores; a second sum for each tile of K, see experts.multiply
        return Tile(64, 64, depth, 8, 8, 2 if kernel == "dweight" else 3, 1 if kernel == "up" else 2)
    if capability not in (80, 90, 100, 103):  # 100 KiB of shared memory
        return Tile(64, 64, depth, 8, 4, 3, 1 if kernel == "up" else 2)
    large_epilogue = kernel in ("up", "dact")
    m = 128 if rows > 64 or kernel == "dweight" else 64
    wide = 128 if n > 64 else 64
    if capability == 80:
        return Tile(m, 64 if large_epilogue else wide, 32, 8, 8, 4, 2 if large_epilogue and depth == 64 else 1)
    warps = 8 if large_epilogue or precision == "tf32" else 4
    specialize = capability != 90 and kernel == "rows_times"
    programs = 1 if warps == 8 or specialize else 2
    stages = 2 if kernel == "up" and precision == "tf32" and capability != 90 else 3  # a third one spills
    return Tile(m, wide, depth, 8, warps, stages, programs, tma=True, specialize=specialize)
