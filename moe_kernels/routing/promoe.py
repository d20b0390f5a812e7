"""ProMoE: images without a label have an expert of their own, the others are routed by prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks, ops
from ..plan import RoutingPlan
from .call import RouterCall
from .expert_choice import capacity
from .losses import routing_contrastive_loss
from .router import AUX_LOSS_MODES, Router, Scores

CHOICES, WEIGHTS = ("token", "expert"), ("identity", "sigmoid", "softmax")
COSINE = Scores(by="cosine")


@dataclass(frozen=True)
class ProMoE(Router):
    """Tokens go to the experts whose prototypes they are like; images with the null label wholly to the last expert.

    gate_weight (E - 1, H) has the prototypes of all experts but the last. Weights are cosines, negative ones, too, or
    their sigmoid or softmax (over experts; with choice "expert" over the tokens of an image); 1 for the null label.
    conditioning["labels"] (B,) says which images have it. The auxiliary loss is the routing contrastive loss.

    Args:
        top_k: K. Each token takes its K best experts, or each expert its C = int(L / (E - 1) K) best of an image's L
            tokens, at least 1.
        choice: "token" or "expert" (recommended by its authors for DDPM).
        weights: "identity", "sigmoid" or "softmax".
        null_label: of images without a label.
        contrastive_weight, temperature: of the loss; by each token's best pick, or by all picks, image by image.
        aux_loss_mode: as in TokenChoice.

    Source: reference.routers.promoe, routing_contrastive_loss.
    """

    top_k: int = 1
    choice: str = "token"
    weights: str = "identity"
    null_label: int = 1000
    contrastive_weight: float = 1.0
    temperature: float = 0.07
    aux_loss_mode: str = "injected"

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _checks.positive("top_k", self.top_k))
        _checks.one_of("choice", self.choice, CHOICES)
        _checks.one_of("weights", self.weights, WEIGHTS)
        _checks.one_of("aux_loss_mode", self.aux_loss_mode, AUX_LOSS_MODES)
        _checks.finite_number("contrastive_weight", self.contrastive_weight)
        _checks.finite_number("temperature", self.temperature)

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        labels = call.per_image("labels", dtypes=_checks.INTEGERS)
        cosines = COSINE(call)
        (T, E), L = cosines.shape, call.tokens_per_image
        null = (labels == self.null_label).repeat_interleave(L, output_size=T)[:, None]
        weights = self._weights(cosines.view(-1, L, E)).view(T, E)
        picks, rows = self._picks(weights.detach(), L, call.backend)
        everywhere = torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
        plan = ops.dispatch_mask(everywhere, torch.cat([picks & ~null, null], 1), rows, call.backend)
        if not (call.with_aux or self.injects(call)):
            return plan, None
        own = (picks if self.choice == "expert" else _best(weights.detach(), 1, call.backend)) & ~null
        groups = call.num_images if self.choice == "expert" else 1
        loss = routing_contrastive_loss(call.tokens, call.gate_weight, own, groups, self.temperature)
        return self.with_loss(plan, self.contrastive_weight * loss, call)

    def _weights(self, cosines: Tensor) -> Tensor:
        if self.weights == "softmax":
            return cosines.softmax(-1 if self.choice == "token" else 1)
        return cosines.sigmoid() if self.weights == "sigmoid" else cosines

    def _picks(self, weights: Tensor, L: int, backend: str) -> tuple[Tensor, int]:
        """Return what would be picked if every image had a label, and the most rows that any labels give."""
        T, E = weights.shape
        if self.choice == "token":
            return _best(weights, self.top_k, backend), T * self.top_k
        C = min(capacity(L, self.top_k, E, "int"), L)
        picks, _ = ops.select_top(weights.view(-1, L, E), C, backend)
        return picks.view(T, E), T // L * max(C * E, L)

    def gate_shape(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        if self.top_k >= num_experts:
            raise ValueError(f"top_k: got {self.top_k}, expected at most the {num_experts - 1} experts with prototypes")
        return num_experts - 1, hidden_size


def _best(weights: Tensor, top_k: int, backend: str) -> Tensor:
    """Mark the top_k largest of each token. (T, E) -> (T, E) bool."""
    ids = ops.select_experts(weights, top_k, backend=backend)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(1, ids.long(), True)
