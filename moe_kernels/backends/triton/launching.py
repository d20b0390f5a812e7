"""Launches: what lies on the CPU between a launcher's call and Triton's compiled kernel.

For every launch Triton asks all arguments what their kernel is compiled for, writes the answers into a text and looks
that up: 5 to 13 us, of the 7 to 19 that a launch takes. Here the first launch of a kind goes that way, and the kernel
that it returns is remembered; the next ones find it by a key of the extension's (csrc/bindings_launch.h) and call it
with the same arguments: 3 to 8 us, most of it in the kernel's own launcher. Kinds are told apart by all that Triton
looks at, and more finely: by an integer's value, not by whether it is 1 or a multiple of 16. Globals that kernels read
are constants, and not compared again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import _C

READ = "3.6", "3.7", "3.8", "3.9"  # versions whose JITFunction.run does what `launch` does
MOST_KINDS = 4096  # of launches: numbers of tokens are many
OPTIONS = "num_warps", "num_stages"

_knobs, _driver = triton.knobs, triton.runtime.driver
DIRECT = triton.__version__.startswith(tuple(f"{version}." for version in READ)) and not _knobs.runtime.interpret
if not DIRECT and not _knobs.runtime.interpret:
    warnings.warn(
        f"triton: got {triton.__version__}, expected {', '.join(READ)} for quick launches: each takes some 8 us more",
        stacklevel=2,
    )

_parameters: dict[Callable, tuple[str, ...]] = {}  # of a kernel
_compiled: dict[tuple, CompiledKernel] = {}


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
    function, driver = kernel.fn, _driver.active
    parameters = _parameters.get(function) or _parameters.setdefault(function, (*kernel.signature.parameters,))
    values, key = _C.launch_key(arguments, parameters, OPTIONS, Tensor, TensorDescriptor)
    device = driver.get_current_device()
    key = function, driver, device, key
    compiled = _compiled.get(key)
    if compiled is None:
        _remember(key, _through_triton(kernel, programs, arguments))
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


def _through_triton(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    return kernel.run(grid=programs, warmup=False, enable_fp_fusion=True, **arguments)


def _remember(key: tuple, kernel: Any) -> None:
    if type(kernel) is CompiledKernel:  # not one that is still being compiled beside
        if len(_compiled) >= MOST_KINDS:
            _compiled.clear()
        _compiled[key] = kernel
