"""Routers of token choice: each token takes its best experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _checks, ops
from ..plan import RoutingPlan
from .call import RouterCall
from .expert_choice import weigh
from .router import AUX_LOSS_MODES, Router, Scores, StatefulRouter


@dataclass(frozen=True)
class TokenChoice(Router):
    """Every token takes its top_k experts, with the raw softmax probabilities as weights (DiT-MoE).

    The auxiliary loss balances the load: alpha E sum_i f_i P_i over all tokens of the call. aux_loss_mode says how it
    reaches the parameters:

    "injected", as in the original: in training, with gradients on, and unless the call asks for the loss, the weights
        of the picks carry it, through an identity whose backward gives the auxiliary loss gradient 1 (the original's is
        on the output: the same gradients). The printed loss does not contain it, and **nothing scales it**: not
        gradient accumulation, and not the loss scale of fp16 training. Under a loss scale of 65536 its share of the
        unscaled gradient is 1/65536, so balancing is in effect off: a bug of the original recipe, kept for parity.
    "scaled": nothing is ever injected.

    In both, `y, aux = layer(x, return_aux_loss=True)` injects nothing and gives an aux to be added to the loss:
    whatever scales the loss scales it too. Use that with fp16. An aux that is not added has no effect.

    Source: reference.routing.token_choice, reference.routing.aux_loss.
    """

    top_k: int
    aux_loss_alpha: float = 0.01
    aux_loss_mode: str = "injected"

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _checks.positive("top_k", self.top_k))
        _checks.finite_number("aux_loss_alpha", self.aux_loss_alpha)
        _checks.one_of("aux_loss_mode", self.aux_loss_mode, AUX_LOSS_MODES)

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        topk_weights, topk_ids, probs = call.gating(self.top_k)
        plan = ops.dispatch(topk_ids, topk_weights, probs.shape[1], call.backend)
        injecting = self.injects(call)
        of = probs, plan.expert_counts, self.top_k, self.aux_loss_alpha
        aux = ops.aux_loss(probs.detach() if injecting else probs, *of[1:]) if call.with_aux else None
        if injecting:
            plan = replace(plan, row_weight=ops.inject_aux_loss(plan.row_weight, *of))
        return plan, aux


SIGMOID = Scores(by="sigmoid")


class GroupLimitedChoice(StatefulRouter):
    """Every token takes its top_k experts out of its best groups of experts (DeepSeek-V3's gate: DSMoE, LingBot-Video).

    A group of consecutive experts is worth the sum of its two best scores + bias; the top_k best scores + bias of the
    groups_taken best groups are picked. w = route_scale s, divided by 1e-20 + the sum of the picked s if renormalise.
    The bias chooses and never weighs. No auxiliary loss.

    Args:
        top_k, num_experts: K, E.
        groups, groups_taken: into how many groups the experts are cut, and how many a token may take from.
        scores: what is scored, and how. Scores("timestep") with renormalise False is Switch-DiT's gate.
        renormalise, route_scale: of the weights; DSMoE: 2.0 at E = 16, 2.5 at E = 48.

    The buffer e_score_correction_bias (E,) begins at 0 and is the user's to change, between steps: nothing here updates
    it, as nothing in DSMoE does. Inside of a forward an update would let activation checkpointing route another way.

    Source: reference.routers.group_limited_choice.
    """

    def __init__(
        self,
        top_k: int,
        num_experts: int,
        groups: int = 1,
        groups_taken: int = 1,
        scores: Scores = SIGMOID,
        renormalise: bool = True,
        route_scale: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"top_k": top_k, "num_experts": num_experts, "groups": groups, "groups_taken": groups_taken}
        self.top_k, E, G, taken = (_checks.positive(name, size) for name, size in sizes.items())
        if E % G:
            raise ValueError(f"groups: got {G}, expected a divisor of num_experts = {E}")
        if taken > G:
            raise ValueError(f"groups_taken: got {taken}, expected at most groups = {G}")
        if self.top_k > taken * (E // G):
            raise ValueError(f"top_k: got {top_k}, expected at most the {taken * (E // G)} experts of {taken} groups")
        _checks.finite_number("route_scale", route_scale)
        self.groups, self.groups_taken, self.scores = G, taken, scores
        self.renormalise, self.route_scale = renormalise, route_scale
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def reset_parameters(self) -> None:
        """Set the bias to 0. `to_empty` leaves whatever memory held."""
        self.e_score_correction_bias.zero_()

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        scores = self.scores(call)
        _checks.shape("gate_weight", scores.shape[1:], self.e_score_correction_bias.shape, "E")
        values = scores.detach() + self.e_score_correction_bias.to(scores.dtype)
        ids = ops.select_experts(values, self.top_k, self.groups, self.groups_taken, call.backend)
        weights = weigh(scores.gather(1, ids.long()), self.renormalise, self.route_scale, 1e-20)
        return ops.dispatch(ids, weights, scores.shape[1], call.backend), None

    def gate_shape(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return self.scores.gate_shape(num_experts, hidden_size)

    def extra_repr(self) -> str:
        names = "top_k", "groups", "groups_taken", "scores", "renormalise", "route_scale"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
