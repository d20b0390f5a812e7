"""Blocks of models without a public package: attributes, shapes and quirks of each, written from its description.

Those that are timed as well are in bench/peers/standins.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.standins import SMALL, at_least_float32, routed
from reference.moe import MoEMLP, clamped_swiglu

H, I, E, K, Is = SMALL.H, SMALL.I, SMALL.E, SMALL.K, SMALL.Is


class LingBotRouter(nn.Module):
    """Sigmoid scores in float32; a bias for the choice alone; groups; renormalised and scaled."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.register_buffer("e_score_correction_bias", torch.linspace(-0.2, 0.2, E))
        self.top_k, self.route_scale = K, 2.5

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(at_least_float32(tokens), self.weight.to(at_least_float32(tokens).dtype)).sigmoid()
        choice = (scores + self.e_score_correction_bias).view(-1, 2, E // 2)
        group = choice.topk(2, -1).values.sum(-1).argmax(-1)
        mine = torch.arange(2, device=tokens.device) == group[:, None]
        ids = choice.masked_fill(~mine[..., None], float("-inf")).flatten(1).topk(self.top_k, -1, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, (weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale).to(tokens.dtype)


class LingBotExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, I, H) / H**0.5) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, H, I) / I**0.5)


class LingBotVideoSparseMoeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.shared_experts = LingBotRouter(), LingBotExperts(), MoEMLP(H, Is)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens = hidden_states.reshape(-1, H)
        ids, weights = self.router(tokens)
        if padding_mask is not None:
            weights = weights * padding_mask[:, None].to(weights.dtype)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-9) * self.router.route_scale
        w = self.experts
        experts = [lambda t, e=e: (F.silu(t @ w.w1[e].T) * (t @ w.w3[e].T)) @ w.w2[e].T for e in range(E)]
        return (routed(tokens, weights, ids, experts) + self.shared_experts(tokens)).view(hidden_states.shape)


class CoreMultiHeadMoE(nn.Module):
    """MAGI-2: heads with experts of their own; a forward that finds its module by number."""

    made: ClassVar[WeakValueDictionary[int, CoreMultiHeadMoE]] = WeakValueDictionary()

    def __init__(self, heads: int = 3):
        super().__init__()
        D, N = H // 2, heads * E
        self.num_heads, self.num_experts, self.d_head, self.topk, self.ep_size = heads, E, D, K, 1
        self.gate = nn.Parameter(torch.randn(N, D))
        self.W_gate, self.W_up = (nn.Parameter(torch.randn(N, D, I)) for _ in range(2))  # some beyond the clamp
        self.W_down = nn.Parameter(torch.randn(N, I, D) / I)  # small: gradients of squares fit into float16
        self.router = nn.Module()
        self.router.register_buffer("expert_bias", torch.linspace(-0.2, 0.2, N))
        self.router.register_buffer("expert_bias_ema", torch.zeros(N))
        self._moe_key = 1 + max(self.made, default=0)
        self.made[self._moe_key] = self

    def _route(self, x_heads: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids, (heads, S, K), of experts within a head."""
        x = at_least_float32(x_heads).transpose(0, 1)
        scores = (x @ self.gate.to(x.dtype).view(self.num_heads, E, -1).mT).sigmoid()
        ids = (scores + self.router.expert_bias.view(-1, 1, E)).topk(K, -1).indices
        return F.normalize(scores.gather(-1, ids), p=1, dim=-1) * 4.9, ids

    def forward(self, x: Tensor) -> Tensor:
        return self.made[self._moe_key]._of_heads(x.view(len(x), self.num_heads, -1)).flatten(1)

    def _of_heads(self, x: Tensor) -> Tensor:
        outputs = []
        for head, (weights, ids) in enumerate(zip(*self._route(x), strict=True)):
            mine = range(head * E, (head + 1) * E)
            experts = [
                lambda t, e=e: clamped_swiglu(t @ torch.cat([self.W_gate[e], self.W_up[e]], 1)) @ self.W_down[e]
                for e in mine
            ]
            outputs.append(routed(x[:, head], weights, ids, experts))
        return torch.stack(outputs, 1)


class HunyuanGate(nn.Module):
    """A router in float32, whatever the experts are in; the short path returns (weights, ids)."""

    def __init__(self):
        super().__init__()
        self.wg, self.drop_tokens = nn.Linear(H, E, bias=False), False

    def forward(self, x: Tensor, topk_impl: str = "easy") -> tuple[Tensor, Tensor]:
        assert topk_impl == "easy"
        logits = self.wg(x.reshape(-1, H).to(self.wg.weight.dtype))
        weights, ids = logits.softmax(1).topk(K)
        return weights / weights.sum(1, keepdim=True).clamp(min=1e-8), ids


class HunyuanMLP(nn.Module):
    """Halves [up; gate] of one layer."""

    def __init__(self):
        super().__init__()
        self.gate_and_up_proj = nn.Linear(H, 2 * I, bias=False)
        self.down_proj = nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up_proj(x).chunk(2, -1)
        return self.down_proj(up * F.silu(gate))


class HunyuanMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.shared_mlp = HunyuanGate(), HunyuanMLP()
        self.experts = nn.ModuleList(HunyuanMLP() for _ in range(E))

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, ids = self.gate(hidden_states)
        y = routed(hidden_states.reshape(-1, H), weights, ids, list(self.experts)).view(hidden_states.shape)
        return y + self.shared_mlp(hidden_states)


class TransposedExperts(nn.Module):
    """An experts module of transformers: (in, out) matrices, SwiGLU, or no gate but GELU; with biases or without."""

    def __init__(self, has_gate: bool, has_bias: bool = False, form: str = "none"):
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = E, has_gate, has_bias, True
        self.is_concatenated, self.has_post_expert_norm, self._is_expert_parallel = True, False, False
        self.act_fn = nn.SiLU() if has_gate else nn.GELU(form)
        up = nn.Parameter(torch.randn(E, H, (1 + has_gate) * I) / H**0.5)
        name = "gate_up_proj" if has_gate else "up_proj"
        self.register_parameter(name, up)
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, up.shape[2])) if has_bias else None)
        self.down_proj_bias = nn.Parameter(torch.randn(E, H)) if has_bias else None
        self.down_proj = nn.Parameter(torch.randn(E, I, H) / I**0.5)
        self.config = SimpleNamespace()

    def _default_apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return self.act_fn(gate) * up

    _apply_gate = _default_apply_gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up = self.gate_up_proj if self.has_gate else self.up_proj
        act = self._apply_gate if self.has_gate else self.act_fn
        bias, down_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
        if self.has_bias:
            experts = [lambda t, e=e: act(t @ up[e] + bias[e]) @ self.down_proj[e] + down_bias[e] for e in range(E)]
        else:
            experts = [lambda t, e=e: act(t @ up[e]) @ self.down_proj[e] for e in range(E)]
        return routed(hidden_states, top_k_weights, top_k_index, experts)
