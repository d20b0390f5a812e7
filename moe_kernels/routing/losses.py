"""Losses of routers, and the averages that thresholds are."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .. import _checks
from .call import outside_autocast


def router_similarity_loss(logits: Tensor, picks: Tensor) -> Tensor:
    """Return sum_ij W_ij (P^T P)_ij / T, P = softmax(logits): experts that are picked together are driven apart.

    M = picks^T picks; W_ii = E M_ii / sum_i M_ii, W_ij = (E^2 - E) M_ij / sum_{i != j} M_ij.

    Args:
        logits: (T, E), differentiable.
        picks: (T, E) bool.
    Source: reference.routers.router_similarity_loss (Expert Race).
    """
    T, E = logits.shape
    with outside_autocast(logits):
        P, M = logits.softmax(-1), picks.to(logits.dtype)
        together, similarity = M.T @ M, P.T @ P
    own = torch.eye(E, dtype=torch.bool, device=logits.device)
    alone, others = torch.where(own, together, 0), torch.where(own, 0, together)
    W = alone * (E / alone.sum().clamp(min=1)) + others * ((E * E - E) / others.sum().clamp(min=1))
    return (W * similarity).sum() / max(T, 1)


def routing_contrastive_loss(x: Tensor, prototypes: Tensor, picks: Tensor, groups: int, temperature: float) -> Tensor:
    """Return the mean cross-entropy with which a prototype finds the mean of its own tokens among all means of a group.

    logits_ij = cosine(prototype_i, mean of the tokens of j) / temperature, i and j over experts that took any token.

    Args:
        x: (T, H) tokens, differentiable.
        prototypes: (E, H), differentiable.
        picks: (T, E) bool.
        groups: G consecutive parts of the batch, each by itself.
    Source: reference.routers.routing_contrastive_loss (ProMoE).
    """
    wide, T = _checks.accumulator(x.dtype), picks.shape[0]
    with outside_autocast(x):
        taken, tokens = (t.view(groups, T // max(groups, 1), t.shape[1]).to(wide) for t in (picks, x))
        counts = taken.sum(1)
        means = F.normalize((taken.transpose(1, 2) @ tokens) / counts.clamp(min=1)[..., None], dim=-1)
        logits = F.normalize(prototypes.to(wide), dim=-1) @ means.transpose(1, 2) / temperature
    found = counts > 0
    logits = logits.masked_fill(~found[:, None], torch.finfo(wide).min)
    missed = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)
    return torch.where(found, missed, 0).sum() / found.sum().clamp(min=1)


@torch.no_grad()
def update_ema(
    average: Tensor, value: Tensor | None, decay: float | Tensor, group: distributed.ProcessGroup | None
) -> None:
    """Set average to decay average + (1 - decay) value in place; value is None where there are no tokens.

    With a process group the value is the mean over its ranks that have one; all of them have to call.
    Where backward computes a forward again (activation checkpointing) the average stays: it has had this step. The rest
    is computed there too, because a policy that keeps results of ops hands them out in their order.
    """
    have = average.new_full((1,), value is not None)
    value = torch.zeros_like(average) if value is None else value.to(average.dtype)
    if group is not None:
        sums = torch.cat([value.flatten(), have])
        distributed.all_reduce(sums, group=group)
        value, have = (sums[:-1] / sums[-1].clamp(min=1)).view_as(value), sums[-1:]
    new = decay * average + (1 - decay) * value
    new = torch.where(have > 0, new, average).view_as(average)
    if not _recomputing():
        average.copy_(new)


def _recomputing() -> bool:
    """Tell whether autograd's backward is what calls. False while a graph is compiled: it cannot ask at run time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
