"""The experts modules of Hugging Face transformers: one structure for every MoE model there, picks as arguments.

Two ways in: `replace_moe(model)`, or `experts_forward` in the library's own registry of implementations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...weights import Biases
from ..family import Family, Routed
from ..linear import NotUnderstoodError
from ..reading import Experts, Reader, computes, known_of

EXPECTED = {  # what the decorator writes on every experts module
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
    parts = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")

    def finds(self, module: nn.Module) -> bool:
        return all(isinstance(module.__dict__.get(name), bool) for name in ("has_gate", "has_bias", "is_transposed"))

    def check(self, block: nn.Module, read: Reader) -> None:
        refuse_unlike(block, read.where(""))
        super().check(block, read)
        if not computes(block.act_fn, FUNCTIONS[activation_of(block)]):
            expected = "SiLU in experts with a gate" if block.has_gate else "GELU in experts without a gate"
            raise ValueError(f"{read.path}.act_fn: got {block.act_fn}, expected {expected}")

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        refuse_unlike(block, read.where(""))
        up = read.parameter(block, "gate_up_proj" if block.has_gate else "up_proj")
        found = stacked(up, read.parameter(block, "down_proj"), block.is_transposed, activation_of(block))
        names = "gate_up_proj_bias" if block.has_gate else "up_proj_bias", "down_proj_bias"
        biases = Biases(*([read.parameter(block, name)] for name in names)) if block.has_bias else None
        return found._replace(biases=biases)

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


FUNCTIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def activation_of(experts: nn.Module) -> str:
    """Return what an experts module computes between its products, if `act_fn` is what its class and attributes say."""
    act = experts.act_fn
    tanh = type(act).__name__ == "GELUTanh" or getattr(act, "approximate", "none") == "tanh"
    return "swiglu" if experts.has_gate else "gelu_tanh" if tanh else "gelu"


def stacked(gate_up: Tensor, down: Tensor, in_out: bool, activation: str = "swiglu") -> Experts:
    """Return stacked parameters as they lie: (in, out) ones whose memory is (out, in) as views of that."""
    if in_out and gate_up.transpose(1, 2).is_contiguous() and down.transpose(1, 2).is_contiguous():
        gate_up, down, in_out = gate_up.transpose(1, 2), down.transpose(1, 2), False
    return Experts([gate_up], [down], activation=activation, layout="gate_up_in_out" if in_out else "gate_up")


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
    Raises: ValueError naming the attribute for interleaved halves, norms behind experts, gates other than
        SiLU(gate) * up, activations other than GELU without a gate.
    Cost: as `moe_mlp`, backend "auto".
    Source: transformers.integrations.moe.
    """
    path, name = type(experts).__name__, type(experts.act_fn).__name__
    expected = ("SiLU", "SiLUActivation") if experts.has_gate else ("GELU", "GELUActivation", "GELUTanh")
    if name not in expected:
        raise ValueError(f"{path}.act_fn: got {experts.act_fn}, expected {expected[0]}")
    try:
        w = FAMILY.experts(experts, Reader(path, known_of(experts)))
    except NotUnderstoodError as reason:
        raise ValueError(str(reason)) from None
    tokens, plan, _ = FAMILY.route(experts, "auto", hidden_states, top_k_index, top_k_weights)
    how = {"activation": w.activation, "layout": w.layout, "biases": w.biases}
    return ops.moe_mlp(tokens, plan, *w.weights, **how).to(hidden_states.dtype)


FAMILY = TransformersExperts()
