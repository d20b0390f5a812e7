"""Blocks of the family's models that no package has, in plain torch: attributes, shapes and quirks of each.

Written from descriptions. The loop over experts is the oracle's `routed_sum`, which does what theirs do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.instrument.shapes import MoEShape
from reference import routers
from reference.moe import MoEMLP, routed_sum, spread_picks

SMALL = MoEShape("small", "small", 32, 24, 16, 6, 2)  # of tests


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def routed(x: Tensor, weights: Tensor, ids: Tensor, experts: list) -> Tensor:
    return routed_sum(x, *spread_picks(weights, ids, len(experts)), experts)


class DSGate(nn.Module):
    def __init__(self, s: MoEShape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(s.E, s.H) / s.H**0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(s.E))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x.reshape(-1, x.shape[-1]))
        return F.linear(x, self.weight.to(x.dtype))


def with_biases(mlp: nn.Module) -> nn.Module:
    """Put a random bias into each linear layer."""
    for layer in mlp.children():
        layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return mlp


class DSMoE(nn.Module):
    """Without a shared expert the input is added in its place."""

    def __init__(self, use_shared_expert: bool = True, bias: bool = False, s: MoEShape = SMALL):
        super().__init__()
        self.gate, self.experts, self.use_shared_expert, self.top_k = DSGate(s), nn.Module(), use_shared_expert, s.K
        self.experts.blocks = nn.ModuleList(self.expert(s, bias) for _ in range(s.E))
        if use_shared_expert:
            self.shared_experts = self.expert(s, bias)

    def expert(self, s: MoEShape, bias: bool) -> nn.Module:
        return with_biases(MoEMLP(s.H, s.I)) if bias else MoEMLP(s.H, s.I)

    def route_tokens_to_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = (scores + self.gate.e_score_correction_bias).topk(self.top_k, -1, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights = self.route_tokens_to_experts(self.gate(hidden_states))
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = routed(tokens, weights, ids, list(self.experts.blocks)).view(hidden_states.shape)
        return y + (self.shared_experts(hidden_states) if self.use_shared_expert else hidden_states)


class SwiGLUFFN(nn.Module):
    """Gate and up in one layer, halves [gate; up]; biases; a dropout."""

    def __init__(self, s: MoEShape, drop: float):
        super().__init__()
        self.w12, self.w3, self.ffn_dropout = nn.Linear(s.H, 2 * s.I), nn.Linear(s.I, s.H), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(self.ffn_dropout(F.silu(gate) * up))


class JiTMoE(DSMoE):
    """Under the name of DSMoE in its own repository."""

    def __init__(self, use_shared_expert: bool = True, drop: float = 0.0, s: MoEShape = SMALL):
        self.drop = drop
        super().__init__(use_shared_expert, s=s)

    def expert(self, s: MoEShape, bias: bool) -> nn.Module:
        return SwiGLUFFN(s, self.drop)


class Mlp(nn.Module):
    """timm's: two layers with biases."""

    def __init__(self, H: int, I: int, form: str):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(H, I), nn.GELU(form), nn.Dropout(0.0)
        self.fc2, self.drop2 = nn.Linear(I, H), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SparseMoEBlock(nn.Module):
    """EC-DiT: experts choose int(S / E * capacity) tokens of an image, with raw affinities; SwiGLU, or MLPs."""

    def __init__(self, capacity: float = 2.0, form: str | None = None, s: MoEShape = SMALL):
        super().__init__()
        self.gate_weight = nn.Parameter(torch.randn(s.E, s.H) / s.H**0.5)
        widths = [s.I] * s.E + [s.Is] * (s.Is > 0)
        mlps = [Mlp(s.H, width, form) if form else MoEMLP(s.H, width) for width in widths]
        self.experts = nn.ModuleList(mlps[: s.E])
        if s.Is:
            self.shared_experts = mlps[-1]
        self.capacity, self.num_experts, self.n_shared_experts = capacity, s.E, int(s.Is > 0)

    def forward(self, x: Tensor) -> Tensor:
        affinity = F.linear(x, self.gate_weight).softmax(-1).mT
        weights, ids = affinity.topk(int(x.shape[1] / self.num_experts * self.capacity), -1, sorted=False)  # (B, E, C)
        y = self.shared_experts(x) if self.n_shared_experts else torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids[:, e, :, None].expand(-1, -1, x.shape[-1])
            y = y.scatter_add(1, chosen, weights[:, e, :, None] * expert(x.gather(1, chosen)))
        return y


