"""Named shapes of MoE layers with where they come from, and routing presets: how unevenly tokens fall on experts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from bench.instrument.readers import Npz

IMAGE_TOKENS = 256  # 256-pixel image, 8x VAE, patch 2


@dataclass(frozen=True)
class MoEShape:
    """Sizes of one MoE layer, and of the transformer around it where the oracle has it (num_heads > 0)."""

    name: str
    model: str  # the name inside case ids: no hyphen
    H: int
    I: int
    Is: int
    E: int
    K: int
    depth: int = 1
    num_heads: int = 0
    tokens_per_image: int = IMAGE_TOKENS
    activation: str = "swiglu"
    qk_norm: bool = False

    def __str__(self) -> str:
        return f"H{self.H}_I{self.I}_Is{self.Is}_E{self.E}_K{self.K}"


def _dit_moe(size: str, H: int, depth: int, num_heads: int, qk_norm: bool = False) -> list[MoEShape]:
    """DiT-MoE (arXiv 2407.11633): routed experts 4H wide, one shared expert 2H wide, top-2 of 8 or 16."""
    around = {"depth": depth, "num_heads": num_heads, "qk_norm": qk_norm}
    return [MoEShape(f"{size}/2-{E}E2A", f"{size}2", H, 4 * H, 2 * H, E, 2, **around) for E in (8, 16)]


MODEL_SHAPES: dict[str, MoEShape] = {
    shape.name: shape
    for shape in (
        *_dit_moe("S", 384, 12, 6),
        *_dit_moe("B", 768, 12, 12),
        *_dit_moe("L", 1024, 24, 16),
        *_dit_moe("XL", 1152, 28, 16, qk_norm=True),
        *_dit_moe("G", 1408, 40, 16, qk_norm=True),
        MoEShape("HiDream-I1", "HiDreamI1", 2560, 6912, 3584, 4, 2, depth=48, tokens_per_image=4096),
        # arXiv 2604.12163: experts take 2 tokens of theirs per token of an image on average
        MoEShape("Nucleus-Image", "NucleusImage", 2048, 1344, 1344, 64, 2, depth=29, tokens_per_image=4096),
        MoEShape("DSMoE-S-E48", "DSMoESE48", 384, 128, 128, 48, 5, depth=12),  # arXiv 2512.01252: many narrow experts
        MoEShape("DSMoE-L-E48", "DSMoELE48", 1024, 448, 448, 48, 5, depth=24),
        MoEShape("JiTMoE-B-E16", "JiTMoEBE16", 768, 1536, 1536, 16, 2, depth=10),
        MoEShape("ProMoE-B", "ProMoEB", 768, 1536, 1536, 12, 1, depth=12, activation="gelu"),  # arXiv 2510.24711
        # arXiv 2503.14487: experts take a token each per token on average; its repository has EC-DiT, too
        MoEShape("DiffMoE-L-E8", "DiffMoELE8", 1024, 4096, 0, 8, 1, depth=24, activation="gelu"),
        MoEShape("EC-DiT-L-E8", "ECDiTLE8", 1024, 4096, 0, 8, 1, depth=24, activation="gelu"),
        MoEShape("digits", "digits", 96, 384, 192, 8, 2, depth=4, num_heads=4, tokens_per_image=16),  # the main job's
    )
}

Preset = Callable[[int, int, int, Generator], tuple[Tensor, Tensor]]


def _pick(log_popularity: Tensor, T: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw K distinct experts per token, expert e first with probability ~ exp(log_popularity[..., e]) (Gumbel top-k).

    Weights are what a DiT-MoE gate gives: the K largest of a softmax over all experts, descending, their sum below 1.
    """
    E = log_popularity.shape[-1]
    if not 1 <= K <= E:
        raise ValueError(f"K: got {K}, expected 1..{E} (num_experts)")
    gumbel = -torch.empty(T, E).exponential_(generator=generator).log()
    topk_ids = (log_popularity + gumbel).topk(K, dim=-1).indices
    probs = torch.randn(T, E, generator=generator).softmax(dim=-1)
    return topk_ids.int(), probs.topk(K, dim=-1).values


