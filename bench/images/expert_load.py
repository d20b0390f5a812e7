"""A trace of real picks, for benchmarks that want a routing as models have it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bench.images.hooks import looking_at


@contextmanager
def trace_picks(model: nn.Module, calls: Collection[int], guided: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keep ids and weights (T, K) of the oracle's gates in the given calls of the model, layer after layer.

    guided: half of each batch is the unconditional one, left out.
    """
    trace: list[tuple[Tensor, Tensor]] = []
    seen = [0] * len(model.blocks)

    def look(layer: int, _: tuple, output: tuple[Tensor, ...]) -> None:
        if seen[layer] in calls:
            weights, ids = (v[: len(v) // 2] if guided else v for v in output[:2])
            trace.append((ids, weights))
        seen[layer] += 1

    with looking_at((block.moe.gate for block in model.blocks), look):
        yield trace
