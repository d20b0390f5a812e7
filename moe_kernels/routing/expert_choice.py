"""Routers of expert choice: each expert takes its best tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks, ops
from ..plan import RoutingPlan
from .call import RouterCall
from .router import Router, Scores

ROUNDINGS = ("floor", "ceil", "int")


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Every expert takes its best tokens out of each group, with the raw affinities as weights (EC-DIT).

    An expert takes C = f S / E of the S tokens of a group, at least 1, and the lower token wins a tie. Load is balanced
    by construction, so there is no auxiliary loss. A token may be taken by 0 to E experts.

    Args:
        capacity_factor: f, mean picks per token, in (0, E]; or a function of the call's conditioning that returns it
            (annealed by step, layer or noise level). A call overrides it: conditioning={"capacity_factor": 4.0}.
        tokens_per_group: S; None: one image, the size of the second to last dimension of x.
        scores: what is scored, and how: see Scores.
        rounding: of C. "floor": int(S f / E), "ceil" (Nucleus), "int": int((S / E) f), as DiffMoE's public code has it.
        renormalise: divide a weight by 1e-12 + the sum over the token's picks (Nucleus).
        route_scale: multiplies the weights (Nucleus: 2.5).

    Source: reference.routing.expert_choice, reference.routers.capacity and weigh.
    """

    capacity_factor: float | Callable[[Mapping[str, Any]], float] = 2.0
    tokens_per_group: int | None = None
    scores: Scores = field(default=Scores(), kw_only=True)
    rounding: str = field(default="floor", kw_only=True)
    renormalise: bool = field(default=False, kw_only=True)
    route_scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.capacity_factor):
            _checks.finite_number("capacity_factor", self.capacity_factor)
            if not self.capacity_factor > 0:
                raise ValueError(f"capacity_factor: got {self.capacity_factor}, expected more than 0")
        if self.tokens_per_group is not None:
            object.__setattr__(self, "tokens_per_group", _checks.positive("tokens_per_group", self.tokens_per_group))
        _checks.one_of("rounding", self.rounding, ROUNDINGS)
        _checks.finite_number("route_scale", self.route_scale)

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        scores = self.scores(call)
        T, E = scores.shape
        group = self.tokens_per_group or call.tokens_per_image
        C = capacity(group, self._factor(call, E), E, self.rounding)
        plan = ops.dispatch_expert_choice(scores, C, group, call.backend)
        if self.renormalise or self.route_scale != 1:
            pick = plan.row_pick.long()
            picked = torch.zeros_like(scores).view(-1).scatter(0, pick, plan.row_weight).view(T, E)
            picked = weigh(picked, self.renormalise, self.route_scale)
            plan = replace(plan, row_weight=picked.view(-1).gather(0, pick))
        return plan, None

    def _factor(self, call: RouterCall, E: int) -> float:
        given = call.get("capacity_factor")
        factor = self.capacity_factor if given is None else given
        if callable(factor):
            factor = factor(call.conditioning)
        if factor is not self.capacity_factor:  # a number on the device would be a host sync, and is refused
            _checks.finite_number("capacity_factor", factor)
        if not 0 < factor <= E:
            raise ValueError(f"capacity_factor: got {factor}, expected (0, E] with E = {E} experts")
        return factor

    def gate_shape(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return self.scores.gate_shape(num_experts, hidden_size)

    def batch_invariant(self) -> bool:
        return self.tokens_per_group is None


def capacity(tokens_per_group: int, factor: float, num_experts: int, rounding: str) -> int:
    """Return how many tokens an expert takes per group, at least 1 and at most all."""
    if rounding == "ceil":
        count = math.ceil(factor * tokens_per_group / num_experts)
    else:
        share = tokens_per_group * factor / num_experts
        count = int(share if rounding == "floor" else tokens_per_group / num_experts * factor)
    return max(1, count)


def weigh(picked: Tensor, renormalise: bool, route_scale: float, epsilon: float = 1e-12) -> Tensor:
    """Return picked scores (T, E or K) as weights: divided by the token's sum, scaled."""
    if renormalise:
        picked = picked / (picked.sum(-1, keepdim=True) + epsilon)
    return picked if route_scale == 1 else picked * route_scale
