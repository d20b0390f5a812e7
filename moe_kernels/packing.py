"""Weights packed once for many forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .adapters import MoEBlock
from .layer import MoELayer
from .ops.moe_mlp import pack_weights


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[int]:
    """Inside the context, run the MoE layers of a model from weights packed once, for sampling.

        with moe_kernels.packed_weights(model), torch.no_grad():
            images = sample(model, ...)

    The CPU kernels read weights in panels, and otherwise make these anew in every call: 12 to 18 % of the time at 256
    tokens, 0 to 3 % at 1024 (S/2 width, one thread: results/*_6f539b63ab_peers.jsonl). Results are the same bits. The
    weights must not change inside: a forward after an update raises. A write through `.data` into part of a matrix is
    the one change that goes unnoticed.

    Args:
        model: any module with MoELayer or blocks of `replace_moe`; those on a backend that reads weights as they are
            (any but native) or with weights that are not contiguous are left alone, and so are calls that autocast to
            another dtype.
    Yields: the number of layers packed.
    Raises: ValueError where the model has no such layer, and from a forward inside for changed weights.
    Cost: the memory of the expert weights once more (twice for bfloat16 on a CPU without avx512_bf16).
    """
    layers = [module for module in model.modules() if isinstance(module, (MoELayer, MoEBlock))]
    if not layers:
        raise ValueError(f"model: found no MoELayer and no block of replace_moe in {type(model).__name__}")
    with ExitStack() as stack:
        count = 0
        for layer in layers:
            release = pack_weights(*layer.expert_weights())
            if release is not None:
                stack.callback(release)
                count += 1
        yield count
