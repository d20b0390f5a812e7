"""DiffMoE: experts of EC-DiT that take their best tokens of the whole batch; in eval as many as a predictor says.

Its forward returns (y, picks, predictions) in training, (y, None, None) in eval. The original's host syncs in eval are
none here: a plan with room for every token in every expert, of which as many rows count as are picked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import dispatch_mask, dispatch_rows, select_top
from ..family import Routed
from .ec_dit import ECDiT


class DiffMoE(ECDiT):
    """Predictor and averages of thresholds are the block's own: `update_threshold` is called once in each step."""

    name = "DiffMoE"
    expected = "modules with gate_weight, capacity_predictor and experts as EC-DiT's"
    parts = (*ECDiT.parts, "capacity_predictor", "expert_threshold", "ema_decay")
    attributes = (*ECDiT.attributes, ("capacity_predictor", nn.Module), ("expert_threshold", Tensor))

    def finds(self, module: nn.Module) -> bool:
        own = module.__dict__
        parts = {"experts", "capacity_predictor"}
        return "gate_weight" in own["_parameters"] and parts <= own["_modules"].keys()

    def route(self, block: nn.Module, backend: str, x: Tensor) -> Routed:
        tokens, E = x.reshape(-1, x.shape[-1]), block.num_experts
        T = tokens.shape[0]
        predicted = block.capacity_predictor(tokens.detach())
        scores = F.linear(tokens, block.gate_weight).softmax(-1)
        if not block.training:
            counts = (predicted.sigmoid() > block.expert_threshold).sum(0, keepdim=True)
            picks, _ = select_top(scores[None], counts, backend)
            return Routed(tokens, dispatch_mask(scores, picks[0], backend=backend))
        weight, token = scores.T.topk(int((T / E) * block.capacity), -1, sorted=False)  # (E, C)
        expert = torch.arange(E, device=x.device)[:, None].expand_as(token)
        plan = dispatch_rows(weight.flatten(), token.flatten(), expert.flatten(), T, E)
        picks = torch.zeros_like(scores.T, dtype=x.dtype).scatter(1, token, 1.0).T
        return Routed(tokens, plan, (picks, predicted))

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Any) -> tuple[Tensor | None, ...]:
        y = super().result(block, y, x, extra)
        if extra is None:
            return y, None, None
        picks, predicted = extra
        block.update_threshold(predicted)
        return y, *(t.reshape(*x.shape[:2], -1) for t in (picks, predicted))
