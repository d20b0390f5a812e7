"""Registration of the ops of the namespace `moe_kernels`: kernel, fake, gradient, and what is not supported."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

try:
    from nvtx import annotate
except ImportError:  # profiler ranges are for those who have nvtx

    def annotate(name: str, domain: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda kernel: kernel


LIBRARY = torch.library.Library("moe_kernels", "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register a functional op and return it. Without `backward` it is a backward itself; differentiating it raises.

    The kernel runs in an nvtx range of the op's name, domain moe_kernels, where nvtx is installed.
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
    return getattr(torch.ops.moe_kernels, name).default


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
