"""The traps that have bitten MoE kernels before, each a small problem with the reason it is here, and its inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("MOE_TEST_DEVICE", "cpu")  # cpu or cuda: where the tests compute
LEAVES = ("x", "routing", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")
LOGIT_MARGIN = 0.05


@dataclass(frozen=True)
class Trap:
    name: str
    reason: str
    T: int = 37
    H: int = 32
    I: int = 24
    Is: int = 16
    E: int = 5
    K: int = 2
    picks: str = "random"  # random | empty_experts | one_expert | expert_choice
    activation: str = "swiglu"
    layout: str = "contiguous"  # contiguous | strided | expanded_dout | poisoned_ends | misaligned
    ids_dtype: torch.dtype = torch.int32
    magnitude: float = 1.0
    may_refuse: bool = False  # a backend may answer with a clear error instead

    @property
    def capacity(self) -> int:
        return max(1, self.T // self.E)

    def __str__(self) -> str:
        return self.name


PLAIN = Trap("plain", "ragged T, E not a power of two")
TRAPS = (
    PLAIN,
    Trap("empty_experts", "experts without rows: hang, garbage or non-zero gradients", picks="empty_experts"),
    Trap("one_expert", "all tokens to one expert: K - 1 groups empty, one long", picks="one_expert", K=1),
    Trap("no_token", "T = 0: empty launches, division by T", T=0),
    Trap("one_token", "T = 1: most experts empty, K groups of one row", T=1),
    Trap("below_tile", "T smaller than any tile", T=5),
    Trap("above_tile", "several tiles per expert, the last one ragged", T=301, E=3, H=16, I=8, Is=8),
    Trap("wide", "longer than one block of every loop", T=21, H=296, I=264, Is=136),
    Trap("all_experts", "K = E: every token in every expert", E=4, K=4),
    Trap("single_expert", "E = K = 1: softmax over one, exactly 1", E=1, K=1),
    Trap(
        "many_narrow_experts", "DSMoE, E = 48, K = 5: experts narrower than a vector", T=20, H=16, I=8, Is=8, E=48, K=5
    ),
    Trap("no_shared", "no shared expert: absent tensors", Is=0),
    Trap("gelu", "two-matrix experts", activation="gelu"),
    Trap("expert_choice", "tokens without any row", picks="expert_choice", activation="gelu", Is=0),
    Trap("expert_choice_shared", "tokens whose only row is the shared one", picks="expert_choice"),
    Trap("strided", "x, weights, routing and upstream gradient not contiguous", layout="strided"),
    Trap("expanded_dout", "out.sum().backward() gives stride-0 gradients", layout="expanded_dout"),
    Trap("poisoned_ends", "rows before the start and past the end are never read", layout="poisoned_ends"),
    Trap("misaligned", "data not aligned to a vector", layout="misaligned", may_refuse=True),
    Trap("odd_widths", "widths not a multiple of 16 bytes", H=21, I=13, Is=7, may_refuse=True),
    Trap("magnitude_1e-5", "garbage hides under an absolute tolerance", magnitude=1e-5),
    Trap("magnitude_1e3", "large values", magnitude=1e3),
    Trap("int64_ids", "ids as torch.topk gives them", ids_dtype=torch.int64),
)
BY_NAME = {trap.name: trap for trap in TRAPS}


@dataclass
class Problem:
    """Inputs of one MoE layer with forced routing: `routing` holds the (T,K) weights, or the (T,E) affinities."""

    trap: Trap
    x: Tensor  # (T, H)
    routing: Tensor
    topk_ids: Tensor | None  # (T, K); None for expert choice
    gate_up_proj: Tensor
    down_proj: Tensor
    shared_gate_up_proj: Tensor | None
    shared_down_proj: Tensor | None
    dout: Tensor  # (T, H)

    def map(self, fn) -> Problem:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trap"}
        return Problem(self.trap, **{name: None if t is None else fn(t) for name, t in tensors.items()})

    def double(self) -> Problem:
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def with_leaves(self) -> tuple[Problem, dict[str, Tensor]]:
        """Return the same problem on fresh leaves (same strides, same memory) and the leaves by name."""
        fresh = self.map(lambda t: t.detach())
        leaves = {n: getattr(fresh, n).requires_grad_() for n in LEAVES if getattr(fresh, n) is not None}
        return fresh, leaves


def sample(draw: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Call torch.rand, torch.randn ... with a CPU generator; the same numbers, then moved to DEVICE, everywhere."""
    return draw(*args, **options, device="cpu").to(DEVICE)


