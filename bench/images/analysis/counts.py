"""Tables of picks over layer, step, position, class and image, filled on the device: no copies and no growing lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

GROUPS = 16  # of images (i modulo GROUPS): what permutations and the jackknife treat as independent


@dataclass
class Tables:
    """Sums over everything counted. L routed layers, S evaluations, 2 halves (conditional, unconditional), P positions.

    load (L, S, 2, P, E) int32: picks. mass (L, S, 2, P) float32: sums of the picks' weights.
    images (N, L, E) int32: picks of each image's conditional half; labels (N,) int64, -1 for what was not drawn.
    group_positions (G, L, P, E), group_steps (G, L, S, E) int32: of the conditional half, by group of images.
    pairs (L, E, E) int64: tokens that picked both experts (of both halves); its diagonal is the load.
    degrees (L, S, E + 1) int64: conditional tokens by how many experts they have.
    kept (L, S), overlap (L, S) float64: sums over conditional tokens of the Jaccard index of the picks with those of
        the step before, and with those of the unconditional half; tokens (S,) int64: how many there were.
    maps (M, S, P) int32: picks of the first M images, over all layers.
    survived (L, S, 2) float64: conditional picks that were tried in bfloat16, and those that came out again.
    """

    load: Tensor
    mass: Tensor
    images: Tensor
    labels: Tensor
    group_positions: Tensor
    group_steps: Tensor
    pairs: Tensor
    degrees: Tensor
    kept: Tensor
    overlap: Tensor
    tokens: Tensor
    maps: Tensor
    survived: Tensor

    @classmethod
    def zeros(cls, L: int, S: int, P: int, E: int, images: int, shown: int, device: str | torch.device) -> Tables:
        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        f64, i64, G = torch.float64, torch.int64, GROUPS
        return cls(
            table(L, S, 2, P, E), table(L, S, 2, P, dtype=torch.float32), table(images, L, E),
            table(images, dtype=i64) - 1, table(G, L, P, E), table(G, L, S, E), table(L, E, E, dtype=i64),
            table(L, S, E + 1, dtype=i64), table(L, S, dtype=f64), table(L, S, dtype=f64), table(S, dtype=i64),
            table(min(images, shown), S, P), table(L, S, 2, dtype=f64),
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tables as arrays by name, as np.savez takes them: the one copy to the host."""
        return {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Tables:
        return cls(**{field.name: torch.from_numpy(arrays[field.name]) for field in fields(cls)})

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


class Counter:
    """Counts what the routed layers of one model pick, batch by batch: `begin`, then the sampler's evaluations.

    Each layer hands over its picks when it has them (`picks`, `weights`: dense, (T, E)); they are counted for all
    layers at once after the last. What is kept from one evaluation to the next is one batch's picks.
    """

    def __init__(self, layers: int, evaluations: int, images: int, shown: int = 64):
        self.L, self.S, self.N, self.shown = layers, evaluations, images, shown
        self.tables: Tables | None = None
        self.guided, self.step, self.seen = False, 0, set()
        self.first, self.labels = 0, torch.zeros(0)
        self.cells = self.weights = self.before = self._survived = self._groups = None

    def begin(self, first: int, labels: Tensor, guided: bool) -> None:
        """Start a batch: images first, first + 1, ... of these labels (B,); guided: B unconditional ones follow them.

        Images from the N-th on are not counted.
        """
        self.first, self.labels, self.guided = first, labels, guided
        self.step, self.seen, self.before = 0, set(), None
        self.cells = self.weights = None

    @property
    def counted(self) -> int:
        """How many images of the batch are counted."""
        return min(len(self.labels), self.N - self.first)

    def take(self, layer: int, T: int, E: int, cells: Tensor, weights: Tensor) -> None:
        """Take a layer's picks: cells (R,) = token * E + expert, each once, and their weights (R,).

        A cell T * E is nobody's, and may come any number of times: rows behind those that a plan has.
        Raises: RuntimeError for a layer that picks twice before all have, or evaluations beyond those expected.
        """
        if layer in self.seen or self.step >= self.S:
            raise RuntimeError(f"layer {layer}: picked more often than {self.S} evaluations of {self.L} layers explain")
        if self.cells is None:
            self.cells = torch.zeros(self.L, T + 1, E, device=cells.device)  # the last token is nobody
            self.weights = torch.zeros_like(self.cells)
        elif not self.seen:
            self.cells.zero_()
            self.weights.zero_()
        cells = cells.reshape(-1).long()
        self.cells[layer].view(-1).index_fill_(0, cells, 1.0)
        self.weights[layer].view(-1).index_copy_(0, cells, weights.detach().reshape(-1).float())
        self.seen.add(layer)
        if len(self.seen) == self.L:
            with torch.autocast(cells.device.type, enabled=False):  # bfloat16 does not count beyond 256
                self._count(E)

    def survive(self, layer: int, tried: Tensor, survived: Tensor) -> None:
        """Count conditional picks of this evaluation that were tried otherwise, and those that came out again."""
        if self._survived is None:
            self._survived = torch.zeros(self.L, self.S, 2, dtype=torch.float64, device=tried.device)
        self._survived[layer, self.step] += torch.stack([tried, survived])

    def result(self) -> Tables:
        """Return the tables; RuntimeError where nothing was counted, or a layer has not picked."""
        if self.tables is None or self.seen:
            raise RuntimeError(f"counter: {len(self.seen)} of {self.L} layers picked, expected all, at least once")
        if self._survived is not None:
            self.tables.survived = self._survived
        return self.tables

    def _count(self, E: int) -> None:
        """Add one evaluation of all layers to the tables. Sums over experts are products with ones: 8 numbers are too
        few for torch's reductions."""
        halves, B, s = 1 + self.guided, len(self.labels), self.step

        def split(values: Tensor) -> Tensor:  # (L, T + 1, ...) -> (L, halves, images, P, ...)
            return values[:, :-1].unflatten(1, (halves, B, -1))[:, :, : self.counted]

        ones = self.cells.new_ones(E)
        picks, degree, mass = split(self.cells), split(self.cells @ ones), split(self.weights.sum(-1))
        P = picks.shape[3]
        if self.tables is None:
            self.tables = Tables.zeros(self.L, self.S, P, E, self.N, self.shown, picks.device)
        t = self.tables
        t.load[:, s, :halves] += picks.sum(2).int()
        t.mass[:, s, :halves] += mass.sum(2)
        rows = picks.flatten(1, 3)
        t.pairs += torch.bmm(rows.mT, rows).long()
        cond, own = picks[:, 0], degree[:, 0]
        self._count_images(cond, s)
        t.degrees[:, s].scatter_add_(1, (of := own.flatten(1).long()), t.tokens.new_ones(1).expand_as(of))
        t.tokens[s] += own[0].numel()
        if self.before is not None:
            before, had = self.before
            t.kept[:, s] += jaccard((cond * before) @ ones, own, had).sum((1, 2))
        if self.guided:
            t.overlap[:, s] += jaccard((cond * picks[:, 1]) @ ones, own, degree[:, 1]).sum((1, 2))
        shown = min(len(t.maps) - self.first, self.counted)
        if shown > 0:
            t.maps[self.first : self.first + shown, s] += own[:, :shown].sum(0).int()
        self.before = cond.clone(), own
        self.step, self.seen = s + 1, set()

    def _count_images(self, cond: Tensor, s: int) -> None:
        t, B = self.tables, cond.shape[1]
        here = slice(self.first, self.first + B)
        if s == 0:
            numbers = torch.arange(here.start, here.stop, device=cond.device)
            self._groups = (numbers % GROUPS == torch.arange(GROUPS, device=cond.device)[:, None]).to(cond.dtype)
            t.labels[here] = self.labels[:B].to(t.labels)
        t.images[here] += cond.sum(2).transpose(0, 1).int()
        by_group = (self._groups @ cond.flatten(2)).unflatten(2, cond.shape[2:]).transpose(0, 1).int()
        t.group_positions += by_group
        t.group_steps[:, :, s] += by_group.sum(2, dtype=torch.int32)


def jaccard(both: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return |both| / |a or b| of sets of so many elements; 1 where both are empty."""
    either = a + b - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