def uniform(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every expert equally likely: what most benchmarks use, and what no trained model does."""
    return _pick(torch.zeros(E), T, K, generator)


def zipf(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The n-th most popular expert has popularity 1/n; which expert that is, is drawn."""
    popularity_rank = torch.randperm(E, generator=generator) + 1
    return _pick(-popularity_rank.float().log(), T, K, generator)


def one_expert(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """All tokens to one expert: with K picks per token, all of them to experts 0 .. K-1 and none to the others."""
    return _pick(torch.where(torch.arange(E) < K, 0.0, -math.inf), T, K, generator)


def empty_experts(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every second expert has no token at all (fewer, where K picks need more): the XL model's extreme case."""
    alive = torch.arange(E) % 2 == 0 if E >= 2 * K else torch.arange(E) < max(K, E - 1)
    return _pick(torch.where(alive, 0.0, -math.inf), T, K, generator)


def position_skewed(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Popularity follows the position in the image, the same in every image: DiT-MoE's shallow layers.

    log popularity of expert e at (row, column) of a square image = 3 cos(2 pi (a_e row + b_e column + c_e)), a_e and
    b_e at most one wave per image. Images have IMAGE_TOKENS tokens; fewer tokens are one smaller image.
    """
    side = math.isqrt(min(T, IMAGE_TOKENS)) or 1
    token = torch.arange(T)
    row, column = (token // side % side / side)[:, None], (token % side / side)[:, None]
    a, b, c = torch.rand(3, E, generator=generator)
    return _pick(3 * torch.cos(2 * math.pi * (a * row + b * column + c)), T, K, generator)


def real(T: int, E: int, K: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Picks recorded from a trained model (`save_routing`), cut or repeated to T tokens, from a drawn start.

    Raises: ValueError where there is no such record for E experts and K picks.
    """
    got = recorded_routing()
    if got != (E, K):
        raise ValueError(f"{routing_trace()}: got routing over (experts, picks) = {got}, expected {(E, K)}")
    trace = Npz(routing_trace(), "MOE_BENCH_ROUTING")
    topk_ids, topk_weights = trace.read("topk_ids"), trace.read("topk_weights")
    start = int(torch.randint(len(topk_ids), (1,), generator=generator))
    rows = (start + np.arange(T)) % len(topk_ids)
    return torch.from_numpy(topk_ids[rows]).int(), torch.from_numpy(topk_weights[rows]).float()


ROUTING_PRESETS: dict[str, Preset] = {
    preset.__name__: preset for preset in (uniform, zipf, one_expert, empty_experts, position_skewed, real)
}


def routing_trace() -> Path:
    """Return where the record of a trained model's routing lies: MOE_BENCH_ROUTING, or .cache/routing.npz."""
    return Path(os.environ.get("MOE_BENCH_ROUTING", Path(__file__).parents[2] / ".cache" / "routing.npz"))


def recorded_routing() -> tuple[int, int] | None:
    """Return (E, K) of the record, None without one; ValueError names the keys that are missing."""
    if not routing_trace().exists():
        return None
    trace = Npz(routing_trace(), "MOE_BENCH_ROUTING")
    if missing := {"topk_ids", "topk_weights", "num_experts"} - trace.keys:
        raise ValueError(f"{trace.where}: got keys {sorted(trace.keys)}, expected {sorted(missing)} too")
    shape = trace.header("topk_ids").shape
    if len(shape) != 2 or trace.header("num_experts").shape:
        raise ValueError(f"{trace.where}: topk_ids, num_experts: expected (N, K) and one number")
    return int(trace.read("num_experts")), shape[1]


def save_routing(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, path: Path | None = None) -> Path:
    """Record topk_ids (N, K) and topk_weights (N, K), tokens image by image, for the preset `real`."""
    path = path or routing_trace()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        topk_ids=topk_ids.cpu().numpy().astype(np.int32),
        topk_weights=topk_weights.detach().float().cpu().numpy(),
        num_experts=num_experts,
    )
    return path
