"""An MoE layer that routes by any rule of the family: the rules of routers.py as modules, and the layer around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import routers
from reference.moe import expert_mlp, inject_aux, moe_expert_choice
from reference.routing import aux_loss, take_tokens, token_choice

Answer = tuple[Tensor, Tensor, Tensor | None]  # weights (T, E), picks (T, E) bool, auxiliary loss


@dataclass(frozen=True)
class Images:
    """What a rule may look at: tokens (T, H) of B images of L, the same before adaLN's modulation, the embedded
    timestep (B, H) and the labels (B,)."""

    tokens: Tensor
    unmodulated: Tensor
    timestep: Tensor
    labels: Tensor

    @property
    def tokens_per_image(self) -> int:
        return len(self.tokens) // max(len(self.labels), 1)


class Rule(nn.Module):
    """How tokens and experts find each other: forward(images, gate_weight) -> weights, picks, auxiliary loss or None.

    E experts, K picks per token on average, H the width, `null` the label of images without one.
    """

    def __init__(self, E: int, K: int, H: int, null: int):
        super().__init__()
        self.E, self.K, self.H, self.null = E, K, H, null

    def gate_shape(self) -> tuple[int, int]:
        return self.E, self.H


class TokenChoice(Rule):
    """DiT-MoE. Load balance loss of weight 0.01."""

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        weights, ids, probs = token_choice(images.tokens, gate_weight, self.K)
        picks = torch.zeros_like(probs, dtype=torch.bool).scatter(1, ids, True)
        return torch.zeros_like(probs).scatter(1, ids, weights), picks, aux_loss(probs, ids, 0.01)


class ExpertChoice(Rule):
    """EC-DIT: each expert takes the K L / E best tokens of an image, by softmax over experts."""

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        scores = routers.score(images.tokens, gate_weight, "softmax")
        L = images.tokens_per_image
        return scores, take_tokens(scores, routers.capacity(L, self.K, self.E, "floor"), L), None


class Nucleus(Rule):
    """Nucleus-Image: expert choice by timestep and unmodulated tokens, normalised per token, times 2.5."""

    def gate_shape(self) -> tuple[int, int]:
        return self.E, 2 * self.H

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        scored = routers.timestep_and_tokens(images.unmodulated, images.timestep)
        scores, L = routers.score(scored, gate_weight, "softmax"), images.tokens_per_image
        picks = take_tokens(scores, routers.capacity(L, self.K, self.E, "ceil"), L)
        return routers.weigh(scores, picks, True, 2.5), picks, None


class DSMoE(Rule):
    """DSMoE: sigmoid scores, normalised per token, times 2; its one group, and a bias that nothing updates: 0."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.register_buffer("e_score_correction_bias", torch.zeros(self.E))

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        scores = routers.score(images.tokens, gate_weight, "sigmoid")
        return *routers.group_limited_choice(scores, self.K, bias=self.e_score_correction_bias, route_scale=2.0), None


class SwitchDiT(DSMoE):
    """Switch-DiT's gate: the timestep alone picks, for all tokens of an image."""

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        timestep = F.silu(images.timestep).repeat_interleave(images.tokens_per_image, 0)
        scores = routers.score(timestep, gate_weight, "softmax")
        bias = self.e_score_correction_bias
        return *routers.group_limited_choice(scores, self.K, bias=bias, renormalise=False), None


class ExpertRace(Rule):
    """Expert Race over the batch in training, by the averaged threshold else; router similarity loss of weight 1e-4."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        logits, T = routers.score(images.tokens, gate_weight, "identity"), len(images.tokens)
        if not self.training:
            return logits, logits >= self.threshold, None
        picks = routers.race(logits, T * self.K, T)
        self.threshold.copy_(routers.ema(self.threshold, logits.detach()[picks].min(), 0.95))
        return logits, picks, 1e-4 * routers.router_similarity_loss(logits, picks)


class DiffMoE(Rule):
    """DiffMoE: the batch's best tokens in training, those above thresholds of a predictor else; its loss times 0.01."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.capacity_predictor = nn.Sequential(nn.Linear(self.H, self.H), nn.SiLU(), nn.Linear(self.H, self.E))
        self.register_buffer("expert_threshold", torch.zeros(self.E))
        self.register_buffer("ema_decay", torch.tensor([0.95]))

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        scores, (up, _, down) = routers.score(images.tokens, gate_weight, "softmax"), self.capacity_predictor
        learned = (p.to(scores.dtype) for p in (up.weight, up.bias, down.weight, down.bias))
        predicted = routers.capacity_predictor(images.tokens, *learned)
        if not self.training:
            return scores, routers.diffmoe_sampling(scores, predicted, self.expert_threshold, "token"), None
        picks, loss, kth = routers.diffmoe_training(scores, predicted, self.K)
        self.expert_threshold.copy_(routers.ema(self.expert_threshold, kth, 0.95))
        return scores, picks, 0.01 * loss


