"""The experts modules of Hugging Face transformers: one structure for every MoE model there, picks as arguments.

Two ways in: `replace_moe(model)`, or `experts_forward` in the library's own registry of implementations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ..family import Family, Routed
from ..linear import NotUnderstoodError
from ..reading import Experts, Reader, computes, known_of

EXPECTED = {  # what the decorator writes on every experts module
    "has_bias": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


class TransformersExperts(Family):
    name = "transformers"
    expected = "modules with has_gate, has_bias, is_transposed, as use_experts_implementation makes them"
    attributes = (
        ("num_experts", int),
        ("down_proj", Tensor),
        ("act_fn", object),
    )
    parts = ("gate_up_proj", "up_proj", "down_proj")

    def finds(self, module: nn.Module) -> bool:
        return all(isinstance(module.__dict__.get(name), bool) for name in ("has_gate", "has_bias", "is_transposed"))

    def check(self, block: nn.Module, read: Reader) -> None:
        refuse_unlike(block, read.where(""))  # before attributes: with a bias there are others
        super().check(block, read)
        name, function = ("SiLU", F.silu) if block.has_gate else ("GELU", F.gelu)
        if not computes(block.act_fn, function):
            gated = "with" if block.has_gate else "without"
            raise ValueError(f"{read.path}.act_fn: got {block.act_fn}, expected {name} in experts {gated} a gate")

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        refuse_unlike(block, read.where(""))
        up = read.parameter(block, "gate_up_proj" if block.has_gate else "up_proj")
        return stacked(up, read.parameter(block, "down_proj"), block.is_transposed, gated=block.has_gate)

    def route(
        self, block: nn.Module, backend: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Routed:
        E = block.num_experts
        if not getattr(block, "_is_expert_parallel", False):
            return Routed(hidden_states, ops.dispatch(top_k_index, top_k_weights, E, backend))
        T, K = top_k_index.shape
        tokens = torch.arange(T, device=top_k_index.device).repeat_interleave(K)
        here = top_k_index.flatten().clamp(max=E)  # E and above: on another rank
        return Routed(hidden_states, ops.dispatch_rows(top_k_weights.flatten(), tokens, here, T, E))

    def trial(self, block: nn.Module, x: Tensor) -> tuple[Any, ...]:
        x = x.flatten(0, 1)
        weights, ids = x[:, : block.num_experts].softmax(-1).topk(min(2, block.num_experts, x.shape[1]))
        return x, ids, weights


def stacked(gate_up: Tensor, down: Tensor, in_out: bool, gated: bool = True) -> Experts:
    """Return stacked parameters as they lie: (in, out) ones whose memory is (out, in) as views of that."""
    if in_out and gate_up.transpose(1, 2).is_contiguous() and down.transpose(1, 2).is_contiguous():
        gate_up, down, in_out = gate_up.transpose(1, 2), down.transpose(1, 2), False
    activation, layout = "swiglu" if gated else "gelu", "gate_up_in_out" if in_out else "gate_up"
    return Experts([gate_up], [down], activation=activation, layout=layout)


def refuse_unlike(experts: nn.Module, path: str) -> None:
    """Refuse what the kernels have not got. Raises: NotUnderstoodError naming the attribute."""
    for name, value in EXPECTED.items():
        if (got := getattr(experts, name, value)) != value:
            raise NotUnderstoodError(f"{path}{name}: got {got!r}, expected {value!r}")
    gate = getattr(type(experts)._apply_gate, "__name__", "") if experts.has_gate else "_default_apply_gate"
    if gate != "_default_apply_gate":
        raise NotUnderstoodError(f"{path}_apply_gate: got {type(experts).__name__}'s own, expected act(gate) * up")


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute any experts module of transformers: an entry for its `ALL_EXPERTS_FUNCTIONS`.

    Args:
        experts: a module that `use_experts_implementation` decorated.
        hidden_states: (T, H) tokens.
        top_k_index, top_k_weights: (T, K), as the model's router gives them; where the library's expert parallelism has
            divided the experts, ids of this rank's own, and those from its number on are elsewhere and no rows.
    Returns: (T, H) in the dtype of hidden_states.
    Raises: ValueError naming the attribute for biases, interleaved halves, norms behind experts, gates other than
        SiLU(gate) * up, activations other than GELU without a gate.
    Cost: as `moe_mlp`, backend "auto".
    Source: transformers.integrations.moe.
    """
    path, name = type(experts).__name__, type(experts.act_fn).__name__
    expected = ("SiLU", "SiLUActivation") if experts.has_gate else ("GELU", "GELUActivation")
    if name not in expected:
        raise ValueError(f"{path}.act_fn: got {experts.act_fn}, expected {expected[0]}")
    try:
        w = FAMILY.experts(experts, Reader(path, known_of(experts)))
    except NotUnderstoodError as reason:
        raise ValueError(str(reason)) from None
    tokens, plan, _ = FAMILY.route(experts, "auto", hidden_states, top_k_index, top_k_weights)
    return ops.moe_mlp(tokens, plan, *w.weights, activation=w.activation, layout=w.layout).to(hidden_states.dtype)


FAMILY = TransformersExperts()