class DiffMoE(SparseMoEBlock):
    """Experts choose in the whole batch; in eval as many tokens as a predictor says. Its thresholds are moving means.

    In its own repository it has the name of EC-DiT's block, and asks all ranks for their thresholds.
    """

    def __init__(self, capacity: float = 1.5, form: str | None = "tanh", s: MoEShape = SMALL):
        super().__init__(capacity, form, s)
        self.capacity_predictor = nn.Sequential(nn.Linear(s.H, s.H), nn.SiLU(), nn.Linear(s.H, s.E))
        self.register_buffer("expert_threshold", torch.linspace(0.4, 0.6, s.E))
        self.register_buffer("ema_decay", torch.tensor([0.95]))

    def update_threshold(self, predicted: Tensor) -> None:
        count = int((len(predicted) / self.num_experts) * self.capacity)
        kth = predicted.detach().sigmoid().topk(count, 0).values[-1]
        self.expert_threshold.copy_(self.expert_threshold * self.ema_decay + (1 - self.ema_decay) * kth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = x.view(-1, x.shape[-1])
        predicted, scores = self.capacity_predictor(tokens.detach()), F.linear(tokens, self.gate_weight).softmax(-1)
        if self.training:
            counts = [int((len(tokens) / self.num_experts) * self.capacity)] * self.num_experts
        else:
            counts = (predicted.sigmoid() > self.expert_threshold).sum(0).tolist()
        picks = torch.zeros_like(scores)
        for e, count in enumerate(counts):
            picks[scores[:, e].topk(count).indices, e] = 1
        y = routed_sum(tokens, scores * picks, picks.bool(), list(self.experts))
        y = y + self.shared_experts(tokens) if self.n_shared_experts else y
        if not self.training:
            return y.view(x.shape), None, None
        self.update_threshold(predicted)
        return y.view(x.shape), *(t.view(*x.shape[:2], -1) for t in (picks, predicted))


class MoeMLP(nn.Module):
    """Two layers with biases around tanh-GELU."""

    def __init__(self, H: int, I: int):
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(H, I), nn.Linear(I, H), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class ProMoE(nn.Module):
    """Cosines to E prototypes, an expert more for images without a label, losses; tokens choose.

    In its own repository SparseMoeBlock, for either choice.
    """

    def __init__(
        self, mode: str = "identity", top_k: int = 1, *, null: bool = True, shared: bool = True, s: MoEShape = SMALL,
        **more,
    ):  # fmt: skip
        super().__init__()
        self.cluster_centers = nn.Parameter(torch.randn(s.E, s.H))
        self.experts = nn.ModuleList(MoeMLP(s.H, s.I) for _ in range(s.E + null))
        if shared:
            self.shared_expert = MoeMLP(s.H, s.Is)
        self.num_experts, self.num_routed_experts, self.top_k, self.router_weight_mode = s.E + null, s.E, top_k, mode
        self.use_shared_expert, self.use_uncond_expert, self.alpha, self.seq_aux = shared, null, 0.0, False
        self.routing_contrastive_lam, self.routing_contrastive_temperature = 1.0, 0.07
        self.use_top_k_for_routing_contrastive = True
        self.__dict__.update(more)

    def compute_router(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and picks (T, E) of tokens whose image has a label."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        cosines = routers.score(tokens, self.cluster_centers, "cosine")
        weights = {"softmax": cosines.softmax(-1), "sigmoid": cosines.sigmoid(), "identity": cosines}
        weights = weights[self.router_weight_mode]
        picks = torch.zeros_like(weights).scatter(1, weights.topk(self.top_k, -1).indices, 1).bool()
        return weights, picks & self.has_label(hidden_states, labels)

    def has_label(self, x: Tensor, labels: Tensor) -> Tensor:
        labelled = labels != 1000 if self.use_uncond_expert else torch.ones_like(labels, dtype=torch.bool)
        return labelled.repeat_interleave(x.shape[1])[:, None]

    def forward(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        x, labelled = hidden_states.reshape(-1, hidden_states.shape[-1]), self.has_label(hidden_states, labels)
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
