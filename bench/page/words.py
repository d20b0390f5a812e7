"""Names and numbers as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.instrument.cases import BACKENDS, ROOMS

BASELINES = {"authors_tp1": "authors' loop", "grouped": "grouped"}
ORDER = (*BACKENDS, "sorted_loop", "authors_tp1", "authors_tp2", "reference")
NAMES = {
    "authors_tp1": "authors' loop", "authors_tp2": "authors' loop, tp=2", "sorted_loop": "sorted loop",
}  # fmt: skip
LEVELS = {
    **{room: f"op: {room}" for room in ROOMS}, "layer": "MoE layer", "block": "transformer block",
    "train_step": "training step", "sampling_step": "sampling step",
}  # fmt: skip
STEPS = ("train_step", "sampling_step")
MODES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}


def name(contender: str) -> str:
    return NAMES.get(contender, contender)


def rank(backend: str) -> int:
    return ORDER.index(backend) if backend in ORDER else len(ORDER)


def figure(value: float) -> str:
    """Format a number to three significant digits without exponents where they can be avoided."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"
    return f"{value:.1e}"


def signed(value: float) -> str:
    return "0" if abs(value) < 5e-7 else f"{value:+.1e}" if abs(value) < 1e-3 else f"{value:+.4f}"


def ratio(value: dict) -> str:
    return f"{value['value']:.2f}x [{value['low']:.2f}, {value['high']:.2f}]"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(words: Sequence[Any]) -> str:
    """Join words as a sentence does: a, b and c."""
    words = [str(word) for word in words]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