def make_problem(trap: Trap, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    T, H, E = trap.T, trap.H, trap.E
    wide = 2 if trap.activation == "swiglu" else 1

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (sample(torch.randn, shape, generator=g) * std).to(dtype)

    probs = draw_logits(trap, g).softmax(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if trap.picks == "expert_choice":
        routing, ids = probs, None
    else:
        routing, ids = probs.topk(trap.K, dim=-1)
        ids = ids.to(trap.ids_dtype)
    problem = Problem(
        trap,
        x=normal(T, H, std=scale),
        routing=routing,
        topk_ids=ids,
        gate_up_proj=normal(E, wide * trap.I, H, std=H**-0.5),
        down_proj=normal(E, H, trap.I, std=trap.magnitude * trap.I**-0.5),
        shared_gate_up_proj=normal(wide * trap.Is, H, std=H**-0.5) if trap.Is else None,
        shared_down_proj=normal(H, trap.Is, std=trap.magnitude * trap.Is**-0.5) if trap.Is else None,
        dout=normal(1, 1).expand(T, H) if trap.layout == "expanded_dout" else normal(T, H),
    )
    return problem.map(LAYOUTS[trap.layout])


def draw_logits(trap: Trap, generator: torch.Generator) -> Tensor:
    """Draw (T, E) router logits whose neighbours in the sorted order differ by a margin: no near ties."""
    logits = sample(torch.rand, trap.T, trap.E, generator=generator).argsort(dim=-1).float()
    logits = logits * 3 * LOGIT_MARGIN + sample(torch.rand, logits.shape, generator=generator) * LOGIT_MARGIN
    if trap.picks == "empty_experts":
        logits[:, ::3] -= 20
    elif trap.picks == "one_expert":
        logits[:, trap.E // 2] += 20
    return logits


def draw_router(T: int, H: int, E: int, K: int, dtype: torch.dtype, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw x (T, H) and gate_weight (E, H); tokens whose K + 1 largest logits nearly tie are drawn again."""
    g = torch.Generator().manual_seed(seed)
    gate_weight = (sample(torch.randn, E, H, generator=g) * 0.1 * H**-0.5).to(dtype)
    x = gate_weight.new_empty(T, H)
    near = x.new_ones(T, dtype=torch.bool)
    while near.any():
        x[near] = (sample(torch.randn, int(near.sum()), H, generator=g) * scale).to(dtype)
        top = (x.double() @ gate_weight.double().T).sort(dim=-1, descending=True).values
        gap = (-top[:, : K + 1].diff(dim=-1)).amin(-1) if E > 1 else top.new_ones(T)
        near = gap < 2e-6 + 1e-4 * top.abs().amax()
    return x, gate_weight


def strided(t: Tensor) -> Tensor:
    """Return t with poison between its elements."""
    buffer = t.new_full((*t.shape, 2), poison(t.dtype))
    return buffer[..., 0].copy_(t)


def embedded(t: Tensor, offset: int) -> Tensor:
    """Return t inside a larger buffer full of poison, `offset` elements from its start."""
    buffer = t.new_full((t.numel() + offset + 4096,), poison(t.dtype))
    return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)


def poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


LAYOUTS = {
    "contiguous": lambda t: t,
    "strided": strided,
    "expanded_dout": lambda t: t,
    "poisoned_ends": lambda t: embedded(t, 64),
    "misaligned": lambda t: embedded(t, 1),
}
