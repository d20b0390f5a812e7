"""replace_moe: the kernels of this project inside somebody else's DiT-MoE, and restore_moe: out of it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends import registry
from ..routing import AUX_LOSS_MODES
from ..weights import own_storage
from .block import KINDS, BlockConfig, MoEBlock, activation_of, original_class, read, replaced_class, unequal
from .linear import NotUnderstoodError, patched

PROBE_TOKENS = (2, 8)  # images, tokens
PROBE_ERROR = 1e-3  # relative, in float32: routing otherwise, renormalising or scaling is far more


def replace_moe(
    model: nn.Module, backend: str = "auto", recompute: bool = False, aux_loss_mode: str = "injected"
) -> int:
    """Swap, in place, every DiT-MoE block of a model for one that computes with this project.

    A block is a module with `gate.weight` (E, H), `experts`, an nn.ModuleList of modules with bias-free linear layers
    gate_proj, up_proj and down_proj, optionally `shared_experts` of the same kind, and `num_experts_per_tok` or
    `gate.top_k`. Its class is not imported. The module objects, their hooks, their state_dict() keys and values, their
    named_parameters() and the Parameter objects stay; all that changes is the block's class, to a subclass of its own,
    and with it the forward. Weights, top_k and alpha are read at every call from the modules as they then are: swap
    them, adapt them (LoRA), shard, offload, tie or re-allocate them, the next call sees it. What works and what is
    refused: docs/replaced_model.md. Train and eval take the same path, and both give gradients (the original gives
    none in eval).

    On a CUDA device the weights of a block are laid side by side once, each Parameter with a storage of its own over
    its part: the kernels of `triton` and `cuda` then read them in place at any width. Where expert widths are multiples
    of 64 they do so wherever the weights lie. At other widths, whatever moves them later is right too, but costs a copy
    of the block's weights in every call: put a model on its GPU first.

    Args:
        model: any module, the block itself included.
        backend: "auto" or a name out of `backends()`.
        recompute: keep no activations for backward, compute them there again: see `moe_mlp`.
        aux_loss_mode: "injected" or "scaled", see TokenChoice.
    Returns: the number of blocks swapped. Doing it again is allowed: it takes over the arguments.
    Raises: ValueError where no block is found; ValueError, TypeError naming the module path of a block that is not as
        above (biases, unequal experts, other activations, hooks inside, another forward: each block is tried on a few
        random tokens against its own forward); RuntimeError for a backend that cannot run here. Nothing is changed
        where it raises.
    Cost: two forwards of 16 tokens through a float32 copy of a block, one block at a time.
    Source: the structure in the DiT-MoE repository; reference.moe.SparseMoeBlock has it too.
    """
    registry.check_name(backend)
    if aux_loss_mode not in AUX_LOSS_MODES:
        raise ValueError(f"aux_loss_mode: got {aux_loss_mode!r}, expected {' or '.join(map(repr, AUX_LOSS_MODES))}")
    blocks = {path or type(m).__name__: m for path, m in model.named_modules() if _looks_like_a_block(m)}
    if not blocks:
        raise ValueError(
            f"model: found no DiT-MoE block in {type(model).__name__}, expected modules with gate.weight and experts, "
            "a ModuleList of modules with gate_proj, up_proj and down_proj"
        )
    configs = [_check_block(path, block, backend, recompute, aux_loss_mode) for path, block in blocks.items()]
    for block, config in zip(blocks.values(), configs, strict=True):
        block.moe_config = config
        if not isinstance(block, MoEBlock):
            block.__class__ = replaced_class(type(block))
        if block.gate.weight.is_cuda:
            with _in_eval(block):
                weights = read(block, config).weights
            _lay_out(weights)
    return len(blocks)


def restore_moe(model: nn.Module) -> int:
    """Give the blocks of `replace_moe` their own classes, and so their own forward, back; parameters stay as they are.

    Args:
        model: any module, the block itself included.
    Returns: the number of blocks restored, 0 where there are none.
    """
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    for block in blocks:
        block.__class__ = original_class(block)
        for name in ("moe_config", "moe_said"):
            block.__dict__.pop(name, None)
    return len(blocks)


def _looks_like_a_block(module: nn.Module) -> bool:
    experts = getattr(module, "experts", None)
    if not isinstance(experts, nn.ModuleList) or not len(experts):
        return False
    has_gate = isinstance(getattr(getattr(module, "gate", None), "weight", None), Tensor)
    return has_gate and all(hasattr(experts[0], kind) for kind in KINDS)


def _check_block(path: str, block: nn.Module, backend: str, recompute: bool, aux_loss_mode: str) -> BlockConfig:
    """Check a block from outside to inside; return its configuration."""
    if patched(block):
        raise ValueError(f"{path}: forward was patched on the instance, expected a block that uses its class's")
    gate_weight = block.gate.weight
    if gate_weight.dim() != 2:
        raise ValueError(f"{path}.gate.weight: got shape {tuple(gate_weight.shape)}, expected (E, H)")
    mlps = list(_mlps(block))
    for name, mlp in mlps:
        _check_activation(f"{path}.{name}", mlp)
    known = {type(mlp).forward for _, mlp in mlps} | {activation_of(mlp) for _, mlp in mlps}
    known |= {type(block.gate).forward, activation_of(block.gate)}
    config = BlockConfig(path, backend, recompute, aux_loss_mode, frozenset(known))
    try:
        with _in_eval(block):  # an adapter's dropout in training is a state, not a structure
            gate_weight, weights, _ = read(block, config)
    except NotUnderstoodError as reason:
        raise ValueError(str(reason)) from None
    _check_shapes(path, gate_weight, weights)
    _check_extras(path, block)
    _probe(path, block, config)
    return config


@contextmanager
def _in_eval(block: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in block.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _mlps(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((f"experts.{e}", expert) for e, expert in enumerate(block.experts))
    shared = getattr(block, "shared_experts", None)
    if shared is not None:
        yield "shared_experts", shared


def _check_activation(path: str, mlp: nn.Module) -> None:
    for kind in KINDS:
        if kind not in mlp._modules:
            raise TypeError(f"{path}.{kind}: got {type(getattr(mlp, kind, None)).__name__}, expected an nn.Linear")
    activation = getattr(mlp, "act_fn", None)
    if activation is None:
        return
    with torch.no_grad():  # the model may be on meta, and so the default device
        probe = torch.linspace(-4, 4, 9, device="cpu")
        if not torch.equal(activation(probe.clone()), F.silu(probe)):
            raise ValueError(f"{path}.act_fn: got {activation}, expected SiLU")


def _check_shapes(path: str, gate_weight: Tensor, weights: tuple[list[Tensor] | None, ...]) -> None:
    reason = unequal(path, weights, gate_weight)
    if reason:
        raise ValueError(f"{reason}; expected experts of one shape, dtype and device")
    H = gate_weight.shape[1]
    for name, gate_up, down in (("experts", *weights[:2]), ("shared_experts", *weights[2:])):
        if gate_up is None:
            continue
        got = [tuple(t.shape) for t in (*gate_up[:2], down[0])]
        I = got[0][0]
        if got != [(I, H), (I, H), (H, I)]:
            raise ValueError(f"{path}.{name}: got weights {got}, expected (I, H), (I, H), (H, I) with H = {H}")


def _check_extras(path: str, block: nn.Module) -> None:
    """Refuse parameters, buffers and modules that the forward of ours would leave out."""
    allowed = [f"{name}.{kind}" for name, _ in _mlps(block) for kind in KINDS]
    for name, _ in (*block.named_parameters(), *block.named_buffers()):
        if name != "gate.weight" and not name.startswith(("gate.", *allowed)):
            raise ValueError(f"{path}: got a parameter or buffer {name}, expected those of gate and experts alone")
    for name, module in block.named_modules():
        silent = isinstance(module, nn.Identity) or getattr(module, "p", 0) == 0
        if isinstance(module, nn.modules.dropout._DropoutNd) and not silent and not name.startswith(tuple(allowed)):
            raise ValueError(f"{path}.{name}: got {module}, expected no dropout")


def _probe(path: str, block: nn.Module, config: BlockConfig) -> None:
    """Compare our forward with the block's own on a few random tokens, in float32 and in eval."""
    if any(p.is_meta for p in block.parameters()) or _fake_mode():
        return
    original = original_class(block) if isinstance(block, MoEBlock) else type(block)
    with torch.inference_mode(False), torch.no_grad():
        trial = copy.deepcopy(block).float().eval()
        H, generator = trial.gate.weight.shape[1], torch.Generator().manual_seed(0)
        x = torch.randn(*PROBE_TOKENS, H, generator=generator, device="cpu").to(trial.gate.weight.device)
        trial.__class__ = original
        try:
            expected = trial(x.clone())
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ValueError(
                f"{path}: its forward failed on x of shape {tuple(x.shape)} ({what}), expected (..., H)"
            ) from error
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            raise ValueError(f"{path}: its forward returned {_name(expected)}, expected a tensor of the shape of x")
        trial.moe_config, trial.__class__ = config, replaced_class(original)
        got = trial(x)
    difference, size = (got - expected).norm(), expected.norm()
    if not difference <= PROBE_ERROR * size:
        raise ValueError(
            f"{path}: its own forward differs from what its attributes say by {float(difference / size):.1%} on random "
            "tokens, expected softmax over all experts, raw top-k weights and a shared expert that is added"
        )


def _fake_mode() -> bool:
    return torch._guards.detect_fake_mode() is not None


def _name(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _lay_out(weights: tuple[list[Tensor] | None, ...]) -> None:
    """Put the matrices of one kind side by side, each Parameter on a storage of its own over its part."""
    with torch.inference_mode(False), torch.no_grad():
        for kind in weights:
            if not kind or len(kind) < 2 or not all(type(t) is nn.Parameter and t.is_leaf for t in kind):
                continue
            together = torch.stack([t.detach() for t in kind])
            for parameter, place in zip(kind, together.unbind(), strict=True):
                parameter.data = own_storage(place)
