"""Routing: router scores -> picks, and the balance loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_choice(x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let each token pick its top_k experts, weighted by the raw softmax probability.

    probs = softmax(x gate_weight^T) over all E experts; the picked ones are not renormalised.

    Args:
        x: (T, H), any float dtype.
        gate_weight: (E, H), dtype of x.
        top_k: picks per token, 1..E.
    Returns:
        topk_weights (T, K) in descending order, topk_ids (T, K) int64, probs (T, E). Of equal scores the lower expert
        index comes first.
    Raises:
        ValueError: top_k outside 1..E; shapes that do not fit; non-finite router logits.
    Cost: 2 T H E FLOPs; one host sync (the finiteness check).
    Source: DiT-MoE, arXiv 2407.11633, section 2.
    """
    E, _ = gate_weight.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k: got {top_k}, expected 1..{E} (the number of experts)")
    probs = _router_probs(x, gate_weight)
    sorted_probs, sorted_ids = probs.sort(dim=-1, descending=True, stable=True)  # torch.topk leaves ties undefined
    return sorted_probs[:, :top_k], sorted_ids[:, :top_k], probs


def expert_choice(
    x: Tensor, gate_weight: Tensor, capacity_factor: float, tokens_per_group: int
) -> tuple[Tensor, Tensor]:
    """Let each expert pick its top C tokens of every group of tokens_per_group consecutive tokens.

    affinities = softmax(x gate_weight^T) over experts; C = int(tokens_per_group * capacity_factor / E), at least 1.
    A token ends up with 0..E experts.

    Args:
        x: (T, H), any float dtype; T a multiple of tokens_per_group.
        gate_weight: (E, H), dtype of x.
        capacity_factor: mean picks per token, in (0, E].
        tokens_per_group: tokens that compete with each other: those of one image, or of several.
    Returns:
        affinities (T, E), used unnormalised as weights where picked; picks (T, E) bool. Of equal affinities the lower
        token index is picked.
    Raises:
        ValueError: capacity_factor or tokens_per_group out of range; shapes that do not fit; non-finite logits.
    Cost: 2 T H E FLOPs and a sort of T E scores; one host sync.
    Source: EC-DIT, arXiv 2410.02098; Expert Choice, arXiv 2202.09368.
    """
    C = expert_capacity(tokens_per_group, capacity_factor, gate_weight.shape[0])
    affinities = _router_probs(x, gate_weight)
    return affinities, take_tokens(affinities, C, tokens_per_group)


def take_tokens(affinities: Tensor, capacity: int, tokens_per_group: int) -> Tensor:
    """Mark, for each expert and group of consecutive tokens, the `capacity` tokens of the largest affinities.

    Args:
        affinities: (T, E), any float dtype. capacity: 1..tokens_per_group. tokens_per_group: a divisor of T.
    Returns:
        picks (T, E) bool, no gradient. Of equal affinities the lower token index is picked.
    Raises:
        ValueError: tokens_per_group that does not divide T.
    """
    T, E = affinities.shape
    if T % tokens_per_group:
        raise ValueError(f"tokens_per_group: got {tokens_per_group}, expected a divisor of the {T} tokens")
    groups = affinities.detach().view(T // tokens_per_group, tokens_per_group, E)
    best = groups.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    picks = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    return picks.view(T, E)


def expert_capacity(tokens_per_group: int, capacity_factor: float, num_experts: int) -> int:
    """Return C = max(1, int(tokens_per_group * capacity_factor / num_experts)), the tokens an expert takes per group.

    Raises:
        ValueError: tokens_per_group < 1, or capacity_factor outside (0, num_experts].
    """
    if tokens_per_group < 1:
        raise ValueError(f"tokens_per_group: got {tokens_per_group}, expected at least 1")
    if not 0 < capacity_factor <= num_experts:
        raise ValueError(f"capacity_factor: got {capacity_factor}, expected (0, {num_experts}] (the number of experts)")
    return max(1, int(tokens_per_group * capacity_factor / num_experts))


def aux_loss(probs: Tensor, topk_ids: Tensor, alpha: float) -> Tensor:
    """Return the balance loss alpha * sum_i E f_i P_i.

    f_i: share of the T K picks that went to expert i (no gradient); P_i: mean probability of expert i over the T
    tokens. A uniform router gives exactly alpha; no tokens give 0.

    Args:
        probs: (T, E), any float dtype.
        topk_ids: (T, K), integers in 0..E-1.
        alpha: weight of the loss, 0.01 in DiT-MoE.
    Returns:
        scalar in the dtype of probs.
    Raises:
        ValueError: ids that do not belong to probs.
    Source: DiT-MoE, arXiv 2407.11633, equation 5, over the local batch.
    """
    T, E = probs.shape
    check_ids(topk_ids, T, E)
    picks = max(1, topk_ids.numel())
    f = torch.bincount(topk_ids.flatten(), minlength=E).to(probs.dtype) / picks
    P = probs.sum(dim=0) / max(1, T)
    return alpha * E * (f * P).sum()


def check_ids(topk_ids: Tensor, T: int, E: int) -> None:
    """Raise ValueError unless topk_ids is (T, K) with every id in 0..E-1."""
    if topk_ids.ndim != 2 or topk_ids.shape[0] != T:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected ({T}, K)")
    if topk_ids.numel() and not 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < E:
        raise ValueError(f"topk_ids: got {int(topk_ids.min())}..{int(topk_ids.max())}, expected ids in 0..{E - 1}")


def _router_probs(x: Tensor, gate_weight: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[1] != gate_weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (T, {gate_weight.shape[1]}) as gate_weight asks")
    logits = F.linear(x, gate_weight)
    if not logits.isfinite().all():
        raise ValueError("x, gate_weight: got non-finite router logits, expected finite numbers")
    return logits.softmax(dim=-1)
