"""The MoE layer: experts, the weighted sum over picks, and the modules of DiT-MoE and EC-DIT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.routing import aux_loss, check_ids, expert_choice, token_choice


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2I), [gate; up] -> silu(gate) up, (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: Tensor, limit: float = 7.0, alpha: float = 1.702, shift: float = 1.0) -> Tensor:
    """(..., 2I), [gate; up] -> g sigmoid(alpha g) (u + shift), g = min(gate, limit), u = clamp(up, -limit, limit).

    Source: the defaults are those of gpt-oss and of MAGI-2 (SwiGLU7); alpha 1 and shift 0 clamp plain SwiGLU.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + shift)


Activation = str | Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "clamped_swiglu": clamped_swiglu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def expert_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Apply one expert: down_proj f(gate_up_proj x + gate_up_bias) + down_bias.

    Args:
        x: (T, H), any float dtype; all weights in the dtype of x.
        gate_up_proj: (2I, H) with rows [gate; up] for functions with a gate, (I, H) for gelu's forms.
        down_proj: (H, I).
        activation: f, a name out of ACTIVATIONS ("gelu": the exact one) or a function (T, 2I) or (T, I) -> (T, I).
        gate_up_bias: (2I,) or (I,), or None. down_bias: (H,), or None.
    Returns:
        (T, H).
    Raises:
        ValueError: unknown activation; gate_up_proj and down_proj that do not fit each other.
    Cost: 6 T H I FLOPs (swiglu), 4 T H I (gelu).
    """
    function = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if function is None:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    rows = down_proj.shape[1] * 2 // function(x.new_zeros(2)).shape[0]
    if gate_up_proj.shape[0] != rows:
        raise ValueError(f"gate_up_proj: got {gate_up_proj.shape[0]} rows, expected {rows} as down_proj asks")
    return F.linear(function(F.linear(x, gate_up_proj, gate_up_bias)), down_proj, down_bias)


def routed_sum(x: Tensor, weights: Tensor, picks: Tensor, experts: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Sum each token's picked experts: out[t] = sum over e with picks[t, e] of weights[t, e] * experts[e](x[t]).

    Token choice and expert choice are both this sum; they differ only in how weights and picks came about.

    Args:
        x: (T, H). weights: (T, E) float. picks: (T, E) bool. experts: E functions (rows, H) -> (rows, H).
    Returns:
        (T, H) in the dtype of x, accumulated in the wider of x's and weights'; exact 0 for a token nobody picked.
        An expert without tokens is still called, on no rows, so that its weights get a zero gradient and not None.
    Cost: one host sync per expert.
    """
    T, H = x.shape
    out = torch.zeros(T, H, device=x.device, dtype=torch.promote_types(x.dtype, weights.dtype))
    for e, expert in enumerate(experts):
        tokens = picks[:, e].nonzero().squeeze(1)
        out.index_add_(0, tokens, expert(x[tokens]).to(out.dtype) * weights[tokens, e, None].to(out.dtype))
    return out.to(x.dtype)


