"""Expert Race: all scores of all tokens race against each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import _checks, ops
from .call import RouterCall, linear
from .losses import router_similarity_loss, update_ema
from .router import AUX_LOSS_MODES, StatefulRouter

GROUPS = ("batch", "image")


class ExpertRace(StatefulRouter):
    """The best scores win, whatever token and expert they belong to; weights are the raw logits (Expert Race).

    In training the L K largest of the L E logits of a group are picked, so that tokens have 0 to E picks, K on average.
    In eval mode those >= threshold, an average over training of the smallest logit that won: each token by itself.

    Args:
        top_k: K.
        group: what races in training: "batch" (the paper's best) or "image".
        hidden_size: H, for a router of two layers: logits = gelu(x A^T + a) gate_weight^T; None: x gate_weight^T.
        similarity_weight: of the router similarity loss. The default is ours: no source gives the paper's.
        decay: of the average, which begins at 0.
        max_picks: in eval mode at most max_picks T rows, the best of the call (images are then not independent where
            that bites): bounds the memory of rows. None: E T.
        process_group: over whose ranks the threshold is averaged; None: each rank keeps its own.
        aux_loss_mode: as in TokenChoice.

    State: the buffer threshold (); with a process group its ranks have to step together. Under activation checkpointing
    a step counts once in the average; twice if the router is compiled and the checkpoint around it is not.
    Source: reference.routers.race, router_similarity_loss, ema.
    """

    def __init__(
        self,
        top_k: int,
        group: str = "batch",
        hidden_size: int | None = None,
        similarity_weight: float = 1e-4,
        decay: float = 0.95,
        max_picks: float | None = None,
        process_group: distributed.ProcessGroup | None = None,
        aux_loss_mode: str = "injected",
    ) -> None:
        super().__init__()
        _checks.one_of("group", group, GROUPS)
        _checks.one_of("aux_loss_mode", aux_loss_mode, AUX_LOSS_MODES)
        for name, value in (("similarity_weight", similarity_weight), ("decay", decay)):
            _checks.finite_number(name, value)
        check_max_picks(max_picks)
        self.top_k, self.group, self.aux_loss_mode = _checks.positive("top_k", top_k), group, aux_loss_mode
        self.similarity_weight, self.decay, self.max_picks = similarity_weight, decay, max_picks
        self.process_group = process_group
        self.hidden = None if hidden_size is None else nn.Linear(hidden_size, hidden_size)
        self.register_buffer("threshold", torch.zeros(()))

    def reset_parameters(self) -> None:
        """Begin anew: threshold 0, the hidden layer drawn as nn.Linear's. `to_empty` leaves whatever memory held."""
        self.threshold.zero_()
        if self.hidden is not None:
            self.hidden.reset_parameters()

    def scores(self, call: RouterCall) -> Tensor:
        x = call.tokens
        if self.hidden is not None:
            x = F.gelu(linear(x, self.hidden.weight, self.hidden.bias))
        return linear(x, call.gate_weight)

    def pick(self, scores: Tensor, call: RouterCall) -> Tensor:
        (T, E), L = scores.shape, call.num_tokens if self.group == "batch" else call.tokens_per_image
        if not self.training:
            return at_most(scores >= self.threshold, scores, self.max_rows(call), call.backend)
        picks, slowest = ops.select_top(scores.view(T // max(L, 1), L * E, 1), L * self.top_k, call.backend)
        update_ema(self.threshold, slowest.mean() if T else None, self.decay, self.process_group)
        return picks.view(T, E)

    def loss(self, scores: Tensor, picks: Tensor, call: RouterCall) -> Tensor:
        return self.similarity_weight * router_similarity_loss(scores, picks)

    def max_rows(self, call: RouterCall) -> int | None:
        if self.training:
            return call.num_tokens * self.top_k
        return rows_bound(self.max_picks, call)

    def batch_invariant(self) -> bool:
        return self.group == "image" if self.training else self.max_picks is None

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, group={self.group!r}, max_picks={self.max_picks}"


def check_max_picks(max_picks: float | None) -> None:
    """Check how many picks a token may have in the mean; None: any."""
    if max_picks is None:
        return
    _checks.finite_number("max_picks", max_picks)
    if max_picks <= 0:
        raise ValueError(f"max_picks: got {max_picks}, expected more than 0")


def rows_bound(max_picks: float | None, call: RouterCall) -> int | None:
    """Return the most rows of a call, None: as many as scores."""
    T, E = call.num_tokens, call.gate_weight.shape[0]
    return None if max_picks is None else min(math.ceil(max_picks * T), T * E)


def at_most(picks: Tensor, scores: Tensor, rows: int | None, backend: str) -> Tensor:
    """Return picks, of which the best `rows` if there are more."""
    if rows is None:
        return picks
    marked = scores.masked_fill(~picks, -torch.inf).view(1, -1, 1)
    return ops.select_top(marked, rows, backend)[0].view(picks.shape) & picks
