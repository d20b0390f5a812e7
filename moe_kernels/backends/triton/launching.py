"""Launches: what lies on the CPU between a launcher's call and Triton's compiled kernel.

Triton asks each launch's arguments what their kernel is compiled for, writes the answers into a text and looks that up:
5 to 13 us, of the 6 to 18 that a launch takes. Here the first launch of a kind goes that way, and the kernel it returns
is remembered; the next ones find it within 3 us and call it with the same arguments. Kinds are told apart by all that
Triton looks at, and more finely: by an integer's value, not by whether it is 1 or a multiple of 16. Globals that a
kernel reads are constants, and not compared again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

READ = "3.6", "3.7", "3.8", "3.9"  # versions whose JITFunction.run does what `launch` does
MOST_KINDS = 1024  # of a kernel: numbers of tokens are many
OPTIONS = {"num_warps", "num_stages"}
Pick = Callable[[Any], tuple]

_knobs, _driver = triton.knobs, triton.runtime.driver
DIRECT = triton.__version__.startswith(tuple(f"{version}." for version in READ)) and not _knobs.runtime.interpret
if not DIRECT and not _knobs.runtime.interpret:
    warnings.warn(
        f"triton: got {triton.__version__}, expected {', '.join(READ)} for quick launches: each takes some 8 us longer",
        stacklevel=2,
    )


class Kinds(NamedTuple):
    """The launches of a kernel whose arguments have given types: how to sort these, and what was compiled for them."""

    tensors: Pick
    descriptors: Pick | None
    others: Pick
    compiled: dict[tuple, CompiledKernel]


_parameters: dict[Callable, Pick] = {}  # of a kernel, from its keyword arguments
_kinds: dict[tuple, Kinds] = {}


def launch(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch a kernel where there is something to do; multiplications and additions may fuse, as nvcc does.

    This is what kernel[programs](**arguments) does, of a dictionary: named ones are copied twice, 1 us. Descriptors are
    those of `grid.operands`.
    """
    if not all(programs):
        return
    if not DIRECT or watched(kernel):
        _through_triton(kernel, programs, arguments)
        return
    pick = _parameters.get(kernel.fn) or _parameters.setdefault(kernel.fn, picking(list(kernel.signature.parameters)))
    values = pick(arguments)
    kinds = _kinds.get((kernel.fn, *map(type, values))) or _new_kinds(kernel, arguments, values)
    tensors, driver, bits = kinds.tensors(values), _driver.active, 0
    for t in tensors:
        bits |= t.data_ptr()
    aligned = tuple([t.data_ptr() % 16 == 0 for t in tensors]) if bits % 16 else None  # None: all are
    dtypes, described = tuple([t.dtype for t in tensors]), kinds.descriptors
    described = described and tuple([descriptor.kind for descriptor in described(values)])
    options = arguments.get("num_warps"), arguments.get("num_stages")
    device = driver.get_current_device()
    key = driver, device, options, aligned, dtypes, described, kinds.others(values)
    compiled = kinds.compiled.get(key)
    if compiled is None:
        _remember(kinds.compiled, key, _through_triton(kernel, programs, arguments))
        return
    x, y, z = (*programs, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def watched(kernel: Any) -> bool:
    """Return whether somebody wants to see launches, as profilers do, or has set a knob of Triton by hand."""
    runtime = _knobs.runtime
    return bool(
        vars(runtime)  # hooks put in the place of these lists, the debug mode
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or vars(_knobs.compilation)
        or kernel.pre_run_hooks
    )


def picking(at: Sequence) -> Pick:
    """Return what takes the items at these places, as a tuple."""
    return itemgetter(*at) if len(at) > 1 else lambda items: tuple([items[place] for place in at])


def _new_kinds(kernel: Any, arguments: dict[str, Any], values: tuple) -> Kinds:
    if unknown := arguments.keys() - kernel.signature.parameters.keys() - OPTIONS:
        raise TypeError(
            f"{kernel.fn.__name__}: got {', '.join(sorted(unknown))}, expected its parameters and {OPTIONS}"
        )
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    described = [i for i, v in enumerate(values) if isinstance(v, TensorDescriptor)]
    others = [i for i in range(len(values)) if i not in (*tensors, *described)]
    kinds = Kinds(picking(tensors), picking(described) if described else None, picking(others), {})
    return _kinds.setdefault((kernel.fn, *map(type, values)), kinds)


def _remember(compiled: dict[tuple, CompiledKernel], key: tuple, kernel: Any) -> None:
    if type(kernel) is CompiledKernel:  # not one that is still being compiled beside
        if len(compiled) >= MOST_KINDS:
            compiled.clear()
        compiled[key] = kernel


def _through_triton(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    return kernel.run(grid=programs, warmup=False, enable_fp_fusion=True, **arguments)
