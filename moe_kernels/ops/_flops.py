"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: 2 for each multiply-add of a product."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

from ..plan import FIELDS

COUNTER = "torch.utils.flop_counter"  # importing it takes a third of a second, and Triton
Shape = Sequence[int]


def _products(rows: int, *kinds: Sequence[Shape]) -> int:
    """Return the FLOPs of `rows` rows, each through one matrix of each kind out of as many as there are experts."""
    return sum(2 * rows * sum(map(prod, kind)) for kind in kinds)


def _routed(plan: Sequence[Shape], *kinds: Sequence[Shape]) -> int:
    (E,), (R,) = (plan[FIELDS.index(name)] for name in ("expert_counts", "row_token"))
    return _products(R, *kinds) // E


def experts(
    x: Shape, plan: Sequence[Shape], gate_up: Sequence[Shape], down: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Count 6 R H I (swiglu)."""
    return _routed(plan, gate_up, down)


def moe_mlp(x: Shape, plan: Sequence[Shape], *arguments: Any, **_: Any) -> int:
    """Count 6 R H I + 6 T H Is (swiglu)."""
    gate_up, down, shared_gate_up, shared_down = arguments[:4]
    return _routed(plan, gate_up, down) + _products(x[0], shared_gate_up, shared_down)


def experts_bwd(dy_rows: Shape, x: Shape, plan: Sequence[Shape], *arguments: Any, **_: Any) -> int:
    """Count the gradients of the rows, and of the weights that need some."""
    kinds, needed = arguments[:2], arguments[7]
    return _routed(plan, *kinds) + _routed(plan, *_those(kinds, needed[:2]))


def moe_mlp_bwd(dout: Shape, x: Shape, plan: Sequence[Shape], *arguments: Any, **_: Any) -> int:
    """Count the gradients of the tokens and of the weights that need some; gate_up once more where it was not kept."""
    routed, shared, kept, needed = arguments[:2], arguments[2:4], arguments[8], arguments[12]
    again = 0 if prod(kept) else _routed(plan, routed[0]) + _products(x[0], shared[0])
    rows = _routed(plan, *routed) + _routed(plan, *_those(routed, needed[:2]))
    return again + rows + _products(x[0], *shared) + _products(x[0], *_those(shared, needed[2:4]))


def _those(kinds: Sequence[Sequence[Shape]], needed: Sequence[bool]) -> list[Sequence[Shape]]:
    return [kind for kind, wanted in zip(kinds, needed, strict=True) if wanted]


def gating(x: Shape, gate_weight: Shape, *_: Any, **__: Any) -> int:
    """Count 2 T H E."""
    return 2 * x[0] * prod(gate_weight)


def gating_bwd(dtopk_weights: Any, dprobs: Any, x: Shape, gate_weight: Shape, *_: Any, **__: Any) -> int:
    """Count 4 T H E."""
    return 4 * x[0] * prod(gate_weight)


def modulated_gating(x: Shape, shift: Shape, scale: Shape, gate_weight: Shape, *_: Any, **__: Any) -> int:
    """Count 2 T H E."""
    return 2 * prod(x[:-1]) * prod(gate_weight)


def modulated_gating_bwd(*arguments: Any, **_: Any) -> int:
    """Count 4 T H E."""
    x, gate_weight = arguments[3], arguments[6]
    return 4 * prod(x[:-1]) * prod(gate_weight)


_FORMULAS = (
    experts, experts_bwd, gating, gating_bwd, moe_mlp, moe_mlp_bwd, modulated_gating, modulated_gating_bwd,
)  # fmt: skip


def _register(counter: ModuleType) -> None:
    for formula in _FORMULAS:
        counter.register_flop_formula([getattr(torch.ops.moe_kernels, formula.__name__)])(formula)


class _WhenImported(MetaPathFinder, Loader):
    """Registers the formulas behind the first import of torch's counter, and is gone then."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
