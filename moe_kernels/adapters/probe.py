"""A trial call: does a block's own forward do what its family says?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .block import BlockConfig, MoEBlock, original_class, replaced_class

OF_TORCH = frozenset(vars(nn.Module()))  # parameters, hooks ...
TOKENS = (2, 8)  # images, tokens
ERROR = 1e-5  # relative, in float32. GELU's two forms differ by 2e-4; two ways to sum by 1e-7, at great widths by 1e-6


def settings_of(block: nn.Module) -> tuple[Any, ...]:
    """Return what tells blocks apart beside their weights: classes and attributes of all modules inside.

    Functions, dtypes and all that can be hashed by what they are; lists and the like by which they are.
    """
    return tuple(
        (name, type(module), tuple((k, _key(v)) for k, v in sorted(vars(module).items()) if k not in OF_TORCH))
        for name, module in block.named_modules()
    )


def _key(value: Any) -> Any:
    if isinstance(value, Tensor | nn.Module):
        return None
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def try_block(block: nn.Module, config: BlockConfig, hidden_size: int) -> None:
    """Compare our forward with the block's own on random tokens, in float32, in eval, with random weights.

    Random, for a model may be on its way to its checkpoint: zeros would hide a difference, and empty memory is no
    number. Nothing is tried on meta or under fake tensors, nor where a family has no trial.

    Raises: ValueError naming the path, with the difference.
    """
    if any(p.is_meta for p in block.parameters()) or torch._guards.detect_fake_mode() is not None:
        return
    original = original_class(block) if isinstance(block, MoEBlock) else type(block)
    config = dataclasses.replace(config, on_trial=True)
    with torch.inference_mode(False), torch.no_grad(), _full_precision(next(block.parameters()).device.type):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*TOKENS, hidden_size, generator=generator, device="cpu")
        arguments = config.family.trial(block, x.to(next(block.parameters()).device))
        if arguments is None:
            return
        trial = _copy(block, config.path)
        _draw(trial, generator)
        trial.__class__ = original
        expected = _call(trial, arguments, config.path)
        trial.moe_config, trial.__class__ = config, replaced_class(original, config.family)
        got = _call(trial, arguments, config.path)
    if shapes_of(got) != shapes_of(expected):
        raise ValueError(f"{config.path}: its forward returned {shapes_of(expected)}, expected {shapes_of(got)}")
    for ours, theirs in zip(_tensors(got), _tensors(expected), strict=True):
        difference, size = (ours - theirs).norm(), theirs.norm()
        if not difference <= ERROR * size:
            raise ValueError(
                f"{config.path}: its own forward differs from what its attributes say by "
                f"{float(difference / size):.1e} of its norm on random tokens, expected that of {config.family.name}"
            )


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Neither autocast nor TF32, whatever the caller has chosen."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # not the older switch: it raises beside these
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _copy(block: nn.Module, path: str) -> nn.Module:
    """Return a float32 copy in eval, without the hooks that a user has put on it: none is to see a trial."""
    try:
        trial = copy.deepcopy(block).float().eval()
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{path}: cannot be copied ({what}), expected a block that copy.deepcopy takes") from error
    for module in trial.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return trial


def _draw(block: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in block.named_parameters():
        if parameter.is_floating_point() and (parameter.dim() > 1 or name.endswith("bias")):
            scale = parameter.shape[-1] ** -0.5
            draw = torch.randn(parameter.shape, generator=generator, device="cpu") * scale
            parameter.data = draw.to(parameter.device)


def _call(block: nn.Module, arguments: tuple[Any, ...], path: str) -> Any:
    try:
        return block(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        shape = tuple(arguments[0].shape)
        raise ValueError(f"{path}: its forward failed on x of shape {shape} ({what}), expected (..., H)") from error


def shapes_of(result: Any) -> str:
    """Say what a forward returned: a tensor's shape, those in a tuple."""
    if isinstance(result, tuple):
        return f"({', '.join(map(shapes_of, result))})"
    return f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
