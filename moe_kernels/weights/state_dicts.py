"""State dicts of DiT-MoE and of MoELayer, one turned into the other; safetensors files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks

_EXPERT_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)experts\.(?P<expert>\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = ("gate_weight", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")


def stack_dit_moe(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a DiT-MoE state dict, of a model or of one block, to the names and shapes of MoELayer.

    `<prefix>experts.i.{gate,up,down}_proj.weight`, `<prefix>gate.weight` and `<prefix>shared_experts...` become
    `<prefix>gate_up_proj` (E,2I,H), `<prefix>down_proj` (E,H,I), `<prefix>gate_weight` (E,H) and
    `<prefix>shared_gate_up_proj`, `<prefix>shared_down_proj`; every other key is kept.

    Raises: ValueError naming the keys where no expert is found, one is missing, or shapes or dtypes do not fit.
    Cost: one copy of the expert weights.
    """
    rest = dict(state_dict)
    matches = [match for match in map(_EXPERT_KEY.fullmatch, state_dict) if match]
    if not matches:
        shown = ", ".join(list(state_dict)[:4])
        raise ValueError(f"state_dict: got keys like {shown}, expected DiT-MoE's experts.0.gate_proj.weight")
    counts: dict[str, int] = {}
    for match in matches:
        counts[match["prefix"]] = max(counts.get(match["prefix"], 0), int(match["expert"]) + 1)
    for prefix, num_experts in counts.items():
        experts = [_take_expert(rest, f"{prefix}experts.{e}.") for e in range(num_experts)]
        gate_up, down = (_stack(f"{prefix}experts", list(parts)) for parts in zip(*experts, strict=True))
        rest[f"{prefix}gate_weight"] = gate_weight = _take(rest, f"{prefix}gate.weight")
        H = down.shape[1]
        _checks.shape(f"state_dict: {prefix}gate.weight", gate_weight.shape, (num_experts, H), "E,H")
        rest[f"{prefix}gate_up_proj"], rest[f"{prefix}down_proj"] = gate_up, down
        if f"{prefix}shared_experts.gate_proj.weight" in rest:
            shared = f"{prefix}shared_experts."
            gate_up, down = _take_expert(rest, shared)
            _checks.shape(f"state_dict: {shared}down_proj.weight", down.shape, (H, down.shape[1]), "H,Is")
            rest[f"{prefix}shared_gate_up_proj"], rest[f"{prefix}shared_down_proj"] = gate_up, down
    return rest


def unstack_dit_moe(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert names and shapes of MoELayer back to those of DiT-MoE; the inverse of `stack_dit_moe`.

    Returns: a dict whose expert weights are views of the stacked ones.
    Raises: ValueError where no `gate_up_proj` is found, or one of its companions is missing or does not fit it; so does
        none in a layer of GELU experts; and where there are biases: DiT-MoE has no names for either.
    """
    rest = dict(state_dict)
    suffix = "gate_up_proj"
    prefixes = [key.removesuffix(suffix) for key in state_dict if re.fullmatch(rf"(.*\.)?{suffix}", key)]
    if not prefixes:
        shown = ", ".join(list(state_dict)[:4])
        raise ValueError(f"state_dict: got keys like {shown}, expected MoELayer's gate_up_proj")
    for prefix in prefixes:
        for name in (prefix + name.replace("_proj", "_bias") for name in _STACKED[1:]):
            if name in rest:
                raise ValueError(f"state_dict: {name}: got biases, expected none: DiT-MoE has no names for them")
        gate_weight, gate_up_proj, down_proj = (_take(rest, prefix + name) for name in _STACKED[:3])
        if gate_weight.dim() != 2:
            raise ValueError(f"state_dict: {prefix}gate_weight: got shape {tuple(gate_weight.shape)}, expected (E,H)")
        _check_mlp(prefix, gate_weight.shape, gate_up_proj, down_proj)
        rest[f"{prefix}gate.weight"] = gate_weight
        for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
            rest.update(_split_expert(f"{prefix}experts.{e}.", gate_up, down))
        if f"{prefix}shared_gate_up_proj" in rest:
            shared = [_take(rest, prefix + name) for name in _STACKED[3:]]
            _check_mlp(f"{prefix}shared_", gate_weight.shape[1:], *shared)
            rest.update(_split_expert(f"{prefix}shared_experts.", *shared))
    return rest


def save(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict as safetensors; views of a slab are written as tensors of their own.

    Raises: OSError naming the file where it cannot be written.
    """
    save_file = _safetensors("safetensors.torch").save_file
    copies = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state_dict.items()}
    try:
        save_file(copies, path)
    except _safetensors("safetensors").SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: {error}") from error


def load(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises: ValueError naming a file that is truncated or is no safetensors file."""
    load_file = _safetensors("safetensors.torch").load_file
    try:
        return load_file(path)
    except _safetensors("safetensors").SafetensorError as error:
        raise ValueError(f"{path}: got a damaged or foreign file ({error}), expected safetensors") from error


def _safetensors(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"moe_kernels.weights: {error}; pip install safetensors", name=error.name) from error


def _take(state_dict: dict[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict: {key} is missing")
    return state_dict.pop(key)


def _take_expert(state_dict: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    gate, up, down = (_take(state_dict, f"{prefix}{kind}.weight") for kind in ("gate_proj", "up_proj", "down_proj"))
    if gate.dim() != 2 or gate.shape != up.shape or down.shape != gate.shape[::-1]:
        got = ", ".join(str(tuple(weight.shape)) for weight in (gate, up, down))
        raise ValueError(f"state_dict: {prefix}: got shapes {got}, expected (I,H), (I,H), (H,I)")
    if not gate.dtype == up.dtype == down.dtype:
        got = ", ".join(str(weight.dtype) for weight in (gate, up, down))
        raise ValueError(f"state_dict: {prefix}: got {got}, expected one dtype")
    return torch.cat([gate, up]), down


def _stack(name: str, weights: list[Tensor]) -> Tensor:
    if len({(weight.shape, weight.dtype) for weight in weights}) > 1:
        got = ", ".join(f"{tuple(w.shape)} {w.dtype}" for w in weights)
        raise ValueError(f"state_dict: {name}: got {got}, expected one shape and dtype")
    return torch.stack(weights)


def _check_mlp(prefix: str, lead: Sequence[int], gate_up: Tensor, down: Tensor) -> None:
    """Check what is to be split against lead, (E, H), or (H,) for the shared expert."""
    *E, H = lead
    dims, I = "E," * len(E), down.shape[-1] if down.dim() else 0
    _checks.shape(f"state_dict: {prefix}down_proj", down.shape, (*E, H, I), f"{dims}H,I")
    _checks.shape(f"state_dict: {prefix}gate_up_proj", gate_up.shape, (*E, 2 * I, H), f"{dims}2I,H; no gelu in DiT-MoE")


def _split_expert(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}
