"""Where the expert weights of a layer lie: stacked, gate and up stacked each by itself, or all matrices one by one; in
either orientation, their halves in either order.

Nothing here moves a weight. Kernels that can take addresses (native) get those; the others get stacked views where the
addresses are regular, and stacked copies where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import accumulator
from . import biases as _biases
from .biases import Biases
from .indexed import ALIGNMENT, Slices, slices_of, tables

WHOLE = 64  # elements: no step of a product over I begins in one matrix and ends in the next where I is a multiple


@dataclass(frozen=True)
class Layout:
    """How the matrices of a layer are stored.

    in_out: matrices are (in, out) and not nn.Linear's (out, in): gate_up_proj (E, H, 2I), down_proj (E, I, H).
    up_first: the halves of gate_up_proj are [up; gate] and not [gate; up].
    """

    in_out: bool = False
    up_first: bool = False


LAYOUTS = {
    "gate_up": Layout(),
    "up_gate": Layout(up_first=True),
    "gate_up_in_out": Layout(in_out=True),
    "up_gate_in_out": Layout(in_out=True, up_first=True),
}


class MoEWeights(NamedTuple):
    """Stacked weights of one layer, all contiguous and of the dtype of x; or, with an index, weights anywhere.

    An index, int32, says where the matrices of a kind are. Number i of gate_0, up_0, gate_1, ... (up_0, up_1, ... for
    gelu) is gate_up_proj[gate_up_index[i]], (I, H); behind those of the routed experts stand the shared expert's, out
    of shared_gate_up_proj, (Is, H). So it is with down_index: (H, I), (H, Is). Matrices are contiguous, the first
    dimension is not: slices overlap (weights/indexed.py). I and Is are multiples of 64 then.
    """

    gate_up_proj: Tensor  # (E, 2I, H), rows [gate; up]; (E, I, H) for gelu
    down_proj: Tensor  # (E, H, I)
    shared_gate_up_proj: Tensor | None = None  # (2Is, H); (Is, H) for gelu
    shared_down_proj: Tensor | None = None  # (H, Is)
    gate_up_index: Tensor | None = None
    down_index: Tensor | None = None
    biases: Biases = Biases()  # stacked, halves [gate | up], in the accumulation dtype

    @property
    def gate_up(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the routed experts' gate_up_proj, the shared expert's, and their index."""
        return self.gate_up_proj, self.shared_gate_up_proj, self.gate_up_index

    @property
    def down(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.down_proj, self.shared_down_proj, self.down_index

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """Return all but the biases."""
        return self[:6]

    def stacked_shapes(self, num_experts: int) -> list[tuple[int, ...]]:
        """Return the shapes of the weights as they are stacked, and so of their gradients: four, or two without a
        shared expert."""
        (H, I), groups, width = self.down_proj.shape[-2:], [num_experts], self.gate_up_proj.shape[-2]
        if self.shared_down_proj is not None:
            groups.append(1)
        if self.gate_up_index is not None:
            width = self.gate_up_index.numel() // sum(groups) * I
        shapes = [(num_experts, width, H), (num_experts, H, I)]
        if self.shared_down_proj is not None:
            Is = self.shared_down_proj.shape[-1]
            shapes += [(width // I * Is, H), (H, Is)]
        return shapes


class Matrices(NamedTuple):
    """The matrices of one kind: `rows` out features by `columns` in features, at `addresses`.

    Element (o, i) lies o * ld + i elements behind its address; i * ld + o where transposed.
    """

    addresses: list[int]
    rows: int
    columns: int
    ld: int
    transposed: bool
    dtype: torch.dtype


class LayerWeights:
    """The weights of one layer as they are: for each kind one stacked tensor, or all its matrices in turn; for gate_up
    two stacked tensors, too.

    Args:
        gate_up: [gate_up_proj], stacked as `layout` says, or [gate_proj, up_proj] of (E, I, H), or
            [gate_0, up_0, gate_1, ...]; [up_0, ...] for gelu. In sequences gate is first in every layout.
        down: [down_proj] or [down_0, down_1, ...].
        shared_gate_up, shared_down: [] without a shared expert; else [proj], or [gate, up] and [down].
        layout: a name out of LAYOUTS.
        biases: a list for each field of Biases, empty for none: as they are, in any dtype.
    Shapes are the caller's to check (ops/_expert_weights.py does). Gradients have the form of what they belong to.
    """

    def __init__(
        self,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        shared_gate_up: Sequence[Tensor] = (),
        shared_down: Sequence[Tensor] = (),
        layout: str = "gate_up",
        biases: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        self.biases = [list(kind) for kind in biases]
        self.kinds = list(gate_up), list(down), list(shared_gate_up), list(shared_down)
        self.name, self.layout = layout, LAYOUTS[layout]
        first = self.kinds[1][0]
        self.num_experts = first.shape[0] if first.dim() == 3 else len(self.kinds[1])
        self.hidden_size, self.intermediate_size = self._out_in(first)
        self.shared_intermediate_size = self._out_in(self.kinds[3][0])[1] if self.kinds[3] else 0
        self.dtype = first.dtype
        self.halves = width(self.kinds[0], self.num_experts, self.layout) // self.intermediate_size

    def _out_in(self, t: Tensor) -> tuple[int, int]:
        rows, columns = t.shape[-2:]
        return (columns, rows) if self.layout.in_out else (rows, columns)

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """Return the weights in a dtype: themselves where they have it, copies of the others (autocast)."""
        if all(t.dtype == dtype for kind in self.kinds for t in kind):
            return self
        return LayerWeights(*(_cast(kind, dtype) for kind in self.kinds), self.name, self.biases)

    def matrices(self) -> list[Matrices | None]:
        """Return what gate, up, down, shared gate, shared up and shared down are; gate is None for gelu."""
        gate_up, down, shared_gate_up, shared_down = self.kinds
        E, I, Is = self.num_experts, self.intermediate_size, self.shared_intermediate_size
        found = [*self._both(gate_up, E, I), self._matrices(down, E, 0, 1, self.hidden_size)]
        if not Is:
            return [*found, None, None, None]
        return [*found, *self._both(shared_gate_up, 1, Is), self._matrices(shared_down, 1, 0, 1, self.hidden_size)]

    def _both(self, tensors: list[Tensor], count: int, rows: int) -> list[Matrices | None]:
        if self.halves == 1:
            return [None, self._matrices(tensors, count, 0, 1, rows)]
        if in_two_stacks(tensors):
            return [self._matrices([stack], count, 0, 1, rows) for stack in tensors]
        # Matrices in turn are always [gate, up]: an order of halves is something that stacked ones have.
        gate = 1 if self.layout.up_first and len(tensors) == 1 else 0
        return [self._matrices(tensors, count, half, 2, rows) for half in (gate, 1 - gate)]

    def _matrices(self, tensors: list[Tensor], count: int, half: int, halves: int, rows: int) -> Matrices:
        """Find the matrices of one kind: every `halves`-th from the `half`-th on; `rows` are their out features."""
        stacked = len(tensors) == 1 and (halves > 1 or count > 1 or tensors[0].dim() == 3)
        if not stacked:
            mine = tensors[half::halves]
            ld, transposed = self._steps(mine[0])
            return Matrices([t.data_ptr() for t in mine], rows, self._columns(mine[0]), ld, transposed, mine[0].dtype)
        t = tensors[0]
        ld, transposed = self._steps(t)
        size = t.element_size()
        step = t.stride(0) * size if t.dim() == 3 else 0
        first = t.data_ptr() + half * rows * (1 if transposed else ld) * size
        addresses = list(range(first, first + count * step, step)) if step else [first] * count
        return Matrices(addresses, rows, self._columns(t), ld, transposed, t.dtype)

    def _columns(self, t: Tensor) -> int:
        return self._out_in(t)[1]

    def _steps(self, t: Tensor) -> tuple[int, bool]:
        """Return ld and transposed of the matrices in t, whose inner step is 1 (see `readable`)."""
        rows, columns = t.shape[-2:]
        outer, inner = t.stride()[-2:]
        flipped = inner != 1 and columns > 1
        ld = inner if flipped else outer
        return max(ld, rows if flipped else columns), flipped != self.layout.in_out

    def readable(self) -> LayerWeights:
        """Return the weights with every matrix dense along one of its axes, all of a kind alike: copies where not."""
        kinds = [kind if _alike(kind) else [t.contiguous() for t in kind] for kind in self.kinds]
        if all(a is b for a, b in zip(kinds, self.kinds, strict=True)):
            return self
        return LayerWeights(*kinds, self.name, self.biases)

    def stacked(self) -> MoEWeights:
        """Return the weights stacked: views where they lie so already, else copies."""
        return MoEWeights(*(self._stacked(i) for i in range(4) if self.kinds[i]), biases=self.stacked_biases())

    def stacked_biases(self) -> Biases:
        """Return the biases stacked, halves [gate | up], in the dtype of sums over values of the weights'."""
        if not any(self.biases):
            return Biases()
        E, H, I, Is = self.num_experts, self.hidden_size, self.intermediate_size, self.shared_intermediate_size
        shapes = (E, self.halves * I), (E, H), (self.halves * Is,), (H,)
        return _biases.stack(self.biases, shapes, accumulator(self.dtype), self._bias_swapped())

    def unstacked_biases(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Return the gradients of `stacked_biases` in the form and the dtypes of the biases."""
        return _biases.unstack(gradients, self.biases, self._bias_swapped())

    def _bias_swapped(self) -> bool:
        return self.layout.up_first and self.halves == 2

    def indexed(self) -> MoEWeights:
        """Return the weights where they lie if their matrices are (out, in), I and Is multiples of 64: stacked if they
        are so already, else with an index; copies of the others."""
        if self.as_kernels_read():
            return MoEWeights(*(kind[0] for kind in self.kinds if kind))
        stacked, indices = [None] * 4, [None, None]
        for kind in (0, 1):
            positions = [p for p in (kind, kind + 2) if self.kinds[p]]
            found = None if all(map(self._lies_stacked, positions)) else self._indexed(positions)
            if found is None:
                for position in positions:
                    stacked[position] = self._stacked(position)
                continue
            *memories, indices[kind] = found
            for position, memory in zip(positions, memories, strict=True):
                stacked[position] = memory
        return MoEWeights(*stacked, *indices)

    def as_kernels_read(self) -> bool:
        """Say whether all is stacked as "gate_up" and contiguous: most layers, and asked in every call."""
        if self.name != "gate_up":
            return False
        for position, kind in enumerate(self.kinds):
            if kind and not (self._is_stacked(position) and kind[0].is_contiguous()):
                return False
        return True

    def _lies_stacked(self, position: int) -> bool:
        kind = self.kinds[position]
        if self.layout.in_out or in_two_stacks(kind):
            return False
        if self._is_stacked(position):
            return kind[0].is_contiguous() and not (self.layout.up_first and self._halves_of(position) == 2)
        return consecutive(kind) is not None

    def _indexed(self, positions: Sequence[int]) -> list[Tensor] | None:
        """Return the memory that holds the matrices at each position, and the index of all; None where none does."""
        if self.layout.in_out or self.intermediate_size % WHOLE or self.shared_intermediate_size % WHOLE:
            return None
        if self.kinds[positions[0]][0].is_meta:
            return None
        found = [self._slices(position) for position in positions]
        if None in found:
            return None
        index = tables.get(tuple(slices.numbers for slices in found), found[0].memory.device)
        return None if index is None else [*(slices.memory for slices in found), index]

    def _slices(self, position: int) -> Slices | None:
        """Return the (out, in) matrices of a kind in the order gate_0, up_0, gate_1, ... or down_0, down_1, ..."""
        kind = self.kinds[position]
        if not self._is_stacked(position):
            return slices_of(kind)
        halves = self._halves_of(position)
        rows, columns = self._shape(position)[-2:]
        if not kind[0].is_contiguous() or kind[0].data_ptr() % ALIGNMENT:
            return None
        memory = kind[0].view(-1, rows // halves, columns)
        numbers = [range(half, memory.shape[0], halves) for half in range(halves)]
        return Slices(memory, tuple(numbers[::-1] if self.layout.up_first else numbers))

    def _halves_of(self, position: int) -> int:
        return 1 if position % 2 else self.halves

    def _shape(self, position: int) -> tuple[int, ...]:
        """Return the shape of a kind stacked as "gate_up"."""
        E, H, I, Is = self.num_experts, self.hidden_size, self.intermediate_size, self.shared_intermediate_size
        return ((E, self.halves * I, H), (E, H, I), (self.halves * Is, H), (H, Is))[position]

    def _stacked(self, position: int) -> Tensor:
        tensors, shape = self.kinds[position], self._shape(position)
        if self._is_stacked(position):
            t = tensors[0].mT if self.layout.in_out else tensors[0]
            return self._ordered(t, position).contiguous()
        if in_two_stacks(tensors):
            return torch.cat([t.mT if self.layout.in_out else t for t in tensors], -2)
        matrices = [t.mT for t in tensors] if self.layout.in_out else tensors
        together = consecutive(matrices)
        return (_filled(matrices) if together is None else together).view(shape)

    def _is_stacked(self, position: int) -> bool:
        kind = self.kinds[position]
        return len(kind) == 1 and kind[0].dim() == (3, 3, 2, 2)[position]

    def _ordered(self, t: Tensor, position: int) -> Tensor:
        """Swap the halves of (..., 2I, H) where the layout has them the other way round: from it, or to it."""
        if not self.layout.up_first or self._halves_of(position) == 1:
            return t
        return torch.cat(t.chunk(2, -2)[::-1], -2)

    def unstacked(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Return the gradients of stacked weights in the form of the weights, each on a storage of its own."""
        lists = []
        for position, (gradient, kind) in enumerate(zip(gradients, self.kinds, strict=False)):
            if gradient is None:
                lists.append([None] * len(kind))
            elif self._is_stacked(position):
                ordered = self._ordered(gradient, position)
                lists.append([(ordered.mT if self.layout.in_out else ordered).contiguous()])
            elif in_two_stacks(kind):
                halves = (half.mT if self.layout.in_out else half for half in gradient.chunk(2, -2))
                lists.append([half.clone(memory_format=torch.contiguous_format) for half in halves])
            else:
                lists.append(self._split(gradient, kind))
        return lists

    def _split(self, gradient: Tensor, kind: list[Tensor]) -> list[Tensor]:
        if self.layout.in_out:
            rows, columns = kind[0].shape
            return [matrix.T.contiguous() for matrix in gradient.view(len(kind), columns, rows)]
        return [own_storage(matrix) for matrix in gradient.view(len(kind), *kind[0].shape)]


def width(gate_up: Sequence[Tensor], num_experts: int, layout: Layout) -> int:
    """Return the columns of gate_up, 2I or I. For the shared expert num_experts is 1."""
    matrices = len(gate_up) if gate_up[0].dim() == 3 else len(gate_up) // num_experts
    return matrices * gate_up[0].shape[-1 if layout.in_out else -2]


def in_two_stacks(tensors: Sequence[Tensor]) -> bool:
    """Say whether a kind is [gate_proj, up_proj], each stacked: matrices in turn have two dimensions."""
    return len(tensors) == 2 and tensors[0].dim() == 3


def _alike(kind: Sequence[Tensor]) -> bool:
    strides = {t.stride() for t in kind}
    if len(strides) > 1:
        return False
    for stride in strides:
        shape = kind[0].shape
        outer, inner = stride[-2:]
        ld, inside = (outer, shape[-1]) if inner == 1 or shape[-1] == 1 else (inner, shape[-2])
        if 1 not in (inner, outer) and 1 not in shape[-2:]:
            return False
        if ld < inside and 1 not in shape[-2:]:
            return False
    return True


def _cast(kind: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if len(kind) < 2:
        return [t.to(dtype) for t in kind]
    out = torch.empty((len(kind), *kind[0].shape), dtype=dtype, device=kind[0].device)
    views = list(out.unbind())
    torch._foreach_copy_(views, kind)
    return views


def consecutive(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return matrices that lie one behind another in memory, whoever owns it, as one tensor; None where they do not."""
    first = matrices[0]
    start, step = first.data_ptr(), first.numel() * first.element_size()
    if first.is_meta or any(not m.is_contiguous() or m.data_ptr() != start + i * step for i, m in enumerate(matrices)):
        return None
    nbytes = len(matrices) * step
    storage = torch._C._construct_storage_from_data_pointer(start, first.device, nbytes)
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage).view(len(matrices), *first.shape)


def _filled(matrices: Sequence[Tensor]) -> Tensor:
    first = matrices[0]
    out = torch.empty((len(matrices), *first.shape), dtype=first.dtype, device=first.device)
    torch._foreach_copy_(list(out.unbind()), list(matrices))
    return out


def own_storage(t: Tensor) -> Tensor:
    """Return a contiguous tensor as one that is no view: its storage is its own bytes, the memory stays shared."""
    return torch._C._from_dlpack(torch._C._to_dlpack(t))
