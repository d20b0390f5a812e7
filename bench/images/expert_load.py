"""Where tokens go: expert load over layer x timestep x position, counted on the device while a model samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Load:
    """Pick counts (layers, steps, positions, E) int32 of the conditional half, and a trace of picks and weights."""

    counts: Tensor
    trace: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def summary(self) -> list[dict]:
        """Describe each layer: largest share over the fair one, idle experts, and what position or step tell (bits).

        The bits are mutual informations: 0 when the load is the same everywhere, up to log2 E.
        """
        rows = []
        for layer, counts in enumerate(self.counts.double()):
            share = counts.sum((0, 1)) / counts.sum()
            rows.append(
                {
                    "layer": layer,
                    "max_over_mean": float(share.max() * len(share)),
                    "idle_experts": int((share == 0).sum()),
                    "position_bits": mutual_information(counts.sum(0)),
                    "timestep_bits": mutual_information(counts.sum(1)),
                }
            )
        return rows


@contextmanager
def count_load(model: nn.Module, steps: int, guided: bool, trace_steps: tuple[int, ...] = ()) -> Iterator[Load]:
    """Count the picks of the oracle's gates while it samples `steps` steps, by forward hooks on `moe.gate`.

    Args: model: a DiTMoE with the oracle's blocks; guided: half of each batch is the unconditional one, left out;
        trace_steps: steps of which picks and weights are kept, too.
    Cost: one index_add per layer and step, no host sync; steps x layers x positions x E x 4 bytes.
    """
    config = model.config
    positions, experts = model.pos_embed.shape[1], config.num_experts
    load = Load(torch.zeros(config.depth, steps, positions, experts, dtype=torch.int32, device=model.pos_embed.device))
    seen = [0] * config.depth

    def hook(layer: int, output: tuple[Tensor, ...]) -> None:
        weights, ids = (v[: len(v) // 2] if guided else v for v in output[:2])
        position = torch.arange(len(ids), device=ids.device) % positions
        cell = position[:, None] * experts + ids
        counts = load.counts[layer, seen[layer]].view(-1)
        counts.index_add_(0, cell.flatten(), counts.new_ones(cell.numel()))
        if seen[layer] in trace_steps:
            load.trace.append((ids, weights))
        seen[layer] += 1

    handles = [
        block.moe.gate.register_forward_hook(lambda _, args, output, layer=layer: hook(layer, output))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        yield load
    finally:
        for handle in handles:
            handle.remove()


def mutual_information(counts: Tensor) -> float:
    """Return the mutual information in bits of the two variables of a table of counts."""
    joint = counts.double() / counts.sum()
    product = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    seen = joint > 0
    return float((joint[seen] * (joint[seen] / product[seen]).log2()).sum())