def spread_picks(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Write token choice in the dense form: topk_weights, topk_ids (T, K) -> weights (T, E), picks (T, E) bool.

    Raises:
        ValueError: topk_ids that do not fit topk_weights or num_experts.
    """
    T, K = topk_weights.shape
    check_ids(topk_ids, T, num_experts)
    if topk_ids.shape[1] != K:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected {(T, K)} as topk_weights")
    ids = topk_ids.long()
    dense = torch.zeros(T, num_experts, dtype=topk_weights.dtype, device=topk_weights.device)
    return dense.scatter_add(1, ids, topk_weights), torch.zeros_like(dense, dtype=torch.bool).scatter(1, ids, True)


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    shared_gate_up_proj: Tensor | None = None,
    shared_down_proj: Tensor | None = None,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared_gate_up_bias: Tensor | None = None,
    shared_down_bias: Tensor | None = None,
) -> Tensor:
    """Run the token-choice MoE layer on given picks.

    out[t] = sum_k topk_weights[t, k] expert_{topk_ids[t, k]}(x[t]) + shared(x[t])

    Args:
        x: (T, H). topk_weights, topk_ids: (T, K). gate_up_proj: (E, 2I, H), (E, I, H) for gelu. down_proj: (E, H, I).
        shared_gate_up_proj, shared_down_proj: (2Is, H) and (H, Is), or None. activation: as expert_mlp, of all experts.
        gate_up_bias: (E, 2I), (E, I) for gelu. down_bias: (E, H). shared_gate_up_bias: (2Is,). shared_down_bias: (H,).
    Returns:
        (T, H) in the dtype of x.
    Raises:
        ValueError: as expert_mlp and spread_picks.
    Cost: T (6 K H I + 6 H Is) FLOPs with swiglu.
    """
    weights, picks = spread_picks(topk_weights, topk_ids, down_proj.shape[0])
    out = moe_expert_choice(x, weights, picks, gate_up_proj, down_proj, activation, gate_up_bias, down_bias)
    if shared_gate_up_proj is not None:
        shared = shared_gate_up_proj, shared_down_proj, activation, shared_gate_up_bias, shared_down_bias
        out = out + expert_mlp(x, *shared)
    return out


def moe_expert_choice(
    x: Tensor,
    affinities: Tensor,
    picks: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation = "gelu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Run the expert-choice MoE layer on given picks; a token nobody picked gives exact zeros.

    out[t] = sum over e with picks[t, e] of affinities[t, e] expert_e(x[t])

    Args:
        x: (T, H). affinities: (T, E). picks: (T, E) bool. gate_up_proj: (E, I, H), (E, 2I, H) for swiglu.
        down_proj: (E, H, I). activation: as expert_mlp. gate_up_bias: (E, I), (E, 2I) for swiglu. down_bias: (E, H).
    Returns:
        (T, H) in the dtype of x.
    Raises:
        ValueError: as expert_mlp; numbers of experts that differ.
    Cost: 4 R H I FLOPs with gelu, R = picks.sum().
    """
    E = {affinities.shape[1], picks.shape[1], gate_up_proj.shape[0], down_proj.shape[0]}
    if len(E) != 1:
        raise ValueError(f"affinities, picks, gate_up_proj, down_proj: got {sorted(E)} experts, expected one number")
    experts = (
        partial(expert_mlp, gate_up_proj=g, down_proj=d, activation=activation, gate_up_bias=gb, down_bias=db)
        for g, d, gb, db in of_each_expert(gate_up_proj, down_proj, gate_up_bias, down_bias)
    )
    return routed_sum(x, affinities, picks, experts)


def of_each_expert(
    gate_up_proj: Tensor, down_proj: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> Iterable[tuple[Tensor | None, ...]]:
    """Return for each expert its two matrices and its two biases, None where there are none."""
    none = [None] * len(down_proj)
    biases = (none if bias is None else bias for bias in (gate_up_bias, down_bias))
    return zip(gate_up_proj, down_proj, *biases, strict=True)


class _InjectAux(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, aux: Tensor) -> Tensor:
        ctx.aux_dtype = aux.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones((), dtype=ctx.aux_dtype, device=dy.device)


def inject_aux(y: Tensor, aux: Tensor) -> Tensor:
    """Return y unchanged; in the backward pass hand the gradient 1 to the scalar aux.

    The balance loss thus acts without showing in the loss, and its gradient does not follow the loss: with fp16 loss
    scaling by 65536 it is 65536 times too weak (the original's behaviour, kept here).
    """
    return _InjectAux.apply(y, aux)


class MoEGate(nn.Module):
    """Router of DiT-MoE. forward(x (..., H)) -> (topk_weights (T, K), topk_ids (T, K), aux scalar): a forward hook here
    sees where every token goes."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, alpha: float = 0.01):
        super().__init__()
        self.top_k, self.alpha = top_k, alpha
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        topk_weights, topk_ids, probs = token_choice(x.reshape(-1, x.shape[-1]), self.weight, self.top_k)
        return topk_weights, topk_ids, aux_loss(probs, topk_ids, self.alpha)


class MoEMLP(nn.Module):
    """SwiGLU expert with the three matrices of the public checkpoints: down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoeBlock(nn.Module):
    """MoE layer of DiT-MoE, one path for train and eval, gradients in both; keys as in the public checkpoints.

    forward(x (..., H), return_aux_loss=False) -> (..., H), or with return_aux_loss the pair (y, aux). By default the
    balance loss is injected while training; a caller who asks for aux adds it to the loss himself, so that it is scaled
    with the loss, and nothing is injected. `last_aux` keeps the latest value, detached.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        shared_intermediate_size: int = 0,
        alpha: float = 0.01,
    ):
        super().__init__()
        self.gate = MoEGate(hidden_size, num_experts, top_k, alpha)
        self.experts = nn.ModuleList(MoEMLP(hidden_size, intermediate_size) for _ in range(num_experts))
        self.shared_experts = MoEMLP(hidden_size, shared_intermediate_size) if shared_intermediate_size else None
        self.last_aux: Tensor | None = None

    @property
    def num_experts_per_tok(self) -> int:
        return self.gate.top_k

    @property
    def alpha(self) -> float:
        return self.gate.alpha

    def forward(self, x: Tensor, return_aux_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        topk_weights, topk_ids, aux = self.gate(tokens)
        self.last_aux = aux.detach()
        y = routed_sum(tokens, *spread_picks(topk_weights, topk_ids, len(self.experts)), self.experts)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        y = y.view(x.shape)
        if return_aux_loss:
            return y, aux
        return inject_aux(y, aux) if self.training and torch.is_grad_enabled() else y


class ExpertChoiceMoE(nn.Module):
    """MoE layer of EC-DIT: experts pick tokens, raw affinities, 2-matrix GELU experts, no shared expert, no aux loss.

    forward(x (..., L, H)) -> same shape. tokens_per_group=None lets the L tokens of one image compete; a number lets
    that many consecutive tokens compete, across images too (EC-DIT: 1024 in training, 512 in sampling), and then an
    image depends on its neighbours in the batch.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        tokens_per_group: int | None = None,
    ):
        super().__init__()
        self.capacity_factor, self.tokens_per_group = capacity_factor, tokens_per_group
        self.gate_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_weight, std=0.006)  # as in the public re-implementations; the paper does not say
        for weight in (*self.gate_up_proj.detach(), *self.down_proj.detach()):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        group = x.shape[-2] if self.tokens_per_group is None else self.tokens_per_group
        affinities, picks = expert_choice(tokens, self.gate_weight, self.capacity_factor, group)
        return moe_expert_choice(tokens, affinities, picks, self.gate_up_proj, self.down_proj).view(x.shape)
