"""The balance loss of the whole batch, where ranks hold parts of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from ..layer import MoELayer
from ..plan import RoutingPlan
from ..routing import RouterCall, TokenChoice
from .exchange import sum_counts


@dataclass(frozen=True)
class TokenChoiceOverRanks(TokenChoice):
    """TokenChoice whose auxiliary loss balances the load of all ranks together: see `balance_over_ranks`."""

    aux_loss_mode: str = "scaled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_loss_mode != "scaled":
            raise ValueError(f"aux_loss_mode: got {self.aux_loss_mode!r}, expected 'scaled' for a loss over ranks")

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        topk_weights, topk_ids, probs = call.gating(self.top_k)
        plan = ops.dispatch(topk_ids, topk_weights, probs.shape[1], call.backend)
        if not call.with_aux:
            return plan, None
        counts = sum_counts(plan.expert_counts)
        aux = ops.aux_loss(probs, counts, self.top_k, self.aux_loss_alpha)  # f T_all / T, for it divides by T alone
        return plan, aux * (probs.shape[0] * self.top_k / counts.sum().clamp(min=1))


def balance_over_ranks(model: nn.Module) -> int:
    """Let the auxiliary losses of a model's MoELayers balance the load of all ranks, not of each by itself.

    A rank's loss becomes alpha E sum_i f_i P_i, f over the tokens of all ranks, P over its own. Its mean over ranks,
    each weighted by its tokens, has the value and the gradients of one process's loss of the whole batch: f has none.

    Args:
        model: its layers' routers are TokenChoice; the loss is asked for by return_aux_loss and never injected.
    Returns: how many layers.
    Raises: TypeError for a layer with another router, ValueError without layers.
    Cost: an all-reduce of E integers per layer, forward.
    Source: arXiv 2501.11873.
    """
    layers = {name: child for name, child in model.named_modules() if isinstance(child, MoELayer)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a MoELayer, expected one or more")
    for name, layer in layers.items():
        if type(layer.router) not in (TokenChoice, TokenChoiceOverRanks):  # a subclass may route another way
            kind = type(layer.router).__name__
            raise TypeError(f"model: got router {kind} in {name or 'the root'}, expected TokenChoice")
    for layer in layers.values():
        layer.router = TokenChoiceOverRanks(layer.router.top_k, layer.router.aux_loss_alpha)
    return len(layers)
