"""Weight arguments of the ops, in stacks or matrix by matrix: their checks, how they reach a backend and come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import _checks
from ..activation import halves as halves_of
from ..backends.base import Backend
from ..weights import LAYOUTS, Biases, LayerWeights, MoEWeights
from ..weights.layouts import in_two_stacks, width

Weights = Tensor | Sequence[Tensor]
Lists = Sequence[Sequence[Tensor]]  # gate_up, down, and those of the shared expert, as LayerWeights takes them; biases


def _shape(name: str, tensors: Sequence[Tensor], lead: tuple[int, ...], halves: int, in_out: bool) -> tuple[int, ...]:
    """Return the shape of a weight argument as lead + (out, in); lead is (E,), for the shared expert ()."""
    first = tensors[0]
    if len(tensors) == 1 and first.dim() == len(lead) + 2:
        *outer, rows, columns = first.shape
        return (*outer, columns, rows) if in_out else (*outer, rows, columns)
    count = halves * lead[0] if lead else halves
    two_stacks = lead and halves == 2
    if not (two_stacks and in_two_stacks(tensors)) and (len(tensors) != count or first.dim() != 2):
        raise ValueError(
            f"{name}: got {len(tensors)} tensors, the first of shape {tuple(first.shape)}, expected one stacked tensor "
            f"with {len(lead) + 2} dimensions{', or two such, [gate, up],' if two_stacks else ''} or {count} matrices"
        )
    for position, tensor in enumerate(tensors):
        if tensor.shape != first.shape:
            raise ValueError(f"{name}[{position}]: got shape {tuple(tensor.shape)}, expected {tuple(first.shape)}")
    *outer, rows, columns = first.shape
    return (*(outer or lead), halves * (columns if in_out else rows), rows if in_out else columns)


def check(
    x: Tensor,
    num_experts: int,
    gate_up_proj: Weights,
    down_proj: Weights,
    activation: str,
    layout: str,
    shared: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Check the weights of the routed experts or of the shared one against x; return them as lists."""
    halves = halves_of(activation)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    in_out, H = LAYOUTS[layout].in_out, x.shape[1]
    prefix, lead, meaning = ("shared_", (), "") if shared else ("", (num_experts,), "E,")
    gate_up, down = (_as_list(prefix + n, w, x) for n, w in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)))

    def expect(name: str, got: tuple[int, ...], rows: int, columns: int, dims: tuple[str, str]) -> None:
        if in_out:
            got, rows, columns, dims = (*got[:-2], got[-1], got[-2]), columns, rows, dims[::-1]
        _checks.shape(prefix + name, got, (*lead, rows, columns), meaning + ",".join(dims))

    shape = _shape(prefix + "gate_up_proj", gate_up, lead, halves, in_out)
    rows = shape[-2]
    if rows % halves or rows == 0:
        expected = f"a positive multiple of {halves} ({activation})"
        raise ValueError(f"{prefix}gate_up_proj: got {rows} {'columns' if in_out else 'rows'}, expected {expected}")
    if in_two_stacks(gate_up):
        expect("gate_up_proj[0]", (*shape[:-2], rows // 2, shape[-1]), rows // 2, H, ("I", "H"))
    expect("gate_up_proj", shape, rows, H, (f"{halves if halves > 1 else ''}I", "H"))
    down_shape = _shape(prefix + "down_proj", down, lead, 1, in_out)
    expect("down_proj", down_shape, H, rows // halves, ("H", "I"))
    return gate_up, down


def check_shared(
    x: Tensor,
    num_experts: int,
    gate_up_proj: Weights | None,
    down_proj: Weights | None,
    activation: str,
    layout: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Check the shared expert's weights, both or none, and return them as lists."""
    if (gate_up_proj is None) != (down_proj is None):
        missing = "shared_down_proj" if down_proj is None else "shared_gate_up_proj"
        raise ValueError(f"{missing}: got None, expected weights: the shared expert has two, or none")
    if gate_up_proj is None:
        return [], []
    return check(x, num_experts, gate_up_proj, down_proj, activation, layout, shared=True)


def check_biases(
    x: Tensor,
    num_experts: int,
    biases: Biases | None,
    activation: str,
    layout: str,
    down: Sequence[Tensor],
    shared_down: Sequence[Tensor],
) -> list[list[Tensor]]:
    """Check biases against the weights; return a list for each kind, empty for none."""
    if biases is None:
        return [[], [], [], []]
    if not isinstance(biases, Biases):
        raise TypeError(f"biases: got {type(biases).__name__}, expected moe_kernels.Biases")
    inner, halves = -2 if LAYOUTS[layout].in_out else -1, halves_of(activation)
    E, H, I = num_experts, x.shape[1], down[0].shape[inner]
    Is = shared_down[0].shape[inner] if shared_down else 0
    expected = ((E,), halves, I), ((E,), 1, H), ((), halves, Is), ((), 1, H)
    lists = []
    for name, value, (lead, parts, size) in zip(biases._fields, biases, expected, strict=True):
        if value is None:
            lists.append([])
            continue
        if not lead and not shared_down:
            raise ValueError(f"biases.{name}: got a bias, expected None: there is no shared expert")
        tensors = _as_list(f"biases.{name}", value, x)
        whole, shapes = (*lead, parts * size), [tuple(tensor.shape) for tensor in tensors]
        count = parts * (lead[0] if lead else 1)
        if shapes not in ([whole], [(size,)] * count):
            raise ValueError(f"biases.{name}: got shapes {shapes[:4]}, expected {whole}, or {count} of {(size,)}")
        lists.append(tensors)
    return lists


def _as_list(name: str, value: Weights, x: Tensor) -> list[Tensor]:
    if not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor or a sequence of tensors")
    tensors = [value] if isinstance(value, Tensor) else list(value)
    if not tensors:
        raise ValueError(f"{name}: got an empty sequence, expected weights")
    dtype, device, autocast = x.dtype, x.device, _checks.autocast_enabled(x)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {device} (the device of x)")
        if tensor.dtype != dtype and not (autocast and tensor.dtype in _checks.FLOATS):
            raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype} (the dtype of x)")
    return tensors


def gate_up_width(gate_up: Sequence[Tensor], num_experts: int, layout: str) -> int:
    """Return the columns of gate_up: 2I or I. num_experts is 1 for the shared expert."""
    return width(gate_up, num_experts, LAYOUTS[layout])


def for_backend(backend: Backend, w: LayerWeights) -> LayerWeights | MoEWeights:
    """Return the weights in the form that a backend reads."""
    return {"addresses": w.readable, "indexed": w.indexed, "stacked": w.stacked}[backend.reads]()


def gradients_of(
    backend: Backend, w: LayerWeights, gradients: Sequence[Any], lists: Lists, needed: Sequence[bool]
) -> list[Tensor]:
    """Return what a backend's backward gave for weights, and behind them for biases, as the list that an op returns: in
    the form and the dtypes of `lists`, kinds that nobody needs left out."""
    count = len(lists) // 2
    forms = gradients[:count] if backend.reads == "addresses" else w.unstacked(gradients[:count])
    forms = [*forms, *(None for _ in range(count - len(forms))), *w.unstacked_biases(gradients[count:])]
    kinds = zip(forms, lists, needed, strict=False)  # what is absent has no gradients
    return [g.to(t.dtype) for form, kind, wanted in kinds if wanted for g, t in zip(form, kind, strict=True)]


def by_kind(gradients: Iterator[Tensor], lists: Lists, needed: Sequence[bool]) -> list[list[Tensor | None]]:
    """Hand an op's list of gradients out again: a list for each kind, of None where `needed` says no."""
    return [[next(gradients) if wanted else None for _ in kind] for kind, wanted in zip(lists, needed, strict=True)]


def empty_gradients(lists: Lists, needed: Sequence[bool]) -> list[Tensor]:
    """Return fakes of what `gradients_of` returns."""
    return [t.new_empty(t.shape) for kind, wanted in zip(lists, needed, strict=True) if wanted for t in kind]


def any_needed(needs: Sequence[Sequence[bool]]) -> list[bool]:
    """Say of each kind whether any of its tensors needs a gradient."""
    return [any(kind) for kind in needs]
