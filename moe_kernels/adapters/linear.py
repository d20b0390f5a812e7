"""What a linear layer multiplies by right now: read live, understood or named with the reason why not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotUnderstoodError(Exception):
    """A module does something that reading its weights would miss. The text names its path and what it does."""


def weight_of(module: nn.Module, path: str, biased: bool = False) -> Tensor:
    """Return W with module(x) = x W^T, as it is at this moment; with `biased` + b, which is for `bias_of` to return.

    Understood: nn.Linear, without bias unless `biased`, its weight computed by torch.nn.utils.parametrize too; LoRA
    layers of PEFT around one, W + sum of scaling B A over the active adapters, merged or disabled ones as PEFT treats
    them.

    Raises: NotUnderstoodError for everything else: hooks, a patched forward, a bias, quantised layers, active dropout.
    Cost: under a microsecond for an nn.Linear; a product of rank r for every active adapter.
    """
    if module is None:
        raise NotUnderstoodError(f"{path}: got None, expected an nn.Linear")
    refuse_watched(module, path)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        if module.bias is not None and not biased:
            raise NotUnderstoodError(f"{path}: got a bias, expected none")
        return plain(module.weight, path)
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        return _with_lora(module, path, biased)
    raise NotUnderstoodError(f"{path}: got {type(module).__module__}.{type(module).__name__}, expected an nn.Linear")


def bias_of(module: nn.Module, path: str) -> Tensor | None:
    """Return b of a module that `weight_of` has understood; None where it has none."""
    bias = getattr(module, "base_layer", module).bias
    return None if bias is None else plain(bias, path)


def plain(weight: Tensor, path: str) -> Tensor:
    """Return a weight that kernels can read. Raises: NotUnderstoodError for a DTensor or another kind of tensor."""
    if type(weight) in (nn.Parameter, Tensor) or torch.compiler.is_compiling() or _is_fake(weight):
        return weight
    raise NotUnderstoodError(f"{path}.weight: got a {type(weight).__name__}, expected a plain tensor")


def watched(module: nn.Module) -> bool:
    """Say whether calling a module may do more than its class says: hooks, a forward of the instance's own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or ("forward" in own and patched(module))
    )


def patched(module: nn.Module) -> bool:
    """Say whether the instance's forward is another than its class's; accelerate leaves that one there, bound."""
    forward = module.__dict__.get("forward")
    bound = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return forward is not None and not bound


def refuse_watched(module: nn.Module, path: str) -> None:
    """Raise NotUnderstoodError where calling a module does more than its class says."""
    if patched(module):
        raise NotUnderstoodError(f"{path}: its forward was replaced on the instance (offloading and casting do so)")
    for name in HOOKS:
        if getattr(module, name):
            raise NotUnderstoodError(f"{path}: got {name.strip('_').replace('_', ' ')}")


def _is_fake(weight: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


def _with_lora(module: nn.Module, path: str, biased: bool) -> Tensor:
    """Do with the weight what peft.tuners.lora.Linear.forward does with the output."""
    if module.disable_adapters and module.merged:
        module.unmerge()
    weight = weight_of(module.base_layer, f"{path}.base_layer", biased)
    if module.disable_adapters or module.merged:
        return weight
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        variants = getattr(module, "lora_variant", {})
        if name in variants or module.use_dora.get(name, False):
            raise NotUnderstoodError(f"{path}: adapter {name!r} is a variant of LoRA (DoRA ...), expected plain LoRA")
        dropout = module.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0:
            raise NotUnderstoodError(f"{path}: adapter {name!r} has dropout {dropout.p} in training, expected 0")
        low, high = (weight_of(side[name], f"{path}.{what}.{name}") for side, what in _sides(module))
        weight = _add_product(weight, high, low, module.scaling[name])
    return weight


def _sides(module: nn.Module) -> tuple[tuple[nn.ModuleDict, str], ...]:
    return (module.lora_A, "lora_A"), (module.lora_B, "lora_B")


def _add_product(weight: Tensor, high: Tensor, low: Tensor, scaling: float) -> Tensor:
    """weight + scaling high low, in the dtype of weight; adapters are often kept wider than it."""
    with torch.autocast(weight.device.type, enabled=False):
        if high.dtype == low.dtype == weight.dtype:
            return torch.addmm(weight, high, low, alpha=scaling)
        dtype = torch.promote_types(high.dtype, low.dtype)
        return weight + (scaling * (high.to(dtype) @ low.to(dtype))).to(weight.dtype)
