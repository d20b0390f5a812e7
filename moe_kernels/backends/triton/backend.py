"""The Triton backend, as the rest of the product calls it: every method hands over to the launchers of its room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

from ... import _checks
from ...plan import RoutingPlan
from ...weights import MoEWeights
from .._device import unfit_devices
from .._views import empty_plan
from ..base import Backend, Request
from ..kept import Kept
from . import adaln, combine, dispatch, dispatch_mask, experts, experts_bwd, gating, selection
from .grid import Pair
from .sums import sum_in_order

_FLOATS = torch.float32, torch.bfloat16, torch.float16
_INTERPRETED = triton.knobs.runtime.interpret


def _on_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the tensors, whichever is the current one."""

    @wraps(method)
    def run(self: TritonBackend, *args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda":
            return method(self, *args)
        with torch.cuda.device(device):
            return method(self, *args)

    return run


def _filled(plan: RoutingPlan, fill: Callable[..., None], *args: Any) -> RoutingPlan:
    """Return a plan that `fill` has filled; one without rows is all zeros."""
    if plan.num_rows:
        fill(*args, plan)
    else:
        for t in plan.tensors():
            t.zero_()
    return plan


class TritonBackend(Backend):
    """Kernels of this folder. Under TRITON_INTERPRET=1 they run on CPU tensors, for tests: thousands of times slower.

    float32 products use TF32 where torch allows it (torch.backends.cuda.matmul.fp32_precision).
    """

    name = "triton"
    fuses_token_choice = True
    reads = "indexed"

    def why_not(self) -> str:
        if _INTERPRETED or torch.cuda.is_available():
            return ""
        return "no CUDA device (TRITON_INTERPRET=1 lets the kernels run on the CPU, for tests)"

    def supports(self, request: Request) -> str | None:
        expected = "cpu" if _INTERPRETED else "cuda"
        if request.device != expected:
            return f"device {request.device}, expected {expected}"
        if request.dtype not in _FLOATS:
            return f"dtype {request.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
        return request.unlike_plain_experts() or (None if _INTERPRETED else unfit_devices((8, 0)))

    @_on_device
    def gating(self, x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        topk_weights, topk_ids, probs = gating.forward(x, gate_weight, top_k)
        _checks.finite(probs)
        return topk_weights, topk_ids, probs

    @_on_device
    def gating_bwd(
        self,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return gating.backward(dtopk_weights, dprobs, x, gate_weight, topk_ids, probs)

    @_on_device
    def dispatch(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> RoutingPlan:
        plan = empty_plan(topk_ids.device, topk_ids.shape[0], num_experts, topk_ids.numel())
        return _filled(plan, dispatch.token_choice, topk_ids, topk_weights)

    @_on_device
    def dispatch_bwd(self, drow_weight: Tensor, row_pick: Tensor, count: int) -> Tensor:
        return dispatch.backward(drow_weight, row_pick, count)

    @_on_device
    def dispatch_expert_choice(self, affinities: Tensor, capacity: int, tokens_per_group: int) -> RoutingPlan:
        T, E = affinities.shape
        plan = empty_plan(affinities.device, T, E, T // tokens_per_group * capacity * E)
        return _filled(plan, dispatch.expert_choice, affinities, capacity, tokens_per_group)

    @_on_device
    def dispatch_mask(self, weights: Tensor, picks: Tensor, max_rows: int) -> RoutingPlan:
        plan = empty_plan(weights.device, *weights.shape, max_rows)
        return _filled(plan, dispatch_mask.marks, weights, picks)

    @_on_device
    def select_top(self, scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        return selection.largest(scores, counts)

    @_on_device
    def select_experts(self, scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
        return selection.best_experts(scores, top_k, groups, groups_taken)

    @_on_device
    def experts(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor]:
        act, gate_up = experts.up(x, plan, w.gate_up, w.down, save)
        return experts.rows_times(act, w.down, plan, x, k_inner=True)[0], gate_up[0]

    @_on_device
    def experts_bwd(
        self,
        dy_rows: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        gate_up: Tensor,
        w: MoEWeights,
        activation: str,
        needed: Sequence[bool] = (True, True),
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = self._backward(dy_rows, x, plan, w, (gate_up, x.new_empty(0)), combined=False)
        return gradients[0], gradients[2], gradients[3]

    @_on_device
    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        out = y_rows.new_empty(plan.num_tokens, y_rows.shape[1])
        return combine.sum_rows((y_rows, shared), plan, out, weighted=True)

    @_on_device
    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        return combine.backward(dout, y_rows, plan)

    @_on_device
    def moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        act, gate_up = experts.up(x, plan, w.gate_up, w.down, save)
        y_rows = experts.rows_times(act, w.down, plan, x, k_inner=True)
        return combine.sum_rows(y_rows, plan, torch.empty_like(x), weighted=True), *gate_up

    @_on_device
    def moe_mlp_bwd(
        self,
        dout: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        w: MoEWeights,
        gate_up: Tensor,
        shared_gate_up: Tensor,
        activation: str,
        needed: Sequence[bool] = (True,) * 4,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return self._combined_backward(dout, x, plan, w, gate_up, shared_gate_up)

    @_on_device
    def token_choice(
        self, x: Tensor, gate_weight: Tensor, w: MoEWeights, top_k: int, activation: str, keep: bool, keep_gate_up: bool
    ) -> tuple[Tensor, Kept]:
        topk_weights, topk_ids, probs = gating.forward(x, gate_weight, top_k)
        _checks.finite(probs)
        plan = empty_plan(x.device, x.shape[0], gate_weight.shape[0], topk_ids.numel())
        _filled(plan, dispatch.token_choice, topk_ids, topk_weights)
        act, gate_up = experts.up(x, plan, w.gate_up, w.down, keep_gate_up)
        y_rows = experts.rows_times(act, w.down, plan, x, k_inner=True)
        out = combine.sum_rows(y_rows, plan, torch.empty_like(x), weighted=True)
        return out, Kept((topk_ids, probs, *gate_up, *plan.tensors()))

    @_on_device
    def token_choice_bwd(
        self,
        dout: Tensor,
        aux_scale: float,
        x: Tensor,
        gate_weight: Tensor,
        w: MoEWeights,
        kept: Kept,
        top_k: int,
        activation: str,
        kept_gate_up: bool,
        router: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        topk_ids, probs, gate_up, shared_gate_up, *tensors = kept.tensors
        plan = RoutingPlan(*tensors)
        dx, dpicks, *gradients = self._combined_backward(dout, x, plan, w, gate_up, shared_gate_up, at_picks=True)
        if not router:
            return dx, None, *gradients
        dprobs = plan.expert_counts.float().mul_(aux_scale) if aux_scale else None
        through, dgate_weight = gating.backward(dpicks, dprobs, x, gate_weight, topk_ids, probs)
        return dx.add_(through), dgate_weight, *gradients

    @_on_device
    def modulated_gating(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate_weight: Tensor, top_k: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        tokens, *scores, moments = adaln.modulated_gating(x, shift, scale, gate_weight, top_k, eps, dtype)
        _checks.finite(scores[2])
        return tokens, *scores, moments

    @_on_device
    def modulated_gating_bwd(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return adaln.modulated_gating_bwd(*args)

    @_on_device
    def gated_moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool, residual: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        act, gate_up = experts.up(x, plan, w.gate_up, w.down, save)
        y_rows, y = experts.rows_times(act, w.down, plan, x, k_inner=True), torch.empty_like(x)
        return combine.sum_rows_gated(y_rows, plan, residual, gate, y), *gate_up, y

    @_on_device
    def gated_residual_bwd(self, dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return adaln.gated_residual_bwd(dout, y, gate)

    def _combined_backward(self, dout, x, plan, w, *gate_up: Tensor, at_picks: bool = False):
        if not gate_up[0].numel():
            gate_up = experts.up(x, plan, w.gate_up, w.down, save=True)[1]
        return self._backward(dout, x, plan, w, gate_up, combined=True, at_picks=at_picks)

    @staticmethod
    def _backward(
        dout: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        w: MoEWeights,
        gate_up: Pair,
        combined: bool,
        at_picks: bool = False,
    ):
        """Return what moe_mlp_bwd returns; without `combined` dout is (R, H), the gradient of y_rows.

        at_picks: drow_weight lies as dispatch_bwd returns it; of token choice, where every pick has a row.
        """
        dgate_up, act, partials = experts_bwd.dact(dout, x, plan, w.down, gate_up, combined)
        shapes = w.stacked_shapes(plan.num_experts)
        dgate_up_proj, pending = experts_bwd.dweight(dgate_up, (x, x), plan, shapes[::2], gather=(False, True))
        ddown_proj, more = experts_bwd.dweight((dout, dout), act, plan, shapes[1::2], gather=(combined, False))
        sum_in_order(*pending, *more)
        dx_rows = experts.rows_times(dgate_up, w.gate_up, plan, x, k_inner=False)
        drow_weight = torch.empty_like(plan.row_weight)
        dx = combine.sum_rows(dx_rows, plan, torch.empty_like(x), False, partials, drow_weight, at_picks)
        return dx, drow_weight, dgate_up_proj[0], ddown_proj[0], dgate_up_proj[1], ddown_proj[1]
