"""replace_moe: the kernels of this project inside somebody else's MoE model, and restore_moe: out of it again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..backends import registry
from ..routing import AUX_LOSS_MODES
from ..weights import own_storage
from .block import BlockConfig, MoEBlock, layer_weights, original_class, replaced_class
from .family import Family, family_of, known_families
from .linear import NotUnderstoodError, patched
from .probe import settings_of, try_block
from .reading import Experts, Reader, known_of, unequal


def replace_moe(
    model: nn.Module, backend: str = "auto", recompute: bool = False, aux_loss_mode: str = "injected"
) -> int:
    """Swap, in place, every MoE block of a known family for one that computes with this project.

    A family says how its blocks are recognised, where their weights lie and how they route; classes are named, never
    imported. A DiT-MoE block is any module with `gate.weight` (E, H), `experts`, an nn.ModuleList of modules with
    bias-free linear layers gate_proj, up_proj and down_proj, optionally `shared_experts` of the same kind, and
    `num_experts_per_tok` or `gate.top_k`. Others, and how to add one: docs/families.md. The module objects, their
    hooks, their state_dict() keys and values, their named_parameters() and the Parameter objects stay; all that changes
    is the block's class, to a subclass of its own, and with it the forward. Weights and settings are read at every call
    from the modules as they then are: swap them, adapt them (LoRA), shard, offload, tie or re-allocate them, the next
    call sees it. What works and what is refused: docs/replaced_model.md. Train and eval take the same path, and both
    give gradients (some originals give none in eval).

    On a CUDA device the weights of a block are laid side by side once, each Parameter with a storage of its own over
    its part: the kernels of `triton` and `cuda` then read them in place at any width. Where expert widths are multiples
    of 64 they do so wherever the weights lie. At other widths, whatever moves them later is right too, but costs a copy
    of the block's weights in every call: put a model on its GPU first.

    Args:
        model: any module, the block itself included.
        backend: "auto" or a name out of `backends()`.
        recompute: keep no activations for backward, compute them there again: see `moe_mlp`.
        aux_loss_mode: "injected" or "scaled", see TokenChoice; of DiT-MoE's blocks.
    Returns: the number of blocks swapped. Doing it again is allowed: it takes over the arguments.
    Raises: ValueError where no block is found, listing the families; ValueError, TypeError naming the path and the
        attribute of a block that is not as its family's are (biases, unequal experts, other activations, hooks inside,
        another forward: blocks are tried on a few random tokens against their own forward, those that differ by their
        place and weights alone once); RuntimeError for a backend that cannot run here. Nothing is changed where it
        raises.
    Cost: two forwards of 16 tokens through a float32 copy of a block, for each kind of block.
    Source: the structure in the DiT-MoE repository; reference.moe.SparseMoeBlock has it too.
    """
    registry.check_name(backend)
    if aux_loss_mode not in AUX_LOSS_MODES:
        raise ValueError(f"aux_loss_mode: got {aux_loss_mode!r}, expected {' or '.join(map(repr, AUX_LOSS_MODES))}")
    found = {path or type(m).__name__: (m, family_of(m)) for path, m in model.named_modules()}
    blocks = {path: (block, family) for path, (block, family) in found.items() if family}
    if not blocks:
        raise ValueError(_nothing_found(model))
    configs, tried, known = {}, set(), {}
    for path, (block, family) in blocks.items():
        how = backend, recompute, aux_loss_mode
        configs[path] = BlockConfig(
            family, Reader(path, known.setdefault(k := known_of(block), k)), *how, _first_argument(block)
        )
        experts = _check_block(block, configs[path])
        settings = settings_of(block)
        if settings not in tried:
            tried.add(settings)
            try_block(block, configs[path], layer_weights(experts).hidden_size)
    for path, (block, family) in blocks.items():
        block.moe_config = configs[path]
        if not isinstance(block, MoEBlock):
            block.__class__ = replaced_class(type(block), family)
        if next(block.parameters()).is_cuda:
            with _in_eval(block):
                lay_out(family.experts(block, configs[path].read))
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


def _first_argument(block: nn.Module) -> str:
    original = original_class(block) if isinstance(block, MoEBlock) else type(block)
    return [*inspect.signature(original.forward).parameters, ""][1]


def _nothing_found(model: nn.Module) -> str:
    likely = [
        f"{path} ({type(module).__name__})" for path, module in model.named_modules() if hasattr(module, "experts")
    ]
    beside = f"; modules with experts: {', '.join(likely[:3])}{' ...' if len(likely) > 3 else ''}" if likely else ""
    looked_for = "; ".join(f"{family.name}: {family.expected}" for family in known_families())
    return (
        f"model: found no MoE block of a known family in {type(model).__name__}{beside}; expected one of {looked_for}; "
        "or one of yours: moe_kernels.adapters.register_family"
    )


def _check_block(block: nn.Module, config: BlockConfig) -> Experts:
    """Check a block from outside to inside; return its weights."""
    path, family = config.path, config.family
    if patched(block):
        raise ValueError(f"{path}: forward was patched on the instance, expected a block that uses its class's")
    try:
        with _in_eval(block):  # an adapter's dropout in training is a state, not a structure
            family.check(block, config.read)
            experts = family.experts(block, config.read)
    except NotUnderstoodError as reason:
        raise ValueError(str(reason)) from None
    reason = unequal(path, experts.tensors, experts.down[0].dtype, experts.down[0].device)
    if reason:
        raise ValueError(f"{reason}; expected experts of one shape, dtype and device")
    _check_extras(path, block, family)
    return experts


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


def _check_extras(path: str, block: nn.Module, family: Family) -> None:
    """Refuse parameters, buffers and dropouts that the forward of ours would leave out."""
    parts = tuple(f"{part}." for part in family.parts)
    for name, _ in (*block.named_parameters(), *block.named_buffers()):
        if not f"{name}.".startswith(parts):
            expected = ", ".join(family.parts)
            raise ValueError(f"{path}: got a parameter or buffer {name}, expected those of {expected} alone")
    for name, module in block.named_modules():
        read = ".lora_dropout." in f".{name}." or name.rpartition(".")[2] in family.dropouts  # at every call
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p and not read:
            raise ValueError(f"{path}.{name}: got {module}, expected no dropout")


def lay_out(experts: Experts) -> None:
    """Put the matrices of one kind side by side, each Parameter on a storage of its own over its part.

    Stacked (in, out) matrices get the strides of (out, in) ones: values, shapes and keys stay.
    """
    with torch.inference_mode(False), torch.no_grad():
        for kind in filter(None, experts.weights):
            if "in_out" in experts.layout:
                for stack in _stacks(kind):
                    stack.data = stack.data.transpose(-1, -2).contiguous().transpose(-1, -2)
            elif len(kind) > 1 and all(type(t) is nn.Parameter and t.is_leaf and t.dim() == 2 for t in kind):
                together = torch.stack([t.detach() for t in kind])
                for parameter, place in zip(kind, together.unbind(), strict=True):
                    parameter.data = own_storage(place)


def _stacks(kind: Sequence[torch.Tensor]) -> list[nn.Parameter]:
    """Return the stacked parameters among, or behind, the matrices of a kind."""
    owners = {id(owner): owner for t in kind for owner in (t if t._base is None else t._base,)}
    return [p for p in owners.values() if type(p) is nn.Parameter and p.is_leaf and p.dim() == 3]
