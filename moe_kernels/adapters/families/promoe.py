"""ProMoE: cosines to prototypes choose, by token or by expert; images without a label go wholly to the last expert.

Both forwards return a loss beside y, which the block around them adds; the original's host syncs are none here.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...routing.losses import routing_contrastive_loss
from ..family import Family, Routed
from ..reading import Experts, Reader

KINDS = ("up_proj", "down_proj")
NULL_LABEL = 1000
MODES = ("softmax", "sigmoid", "identity")


class Scored(NamedTuple):
    """What both choices begin with."""

    weights: Tensor  # (B, S, E), in the dtype that the original picks by
    null: Tensor  # (B, 1) bool: images for the last expert


class ProMoE(Family):
    """Tokens choose (its models TC). y is float32 where x is narrower, as the original's."""

    name = "ProMoE"
    expected = "modules with cluster_centers and experts of up_proj and down_proj"
    parts = ("cluster_centers", "experts", "shared_expert")
    attributes = (
        ("cluster_centers", Tensor),
        ("experts", nn.ModuleList),
        ("num_experts", int),
        ("top_k", int),
        ("router_weight_mode", str),
        ("use_shared_expert", bool),
        ("use_uncond_expert", bool),
        ("routing_contrastive_lam", (int, float)),
        ("routing_contrastive_temperature", (int, float)),
        ("use_top_k_for_routing_contrastive", bool),
        ("alpha", (int, float)),
        ("seq_aux", bool),
    )

    def finds(self, module: nn.Module) -> bool:
        return "cluster_centers" in module._parameters and "experts" in module._modules

    def check(self, block: nn.Module, read: Reader) -> None:
        super().check(block, read)
        if block.router_weight_mode not in MODES:
            got, expected = block.router_weight_mode, ", ".join(map(repr, MODES))
            raise ValueError(f"{read.path}.router_weight_mode: got {got!r}, expected one of {expected}")

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        names = ("experts", "shared_expert")[: 1 + block.use_shared_expert]
        weights = [kind for name in names for kind in read.mlps(block, name, KINDS, biased=True)]
        return Experts(*weights, activation=read.gelu(block, names, "act_fn"), biases=read.biases(block, names, KINDS))

    def route(self, block: nn.Module, backend: str, x: Tensor, labels: Tensor | None = None) -> Routed:
        (weights, null), tokens = _scored(block, x, labels, over=-1), x.reshape(-1, x.shape[-1])
        null = null.expand(x.shape[:2]).reshape(-1, 1)
        best, ids = weights.flatten(0, 1).topk(block.top_k, -1)
        first = torch.arange(block.top_k, device=x.device) == 0  # of its picks all name the last expert, one weighs
        best = torch.where(null, first.to(best.dtype), best)
        plan = ops.dispatch(torch.where(null, block.num_experts - 1, ids), best, block.num_experts, backend)
        if not block.training:
            return Routed(tokens, plan)
        return Routed(tokens, plan, self._loss(block, tokens, weights.flatten(0, 1), ids, ~null, len(x)))

    def _loss(
        self, block: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, labelled: Tensor, images: int
    ) -> Tensor | None:
        picks = torch.zeros_like(weights, dtype=torch.bool).scatter(1, ids, True) & labelled
        losses = []
        if block.alpha > 0:
            groups = images if block.seq_aux else 1
            probabilities = weights if block.router_weight_mode == "softmax" else weights.softmax(-1)
            losses.append(block.alpha * _load_balance_loss(probabilities, picks, labelled, groups, block.top_k))
        if block.routing_contrastive_lam > 0:
            if not block.use_top_k_for_routing_contrastive:
                picks = torch.zeros_like(picks).scatter(1, ids[:, :1], True) & labelled
            losses.append(_contrastive_loss(block, x, picks, 1))
        return sum(losses) if losses else None

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return y.view(x.shape).to(torch.promote_types(x.dtype, torch.float32)), extra

    def trial(self, block: nn.Module, x: Tensor) -> tuple[Any, ...]:
        return x, torch.tensor([NULL_LABEL, 0], device=x.device)


