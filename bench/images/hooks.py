"""Looking at what modules get and give while something else calls the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def looking_at(modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Call look(i, arguments, output, **what was given by name) behind every forward of the i-th module."""

    def hook(i: int) -> Callable[..., None]:
        return lambda _, args, named, output: look(i, args, output, **named)

    handles = [module.register_forward_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
