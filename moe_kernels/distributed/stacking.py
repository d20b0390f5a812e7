"""Replaced blocks, whose experts are modules of their own, made into MoELayers, whose experts can be split."""

from __future__ import annotations

from torch import nn

from ..adapters.families.dit_moe import DiTMoEBlock
from ..layer import MoELayer
from ..weights import stack_dit_moe


def stack_experts(model: nn.Module) -> int:
    """Exchange every replaced DiT-MoE block inside model for a MoELayer with its weights, router and options.

    For `expert_parallel`. State dicts then have the names of MoELayer: `checkpoints.gather_dit_moe` and
    `checkpoints.scatter_dit_moe` speak those of DiT-MoE.

    Args:
        model: after `replace_moe`, before any wrapper and the making of an optimizer.
    Returns: how many blocks.
    Raises: ValueError where model holds no replaced block, or is one.
    Cost: the weights once more while a block is exchanged.
    """
    if isinstance(model, DiTMoEBlock):
        raise ValueError("model: got a replaced block itself, expected the model that holds it")
    blocks = {name: child for name, child in model.named_modules() if isinstance(child, DiTMoEBlock)}
    if not blocks:
        kind = type(model).__name__
        raise ValueError(f"model: got {kind} without a replaced block of DiT-MoE, expected replace_moe(model)")
    for name, block in blocks.items():
        model.set_submodule(name, _layer(block))
    return len(blocks)


def _layer(block: DiTMoEBlock) -> MoELayer:
    state, router, config = stack_dit_moe(block.state_dict()), block.router(), block.moe_config
    down, shared = state["down_proj"], state.get("shared_down_proj")
    E, H, I = down.shape
    Is = 0 if shared is None else shared.shape[1]
    how = {"router": router, "backend": config.backend, "recompute": config.recompute}
    layer = MoELayer(H, I, E, router.top_k, Is, **how, device=down.device, dtype=down.dtype)
    layer.load_state_dict(state, assign=down.is_meta)
    for name, p in layer.named_parameters():
        p.requires_grad_(_trains(block, name))
    return layer.train(block.training)


def _trains(block: DiTMoEBlock, name: str) -> bool:
    part = block.gate if name == "gate_weight" else block.shared_experts if name.startswith("shared") else block.experts
    return any(p.requires_grad for p in part.parameters())
