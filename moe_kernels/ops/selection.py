"""Selection: which scores are picked, by rules that need a pass over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import Backend, Request
from ..backends.registry import choose
from ._library import register


def select_top(scores: Tensor, counts: Tensor | int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mark the largest scores of every group: a race (N = 1), or experts that take tokens (N = E).

    picks[g, m, n] = scores[g, m, n] is among the counts[g, n] largest of scores[g, :, n]. Of equal scores, 0 and -0
    among them, the first is picked; NaN counts as larger than infinity.

    Args:
        scores: (G, M, N) float32, bfloat16, float16 or float64; no gradient.
        counts: how many are picked of each (g, n): an int, 0 to M, or (G, N) int32 or int64, clamped to that.
        backend: "auto" or a name out of `backends()`.
    Returns: picks (G, M, N) bool, and least (G, N) float32 (float64 for float64 scores): the smallest score that is
        picked, infinity where none is.
    Raises: TypeError, ValueError naming the argument.
    Cost: at most four passes over the scores (eager, grouped: a sort of each group); no host syncs on a GPU.
    Source: reference.routers.race, reference.routing.take_tokens, reference.routers.diffmoe_sampling.
    """
    _checks.tensor("scores", scores, "G,M,N")
    G, M, N = scores.shape
    if isinstance(counts, Tensor):
        _checks.tensor("counts", counts, "G,N", _checks.INTEGERS, like=scores)
        _checks.shape("counts", counts.shape, (G, N), "G,N")
        return _select_top(scores.detach(), counts, 0, backend)
    if not 0 <= counts <= M:
        raise ValueError(f"counts: got {counts}, expected 0 to M = {M}")
    return _select_top(scores.detach(), None, counts, backend)


def select_experts(scores: Tensor, top_k: int, groups: int = 1, groups_taken: int = 1, backend: str = "auto") -> Tensor:
    """Pick every token's best experts out of its best groups of consecutive experts.

    A group is worth the sum of its two largest scores. Outside of the groups_taken best groups scores count as minus
    infinity; the top_k largest are picked. The lower group, and the lower expert, wins a tie; NaN is largest.

    Args:
        scores: (T, E) float32, bfloat16, float16 or float64; no gradient.
        top_k: K, 1 to E.
        groups: into how many groups the experts are cut; divides E.
        groups_taken: 1 to groups.
        backend: "auto" or a name out of `backends()`.
    Returns: topk_ids (T, K) int32, by descending score.
    Raises: TypeError, ValueError naming the argument.
    Cost: one pass over the scores (eager, grouped: a sort of each token's); no host syncs on a GPU.
    Source: reference.routers.group_limited_choice.
    """
    _checks.tensor("scores", scores, "T,E")
    E = scores.shape[1]
    for name, size, most in (("top_k", top_k, E), ("groups", groups, E), ("groups_taken", groups_taken, groups)):
        if _checks.positive(name, size) > most:
            raise ValueError(f"{name}: got {size}, expected 1 to {most}")
    if E % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of E = {E}")
    return _select_experts(scores.detach(), top_k, groups, groups_taken, backend)


def _prepare(scores: Tensor, backend: str) -> tuple[Backend, Tensor]:
    scores = scores.to(_checks.accumulator(scores.dtype)).contiguous()
    return choose(backend, Request("dispatch", scores.dtype, scores.device.type)), scores


def _top_kernel(scores: Tensor, counts: Tensor | None, count: int, backend: str) -> tuple[Tensor, Tensor]:
    chosen, scores = _prepare(scores, backend)
    return chosen.select_top(scores, count if counts is None else counts.int().contiguous())


def _top_fake(scores: Tensor, counts: Tensor | None, count: int, backend: str) -> tuple[Tensor, Tensor]:
    G, M, N = scores.shape
    picks = scores.new_empty((G, M, N), dtype=torch.bool)
    return picks, scores.new_empty((G, N), dtype=_checks.accumulator(scores.dtype))


def _experts_kernel(scores: Tensor, top_k: int, groups: int, groups_taken: int, backend: str) -> Tensor:
    chosen, scores = _prepare(scores, backend)
    return chosen.select_experts(scores, top_k, groups, groups_taken)


def _experts_fake(scores: Tensor, top_k: int, groups: int, groups_taken: int, backend: str) -> Tensor:
    return scores.new_empty((scores.shape[0], top_k), dtype=torch.int32)


_select_top = register(
    "select_top(Tensor scores, Tensor? counts, SymInt count, str backend) -> (Tensor, Tensor)", _top_kernel, _top_fake
)
_select_experts = register(
    "select_experts(Tensor scores, int top_k, int groups, int groups_taken, str backend) -> Tensor",
    _experts_kernel,
    _experts_fake,
)
