"""Registration of the ops of the namespace `moe_kernels`: kernel, fake, gradient, and what is not supported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    from nvtx import annotate
except ImportError:  # profiler ranges are for those who have nvtx

    def annotate(name: str, domain: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda kernel: kernel


LIBRARY = torch.library.Library("moe_kernels", "DEF")


class _Op(NamedTuple):
    """What an op is made of; without setup_context and backward it is a backward itself."""

    kernel: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register a functional op and return what calls it. Without `backward` it is a backward itself; differentiating it
    raises.

    The kernel runs in an nvtx range of the op's name, domain moe_kernels, where nvtx is installed. A call goes through
    torch's dispatcher where somebody there may want to see it (`seen`), and else straight to the kernel: arguments
    in lists cost the dispatcher's autograd more than all the rest of a small call.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    qualified = f"moe_kernels::{name}"
    kernel = annotate(name, domain="moe_kernels")(_outside_autocast(kernel))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified, backward or _no_double_backward, setup_context=setup_context, lib=LIBRARY
    )
    torch.library.register_vmap(qualified, _no_vmap(name), lib=LIBRARY)
    through_dispatcher = getattr(torch.ops.moe_kernels, name).default
    op = _Op(kernel, setup_context, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return through_dispatcher(*args)
        values = flat(args)
        tensors = [a for a in values if isinstance(a, Tensor)]
        if seen(tensors):
            return through_dispatcher(*args)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return kernel(*args)
        if backward is None:
            return through_dispatcher(*args)
        lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
        return _Direct.apply(op, lengths, *values)

    call.kernel = kernel
    return call


_PLAIN = (Tensor, nn.Parameter)


def seen(tensors: Sequence[Tensor]) -> bool:
    """Say whether a call has to go through the dispatcher: modes (fake tensors, FLOP counters, tracers), function
    transforms, forward-mode derivatives and profilers see calls there; so do subclasses of Tensor, and meta tensors."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return True
    for t in tensors:  # any() over a generator takes twice as long
        if type(t) not in _PLAIN or t.is_meta:
            return True
    return False


def flat(args: Iterable[Any]) -> list[Any]:
    """Return the arguments of an op with its lists laid out."""
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            values += arg
        else:
            values.append(arg)
    return values


def nested(values: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Undo `flat`: lists of those lengths, single values where it is None."""
    found, at = [], 0
    for length in lengths:
        found.append(values[at] if length is None else list(values[at : at + length]))
        at += 1 if length is None else length
    return found


class _Direct(torch.autograd.Function):
    """An op's kernel and gradient, as torch.library calls them, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, op: _Op, lengths: Sequence[int | None], *values: Any) -> Any:
        args = nested(values, lengths)
        output = op.kernel(*args)
        op.setup_context(ctx, args, output)
        ctx.op, ctx.lengths_of_args = op, lengths
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.needs = nested(ctx.needs_input_grad[2:], ctx.lengths_of_args)
        return None, None, *flat(ctx.op.backward(ctx, *grads))


def needs_input_grad(ctx: Any) -> Sequence[Any]:
    """Return which of an op's arguments need a gradient: a list of flags for a list."""
    return ctx.needs_input_grad if not hasattr(ctx, "needs") else ctx.needs


def _outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Run a kernel with autocast off: the op has settled its dtypes, float32 router logits among them."""

    @wraps(kernel)
    def run(*args: Any) -> Any:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return run(*args)
        return kernel(*args)

    return run


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("moe_kernels: double backward is not supported; differentiate once, without create_graph=True")


def _no_vmap(name: str) -> Callable[..., Any]:
    def rule(*args: Any) -> None:
        raise RuntimeError(f"moe_kernels: vmap over {name} is not supported; flatten the batch into the tokens")

    return rule