class ProMoE(Rule):
    """ProMoE: cosines to E - 1 prototypes; images without a label to the last expert; contrastive loss of weight 1."""

    def gate_shape(self) -> tuple[int, int]:
        return self.E - 1, self.H

    def forward(self, images: Images, gate_weight: Tensor) -> Answer:
        cosines = routers.score(images.tokens, gate_weight, "cosine")
        answer = partial(routers.promoe, cosines, images.labels, self.null)
        own = answer(1)[1][:, :-1]
        return *answer(self.K), routers.routing_contrastive_loss(images.tokens, gate_weight, own, 1, 0.07)


RULES: dict[str, Callable[..., Rule]] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "nucleus": Nucleus,
    "dsmoe": DSMoE,
    "switch_dit": SwitchDiT,
    "expert_race": ExpertRace,
    "diffmoe": DiffMoE,
    "promoe": ProMoE,
}


class RoutedMoE(nn.Module):
    """MoE layer that routes by a rule: SwiGLU experts I wide, one shared Is wide; in training its loss is injected.

    forward(x (B, L, H), return_aux_loss=False, router_input=(B, L, H), conditioning={"timestep": (B, H), "labels":
    (B,)}) -> (B, L, H), or with return_aux_loss the pair (y, aux), aux 0 for a rule without loss.
    """

    def __init__(self, H: int, I: int, E: int, K: int, Is: int, rule: str, null: int):
        super().__init__()
        self.router = RULES[rule](E, K, H, null)
        self.gate_weight = nn.Parameter(torch.empty(self.router.gate_shape()))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(E, *size)) for size in ((2 * I, H), (H, I)))
        self.shared_gate_up_proj, self.shared_down_proj = (
            nn.Parameter(torch.empty(size)) for size in ((2 * Is, H), (H, Is))
        )
        nn.init.uniform_(self.gate_weight, -(self.gate_weight.shape[1] ** -0.5), self.gate_weight.shape[1] ** -0.5)
        for weight, inner in ((self.gate_up_proj, I), (self.down_proj, I)):
            nn.init.uniform_(weight, -math.sqrt(6 / (H + inner)), math.sqrt(6 / (H + inner)))
        for weight in (self.shared_gate_up_proj, self.shared_down_proj):
            nn.init.uniform_(weight, -math.sqrt(6 / (H + Is)), math.sqrt(6 / (H + Is)))

    def route(self, x: Tensor, router_input: Tensor, conditioning: dict[str, Tensor]) -> Answer:
        """Return the rule's answer for images x (B, L, H), in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens, unmodulated, timestep = (t.to(wide) for t in (x, router_input, conditioning["timestep"]))
        images = Images(tokens.flatten(0, 1), unmodulated.flatten(0, 1), timestep, conditioning["labels"])
        return self.router(images, self.gate_weight.to(wide))

    def forward(
        self, x: Tensor, return_aux_loss: bool = False, *, router_input: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens, (weights, picks, aux) = x.flatten(0, 1), self.route(x, router_input, conditioning)
        y = moe_expert_choice(tokens, weights, picks, self.gate_up_proj, self.down_proj, "swiglu")
        y = (y + expert_mlp(tokens, self.shared_gate_up_proj, self.shared_down_proj, "swiglu")).view(x.shape)
        if return_aux_loss:
            return y, y.new_zeros(()) if aux is None else aux
        return inject_aux(y, aux) if aux is not None and self.training and torch.is_grad_enabled() else y
