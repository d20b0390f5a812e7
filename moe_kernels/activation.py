"""What an expert computes between its two products, and the name under which that goes through ops and backends."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from . import _checks

NAMES = ("swiglu", "gelu", "gelu_tanh")
PLAIN = ("swiglu", "gelu")  # what every backend has


@dataclass(frozen=True)
class ClampedSwiGLU:
    """g sigmoid(alpha g) (u + shift) with g = min(gate, limit), u = clamp(up, -limit, limit).

    Args:
        limit: positive; gradients are zero where gate or up lie beyond it.
        alpha: of the sigmoid.
        shift: added to up.
    Raises: TypeError, ValueError naming the argument.
    Source: the defaults are those of gpt-oss and MAGI-2; alpha=1, shift=0 clamp plain SwiGLU.
    """

    limit: float = 7.0
    alpha: float = 1.702
    shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("limit", "alpha", "shift"):
            _checks.finite_number(name, value := getattr(self, name))
            object.__setattr__(self, name, float(value))
        if self.limit <= 0:
            raise ValueError(f"limit: got {self.limit}, expected a positive number")

    def __str__(self) -> str:
        return f"{CLAMPED}limit={self.limit!r}, alpha={self.alpha!r}, shift={self.shift!r})"


CLAMPED = "clamped_swiglu("
Activation = str | ClampedSwiGLU


def spelled(activation: Activation) -> str:
    """Return the name of an activation, its numbers included. Raises: ValueError for anything else."""
    if isinstance(activation, ClampedSwiGLU):
        return str(activation)
    if not isinstance(activation, str) or not (activation in NAMES or activation.startswith(CLAMPED)):
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"activation: got {activation!r}, expected one of {names}, or a ClampedSwiGLU")
    return activation


def halves(name: str) -> int:
    """Return how many rows of gate_up_proj make one unit of the intermediate size: 2 with a gate."""
    return 1 if name in ("gelu", "gelu_tanh") else 2


def clamp_of(name: str) -> tuple[float, float, float] | None:
    """Return limit, alpha and shift of a spelled ClampedSwiGLU, None for others."""
    if not name.startswith(CLAMPED):
        return None
    try:
        numbers = dict(part.split("=") for part in name.removeprefix(CLAMPED).removesuffix(")").split(", "))
        return astuple(ClampedSwiGLU(**{key: float(number) for key, number in numbers.items()}))
    except (TypeError, ValueError):
        raise ValueError(f"activation: got {name!r}, expected {str(ClampedSwiGLU())!r} or other numbers") from None
