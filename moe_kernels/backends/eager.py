"""The eager backend: every room in clean PyTorch, on any device, in any float dtype."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .._checks import accumulator
from ..activation import clamp_of
from ..plan import RoutingPlan
from ..weights import MoEWeights
from .base import Backend, Request


class EagerBackend(Backend):
    """Gathers rows, loops over experts, and sums by CSR in a fixed order. The loop is the only wait for the device."""

    name = "eager"

    def supports(self, request: Request) -> str | None:
        return None

    def gating(self, x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulator(x.dtype)
        logits = x.to(acc) @ gate_weight.to(acc).T
        _checks.finite(logits)
        probs = logits.softmax(-1)
        topk_weights, topk_ids = probs.sort(dim=-1, descending=True, stable=True)
        return topk_weights[:, :top_k].contiguous(), topk_ids[:, :top_k].int().contiguous(), probs

    def gating_bwd(
        self,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(probs) if dprobs is None else dprobs.expand_as(probs)
        if dtopk_weights is not None:
            total = total.scatter_add(1, topk_ids.long(), dtopk_weights)
        dlogits = probs * (total - (probs * total).sum(-1, keepdim=True))
        dx, dgate_weight = dlogits @ gate_weight.to(probs.dtype), dlogits.T @ x.to(probs.dtype)
        return dx.to(x.dtype), dgate_weight.to(gate_weight.dtype)

    def dispatch(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> RoutingPlan:
        T, K = topk_ids.shape
        ids = topk_ids.reshape(-1).clamp(0, num_experts - 1)  # unchecked on a GPU
        row_expert, picks = ids.sort(stable=True)
        row_of_pick = torch.empty_like(picks).scatter_(0, picks, torch.arange(T * K, device=picks.device))
        expert_offsets = _offsets(row_expert, num_experts)
        return RoutingPlan(
            expert_counts=expert_offsets.diff(),
            expert_offsets=expert_offsets,
            row_token=(picks // K).int(),
            row_weight=topk_weights.reshape(-1)[picks],
            row_pick=picks.int(),
            token_row_offsets=torch.arange(0, T * K + 1, K, dtype=torch.int32, device=picks.device),
            token_rows=row_of_pick.view(T, K).sort(1).values.reshape(-1).int(),
        )

    def dispatch_expert_choice(self, affinities: Tensor, capacity: int, tokens_per_group: int) -> RoutingPlan:
        T, E = affinities.shape
        groups = T // tokens_per_group
        grouped = affinities.view(groups, tokens_per_group, E).permute(2, 0, 1)
        best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :capacity].sort(-1).values
        first_token = torch.arange(groups, device=best.device)[:, None] * tokens_per_group
        tokens = (best + first_token).reshape(E, -1)
        picks = (tokens * E + torch.arange(E, device=best.device)[:, None]).reshape(-1)
        row_token = tokens.reshape(-1)
        owner, token_rows = row_token.sort(stable=True)
        rows = groups * capacity
        return RoutingPlan(
            expert_counts=torch.full((E,), rows, dtype=torch.int32, device=best.device),
            expert_offsets=torch.arange(E + 1, dtype=torch.int32, device=best.device) * rows,
            row_token=row_token.int(),
            row_weight=affinities.reshape(-1)[picks],
            row_pick=picks.int(),
            token_row_offsets=_offsets(owner, T),
            token_rows=token_rows.int(),
        )

    def experts(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor]:
        x_rows, (gate_up_bias, down_bias, *_) = x.index_select(0, plan.row_token), w.biases
        gate_up = self.rows_times(x_rows, w.gate_up_proj.transpose(1, 2), plan, gate_up_bias)
        y_rows = self.rows_times(_activate(gate_up, activation), w.down_proj.transpose(1, 2), plan, down_bias)
        return y_rows, gate_up if save else x.new_empty(0)

    def experts_bwd(
        self,
        dy_rows: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        gate_up: Tensor,
        w: MoEWeights,
        activation: str,
        needed: Sequence[bool] = (True,) * 4,
    ) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        dact = self.rows_times(dy_rows, w.down_proj, plan)
        act, dgate_up = _activate_bwd(gate_up, dact, activation)
        ddown_proj = self.outer_sums(dy_rows, act.to(x.dtype), plan) if needed[1] else None
        dgate_up_proj = self.outer_sums(dgate_up, x.index_select(0, plan.row_token), plan) if needed[0] else None
        dx = _sum_rows(self.rows_times(dgate_up, w.gate_up_proj, plan), plan)
        return dx.to(x.dtype), dgate_up_proj, ddown_proj, *_bias_gradients(w, needed[2:], plan, dgate_up, dy_rows, None)

    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        out = _sum_rows(y_rows, plan, plan.row_weight)
        return (out if shared is None else out + shared).to(y_rows.dtype)

    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        acc = accumulator(y_rows.dtype)
        dout_rows = dout.index_select(0, plan.row_token).to(acc)
        drow_weight = (dout_rows * y_rows.to(acc)).sum(-1)
        return (dout_rows * plan.row_weight[:, None].to(acc)).to(y_rows.dtype), drow_weight.to(plan.row_weight.dtype)

    def moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        y_rows, gate_up = self.experts(x, plan, w, activation, save)
        if w.shared_gate_up_proj is None:
            return self.combine(y_rows, plan, None), gate_up, x.new_empty(0)
        gate_up_bias, down_bias = (bias if bias is None else bias.to(x.dtype) for bias in w.biases[2:])
        shared_gate_up = F.linear(x, w.shared_gate_up_proj, gate_up_bias)
        shared = F.linear(_activate(shared_gate_up, activation), w.shared_down_proj, down_bias)
        return self.combine(y_rows, plan, shared), gate_up, shared_gate_up if save else x.new_empty(0)

    def moe_mlp_bwd(
        self,
        dout: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        w: MoEWeights,
        gate_up: Tensor,
        shared_gate_up: Tensor,
        activation: str,
        needed: Sequence[bool] = (True,) * 8,
    ) -> tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]:
        if not gate_up.numel():
            _, gate_up, shared_gate_up = self.moe_mlp(x, plan, w, activation, True)
        dout_rows = dout.index_select(0, plan.row_token)
        row_weight = plan.row_weight[:, None].to(accumulator(x.dtype))
        dact = self.rows_times(dout_rows, w.down_proj, plan).to(row_weight.dtype)  # before the row's weight
        act, dgate_up = _activate_bwd(gate_up, dact * row_weight, activation)
        drow_weight = (dact * act).sum(-1)
        if w.biases.down is not None:
            drow_weight = drow_weight + (dout_rows * of_rows(w.biases.down, plan)).sum(-1)
        drow_weight = drow_weight.to(plan.row_weight.dtype)
        ddown_proj = self.outer_sums(dout_rows, (act * row_weight).to(x.dtype), plan) if needed[1] else None
        dgate_up_proj = self.outer_sums(dgate_up, x.index_select(0, plan.row_token), plan) if needed[0] else None
        dx = _sum_rows(self.rows_times(dgate_up, w.gate_up_proj, plan), plan)
        dbiases = _bias_gradients(w, needed[4:6], plan, dgate_up, dout_rows, plan.row_weight)
        if w.shared_gate_up_proj is None:
            return dx.to(x.dtype), drow_weight, dgate_up_proj, ddown_proj, None, None, *dbiases
        act, dgate_up = _activate_bwd(shared_gate_up, dout @ w.shared_down_proj, activation)
        dx = (dx + dgate_up @ w.shared_gate_up_proj).to(x.dtype)
        dshared_gate_up_proj = dgate_up.T @ x if needed[2] else None
        dshared_down_proj = dout.T @ act.to(x.dtype) if needed[3] else None
        if w.biases.present:
            pairs = (dgate_up, w.biases.shared_gate_up), (dout, w.biases.shared_down)
            dbiases += [None if bias is None else rows.to(bias.dtype).sum(0) for rows, bias in pairs]
        return dx, drow_weight, dgate_up_proj, ddown_proj, dshared_gate_up_proj, dshared_down_proj, *dbiases

    def rows_times(self, rows: Tensor, weight: Tensor, plan: RoutingPlan, bias: Tensor | None = None) -> Tensor:
        """(R, M), (E, M, N), (E, N) -> (R, N): every row times the matrix of its expert, plus its bias."""
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for e, (start, end) in enumerate(_spans(plan)):
            if bias is None:
                torch.mm(rows[start:end], weight[e], out=out[start:end])
            else:
                torch.addmm(bias[e].to(rows.dtype), rows[start:end], weight[e], out=out[start:end])
        return out

    def outer_sums(self, left: Tensor, right: Tensor, plan: RoutingPlan) -> Tensor:
        """(R, M), (R, N) -> (E, M, N): left^T right over the rows of each expert, exact zeros where it has none."""
        out = left.new_empty(plan.num_experts, left.shape[1], right.shape[1])
        for e, (start, end) in enumerate(_spans(plan)):
            torch.mm(left[start:end].T, right[start:end], out=out[e])
        return out


def _spans(plan: RoutingPlan) -> list[tuple[int, int]]:
    offsets = plan.expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] > plan.num_rows or offsets != sorted(offsets):
        raise ValueError(
            f"plan.expert_offsets: got {offsets}, expected ascending offsets from 0 to at most {plan.num_rows}"
        )
    return list(pairwise(offsets))


def _offsets(ascending: Tensor, end: int) -> Tensor:
    """Return for 0..end how many of the sorted values lie below: an exclusive prefix sum, (end + 1,) int32."""
    bounds = torch.arange(end + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, bounds, out_int32=True)


def _sum_rows(rows: Tensor, plan: RoutingPlan, row_weight: Tensor | None = None) -> Tensor:
    """(R, H) -> (T, H) float32 (float64): the sum of each token's rows in ascending order, zeros where it has none."""
    return _bags(rows, plan.token_rows, plan.token_row_offsets, row_weight)


