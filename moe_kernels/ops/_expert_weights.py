"""Weight arguments of the ops: stacked, or lists of per-expert views of one slab."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks, weights
from ..backends.base import MoEWeights
from ..plan import RoutingPlan

Weights = Tensor | Sequence[Tensor]


def stacked_shape(name: str, tensors: Sequence[Tensor], lead: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Return the stacked shape of a weight argument: lead + (rows, columns); lead is (E,), for the shared expert ()."""
    first = tensors[0]
    if len(tensors) == 1 and first.dim() == len(lead) + 2:
        return tuple(first.shape)
    count = parts * lead[0] if lead else parts
    if len(tensors) != count or first.dim() != 2:
        raise ValueError(
            f"{name}: got {len(tensors)} tensors, the first of shape {tuple(first.shape)}, expected one stacked tensor "
            f"with {len(lead) + 2} dimensions or {count} matrices"
        )
    for position, tensor in enumerate(tensors):
        if tensor.shape != first.shape:
            raise ValueError(f"{name}[{position}]: got shape {tuple(tensor.shape)}, expected {tuple(first.shape)}")
    return (*lead, parts * first.shape[0], first.shape[1])


def check(
    x: Tensor, plan: RoutingPlan, gate_up_proj: Weights, down_proj: Weights, activation: str, shared: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Check the weights of the routed experts or of the shared one against x and the plan; return them as lists."""
    parts = _checks.activation(activation)
    prefix, lead, meaning = ("shared_", (), "") if shared else ("", (plan.num_experts,), "E,")
    gate_up, down = (_as_list(prefix + n, w, x) for n, w in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)))
    H = x.shape[1]
    shape = stacked_shape(prefix + "gate_up_proj", gate_up, lead, parts)
    rows = shape[-2]
    if rows % parts or rows == 0:
        expected = f"a positive multiple of {parts} ({activation})"
        raise ValueError(f"{prefix}gate_up_proj: got {rows} rows, expected {expected}")
    _checks.shape(f"{prefix}gate_up_proj", shape, (*lead, rows, H), f"{meaning}{parts if parts > 1 else ''}I,H")
    down_shape = stacked_shape(prefix + "down_proj", down, lead, 1)
    _checks.shape(f"{prefix}down_proj", down_shape, (*lead, H, rows // parts), f"{meaning}H,I")
    return gate_up, down


def _as_list(name: str, value: Weights, x: Tensor) -> list[Tensor]:
    if not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor or a sequence of tensors")
    tensors = [value] if isinstance(value, Tensor) else list(value)
    if not tensors:
        raise ValueError(f"{name}: got an empty sequence, expected weights")
    autocast = _checks.autocast_enabled(x)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x.device} (the device of x)")
        if tensor.dtype != x.dtype and not (autocast and tensor.dtype in _checks.FLOATS):
            raise TypeError(f"{name}: got {tensor.dtype}, expected {x.dtype} (the dtype of x)")
    return tensors


def gate_up_width(gate_up: Sequence[Tensor], num_experts: int | None) -> int:
    """Return the columns of gate_up: 2I or I. num_experts is None for the shared expert."""
    matrices = 1 if len(gate_up) == 1 else len(gate_up) // (num_experts or 1)
    return matrices * gate_up[0].shape[-2]


def stack(
    x: Tensor,
    num_experts: int,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    shared_gate_up: Sequence[Tensor] = (),
    shared_down: Sequence[Tensor] = (),
) -> MoEWeights:
    """View (never copy) the lists as stacked tensors; cast to the dtype of x where autocast made it another one."""
    H = x.shape[1]

    def one(name: str, tensors: Sequence[Tensor], *shape: int) -> Tensor:
        return weights.stacked(name, tensors, shape).to(x.dtype).contiguous()

    width, I = gate_up_width(gate_up, num_experts), down[0].shape[-1]
    routed = one("gate_up_proj", gate_up, num_experts, width, H), one("down_proj", down, num_experts, H, I)
    if not shared_gate_up:
        return MoEWeights(*routed)
    return MoEWeights(
        *routed,
        one("shared_gate_up_proj", shared_gate_up, gate_up_width(shared_gate_up, None), H),
        one("shared_down_proj", shared_down, H, shared_down[0].shape[-1]),
    )


def unstack_gradient(gradient: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of a weight argument as views of the stacked gradient, one for each of its tensors."""
    if gradient is None or not tensors:
        return [None] * len(tensors)
    if len(tensors) == 1:
        return [gradient.view(tensors[0].shape)]
    return list(gradient.view(len(tensors), *tensors[0].shape).unbind(0))
