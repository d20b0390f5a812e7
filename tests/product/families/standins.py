"""Blocks of models without a public package: attributes, shapes and quirks of each, written from its description."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import routers
from reference.moe import MoEMLP, clamped_swiglu, routed_sum, spread_picks

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


class SwiGLUFFN(nn.Module):
    """Gate and up in one layer, halves [gate; up]; biases; a dropout."""

    def __init__(self, drop: float):
        super().__init__()
        self.w12, self.w3, self.ffn_dropout = nn.Linear(H, 2 * I), nn.Linear(I, H), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(self.ffn_dropout(F.silu(gate) * up))


class JiTMoE(DSMoE):
    """Under the name of DSMoE in its own repository."""

    def __init__(self, use_shared_expert: bool = True, drop: float = 0.0):
        super().__init__(use_shared_expert)
        self.experts.blocks = nn.ModuleList(SwiGLUFFN(drop) for _ in range(E))
        if use_shared_expert:
            self.shared_experts = SwiGLUFFN(drop)


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


class DiffMoE(SparseMoEBlock):
    """Experts choose in the whole batch; in eval as many tokens as a predictor says. Its thresholds are moving means.

    In its own repository it has the name of EC-DiT's block, and asks all ranks for their thresholds.
    """

    def __init__(self, capacity: float = 1.5, form: str | None = "tanh"):
        super().__init__(capacity, form)
        self.capacity_predictor = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, E))
        self.register_buffer("expert_threshold", torch.linspace(0.4, 0.6, E))
        self.register_buffer("ema_decay", torch.tensor([0.95]))

    def update_threshold(self, predicted: Tensor) -> None:
        count = int((len(predicted) / E) * self.capacity)
        kth = predicted.detach().sigmoid().topk(count, 0).values[-1]
        self.expert_threshold.copy_(self.expert_threshold * self.ema_decay + (1 - self.ema_decay) * kth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = x.view(-1, H)
        predicted, scores = self.capacity_predictor(tokens.detach()), F.linear(tokens, self.gate_weight).softmax(-1)
        if self.training:
            count = int((len(tokens) / E) * self.capacity)
            counts = [count] * E
        else:
            counts = (predicted.sigmoid() > self.expert_threshold).sum(0).tolist()
        picks = torch.zeros_like(scores)
        for e, count in enumerate(counts):
            picks[scores[:, e].topk(count).indices, e] = 1
        y = routed_sum(tokens, scores * picks, picks.bool(), list(self.experts)) + self.shared_experts(tokens)
        if not self.training:
            return y.view(x.shape), None, None
        self.update_threshold(predicted)
        return y.view(x.shape), *(t.view(*x.shape[:2], E) for t in (picks, predicted))


class MoeMLP(nn.Module):
    """Two layers with biases around tanh-GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(H, width), nn.Linear(width, H), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class ProMoE(nn.Module):
    """Cosines to prototypes, an expert for images without a label, losses; tokens choose.

    In its own repository SparseMoeBlock, for either choice.
    """

    def __init__(self, mode: str = "identity", top_k: int = 1, *, null: bool = True, shared: bool = True, **more):
        super().__init__()
        self.cluster_centers = nn.Parameter(torch.randn(E - null, H))
        self.experts = nn.ModuleList(MoeMLP(I) for _ in range(E))
        if shared:
            self.shared_expert = MoeMLP(Is)
        self.num_experts, self.num_routed_experts, self.top_k, self.router_weight_mode = E, E - null, top_k, mode
        self.use_shared_expert, self.use_uncond_expert, self.alpha, self.seq_aux = shared, null, 0.0, False
        self.routing_contrastive_lam, self.routing_contrastive_temperature = 1.0, 0.07
        self.use_top_k_for_routing_contrastive = True
        self.__dict__.update(more)

    def compute_router(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and picks (T, E) of tokens whose image has a label."""
        tokens = hidden_states.reshape(-1, H)
        cosines = routers.score(tokens, self.cluster_centers, "cosine")
        weights = {"softmax": cosines.softmax(-1), "sigmoid": cosines.sigmoid(), "identity": cosines}
        weights = weights[self.router_weight_mode]
        picks = torch.zeros_like(weights).scatter(1, weights.topk(self.top_k, -1).indices, 1).bool()
        return weights, picks & self.has_label(hidden_states, labels)

    def has_label(self, x: Tensor, labels: Tensor) -> Tensor:
        labelled = labels != 1000 if self.use_uncond_expert else torch.ones_like(labels, dtype=torch.bool)
        return labelled.repeat_interleave(x.shape[1])[:, None]

    def forward(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        x, labelled = hidden_states.reshape(-1, H), self.has_label(hidden_states, labels)
        weights, picks = self.routed_by(hidden_states, labels)
        loss = self.loss(x, weights, picks, labelled, len(labels)) if self.training else None
        if self.use_uncond_expert:
            weights, picks = torch.cat([weights, torch.ones_like(weights[:, :1])], 1), torch.cat([picks, ~labelled], 1)
        experts = [lambda t, expert=expert: expert(t.to(x.dtype)) for expert in self.experts]
        y = routed_sum(self.wide(x), weights, picks, experts)
        y = y + self.shared_expert(x) if self.use_shared_expert else y
        return y.view(hidden_states.shape), loss

    def routed_by(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute_router(x, labels)

    wide = staticmethod(at_least_float32)  # sums are float32, whatever the tokens are

    def loss(self, x: Tensor, weights: Tensor, picks: Tensor, labelled: Tensor, images: int) -> Tensor | None:
        losses = []
        if self.alpha:
            p = weights if self.router_weight_mode == "softmax" else weights.softmax(-1)
            p, taken = (t[labelled[:, 0]].to(p.dtype) for t in (p, picks))
            groups = images - int((~labelled).sum() // (len(x) // images)) if self.seq_aux else 1
            pairs = zip(p.chunk(groups), taken.chunk(groups), strict=True)
            each = [(a.mean(0) * b.mean(0)).sum() * p.shape[1] / self.top_k for a, b in pairs]
            losses.append(self.alpha * torch.stack(each).mean())
        if self.routing_contrastive_lam:
            if not self.use_top_k_for_routing_contrastive:
                picks = torch.zeros_like(picks).scatter(1, weights.argmax(1, keepdim=True), True) & labelled
            groups, scale = self.groups(images), self.routing_contrastive_lam
            args = self.cluster_centers, picks, groups, self.routing_contrastive_temperature
            losses.append(scale * routers.routing_contrastive_loss(x, *args))
        return torch.stack(losses).sum() if losses else None

    def groups(self, images: int) -> int:
        return 1


class ProMoEByExpert(ProMoE):
    """Experts choose in each image with a label; sums are in the dtype of the tokens."""

    wide = staticmethod(lambda x: x)

    def compute_router(self, cond_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = cond_hidden_states
        cosines = routers.score(x, self.cluster_centers, "cosine")
        weights = {"softmax": cosines.softmax(1), "sigmoid": cosines.sigmoid(), "identity": cosines}
        weights = weights[self.router_weight_mode]
        count = max(1, min(int((x.shape[1] / weights.shape[2]) * self.top_k), x.shape[1]))
        picks = torch.zeros_like(weights).scatter(1, weights.topk(count, 1).indices, 1).bool()
        return weights.flatten(0, 1), picks.flatten(0, 1)

    def routed_by(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weights, picks = self.compute_router(x)
        return weights, picks & self.has_label(x, labels)

    def groups(self, images: int) -> int:
        return images


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
