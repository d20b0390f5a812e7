"""Looking at what modules get and give while something else calls the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def looking_at(modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Call look(i, arguments, output, **what was given by name) behind every forward of the i-th module."""
    handles = [
        module.register_forward_hook(
            lambda _, args, named, output, i=i: look(i, args, output, **named), with_kwargs=True
        )
        for i, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
