"""The family's routers: how each is made, what it asks of a call, and what the oracle makes of the same call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import reference.moe
from moe_kernels import DiffMoE, ExpertChoice, ExpertRace, GroupLimitedChoice, MoELayer, ProMoE, Router, Scores
from reference import routers, routing
from tests.trap_cases import sample

B, L, H, I, E = 3, 12, 32, 24, 6
NULL = 1000
Answer = tuple[Tensor, Tensor, Tensor | None]  # weights (T, E), picks (T, E), auxiliary loss


@dataclass(frozen=True)
class RouterCase:
    make: Callable[[], Router]
    oracle: Callable[[MoELayer, Tensor, dict[str, Any]], Answer]
    training: bool = False
    asks: tuple[str, ...] = field(default=())  # "timestep" and "labels" of the conditioning, and "router_input"


def expert_choice(layer: MoELayer, x: Tensor, call: dict[str, Any], of: str, by: str, rounding: str, renormalise: bool):
    timestep, unmodulated = call["conditioning"]["timestep"], call["router_input"].flatten(0, 1)
    scored = {"tokens": x, "timestep_and_unmodulated": routers.timestep_and_tokens(unmodulated, timestep)}[of]
    scores = routers.score(scored, layer.gate_weight, by)
    picks = routing.take_tokens(scores, routers.capacity(L, 2.3, E, rounding), L)
    return routers.weigh(scores, picks, renormalise, 2.5 if renormalise else 1.0), picks, None


def group_limited(layer: MoELayer, x: Tensor, call: dict[str, Any]) -> Answer:
    scores = routers.score(x, layer.gate_weight, "sigmoid")
    bias = layer.router.e_score_correction_bias
    return *routers.group_limited_choice(scores, 2, 3, 2, bias, True, 2.5), None


def switch_dit(layer: MoELayer, x: Tensor, call: dict[str, Any]) -> Answer:
    timestep = torch.nn.functional.silu(call["conditioning"]["timestep"]).repeat_interleave(L, 0)
    scores = routers.score(timestep, layer.gate_weight, "softmax")
    bias = layer.router.e_score_correction_bias  # the gate is ours, and has one
    return *routers.group_limited_choice(scores, 2, bias=bias, renormalise=False), None


def race(layer: MoELayer, x: Tensor, call: dict[str, Any], group: int) -> Answer:
    hidden = layer.router.hidden
    logits = routers.score(x if hidden is None else torch.nn.functional.gelu(hidden(x)), layer.gate_weight, "identity")
    picks = routers.race(logits, 2 * group, group) if layer.training else logits >= layer.router.threshold
    return logits, picks, 1e-4 * routers.router_similarity_loss(logits, picks)


def predicted(layer: MoELayer, x: Tensor) -> Tensor:
    up, _, down = layer.router.capacity_predictor
    return routers.capacity_predictor(x, up.weight, up.bias, down.weight, down.bias)


def diffmoe(layer: MoELayer, x: Tensor, call: dict[str, Any], of: str = "batch") -> Answer:
    scores, logits = routers.score(x, layer.gate_weight, "softmax"), predicted(layer, x)
    if not layer.training:
        return scores, routers.diffmoe_sampling(scores, logits, layer.router.expert_threshold, of), None
    picks, loss, _ = routers.diffmoe_training(scores, logits, 1.3)
    return scores, picks, 0.01 * loss


def promoe(layer: MoELayer, x: Tensor, call: dict[str, Any], top_k: int, by: str, choice: str) -> Answer:
    cosines, labels = routers.score(x, layer.gate_weight, "cosine"), call["conditioning"]["labels"]
    weights, picks = routers.promoe(cosines, labels, NULL, top_k, by, choice)
    own = picks if choice == "expert" else routers.promoe(cosines, labels, NULL, 1, by, choice)[1]
    groups = B if choice == "expert" else 1
    return weights, picks, routers.routing_contrastive_loss(x, layer.gate_weight, own[:, :-1], groups, 0.07)


NUCLEUS = Scores("timestep_and_unmodulated")
CASES = {
    "expert choice, int": RouterCase(
        lambda: ExpertChoice(2.3, scores=Scores(by="sigmoid"), rounding="int"),
        partial(expert_choice, of="tokens", by="sigmoid", rounding="int", renormalise=False),
    ),
    "Nucleus": RouterCase(
        lambda: ExpertChoice(2.3, scores=NUCLEUS, rounding="ceil", renormalise=True, route_scale=2.5),
        partial(expert_choice, of=NUCLEUS.of, by="softmax", rounding="ceil", renormalise=True),
        asks=("timestep", "router_input"),
    ),
    "DSMoE": RouterCase(lambda: GroupLimitedChoice(2, E, groups=3, groups_taken=2, route_scale=2.5), group_limited),
    "Switch-DiT": RouterCase(
        lambda: GroupLimitedChoice(2, E, scores=Scores("timestep"), renormalise=False), switch_dit, asks=("timestep",)
    ),
    "race": RouterCase(lambda: ExpertRace(2), partial(race, group=B * L), training=True),
    "race of an image": RouterCase(lambda: ExpertRace(2, "image", H), partial(race, group=L), training=True),
    "race, threshold": RouterCase(lambda: ExpertRace(2, "batch", H), partial(race, group=B * L)),
    "DiffMoE": RouterCase(lambda: DiffMoE(E, H, 1.3), diffmoe, training=True),
    "DiffMoE, sampling": RouterCase(lambda: DiffMoE(E, H, 1.3), diffmoe),
    "DiffMoE, by token": RouterCase(lambda: DiffMoE(E, H, 1.3, sampling="token"), partial(diffmoe, of="token")),
    "ProMoE": RouterCase(
        lambda: ProMoE(), partial(promoe, top_k=1, by="identity", choice="token"), True, asks=("labels",)
    ),
    "ProMoE, K = 2": RouterCase(
        lambda: ProMoE(2, weights="softmax"), partial(promoe, top_k=2, by="softmax", choice="token"), True, ("labels",)
    ),
    "ProMoE, experts choose": RouterCase(
        lambda: ProMoE(2, "expert", "softmax"),
        partial(promoe, top_k=2, by="softmax", choice="expert"),
        True,
        ("labels",),
    ),
}


def draw(case: RouterCase, backend: str, seed: int, bias: bool = False) -> tuple[MoELayer, Tensor, dict[str, Any]]:
    """Return a layer, x (B, L, H) and what forward gets beside it, such that no pick hangs by a rounding error."""
    for attempt in range(1000):
        layer, x, call = _draw(case, backend, seed * 1000 + attempt, bias)
        exact, wide, more = double(layer, x, call)
        noise = torch.randn_like(wide)
        same = [case.oracle(exact, (wide + s * noise).flatten(0, 1), more)[1] for s in (0.0, 1e-5, -1e-5)]
        if all(torch.equal(same[0], other) for other in same[1:]):
            return layer, x, call
    raise AssertionError("near ties in every draw")


def _draw(case: RouterCase, backend: str, seed: int, bias: bool) -> tuple[MoELayer, Tensor, dict[str, Any]]:
    torch.manual_seed(seed)
    top_k = getattr(case.make(), "top_k", 2)
    layer = MoELayer(H, I, E, top_k, router=case.make(), backend=backend, bias=bias).train(case.training)
    if bias:
        torch.nn.init.normal_(layer.gate_up_bias), torch.nn.init.normal_(layer.down_bias)
    for name, buffer in layer.named_buffers():
        if "decay" not in name:
            buffer.copy_(0.5 + torch.randn(buffer.shape) * 0.05 if "threshold" in name else torch.randn(buffer.shape))
    g = torch.Generator().manual_seed(seed)
    timestep, unmodulated = sample(torch.randn, B, H, generator=g), sample(torch.randn, B, L, H, generator=g)
    labels = torch.tensor([3, NULL, 7])
    call = {"router_input": unmodulated, "conditioning": {"timestep": timestep, "labels": labels}}
    return layer, sample(torch.randn, B, L, H, generator=g), call


def double(layer: MoELayer, x: Tensor, call: dict[str, Any]) -> tuple[MoELayer, Tensor, dict[str, Any]]:
    """Return all of it in float64."""
    conditioning = {name: t.double() if t.is_floating_point() else t for name, t in call["conditioning"].items()}
    call = {"router_input": call["router_input"].double(), "conditioning": conditioning}
    return copy.deepcopy(layer).double(), x.double(), call


def by_oracle(case: RouterCase, layer: MoELayer, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return what a layer's forward returns, and the auxiliary loss, from the oracle's routing and its loop."""
    tokens = x.flatten(0, 1)
    weights, picks, aux = case.oracle(layer, tokens, call)
    experts = layer.gate_up_proj, layer.down_proj, "swiglu", layer.gate_up_bias, layer.down_bias
    out = reference.moe.moe_expert_choice(tokens, weights, picks, *experts)
    return out.view(x.shape), aux