class ProMoEByExpert(ProMoE):
    """Experts choose (its models EC): max(1, int(S / E * top_k)) tokens of each image with a label."""

    name = "ProMoE by expert"
    expected = "the same with compute_router(x) and not (x, labels)"
    attributes = tuple(named for named in ProMoE.attributes if not named[0].startswith(("alpha", "seq_aux", "use_top")))

    def finds(self, module: nn.Module) -> bool:
        router = getattr(type(module), "compute_router", None)
        return super().finds(module) and router is not None and "labels" not in inspect.signature(router).parameters

    def route(self, block: nn.Module, backend: str, x: Tensor, labels: Tensor | None = None) -> Routed:
        weights, null = _scored(block, x, labels, over=1)
        (B, S, E), N = weights.shape, block.num_experts
        weight, token = weights.mT.topk(max(1, min(int((S / E) * block.top_k), S)), -1, sorted=False)  # (B, E, C)
        token = token + torch.arange(0, B * S, S, device=x.device)[:, None, None]
        expert = torch.where(null[..., None], N, torch.arange(E, device=x.device)[:, None]).expand_as(token)
        rows = [(weight, token, expert)]  # those of expert N are none
        if block.use_uncond_expert:
            every = torch.arange(B * S, device=x.device).view(B, S)
            last = torch.where(null, N - 1, N).expand(B, S)
            rows.append((torch.ones_like(every, dtype=weight.dtype), every, last))
        rows = (torch.cat([t.flatten() for t in kind]) for kind in zip(*rows, strict=True))
        plan = ops.dispatch_rows(*rows, B * S, N)
        tokens, loss = x.reshape(-1, x.shape[-1]), None
        if block.training and block.routing_contrastive_lam > 0:
            picks = torch.zeros(E, B * S, dtype=torch.bool, device=x.device)
            picks = picks.scatter(1, token.transpose(0, 1).flatten(1), True).T
            loss = _contrastive_loss(block, tokens, picks & ~null.expand(B, S).reshape(-1, 1), B)
        return Routed(tokens, plan, loss)

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return y.view(x.shape).to(x.dtype), extra


def _scored(block: nn.Module, x: Tensor, labels: Tensor | None, over: int) -> Scored:
    """Return what the picks are by; softmax `over` experts, or over the tokens of an image."""
    B = x.shape[0]
    if not isinstance(labels, Tensor) or labels.numel() != B:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: got {got}, expected a tensor ({B},): one label for each image")
    cosines = F.normalize(x, dim=-1) @ F.normalize(block.cluster_centers, dim=-1).T
    weights = {"softmax": lambda: cosines.softmax(over), "sigmoid": cosines.sigmoid, "identity": lambda: cosines}
    null = labels.view(B, 1) == NULL_LABEL
    return Scored(weights[block.router_weight_mode](), null if block.use_uncond_expert else torch.zeros_like(null))


def _contrastive_loss(block: nn.Module, x: Tensor, picks: Tensor, groups: int) -> Tensor:
    loss = routing_contrastive_loss(x, block.cluster_centers, picks, groups, block.routing_contrastive_temperature)
    return block.routing_contrastive_lam * loss


def _load_balance_loss(probabilities: Tensor, picks: Tensor, labelled: Tensor, groups: int, K: int) -> Tensor:
    """Return E sum_e f_e P_e over tokens with a label, the mean over groups of consecutive tokens that have any."""
    T, E = probabilities.shape
    wide = torch.promote_types(probabilities.dtype, torch.float32)
    P, f, labelled = (t.to(wide).view(groups, T // groups, -1) for t in (probabilities, picks, labelled))
    counts = labelled.sum(1)  # (groups, 1)
    P, f = (P * labelled).sum(1) / counts.clamp(min=1), f.sum(1) / (K * counts.clamp(min=1))
    return E * (P * f).sum() / (counts > 0).sum().clamp(min=1)
