"""Numbers on the command line: argparse types that refuse, with the option's name, what nobody can mean."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", int, float)


def seconds(text: str) -> float:
    """Read a time: finite, not negative."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a finite number, at least 0")


def positive(text: str) -> float:
    """Read a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a positive number")


def count(text: str) -> int:
    """Read an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer, at least 1")


def counts(text: str) -> list[int]:
    """Read comma-separated integers of at least 1."""
    return [count(word) for word in text.split(",")]


def _number(text: str, kind: type[T], allowed: Callable[[T], bool], expected: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
    return value
