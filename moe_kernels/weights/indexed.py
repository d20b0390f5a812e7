"""Matrices that lie anywhere on a GPU, as its kernels read them: one tensor over all of them, and where each begins.

Addresses differ by multiples of some step, 512 bytes as torch allocates. So the matrices of one kind are slices of a
tensor (n, rows, columns) that starts at the lowest of them and has that step as stride of its first dimension; slices
overlap, and a table says which ones are meant. A copy engine takes such a tensor as any other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: what copy engines want of addresses and strides
MOST_TABLES = 4096


Numbers = tuple[Sequence[int], ...]  # of slices, to be taken in turn: the first of each, the second of each ...


class Slices(NamedTuple):
    """Matrix i is memory[in_turn(numbers)[i]]."""

    memory: Tensor  # (n, rows, columns)
    numbers: Numbers  # hashable: tuples, or ranges, which say in three numbers where a stack's matrices are


def in_turn(numbers: Numbers) -> list[int]:
    return [number for each in zip(*numbers, strict=True) for number in each]


def slices_of(tensors: Sequence[Tensor]) -> Slices | None:
    """Return contiguous tensors of one shape, matrices or stacks (E, rows, columns), as slices of one tensor; of stacks
    the first matrix of each comes first. None where no step of 16 bytes leads to all."""
    first = tensors[0]
    size, (*count, rows, columns) = first.element_size(), first.shape
    matrix = rows * columns * size
    addresses = [t.data_ptr() for t in tensors]
    lowest = min(addresses)
    offsets = [address - lowest for address in addresses]
    step = math.gcd(*offsets, matrix if count else 0) or matrix
    nbytes = max(offsets) + first.numel() * size
    last = (nbytes - matrix) // step
    fits = lowest % ALIGNMENT == 0 == step % ALIGNMENT and last < 2**31
    if not fits or any(not t.is_contiguous() for t in tensors):
        return None
    storage = torch._C._construct_storage_from_data_pointer(lowest, first.device, nbytes)
    memory = torch.empty(0, dtype=first.dtype, device=first.device)
    memory.set_(storage, 0, (last + 1, rows, columns), (step // size, columns, 1))
    starts, apart = [offset // step for offset in offsets], matrix // step
    if not count:
        return Slices(memory, (tuple(starts),))
    return Slices(memory, tuple(range(start, start + count[0] * apart, apart) for start in starts))


class _Tables:
    """Tables on devices, by their numbers. A captured CUDA graph reads its tables for good, so those stay."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[tuple, tuple[Tensor, torch.cuda.Stream | None, torch.cuda.Event | None]] = {}
        self.captured: dict[tuple, Tensor] = {}

    def get(self, kinds: tuple[Numbers, ...], device: torch.device) -> Tensor | None:
        """Return the numbers of each kind in turn as int32 on a device, without waiting for it.

        None while a CUDA graph is captured that meets them for the first time: the upload would be part of the graph.
        """
        key = (device, kinds)
        if device.type != "cuda":
            with self.lock:
                if key not in self.kept:
                    self._keep(key, torch.tensor(_laid_out(kinds), dtype=torch.int32, device=device), None, None)
                return self.kept[key][0]
        capturing = torch.cuda.is_current_stream_capturing()
        with self.lock:
            if key not in self.kept:
                if capturing:
                    return self.captured.get(key)
                host = torch.tensor(_laid_out(kinds), dtype=torch.int32, pin_memory=True)
                stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
                self._keep(key, host.to(device, non_blocking=True), stream, event)
                event.record(stream)
            table, uploaded_on, event = self.kept[key]
            if capturing:  # whoever captures has waited for the device before
                self.captured[key] = table
                return table
        stream = torch.cuda.current_stream(device)
        if stream != uploaded_on:
            stream.wait_event(event)
            table.record_stream(stream)
        return table

    def _keep(self, key: tuple, table: Tensor, *upload: torch.cuda.Stream | torch.cuda.Event | None) -> None:
        if len(self.kept) >= MOST_TABLES:
            del self.kept[next(iter(self.kept))]
        self.kept[key] = (table, *upload)


def _laid_out(kinds: tuple[Numbers, ...]) -> list[int]:
    return [number for numbers in kinds for number in in_turn(numbers)]


tables = _Tables()
