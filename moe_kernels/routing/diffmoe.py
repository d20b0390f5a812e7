"""DiffMoE: experts take their best tokens of the batch; in sampling as many as a predictor says."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import _checks, ops
from ..plan import RoutingPlan
from .call import RouterCall, linear
from .expert_choice import capacity
from .losses import update_ema
from .race import at_most, check_max_picks, rows_bound
from .router import AUX_LOSS_MODES, StatefulRouter

SAMPLERS = ("batch", "token")


class DiffMoE(StatefulRouter):
    """Each expert takes its C = int((T / E) f) best tokens of the whole batch in training, as predicted in sampling.

    Scores are softmax over E, and weights. capacity_predictor, Linear SiLU Linear on detached tokens, learns which
    tokens an expert takes (binary cross-entropy, the auxiliary loss); expert_threshold is the average of each expert's
    C-th largest prediction. In eval mode n_e = the number of tokens predicted above expert e's threshold, and

    sampling "batch": expert e takes the n_e best tokens of the batch by score, as the released sampler does: images
        depend on each other.
    sampling "token": it takes the tokens above its threshold: each token by itself.

    Args:
        num_experts, hidden_size: E, H.
        capacity_factor: f.
        predictor_weight: of the loss; 0.01 in the released class, 1 in its configurations.
        decay: of the average, which begins at 0.
        sampling: "batch" or "token".
        max_picks: as in ExpertRace.
        process_group: over whose ranks the thresholds are averaged; None: each rank keeps its own.
        aux_loss_mode: as in TokenChoice.

    State: the buffers expert_threshold (E,) and ema_decay (1,), and the predictor's parameters, named as in the
    released code. Under activation checkpointing a step counts once in the average; twice if the router is compiled and
    the checkpoint around it is not.
    Source: reference.routers.diffmoe_training, diffmoe_sampling, capacity_predictor.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        capacity_factor: float = 1.0,
        predictor_weight: float = 0.01,
        decay: float = 0.95,
        sampling: str = "batch",
        max_picks: float | None = None,
        process_group: distributed.ProcessGroup | None = None,
        aux_loss_mode: str = "injected",
    ) -> None:
        super().__init__()
        E, H = _checks.positive("num_experts", num_experts), _checks.positive("hidden_size", hidden_size)
        _checks.one_of("sampling", sampling, SAMPLERS)
        _checks.one_of("aux_loss_mode", aux_loss_mode, AUX_LOSS_MODES)
        numbers = {"capacity_factor": capacity_factor, "predictor_weight": predictor_weight, "decay": decay}
        for name, value in numbers.items():
            _checks.finite_number(name, value)
        check_max_picks(max_picks)
        if not 0 < capacity_factor <= E:
            raise ValueError(f"capacity_factor: got {capacity_factor}, expected (0, E] with E = {E} experts")
        self.capacity_factor, self.predictor_weight, self.sampling = capacity_factor, predictor_weight, sampling
        self.decay = decay
        self.max_picks, self.process_group, self.aux_loss_mode = max_picks, process_group, aux_loss_mode
        self.capacity_predictor = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, E))
        self.register_buffer("expert_threshold", torch.zeros(E))
        self.register_buffer("ema_decay", torch.tensor([decay]))

    def reset_parameters(self) -> None:
        """Begin anew: thresholds 0, ema_decay as given, the predictor drawn as nn.Linear's layers. `to_empty` leaves
        whatever memory held."""
        self.expert_threshold.zero_()
        self.ema_decay.fill_(self.decay)
        for part in (self.capacity_predictor[0], self.capacity_predictor[2]):
            part.reset_parameters()

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        scores = self.scores(call)
        _checks.shape("gate_weight", scores.shape[1:], self.expert_threshold.shape, "E")
        if not self.training:
            rows = rows_bound(self.max_picks, call)
            picks = at_most(self._sampled(scores, call), scores.detach(), rows, call.backend)
            return ops.dispatch_mask(scores, picks, rows, call.backend), None
        T, E = scores.shape
        C = capacity(max(T, 1), self.capacity_factor, E, "int")
        plan = ops.dispatch_expert_choice(scores, C, max(T, 1), call.backend)
        if not T:
            update_ema(self.expert_threshold, None, self.ema_decay, self.process_group)
            return plan, None
        predicted = self._predicted(call)
        _, kth = ops.select_top(predicted.detach().sigmoid()[None], C, call.backend)
        update_ema(self.expert_threshold, kth[0], self.ema_decay, self.process_group)
        if not (call.with_aux or self.injects(call)):
            return plan, None
        picks = torch.zeros_like(predicted).view(-1).scatter(0, plan.row_pick.long(), 1.0).view(T, E)
        loss = F.binary_cross_entropy_with_logits(predicted, picks)
        return self.with_loss(plan, self.predictor_weight * loss, call)

    def _predicted(self, call: RouterCall) -> Tensor:
        up, _, down = self.capacity_predictor
        return linear(F.silu(linear(call.tokens.detach(), up.weight, up.bias)), down.weight, down.bias)

    @torch.no_grad()
    def _sampled(self, scores: Tensor, call: RouterCall) -> Tensor:
        above = self._predicted(call).sigmoid() > self.expert_threshold
        if self.sampling == "token":
            return above
        return ops.select_top(scores[None], above.sum(0, keepdim=True), call.backend)[0][0]

    def batch_invariant(self) -> bool:
        return not self.training and self.sampling == "token" and self.max_picks is None

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}, sampling={self.sampling!r}, max_picks={self.max_picks}"
