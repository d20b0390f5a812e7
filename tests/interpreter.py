"""Triton's interpreter made right, and faster. Patches for tests alone.

bfloat16: it keeps the bits as uint16, multiplies them as integers and truncates. Kernels compute in float32 after
`.to(tl.float32)`, so casts and products are all there is.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import torch


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, as torch does."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: broadcast views have stride 0
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)


def patch_each_function_once() -> None:
    """Keep the interpreter from looking through all of triton.language at every launch and at every call of a device
    function, such as tl.sum, for what it has to replace there: once for each function is enough."""
    from triton.runtime import interpreter

    patch, kept = interpreter._patch_lang, SimpleNamespace(restore=lambda: None)

    @functools.cache
    def patch_once(function):
        patch(function)
        return kept

    interpreter._patch_lang = patch_once


def leave_out_the_overflow_check() -> None:
    """Triton spends a third of all time on looking for integers that overflow, and drops what it has found."""
    from triton.runtime import interpreter

    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = lambda lhs, rhs, operation: None


def enable_bfloat16() -> None:
    """Patch the interpreter's builder. Raises AttributeError where this version of Triton has it under other names."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(tensor):
        return handle(to_float32(tensor.data), tl.float32) if tensor.dtype.scalar == tl.bfloat16 else tensor

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        values = widened(src)
        if target == tl.bfloat16:
            return handle(from_float32(values.data), tl.bfloat16)
        return cast(self, values, dst_type)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: cast_impl(self, src, dst_type)
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.binary_op = _refusing(builder.binary_op, tl.bfloat16)


def _refusing(binary_op, bfloat16):
    """Arithmetic on bfloat16 itself would still be done on the bits: no kernel of ours may do it."""

    def checked(self, lhs, rhs, op):
        if bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError(f"{op.__name__} on bfloat16 in the interpreter: convert to float32 first")
        return binary_op(self, lhs, rhs, op)

    return checked
