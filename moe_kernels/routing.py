"""Routers: which experts work on which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from . import _checks, ops
from .plan import RoutingPlan

AUX_LOSS_MODES = ("injected", "scaled")


class Router(Protocol):
    """What MoELayer asks of a router."""

    def route(
        self,
        x: Tensor,
        gate_weight: Tensor,
        backend: str = "auto",
        *,
        tokens_per_image: int | None = None,
        inject_aux: bool = False,
        with_aux: bool = True,
    ) -> tuple[RoutingPlan, Tensor | None]: ...


class ScoresFirst:
    """A router whose `route` is gating and then `plan`: layers with adaLN fuse the first and call `plan` themselves."""

    def route(
        self,
        x: Tensor,
        gate_weight: Tensor,
        backend: str = "auto",
        *,
        tokens_per_image: int | None = None,
        inject_aux: bool = False,
        with_aux: bool = True,
    ) -> tuple[RoutingPlan, Tensor | None]:
        """Route tokens and experts to each other: gating, dispatch and, `with_aux`, the auxiliary loss.

        Args:
            x: (T, H); float32, bfloat16, float16 or float64.
            gate_weight: (E, H).
            backend: "auto" or a name out of `backends()`.
            tokens_per_image: how many consecutive tokens are one image, where the router asks.
            inject_aux: in mode "injected", let the plan's row_weight carry the gradient of the auxiliary loss.
            with_aux: whether to compute the auxiliary loss.
        Returns: the plan, and the auxiliary loss or None where there is none; differentiable unless it is injected.
        Raises: as `gating` and the dispatch of the router; ValueError for a router that does not fit E experts.
        Cost: as these two; no host syncs on a GPU.
        Source: reference.routing.
        """
        scores = ops.gating(x, gate_weight, self.picks, backend)
        how = {"tokens_per_image": tokens_per_image, "inject_aux": inject_aux, "with_aux": with_aux}
        return self.plan(*scores, backend, **how)


@dataclass(frozen=True)
class TokenChoice(ScoresFirst):
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
    """

    top_k: int
    aux_loss_alpha: float = 0.01
    aux_loss_mode: str = "injected"

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _checks.positive("top_k", self.top_k))
        _checks.finite_number("aux_loss_alpha", self.aux_loss_alpha)
        if self.aux_loss_mode not in AUX_LOSS_MODES:
            expected = " or ".join(map(repr, AUX_LOSS_MODES))
            raise ValueError(f"aux_loss_mode: got {self.aux_loss_mode!r}, expected {expected}")

    @property
    def picks(self) -> int:
        """How many experts `gating` is to pick for each token."""
        return self.top_k

    def plan(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
        backend: str = "auto",
        *,
        tokens_per_image: int | None = None,
        inject_aux: bool = False,
        with_aux: bool = True,
    ) -> tuple[RoutingPlan, Tensor | None]:
        """Turn what `gating` or `modulated_gating` returned into what `route` returns."""
        plan = ops.dispatch(topk_ids, topk_weights, probs.shape[1], backend)
        injecting = inject_aux and self.aux_loss_mode == "injected"
        of = probs, plan.expert_counts, self.top_k, self.aux_loss_alpha
        aux = ops.aux_loss(probs.detach() if injecting else probs, *of[1:]) if with_aux else None
        if injecting:
            plan = replace(plan, row_weight=ops.inject_aux_loss(plan.row_weight, *of))
        return plan, aux


@dataclass(frozen=True)
class ExpertChoice(ScoresFirst):
    """Every expert takes its best tokens out of each group, with the raw affinities as weights (EC-DIT).

    Load is balanced by construction, so there is no auxiliary loss. A token may be taken by 0 to E experts.
    """

    capacity_factor: float = 2.0  # mean picks per token, in (0, E]
    tokens_per_group: int | None = None  # None: one image, the size of the second to last dimension of x

    def __post_init__(self) -> None:
        _checks.finite_number("capacity_factor", self.capacity_factor)
        if not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor: got {self.capacity_factor}, expected more than 0")
        if self.tokens_per_group is not None:
            object.__setattr__(self, "tokens_per_group", _checks.positive("tokens_per_group", self.tokens_per_group))

    @property
    def picks(self) -> int:
        """How many experts `gating` is to pick for each token: none, the experts pick."""
        return 0

    def plan(
        self,
        topk_weights: Tensor,
        topk_ids: Tensor,
        affinities: Tensor,
        backend: str = "auto",
        *,
        tokens_per_image: int | None = None,
        inject_aux: bool = False,
        with_aux: bool = True,
    ) -> tuple[RoutingPlan, Tensor | None]:
        """Turn what `gating` or `modulated_gating` returned into what `route` returns."""
        T, E = affinities.shape
        if self.capacity_factor > E:
            raise ValueError(f"capacity_factor: got {self.capacity_factor}, expected (0, E] with E = {E} experts")
        group = self.tokens_per_group or tokens_per_image or max(T, 1)
        capacity = max(1, int(group * self.capacity_factor / E))
        return ops.dispatch_expert_choice(affinities, capacity, group, backend), None
