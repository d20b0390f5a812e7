"""The biases of experts. Small beside the matrices: backends get them stacked, in the dtype of sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Vectors = Tensor | Sequence[Tensor]
Lists = Sequence[Sequence[Tensor]]  # one for each field of Biases; empty: none
Shapes = Sequence[tuple[int, ...]]  # of each kind, stacked


class Biases(NamedTuple):
    """The biases of a layer's experts: of each kind one stacked tensor, or all its vectors in turn; None for none.

    The halves of a stacked gate_up are in the order of those of gate_up_proj; vectors are [gate_0, up_0, gate_1, ...],
    [up_0, ...] where experts have no gate.
    """

    gate_up: Vectors | None = None  # (E, 2I), (E, I) without a gate; or vectors (I,)
    down: Vectors | None = None  # (E, H); or vectors (H,)
    shared_gate_up: Vectors | None = None  # (2Is,), (Is,); or vectors (Is,)
    shared_down: Vectors | None = None  # (H,), or one such

    @property
    def present(self) -> bool:
        """Say whether there is any."""
        return any(kind is not None for kind in self)


def stack(kinds: Lists, shapes: Shapes, dtype: torch.dtype, up_first: bool) -> Biases:
    """Return each kind as one contiguous tensor of `dtype`, halves [gate | up]."""
    stacked = []
    for position, (kind, shape) in enumerate(zip(kinds, shapes, strict=False)):
        if not kind:
            stacked.append(None)
            continue
        whole = kind[0] if len(kind) == 1 else torch.cat(list(kind))
        whole = whole.to(dtype).reshape(shape)
        if up_first and position % 2 == 0 and len(kind) == 1:
            whole = _swapped(whole)
        stacked.append(whole.contiguous())
    return Biases(*stacked)


def unstack(gradients: Sequence[Tensor | None], kinds: Lists, up_first: bool) -> list[list[Tensor | None]]:
    """Return gradients of what `stack` gave in the form and the dtype of the kinds."""
    lists = []
    for position, (gradient, kind) in enumerate(zip(gradients, kinds, strict=False)):
        if gradient is None or not kind:
            lists.append([None] * len(kind))
            continue
        if up_first and position % 2 == 0 and len(kind) == 1:
            gradient = _swapped(gradient)
        parts = gradient.reshape(len(kind), *kind[0].shape).to(kind[0].dtype)
        lists.append([parts[0]] if len(kind) == 1 else [part.clone() for part in parts.unbind()])
    return lists


def _swapped(halves: Tensor) -> Tensor:
    return torch.cat(halves.chunk(2, -1)[::-1], -1)
