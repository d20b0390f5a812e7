"""A block after `replace_moe`: the modules of the original, read live, and this project's experts."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..layer import describe_backend
from ..ops import moe_mlp
from ..routing import TokenChoice
from ..weights import Biases, LayerWeights
from .family import Family
from .linear import NotUnderstoodError
from .reading import Experts, Reader, unequal

INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent))  # torch's, ours


@dataclass(frozen=True)
class BlockConfig:
    """What `replace_moe` was told, and how the block's modules are read."""

    family: Family
    read: Reader
    backend: str
    recompute: bool
    aux_loss_mode: str
    first_argument: str  # what the original's forward calls x
    router_class: type[TokenChoice] = TokenChoice  # of DiT-MoE; another is for whoever wants to see what it does
    on_trial: bool = False  # the original is not to step in: that would compare it with itself

    @property
    def path(self) -> str:
        return self.read.path


class MoEBlock(nn.Module):
    """The forward of a replaced block; its class is a subclass of this one and of the original's.

    At each call the weights are read from the modules as they are, wherever their memory lies, and the family's router
    is called; nothing is moved or kept. Where a module does something that reading cannot show (hooks, offloading,
    quantised layers ...), the original's own forward computes the call, and a warning names the module once. Under
    torch.compile, and where the original gives no gradient, that is an error instead.
    """

    moe_config: BlockConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the block; arguments and results as in the original's forward."""
        config = self.moe_config
        if not args and config.first_argument not in kwargs:
            raise TypeError(f"{config.path}: got no {config.first_argument}, expected a tensor")
        x, *args = args or (kwargs.pop(config.first_argument),)
        family, backend = config.family, config.backend
        try:
            experts = family.experts(self, config.read)
            tokens, plan, extra = family.route(self, backend, x, *args, **kwargs)
        except NotUnderstoodError as reason:
            return self.by_the_original(str(reason), x, *args, **kwargs)
        try:
            how = {"activation": experts.activation, "layout": experts.layout, "biases": experts.biases}
            y = moe_mlp(tokens, plan, *experts.weights, backend=backend, recompute=config.recompute, **how)
        except (TypeError, ValueError):
            reason = unequal(config.path, experts.tensors, _checks.compute_dtype(tokens), tokens.device)
            if not reason:
                raise
        else:
            return family.result(self, y, x, extra)
        return self.by_the_original(reason, x, *args, **kwargs)

    def by_the_original(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute a call by the original's forward, and say so once for each reason."""
        if self.moe_config.on_trial:
            raise ValueError(reason)
        if torch.compiler.is_compiling():
            path = self.moe_config.path  # Reader leaves it out while compiling: equal blocks are then one graph
            reason = reason if reason.startswith(path) else f"{path}.{reason.removeprefix('.')}"
            raise RuntimeError(
                f"replace_moe: {reason}; under torch.compile only blocks that the kernels compute can run"
            )
        said = self.__dict__.setdefault("moe_said", set())
        if reason not in said:
            said.add(reason)
            warnings.warn(f"replace_moe: {reason}; the block's original forward computes it", stacklevel=_level())
        result = super().forward(x, *args, **kwargs)
        y = result if isinstance(result, Tensor) else result[0]
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if wanted and not (y.requires_grad and self.moe_config.family.differentiates(self)):
            raise RuntimeError(
                f"replace_moe: {reason}, and the original's forward gives no gradients "
                f"{'in training' if self.training else 'in eval'}; expected train(), or torch.no_grad()"
            )
        return result

    def expert_weights(self) -> tuple[tuple[Any, ...], str, str, str, Biases | None]:
        """Return the four weights of `moe_mlp`, the activation, the layout, the backend and the biases."""
        try:
            experts = self.moe_config.family.experts(self, self.moe_config.read)
        except NotUnderstoodError as reason:
            raise ValueError(f"replace_moe: {reason}") from None
        return experts.weights, experts.activation, experts.layout, self.moe_config.backend, experts.biases

    def extra_repr(self) -> str:
        config = self.moe_config
        try:
            experts = config.family.experts(self, config.read)
            reason = unequal(config.path, experts.tensors, experts.down[0].dtype, experts.down[0].device)
        except NotUnderstoodError as error:
            reason = str(error)
        if reason:
            return f"backend=the original's forward ({reason})"
        w = layer_weights(experts)
        sizes = w.num_experts, w.hidden_size, w.intermediate_size, w.shared_intermediate_size
        backend = describe_backend(config.backend, experts.down[0], *sizes, experts.activation, bool(experts.biases))
        return f"family={config.family.name}, backend={backend}"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle, and so copy, as the original's class: the one of this block is made at run time."""
        state = object.__reduce_ex__(self, max(protocol, 2))[2]  # as the class, or its __getstate__ and slots, have it
        return _rebuild, (original_class(self), self.moe_config.family), state


def _level() -> int:
    """Return the stacklevel at which a warning of our caller names who called the block: no line of torch or ours."""
    frame, level = sys._getframe(1), 1  # warnings' skip_file_prefixes needs Python 3.12
    while frame.f_back and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def layer_weights(experts: Experts) -> LayerWeights:
    """Return the weights as the layouts know them."""
    return LayerWeights(*(kind or () for kind in experts.weights), experts.layout)


@cache
def replaced_class(original: type[nn.Module], family: Family) -> type[MoEBlock]:
    """Return the class that a block of class `original` has after `replace_moe`: a subclass, of the same name."""
    base = family.block_class or MoEBlock
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": base.__doc__}
    return type(original.__name__, (base, original), names)


def original_class(block: MoEBlock) -> type[nn.Module]:
    """Return what a block's class was before `replace_moe`."""
    order = type(block).__mro__
    return order[order.index(MoEBlock) + 1]


def _rebuild(original: type[nn.Module], family: Family) -> MoEBlock:
    cls = replaced_class(original, family)
    return cls.__new__(cls)
