"""A cost model of a training step on many GPUs: bytes over links, compute, memory; FSDP2 alone and beside EP.

Every figure of the hardware is a published peak, so times are lower bounds, and their ratios tell what binds. Compute
overlaps with FSDP2's gathers, which are asked for a block ahead; the all-to-alls only with the shared expert.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from reference.dit import DiTMoE, DiTMoEConfig

MODELS = {"XL": "DiT-MoE-XL/2-8E2A", "16B": "DiT-MoE-G/2-16E2A"}
GPUS = (8, 64, 512)
EP = 8
IMAGES = 8  # of 256 x 256 pixels, per GPU and step
GATHERED, REDUCED, STATE = 2, 4, 16  # bytes per parameter: bf16; fp32; fp32 weight, gradient and two moments
PASSES = 3  # forward, and twice that backward


@dataclass(frozen=True)
class Machine:
    """H100 SXM in a DGX H100. Sources: NVIDIA's data sheet of the H100, its DGX H100 user guide; nothing measured."""

    flops: float = 989e12  # bf16, dense
    nvlink: float = 450e9  # bytes/s of a GPU, one direction: half of 900 GB/s
    network: float = 50e9  # bytes/s of a GPU's ConnectX-7, one direction: 400 Gb/s
    gpus: int = 8  # of a node


@dataclass(frozen=True)
class Sizes:
    """What the cost of a model depends on."""

    depth: int
    hidden: int
    experts: int
    picks: int
    tokens: int  # of an image
    shared: int  # width of the shared expert
    width: int  # of a routed one
    expert_parameters: int
    other_parameters: int

    @classmethod
    def of(cls, name: str) -> Sizes:
        """Count the parameters of the reference on the meta device."""
        config = DiTMoEConfig.from_name(name)
        with torch.device("meta"):
            model = DiTMoE(config)
        routed = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
        H, everything = config.hidden_size, sum(p.numel() for p in model.parameters())
        return cls(
            config.depth, H, config.num_experts, config.top_k, (config.input_size // config.patch_size) ** 2,
            config.num_shared * H, config.mlp_ratio * H, routed, everything - routed,
        )  # fmt: skip

    def flops(self, images: int) -> float:
        """Return the FLOPs of a forward: attention's projections and products, experts; not adaLN, per image only."""
        tokens, H = images * self.tokens, self.hidden
        mlps = 3 * H * (self.picks * self.width + self.shared)
        return 2 * tokens * self.depth * (4 * H * H + mlps + 2 * self.tokens * H)


def rows_bytes(tokens: int, picks: int, hidden: int, itemsize: int) -> int:
    """Return the bytes of the rows that a rank sends in one direction of one layer, its own among them."""
    return tokens * picks * hidden * itemsize


def sharded_bytes(parameters: int, ranks: int, itemsize: int) -> float:
    """Return the bytes that a rank receives when parameters are gathered, or sends when gradients are reduced."""
    return parameters * itemsize * (ranks - 1) / ranks


def gather_s(parameters: int, ranks: int, inside: int, itemsize: int, machine: Machine) -> float:
    """Return the seconds in which each of `ranks` gets all parameters; `inside` of them share a node and its links."""
    nodes = ranks // inside
    network = sharded_bytes(parameters, nodes, itemsize) / (inside * machine.network)
    return max(network, sharded_bytes(parameters, ranks, itemsize) / machine.nvlink if inside > 1 else 0)


def step(sizes: Sizes, gpus: int, ep: int, images: int = IMAGES, machine: Machine = Machine()) -> dict[str, float]:
    """Return the milliseconds of a training step and what binds it, and GiB of a GPU without activations.

    Args:
        gpus: in full nodes; FSDP2 over all of them, experts over gpus / ep.
        ep: 1, or a divisor of the experts that fits in a node.
    """
    if sizes.experts % ep or machine.gpus % ep or gpus % machine.gpus:
        raise ValueError(f"ep: got {ep} on {gpus} GPUs, expected a divisor of {sizes.experts} experts, in full nodes")
    units = [(sizes.other_parameters, gpus, machine.gpus)]
    units.append((sizes.expert_parameters // ep, gpus // ep, machine.gpus // ep))
    sharding = sum(2 * gather_s(*unit, GATHERED, machine) + gather_s(*unit, REDUCED, machine) for unit in units)
    compute = PASSES * sizes.flops(images) / machine.flops
    tokens = images * sizes.tokens
    exchange = rows_bytes(tokens, sizes.picks, sizes.hidden, GATHERED) * (ep - 1) / ep / machine.nvlink
    shared = 6 * tokens * sizes.hidden * sizes.shared / machine.flops
    exchanges = sizes.depth * 2 * (exchange + max(exchange - shared, 0))  # both ways; forward hides one, backward too
    block = (sizes.other_parameters + sizes.expert_parameters / ep) / sizes.depth
    memory = STATE * (sizes.other_parameters + sizes.expert_parameters) / gpus + (2 * GATHERED + REDUCED) * block
    return {
        "compute_ms": 1e3 * compute,
        "sharding_ms": 1e3 * sharding,
        "exchange_ms": 1e3 * exchanges,
        "step_ms": 1e3 * (max(compute, sharding) + exchanges),
        "memory_gib": memory / 2**30,
    }


def hidden_from(sizes: Sizes, gpus: int, ep: int) -> int:
    """Return the images per GPU from which compute hides FSDP2's traffic."""
    one = step(sizes, gpus, ep, 1)
    return max(1, -int(-one["sharding_ms"] // one["compute_ms"]))


def wins_below(sizes: Sizes, gpus: int) -> int:
    """Return the images per GPU up to which EP's bound of a step is the lower one; 0 where it never is."""
    images = 0
    while step(sizes, gpus, EP, images + 1)["step_ms"] < step(sizes, gpus, 1, images + 1)["step_ms"]:
        images += 1
    return images


def table() -> str:
    """Return the table of docs/many_machines.md."""
    head = (
        "model",
        "GPUs",
        "way",
        "compute",
        "FSDP2",
        "all-to-all",
        "step at least",
        "GiB",
        "hidden from",
        "EP wins to",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, name in MODELS.items():
        sizes = Sizes.of(name)
        for gpus in GPUS:
            for ep in (1, EP):
                found = step(sizes, gpus, ep)
                times = [f"{found[key]:.1f} ms" for key in ("compute_ms", "sharding_ms", "exchange_ms", "step_ms")]
                way = "FSDP2" if ep == 1 else f"EP {ep} + FSDP2"
                wins = f"{wins_below(sizes, gpus)} images" if ep > 1 else ""
                memory, hidden = f"{found['memory_gib']:.1f}", f"{hidden_from(sizes, gpus, ep)} images"
                lines.append(f"| {' | '.join((label, str(gpus), way, *times, memory, hidden, wins))} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    print(f"{IMAGES} images of 256 x 256 pixels per GPU and step, bf16, H100 SXM at its published peaks\n\n{table()}")
    return 0