def _bags(rows: Tensor, order: Tensor, offsets: Tensor, row_weight: Tensor | None) -> Tensor:
    """Sum the rows order[offsets[i]] to order[offsets[i + 1] - 1], for each i; what lies behind the last is not summed.

    An embedding bag: one thread owns a token, so the order is fixed, and it is threaded (index_add_ on the CPU was four
    times slower at T=4096, H=384, K=2; on a GPU it is not deterministic).
    """
    acc = accumulator(rows.dtype)
    if row_weight is not None:
        row_weight = row_weight.index_select(0, order).to(acc)
    # Rows behind the last token's are a bag of their own, which is dropped. `include_last_offset` would give
    # them to the last token in float64, and on a GPU.
    return F.embedding_bag(order, rows.to(acc), offsets, mode="sum", per_sample_weights=row_weight)[:-1]


def of_rows(of_experts: Tensor, plan: RoutingPlan) -> Tensor:
    """(E, N) -> (R, N): what belongs to the expert of each row; rows behind the last expert's get the last one's."""
    rows = torch.arange(plan.num_rows, dtype=torch.int32, device=of_experts.device)
    row_expert = torch.searchsorted(plan.expert_offsets[1:], rows, right=True, out_int32=True)
    return of_experts.index_select(0, row_expert.clamp(max=plan.num_experts - 1))


