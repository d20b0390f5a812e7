"""What a router is: what is scored, who competes, what a pick weighs, what it adds to the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import _checks, ops
from ..plan import RoutingPlan
from .call import RouterCall, linear

AUX_LOSS_MODES = ("injected", "scaled")


@dataclass(frozen=True)
class Scores:
    """The first joint of a router: what is scored, and how. Scores(of, by)(call) -> (T, E), float32 or float64.

    of: "tokens": those of the layer. "unmodulated": the call's router_input; in `forward_adaln`, unless it is given,
        LayerNorm(x). "timestep_and_unmodulated": conditioning["timestep"] (B, H) and those, so that gate_weight is
        (E, 2H), the timestep's half first (Nucleus). "timestep": silu of it alone, so that an image's tokens share
        their experts (Switch-DiT).
    by: "softmax" over E, "sigmoid" or "identity" of the logits, or "cosine" to the rows of gate_weight.
    Cost: 2 T H E FLOPs. ("tokens", "softmax") is the room `gating`, with its kernels, fused with adaLN; all others are
        plain torch on the device of the tokens.
    """

    of: str = "tokens"
    by: str = "softmax"

    def __post_init__(self) -> None:
        _checks.one_of("of", self.of, SCORED)
        _checks.one_of("by", self.by, SCORERS)

    def __call__(self, call: RouterCall) -> Tensor:
        if self.of == "tokens" and self.by == "softmax":
            return call.gating(0)[2]
        if self.by == "cosine" and self.of in ("timestep", "timestep_and_unmodulated"):
            raise ValueError(f"by: got 'cosine' of {self.of!r}, expected 'tokens' or 'unmodulated'")
        return SCORERS[self.by](self._logits(call))

    def _logits(self, call: RouterCall) -> Tensor:
        weight = call.gate_weight
        if self.of in ("tokens", "unmodulated"):
            x = call.tokens if self.of == "tokens" else call.unmodulated
            if self.by != "cosine":
                return linear(x, weight)
            wide = _checks.accumulator(x.dtype)
            return linear(F.normalize(x.to(wide), dim=-1), F.normalize(weight.to(wide), dim=-1))
        own = weight.shape[1] // 2 if self.of == "timestep_and_unmodulated" else weight.shape[1]
        timestep = call.per_image("timestep", own)
        if self.of == "timestep":
            logits = linear(F.silu(timestep.to(_checks.accumulator(timestep.dtype))), weight)
            return logits.repeat_interleave(call.tokens_per_image, 0, output_size=call.num_tokens)
        halves = linear(timestep, weight[:, :own]), linear(call.unmodulated, weight[:, own:])
        E = weight.shape[0]
        logits = halves[1].view(call.num_images, call.tokens_per_image, E) + halves[0][:, None]
        return logits.view(call.num_tokens, E)

    def gate_shape(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        """Return the shape of gate_weight."""
        return num_experts, hidden_size * (2 if self.of == "timestep_and_unmodulated" else 1)


SCORED = ("tokens", "unmodulated", "timestep_and_unmodulated", "timestep")
SCORERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits: logits,
    "cosine": lambda logits: logits,
}


class Router:
    """Which experts work on which tokens. A layer calls `plan` and nothing else.

    `plan` joins four parts, and a router of one's own overrides those in which it differs: `scores(call) -> (T, E)`,
    softmax of x gate_weight^T; `pick(scores, call) -> (T, E) bool`; `weigh(scores, picks) -> (T, E)`, the raw scores;
    `loss(scores, picks, call) -> scalar`, none. Or it overrides `plan`, as rules with kernels of their own do.
    """

    scores: Callable[[RouterCall], Tensor] = Scores()
    aux_loss_mode = "injected"

    def pick(self, scores: Tensor, call: RouterCall) -> Tensor:
        """Mark what is picked: (T, E) float -> (T, E) bool."""
        raise NotImplementedError(f"{type(self).__name__}: a router defines pick, or plan")

    def weigh(self, scores: Tensor, picks: Tensor) -> Tensor:
        """Return what a pick weighs, (T, E); only what is picked counts."""
        return scores

    def loss(self, scores: Tensor, picks: Tensor, call: RouterCall) -> Tensor | None:
        """Return the auxiliary loss, a scalar, or None where there is none."""
        return None

    def max_rows(self, call: RouterCall) -> int | None:
        """Return how many picks there may be; None: as many as scores."""
        return None

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        """Route the tokens of a call.

        Returns: the plan, and the auxiliary loss, None where there is none or the call does not ask for it.
        Raises: ValueError, TypeError naming what the call lacks; as the ops.
        Cost: no host syncs on a GPU.
        """
        scores = self.scores(call)
        picks = self.pick(scores.detach(), call)
        plan = ops.dispatch_mask(self.weigh(scores, picks), picks, self.max_rows(call), call.backend)
        wanted = call.with_aux or self.injects(call)
        return self.with_loss(plan, self.loss(scores, picks, call) if wanted else None, call)

    def injects(self, call: RouterCall) -> bool:
        return call.inject_aux and self.aux_loss_mode == "injected"

    def with_loss(self, plan: RoutingPlan, aux: Tensor | None, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        """Return what `plan` returns: the loss where it is asked for, else injected into the weights."""
        if aux is not None and self.injects(call):
            plan = replace(plan, row_weight=_Inject.apply(plan.row_weight, aux))
        return plan, aux if call.with_aux else None

    def gate_shape(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        """Return the shape of the layer's gate_weight."""
        return num_experts, hidden_size

    def batch_invariant(self) -> bool:
        """Say whether an image's routing is the same whatever other images are in the batch."""
        return True

    def route(
        self, x: Tensor, gate_weight: Tensor, backend: str = "auto", **how: Any
    ) -> tuple[RoutingPlan, Tensor | None]:
        """Route tokens (T, H) without a layer: `plan` of RouterCall(x, gate_weight, backend, **how)."""
        return self.plan(RouterCall(x, gate_weight, backend, **how))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and hasattr(Router, name):
            self.__dict__[name] = value  # a learned part: nn.Module keeps it where the part of this class would hide it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "route" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.route: layers call plan(call), expected plan to be overridden")


class StatefulRouter(Router, nn.Module):
    """A router with averages, which stay in float32 or wider in a half-precision layer: there they would stand still.

    A copy shares the process group; a pickled one has none. `MoELayer.reset_parameters` calls `reset_parameters`, which
    gives parameters and averages their first values: `to_empty` leaves whatever memory held.
    """

    process_group: distributed.ProcessGroup | None = None

    def reset_parameters(self) -> None:
        """Give parameters and averages their first values."""
        raise NotImplementedError(f"{type(self).__name__}: a router with averages defines reset_parameters")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                source = buffer if before[name].is_meta else before[name]
                self._buffers[name] = source.to(buffer.device, _checks.accumulator(before[name].dtype))
        return self

    def __deepcopy__(self, memo: dict) -> StatefulRouter:
        new = memo[id(self)] = type(self).__new__(type(self))
        shared = {"process_group": self.process_group}
        new.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in shared}, memo) | shared)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": None}


class _Inject(torch.autograd.Function):
    """An identity of the weights whose backward gives the auxiliary loss gradient 1."""

    @staticmethod
    def forward(ctx: Any, row_weight: Tensor, aux: Tensor) -> Tensor:
        ctx.dtype = aux.dtype
        return row_weight.view_as(row_weight)

    @staticmethod
    def backward(ctx: Any, drow_weight: Tensor) -> tuple[Tensor, Tensor]:
        return drow_weight, torch.ones((), dtype=ctx.dtype, device=drow_weight.device)
