"""Blocks of models without a public package: attributes, shapes and quirks of each, written from its description."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.moe import MoEMLP, routed_sum, spread_picks

H, I, E, K, Is = 32, 24, 6, 2, 16


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def routed(x: Tensor, weights: Tensor, ids: Tensor, experts: list) -> Tensor:
    return routed_sum(x, *spread_picks(weights, ids, len(experts)), experts)


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


class DSGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x.reshape(-1, H))
        return F.linear(x, self.weight.to(x.dtype))


def with_biases(mlp: nn.Module) -> nn.Module:
    """Put a random bias into each linear layer."""
    for layer in mlp.children():
        layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return mlp


class DSExperts(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.blocks = nn.ModuleList(with_biases(MoEMLP(H, I)) if bias else MoEMLP(H, I) for _ in range(E))


class DSMoE(nn.Module):
    """Without a shared expert the input is added in its place."""

    def __init__(self, use_shared_expert: bool = True, bias: bool = False):
        super().__init__()
        self.gate, self.experts, self.use_shared_expert = DSGate(), DSExperts(bias), use_shared_expert
        if use_shared_expert:
            self.shared_experts = with_biases(MoEMLP(H, I)) if bias else MoEMLP(H, I)

    def route_tokens_to_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = (scores + self.gate.e_score_correction_bias).topk(K, -1, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights = self.route_tokens_to_experts(self.gate(hidden_states))
        tokens = hidden_states.reshape(-1, H)
        y = routed(tokens, weights, ids, list(self.experts.blocks)).view(hidden_states.shape)
        return y + (self.shared_experts(hidden_states) if self.use_shared_expert else hidden_states)


class Mlp(nn.Module):
    """timm's: two layers with biases."""

    def __init__(self, width: int, form: str):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(H, width), nn.GELU(form), nn.Dropout(0.0)
        self.fc2, self.drop2 = nn.Linear(width, H), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SparseMoEBlock(nn.Module):
    """EC-DiT: experts choose int(S / E * capacity) tokens of an image, with raw affinities; SwiGLU, or MLPs."""

    def __init__(self, capacity: float = 2.0, form: str | None = None):
        super().__init__()
        self.gate_weight = nn.Parameter(torch.randn(E, H) / H**0.5)
        self.experts, self.shared_experts = nn.ModuleList(), Mlp(Is, form) if form else MoEMLP(H, Is)
        for _ in range(E):
            self.experts.append(Mlp(I, form) if form else MoEMLP(H, I))
        self.capacity, self.num_experts, self.n_shared_experts = capacity, E, 1

    def forward(self, x: Tensor) -> Tensor:
        affinity = F.linear(x, self.gate_weight).softmax(-1).mT
        weights, ids = affinity.topk(int(x.shape[1] / E * self.capacity), -1, sorted=False)  # (B, E, C)
        y = self.shared_experts(x)
        for e, expert in enumerate(self.experts):
            chosen = ids[:, e, :, None].expand(-1, -1, H)
            y = y.scatter_add(1, chosen, weights[:, e, :, None] * expert(x.gather(1, chosen)))
        return y


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