def _bias_gradients(
    w: MoEWeights, needed: Sequence[bool], plan: RoutingPlan, dgate_up: Tensor, dy_rows: Tensor, weight: Tensor | None
) -> list[Tensor | None]:
    """Return the gradients of the routed experts' biases, from those of gate_up and of their rows before `weight`."""
    if not w.biases.present:
        return []
    rows = torch.arange(plan.num_rows, dtype=torch.int32, device=dgate_up.device)
    kinds = (w.biases.gate_up, dgate_up, None), (w.biases.down, dy_rows, weight)
    return [
        _bags(gradient, rows, plan.expert_offsets, by) if wanted and bias is not None else None
        for wanted, (bias, gradient, by) in zip(needed, kinds, strict=True)
    ]


def _activate(gate_up: Tensor, activation: str) -> Tensor:
    wide = gate_up.to(accumulator(gate_up.dtype))
    if activation in _GELU:
        return F.gelu(wide, approximate=_GELU[activation]).to(gate_up.dtype)
    gate, up = wide.chunk(2, -1)
    if clamp := clamp_of(activation):
        limit, alpha, shift = clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (gate * torch.sigmoid(alpha * gate) * (up + shift)).to(gate_up.dtype)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _activate_bwd(gate_up: Tensor, dact: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation, still in the accumulation dtype, and dgate_up in the dtype of gate_up."""
    wide, dact = gate_up.to(accumulator(gate_up.dtype)), dact.to(accumulator(gate_up.dtype))
    if activation in _GELU:
        how = _GELU[activation]
        dgate_up = torch.ops.aten.gelu_backward(dact, wide, approximate=how)
        return F.gelu(wide, approximate=how), dgate_up.to(gate_up.dtype)
    gate, up = wide.chunk(2, -1)
    if clamp := clamp_of(activation):
        act, dgate, dup = _clamped_swiglu_bwd(gate, up, dact, *clamp)
        return act, torch.cat([dgate, dup], -1).to(gate_up.dtype)
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    return silu * up, torch.cat([dgate, dact * silu], -1).to(gate_up.dtype)


_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _clamped_swiglu_bwd(
    gate: Tensor, up: Tensor, dact: Tensor, limit: float, alpha: float, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation, dgate and dup."""
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit) + shift
    sigmoid = torch.sigmoid(alpha * g)
    swish = g * sigmoid
    dgate = dact * u * (sigmoid + alpha * swish * (1 - sigmoid))
    return swish * u, dgate.masked_fill(gate > limit, 0), (dact * swish).masked_fill(up.abs() > limit, 0)
