"""The family's routing rules: which expert works on which token, in the dense form weights (T, E), picks (T, E) bool.

`routing.py` has the two rules of DiT-MoE and EC-DIT; here are the others. T tokens are B images of L consecutive ones,
scores (T, E) of any float dtype. Of equal scores the lower token wins, and then the lower expert. A layer's output is
`moe.routed_sum(x, weights, picks, experts)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.routing import take_tokens


def score(x: Tensor, gate_weight: Tensor, how: str) -> Tensor:
    """Score E experts for every token: softmax | sigmoid | identity of x gate_weight^T, or cosine(x, gate_weight).

    Args:
        x: (T, D). gate_weight: (E, D), for cosine the prototypes.
    Returns: (T, E).
    Source: EC-DIT (softmax), DSMoE (sigmoid), Expert Race (identity), ProMoE (cosine).
    """
    if how == "cosine":
        return F.linear(F.normalize(x, dim=-1), F.normalize(gate_weight, dim=-1))
    logits = F.linear(x, gate_weight)
    return {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "identity": logits}[how]


def timestep_and_tokens(tokens: Tensor, timestep: Tensor) -> Tensor:
    """Return (T, 2D): [timestep of the token's image; token], what Nucleus scores. tokens (T, D), timestep (B, D).

    Source: Nucleus-Image, arXiv 2604.12163: the router sees unmodulated tokens, whose norms do not follow the noise.
    """
    return torch.cat([timestep.repeat_interleave(len(tokens) // len(timestep), 0), tokens], -1)


def group_limited_choice(
    scores: Tensor,
    top_k: int,
    groups: int = 1,
    groups_taken: int = 1,
    bias: Tensor | None = None,
    renormalise: bool = True,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Let each token pick its top_k experts out of its best groups of consecutive experts.

    A group's value is the sum of its two best scores + bias; of the groups_taken best groups the top_k best
    scores + bias are picked. w = route_scale s, divided by the sum of the picked s if `renormalise`: the bias chooses
    and never weighs.

    Args:
        scores: (T, E). bias: (E,) or None.
    Returns: weights (T, E), 0 where not picked; picks (T, E) bool.
    Source: DeepSeek-V3 (arXiv 2412.19437), as DSMoE (arXiv 2512.01252) and LingBot-Video route.
    """
    T, E = scores.shape
    values = scores.detach() if bias is None else scores.detach() + bias
    by_group = values.view(T, groups, E // groups)
    worth = by_group.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    best = worth.sort(dim=-1, descending=True, stable=True).indices[:, :groups_taken]
    allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)[..., None].expand_as(by_group)
    values = values.masked_fill(~allowed.reshape(T, E), -math.inf)
    ids = values.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    picks = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
    return weigh(scores, picks, renormalise, route_scale, 1e-20), picks


def weigh(scores: Tensor, picks: Tensor, renormalise: bool, route_scale: float, epsilon: float = 1e-12) -> Tensor:
    """Return route_scale s, divided by epsilon + the token's sum over its picks if `renormalise`; 0 where not picked.

    Source: DSMoE (epsilon 1e-20), Nucleus-Image (1e-12: there a token may have no picks).
    """
    picked = scores * picks
    return route_scale * (picked / (picked.sum(-1, keepdim=True) + epsilon) if renormalise else picked)


def capacity(tokens_per_group: int, capacity_factor: float, num_experts: int, rounding: str) -> int:
    """Return how many tokens an expert takes per group, at least 1.

    floor: int(S f / E), EC-DIT. ceil: ceil(f S / E), Nucleus. int: int((S / E) f), the public codes of DiffMoE and
    ProMoE, where S / E is rounded first.
    """
    S, f, E = tokens_per_group, capacity_factor, num_experts
    return max(1, {"floor": int(S * f / E), "ceil": math.ceil(f * S / E), "int": int((S / E) * f)}[rounding])


def race(scores: Tensor, picks_per_group: int, tokens_per_group: int) -> Tensor:
    """Let the L E scores of a group of L tokens race: the picks_per_group largest are picked. -> picks (T, E) bool.

    A group is an image, or the whole batch; picks_per_group = L K for K picks per token on average.

    Source: Expert Race, arXiv 2503.16057.
    """
    T, E = scores.shape
    flat = scores.detach().reshape(T // max(tokens_per_group, 1), -1)
    best = flat.sort(dim=-1, descending=True, stable=True).indices[:, :picks_per_group]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True).view(T, E)


def ema(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """Return decay old + (1 - decay) new: what thresholds are between steps (Expert Race, DiffMoE: 0.95)."""
    return decay * old + (1 - decay) * new


def router_similarity_loss(logits: Tensor, picks: Tensor) -> Tensor:
    """Return sum_ij W_ij (P^T P)_ij / T, P = softmax(logits): experts that are picked together are driven apart.

    M = picks^T picks. W_ii = E M_ii / sum_i M_ii; W_ij = (E^2 - E) M_ij / sum_{i != j} M_ij; 0 where the sum is 0.

    Args:
        logits: (T, E), with gradient. picks: (T, E) bool.
    Source: Expert Race, arXiv 2503.16057.
    """
    T, E = logits.shape
    P, M = logits.softmax(-1), picks.to(logits.dtype).T @ picks.to(logits.dtype)
    own = torch.eye(E, dtype=torch.bool, device=M.device)
    W = torch.where(own, E * M / M[own].sum().clamp(min=1), (E * E - E) * M / M[~own].sum().clamp(min=1))
    return (W * (P.T @ P)).sum() / max(T, 1)


def capacity_predictor(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Predict whether expert e will take token t: logits (T, E) = down silu(up x + b) + b', no gradient to x.

    Source: DiffMoE, arXiv 2503.14487.
    """
    return F.linear(F.silu(F.linear(x.detach(), up, up_bias)), down, down_bias)


def diffmoe_training(scores: Tensor, predicted: Tensor, capacity_factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Let each expert take its C = int((T / E) f) best tokens of the whole batch.

    Args:
        scores: (T, E), softmax over E. predicted: (T, E), logits of the predictor.
    Returns: picks (T, E) bool; the predictor's loss, the mean binary cross-entropy of `predicted` against picks; and
        each expert's C-th largest sigmoid(predicted) (E,), which the thresholds of `diffmoe_sampling` are the EMA of.
    Source: DiffMoE, arXiv 2503.14487.
    """
    T, E = scores.shape
    C = capacity(T, capacity_factor, E, "int")
    picks = take_tokens(scores, C, T)
    loss = F.binary_cross_entropy_with_logits(predicted, picks.to(predicted.dtype))
    return picks, loss, predicted.detach().sigmoid().sort(dim=0, descending=True).values[C - 1]


def diffmoe_sampling(scores: Tensor, predicted: Tensor, thresholds: Tensor, of: str = "batch") -> Tensor:
    """Mark what experts take in sampling. -> picks (T, E) bool.

    of "batch": expert e takes as many tokens as have sigmoid(predicted) > threshold_e, and those are the best of the
    batch by score (the released sampler). of "token": it takes the tokens above its threshold themselves.

    Source: DiffMoE, arXiv 2503.14487.
    """
    above = predicted.sigmoid() > thresholds
    if of == "token":
        return above
    order = scores.detach().sort(dim=0, descending=True, stable=True).indices
    rank = order.argsort(0)
    return rank < above.sum(0)


def promoe(
    cosines: Tensor, labels: Tensor, null_label: int, top_k: int, by: str = "identity", choice: str = "token"
) -> tuple[Tensor, Tensor]:
    """Route images with a label by prototypes, and those without to an expert of their own.

    w = identity | sigmoid | softmax of the cosines, the softmax over experts (choice "token") or over the tokens of an
    image ("expert"). Each token takes its top_k experts, or each expert its C = int((L / E) top_k) best tokens of an
    image, at least 1. All tokens of an image with null_label go to the last expert, with weight 1.

    Args:
        cosines: (T, E): of the tokens and the prototypes. labels: (B,) integers.
    Returns: weights (T, E + 1), picks (T, E + 1) bool.
    Source: ProMoE, arXiv 2510.24711.
    """
    (T, E), L = cosines.shape, len(cosines) // max(len(labels), 1)
    over = cosines.view(-1, L, E)
    weights = {"identity": over, "sigmoid": over.sigmoid(), "softmax": over.softmax(-1 if choice == "token" else 1)}[by]
    weights = weights.reshape(T, E)
    if choice == "token":
        ids = weights.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        picks = torch.zeros_like(weights, dtype=torch.bool).scatter(1, ids, True)
    else:
        picks = take_tokens(weights, min(capacity(L, top_k, E, "int"), L), L)
    null = (labels == null_label).repeat_interleave(L)[:, None]
    return torch.cat([weights, torch.ones_like(weights[:, :1])], 1), torch.cat([picks & ~null, null], 1)


def routing_contrastive_loss(x: Tensor, prototypes: Tensor, picks: Tensor, groups: int, temperature: float) -> Tensor:
    """Return the mean cross-entropy with which a prototype finds the mean of its own tokens among all means of a group.

    logits_ij = cosine(prototype_i, mean of the tokens of j) / temperature, i and j over experts that took any token.

    Args:
        x: (T, H). prototypes: (E, H). picks: (T, E) bool. groups: consecutive parts of the batch, each by itself.
    Source: ProMoE, arXiv 2510.24711: one group where tokens choose (by their best pick), images where experts do.
    """
    losses = []
    for tokens, taken in zip(x.chunk(groups), picks.chunk(groups), strict=True):
        found = [e for e in range(len(prototypes)) if taken[:, e].any()]
        if found:
            means = torch.stack([tokens[taken[:, e]].mean(0) for e in found])
            logits = score(prototypes[found], means, "cosine") / temperature
            losses.append(F.cross_entropy(logits, torch.arange(len(found), device=x.device), reduction="none"))
    return torch.cat(losses).mean() if losses else x.sum() * 0
