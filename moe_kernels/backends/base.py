"""The interface that every backend implements: four rooms and the fused layer, on plain tensors, without autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import accumulator
from ..activation import PLAIN
from ..plan import RoutingPlan
from ..weights import LayerWeights, MoEWeights
from . import plain
from .kept import Kept

Weights = LayerWeights | MoEWeights  # which of the two says Backend.reads
Gradient = Tensor | list[Tensor] | None


class Request(NamedTuple):
    """What a call asks for: everything a backend may refuse by. Token counts are not part of it."""

    room: str  # "gating" | "dispatch" | "experts" | "combine" | "moe_mlp"
    dtype: torch.dtype
    device: str = "cpu"  # device type
    num_experts: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    shared_intermediate_size: int = 0
    activation: str = "swiglu"  # as moe_kernels.activation spells it
    biases: bool = False

    def unlike_plain_experts(self) -> str | None:
        """Return why a backend whose kernels have bias-free SwiGLU and GELU experts cannot compute this, else None."""
        others = "native, grouped and eager compute it"
        if self.activation not in PLAIN:
            return f"activation {self.activation!r}, expected {' or '.join(map(repr, PLAIN))}; {others}"
        return f"experts with biases, expected none; {others}" if self.biases else None


class Backend(ABC):
    """One way to compute the rooms.

    Tensors come in contiguous, checked for shape, dtype and device, and outside autograd and autocast. Results are
    fresh tensors, never views of the arguments. `plan` has int32 indices; its contents are not checked; it may have
    rows behind expert_offsets[E], which no result depends on. Low-precision
    matrix products accumulate in float32, and so do the activation, the softmax and the combination. Nothing but the
    loop of `eager` waits for the device.
    """

    name: str
    fuses_token_choice = False  # has token_choice and token_choice_bwd
    reads = "stacked"  # the form in which weights come: "stacked" or "indexed" MoEWeights, or "addresses": LayerWeights

    def available(self) -> bool:
        """Say whether the backend can run in this process at all."""
        return not self.why_not()

    def why_not(self) -> str:
        """Return why the backend is not available, "" where it is."""
        return ""

    @abstractmethod
    def supports(self, request: Request) -> str | None:
        """Return None where the request can be computed, else the reason why it cannot."""

    @abstractmethod
    def gating(self, x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(T,H), (E,H) -> topk_weights (T,K) f32, topk_ids (T,K) i32, probs (T,E) f32; float64 for float64 x.

        Descending weight, the lower expert index on a tie. top_k = 0 gives empty (T,0) picks. Where the device is the
        CPU, router logits that are not finite raise ValueError.
        """

    @abstractmethod
    def gating_bwd(
        self,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return dx (T,H) in the dtype of x and dgate_weight (E,H) in the dtype of gate_weight.

        dprobs is (T,E), or (1,E): the same for every token, as the auxiliary loss gives it.
        """

    @abstractmethod
    def dispatch(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> RoutingPlan:
        """(T,K) ids i32 in [0,E), (T,K) weights -> plan with R = T K rows. On a GPU other ids are clamped to [0,E)."""

    @abstractmethod
    def dispatch_expert_choice(self, affinities: Tensor, capacity: int, tokens_per_group: int) -> RoutingPlan:
        """(T,E) -> plan with R = E capacity T/tokens_per_group rows; the lower token index wins a tie."""

    # Selection by rules that need a pass over all scores, and the plan of what they pick. A backend with kernels for it
    # overrides these; here it is plain torch.

    def select_top(self, scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        """(G,M,N) -> picks (G,M,N) bool, the counts[g,n] largest of scores[g,:,n], and least (G,N), the smallest of
        them, infinity where there is none. Counts are int32 (G,N), clamped to 0..M, or one number for all. The first
        of equal scores is picked, NaN is largest."""
        return plain.select_top(scores, counts)

    def select_experts(self, scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
        """(T,E) -> ids (T,K) i32 by descending score, where scores outside of the groups_taken groups with the largest
        sums of two scores count as minus infinity; ties as above."""
        return plain.select_experts(scores, top_k, groups, groups_taken)

    def dispatch_mask(self, weights: Tensor, picks: Tensor, max_rows: int) -> RoutingPlan:
        """(T,E) weights, (T,E) bool -> plan of max_rows rows, one for each pick; what is beyond is dropped, the last
        experts' last tokens. Rows behind have weight 0, token 0, pick T E and themselves as token_rows."""
        return RoutingPlan(*plain.plan_of_marks(weights, picks, max_rows))

    def dispatch_bwd(self, drow_weight: Tensor, row_pick: Tensor, count: int) -> Tensor:
        """Return (count,): the gradients of the weights (T,K) or affinities (T,E) that the rows were picked from."""
        return drow_weight.new_zeros(count).scatter(0, row_pick.long(), drow_weight)

    @abstractmethod
    def experts(self, x: Tensor, plan: RoutingPlan, w: Weights, activation: str, save: bool) -> tuple[Tensor, Tensor]:
        """Return y_rows (R,H), unweighted, and gate_up (R,2I) ((R,I) without a gate), which is (0,) unless `save`.

        gate_up is always [gate | up], whatever the layout of the weights; its bias is in it. w has no shared expert.
        """

    @abstractmethod
    def experts_bwd(
        self,
        dy_rows: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        gate_up: Tensor,
        w: Weights,
        activation: str,
        needed: Sequence[bool],
    ) -> tuple[Tensor, *tuple[Gradient, ...]]:
        """Return dx (T,H) and the gradients of gate_up_proj and down_proj, and of their biases, as `moe_mlp_bwd`
        does; `needed` has four flags."""

    @abstractmethod
    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        """(R,H) -> sum over a token's rows, ascending, of row_weight y, and shared before or after it: (T,H)."""

    @abstractmethod
    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        """Return dy_rows (R,H) in the dtype of y_rows and drow_weight (R,) in the dtype of row_weight."""

    @abstractmethod
    def moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: Weights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return out (T,H), gate_up (R,2I), shared_gate_up (T,2Is); the last two are (0,) where not saved or absent."""

    def pack(self, w: Weights, activation: str, owners: Sequence[Tensor]) -> Callable[[], None] | None:
        """Keep a copy of the weights in the form the forward reads; moe_mlp uses it for weights at the same address.

        Until the returned function is called, which drops the copy, moe_mlp raises ValueError for weights that have
        changed since: by the version of `owners`, the parameters behind w, or by sampled values. None where the backend
        has no such form.
        """
        return None

    @abstractmethod
    def moe_mlp_bwd(
        self,
        dout: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        w: Weights,
        gate_up: Tensor,
        shared_gate_up: Tensor,
        activation: str,
        needed: Sequence[bool],
    ) -> tuple[Tensor, Tensor, *tuple[Gradient, ...]]:
        """Return dx, drow_weight and the gradients of the four weights: stacked, or lists where the backend reads
        addresses, in the form of the weights; exact zeros where an expert has no rows. None for a shared expert that is
        not there, and, if the backend can save the work, where `needed` (eight flags, biases last) says no. Behind
        them, if w has biases, their gradients, stacked as MoEWeights has the biases.

        gate_up and shared_gate_up are (0,) where the forward did not keep them: they are computed again.
        """

    def token_choice(
        self, x: Tensor, gate_weight: Tensor, w: Weights, top_k: int, activation: str, keep: bool, keep_gate_up: bool
    ) -> tuple[Tensor, Kept]:
        """Do what `gating`, `dispatch` and `moe_mlp` do one after the other, to the bit; return out (T,H) and what
        `token_choice_bwd` reads, if it is to be kept."""
        raise NotImplementedError

    def token_choice_bwd(
        self,
        dout: Tensor,
        aux_scale: float,
        x: Tensor,
        gate_weight: Tensor,
        w: Weights,
        kept: Kept,
        top_k: int,
        activation: str,
        kept_gate_up: bool,
        router: bool,
    ) -> tuple[Tensor, Tensor | None, *tuple[Gradient, ...]]:
        """Return dx and dgate_weight, without `router` the part of dx that goes through the experts and None, and the
        gradients of the weights as `moe_mlp_bwd` does. aux_scale: see `aux_loss_scale`; 0 for no such loss."""
        raise NotImplementedError

    # What adaLN puts around the layer. A backend that can fuse it overrides these; here it is plain torch around the
    # rooms above.

    def modulated_gating(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate_weight: Tensor, top_k: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return tokens = LayerNorm(x) (1 + scale_b) + shift_b, (B,L,H) -> (T,H) in `dtype`, what `gating` makes of
        them, and moments (2,T): mean and reciprocal deviation of each token, in the accumulation dtype."""
        wide = x.to(accumulator(x.dtype))
        mean = wide.mean(-1, keepdim=True)
        reciprocal = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
        tokens = _modulate((wide - mean) * reciprocal, shift, scale).to(dtype).view(-1, x.shape[-1])
        return tokens, *self.gating(tokens, gate_weight, top_k), torch.stack([mean.flatten(), reciprocal.flatten()])

    def modulated_gating_bwd(
        self,
        dtokens: Tensor | None,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
        moments: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dx (B,L,H), dshift and dscale (B,H), dgate_weight (E,H), each in the dtype of what it belongs to."""
        mean, reciprocal = moments.view(2, *x.shape[:2], 1)
        normal = (x.to(mean.dtype) - mean) * reciprocal
        total, dgate_weight = torch.zeros_like(normal), torch.zeros_like(gate_weight)
        if dtokens is not None:
            total = total + dtokens.view(x.shape)
        if dtopk_weights is not None or dprobs is not None:
            tokens = _modulate(normal, shift, scale).to(dtype).view(-1, x.shape[-1])
            through, dgate_weight = self.gating_bwd(dtopk_weights, dprobs, tokens, gate_weight, topk_ids, probs)
            total = total + through.view(x.shape)
        dnormal = total * (1 + scale[:, None].to(total.dtype))
        along = (dnormal * normal).mean(-1, keepdim=True)
        dx = reciprocal * (dnormal - dnormal.mean(-1, keepdim=True) - normal * along)
        dshift, dscale = total.sum(1), (total * normal).sum(1)
        return dx.to(x.dtype), dshift.to(shift.dtype), dscale.to(scale.dtype), dgate_weight

    def gated_moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: Weights, activation: str, save: bool, residual: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return out = residual + gate_b y (T,H) in the dtype of residual, the rest of moe_mlp's results, and y."""
        y, gate_up, shared_gate_up = self.moe_mlp(x, plan, w, activation, save)
        wide = accumulator(residual.dtype)
        out = residual + _images(y, gate).to(wide).mul(gate[:, None].to(wide)).view(y.shape)
        return out.to(residual.dtype), gate_up, shared_gate_up, y

    def gated_residual_bwd(self, dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return dy = gate_b dout (T,H) in the dtype of y, and dgate (B,H), the sums of dout y over each image."""
        wide = _images(dout.to(accumulator(dout.dtype)), gate)
        dgate = (wide * _images(y, gate).to(wide.dtype)).sum(1)
        return (wide * gate[:, None].to(wide.dtype)).to(y.dtype).view(y.shape), dgate.to(gate.dtype)


def _modulate(normal: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normal * (1 + scale[:, None].to(normal.dtype)) + shift[:, None].to(normal.dtype)


def _images(t: Tensor, gate: Tensor) -> Tensor:
    """(T, H) -> (B, L, H)."""
    B, H = gate.shape
    return t.view(B, t.shape[0] // max(B, 1), H)
