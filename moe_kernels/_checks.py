"""Checks of arguments: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .plan import RoutingPlan

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST_DEVICES = tuple(  # asked once: Dynamo of torch 2.11 cannot trace the question
    name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name)
)
INTEGERS = (torch.int32, torch.int64)


def tensor(
    name: str, value: object, dims: str, dtypes: Sequence[torch.dtype] = FLOATS, like: Tensor | None = None
) -> None:
    """Check that `value` is a tensor with the dimensions written as in "T,H" and, given `like`, on its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor ({dims})")
    if value.dim() != dims.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({dims})")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device}")


def shape(name: str, got: Sequence[int], expected: Sequence[int], meaning: str) -> None:
    """Check a shape whose meaning is written as in "E,H"."""
    if tuple(got) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(got)}, expected ({meaning}) = {tuple(expected)}")


def positive(name: str, value: int) -> int:
    """Check an integer size, numpy's integers too; return it as an int."""
    plain = type(value) is int  # numbers.Integral takes ten times as long to ask
    if not plain and (not isinstance(value, (numbers.Integral, torch.SymInt)) or isinstance(value, bool)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return value if isinstance(value, torch.SymInt) else int(value)


def finite_number(name: str, value: float) -> None:
    """Check a number that is to be computed with."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Check an option that is a word."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, choices))}")


def router(gate_weight: object, like: Tensor, hidden_size: int, top_k: object) -> None:
    """Check a router's weight (E, H) and its number of picks, 0 to E."""
    tensor("gate_weight", gate_weight, "E,H", like=like)
    E, _ = gate_weight.shape
    positive("H", hidden_size)
    positive("num_experts", E)
    shape("gate_weight", gate_weight.shape, (E, hidden_size), "E,H")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k: got {type(top_k).__name__}, expected an int")
    if not 0 <= top_k <= E:
        raise ValueError(f"top_k: got {top_k}, expected 0 to num_experts = {E}")


def plan(plan: object, num_tokens: int | None, like: Tensor) -> RoutingPlan:
    """Check a plan, made for these tokens and this device; return it with row_weight as backends take it."""
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a RoutingPlan")
    if num_tokens is not None and plan.num_tokens != num_tokens:
        raise ValueError(f"plan: got a plan for {plan.num_tokens} tokens, expected {num_tokens}")
    if plan.row_token.device != like.device:
        raise ValueError(f"plan: got device {plan.row_token.device}, expected {like.device}")
    plan.check_layout()
    row_weight = narrow(plan.row_weight, like)
    return plan if row_weight is plan.row_weight else replace(plan, row_weight=row_weight)


def narrow(t: Tensor, x: Tensor) -> Tensor:
    """Return t; float32 for float64 beside an x that is not: no kernel reads that, and sums are in float32."""
    return t.float() if t.dtype == torch.float64 != x.dtype else t


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over values of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(x: Tensor) -> bool:
    """Say whether autocast is on for the device of x; False on devices that have none, as meta."""
    return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer works on x: that of x, or autocast's where it is on. float64 stays."""
    if x.dtype != torch.float64 and autocast_enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def set_nonfinite(mode: str) -> None:
    """Choose what token choice does on a CPU with router logits that are not finite: "raise" (default) or "propagate".

    "propagate" does what the originals, and GPUs, do: NaN comes out of that token alone, so that a loss scaler sees it
    and skips the step. For the whole process.

    Args:
        mode: "raise" or "propagate".
    Raises: ValueError for another mode.
    """
    global _nonfinite
    if mode not in ("raise", "propagate"):
        raise ValueError(f"mode: got {mode!r}, expected 'raise' or 'propagate'")
    _nonfinite = mode


_nonfinite = "raise"


def refuse_nonfinite(token: int) -> None:
    """Raise for a token whose router logits are not finite, unless `set_nonfinite` says otherwise."""
    if _nonfinite == "raise":
        raise ValueError(
            f"x, gate_weight: got non-finite router logits (token {token}), expected finite ones; "
            'moe_kernels.set_nonfinite("propagate") lets them through'
        )


def ids(topk_ids: Tensor, num_experts: int) -> None:
    """Refuse ids that no expert has, only on the CPU, as `finite`."""
    if topk_ids.device.type == "cpu" and topk_ids.numel():
        low, high = (int(bound) for bound in topk_ids.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"topk_ids: got ids from {low} to {high}, expected [0, {num_experts})")


def finite(probs: Tensor) -> None:
    """Refuse the softmax of logits that were not finite, only on the CPU: on a GPU the check would force a sync."""
    if probs.device.type == "cpu" and not bool(probs.isfinite().all()):
        refuse_nonfinite(int((~probs.isfinite()).any(1).nonzero()[0]))
