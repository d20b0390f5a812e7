"""The peers: what DiT-MoE users run today, rebuilt from the description of its algorithm, to be timed against.

`AuthorsMoE` does what the original does, cost included: the training path walks all experts with boolean masks, the
inference path argsorts, asks the CPU for the expert boundaries and scatters with a materialised index;
`pretraining_tp=2` cuts each GEMM into slices. tests/bench/test_peers.py pins its ATen calls, so that the baseline is
neither better nor worse than theirs. `SortedLoopMoE` is the loop a careful user would write: tokens sorted by expert,
one plain GEMM per expert and projection. Parameters carry DiT-MoE's state-dict keys, so that both stand in for the
oracle's SparseMoeBlock.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InjectAuxLoss(torch.autograd.Function):
    """Pass y through; in backward give aux the gradient 1, whatever the loss scale (the original's behaviour)."""

    @staticmethod
    def forward(ctx, y: Tensor, aux: Tensor) -> Tensor:
        ctx.aux_dtype = aux.dtype
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones((), dtype=ctx.aux_dtype, device=dy.device)


class PeerGate(nn.Module):
    """Softmax over all experts, unsorted top-k, raw probabilities; batch-wise aux loss in training."""

    def __init__(self, weight: nn.Parameter, top_k: int, alpha: float):
        super().__init__()
        self.weight, self.top_k, self.alpha = weight, top_k, alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, L, H) -> topk_weights (T, K), topk_ids (T, K) int64, aux () or None."""
        B, H = x.shape[0], x.shape[-1]
        probs = F.linear(x.view(-1, H), self.weight).softmax(dim=-1)
        topk_weights, topk_ids = torch.topk(probs, k=self.top_k, dim=-1, sorted=False)
        if not (self.training and self.alpha > 0):
            return topk_weights, topk_ids, None
        num_experts = self.weight.shape[0]
        picked = F.one_hot(topk_ids.view(B, -1).view(-1), num_classes=num_experts)
        load = picked.float().mean(0) * num_experts
        return topk_weights, topk_ids, (probs.mean(0) * load).sum() * self.alpha


class PeerMLP(nn.Module):
    """SwiGLU expert; with pretraining_tp > 1 in slices, joined by cat and Python's sum, as in the original."""

    def __init__(self, mlp: nn.Module, pretraining_tp: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.pretraining_tp = pretraining_tp

    def forward(self, x: Tensor) -> Tensor:
        if self.pretraining_tp == 1:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        width = self.up_proj.weight.shape[0] // self.pretraining_tp
        gate_slices = self.gate_proj.weight.split(width, dim=0)
        up_slices = self.up_proj.weight.split(width, dim=0)
        down_slices = self.down_proj.weight.split(width, dim=1)
        gate = torch.cat([F.linear(x, w) for w in gate_slices], dim=-1)
        up = torch.cat([F.linear(x, w) for w in up_slices], dim=-1)
        act = (F.silu(gate) * up).split(width, dim=-1)
        return sum(F.linear(a, w) for a, w in zip(act, down_slices, strict=True))


class PeerMoE(nn.Module):
    """A DiT-MoE block taken over: the very same Parameter objects under the same keys, the peer's algorithm.

    forward(x) takes (B, L, H) and returns the same shape; on_given_picks(x, topk_weights, topk_ids) is the entry for
    forced routing.
    """

    def __init__(self, block: nn.Module, pretraining_tp: int = 1):
        super().__init__()
        mlps = [*block.experts, *([] if block.shared_experts is None else [block.shared_experts])]
        widths = [mlp.up_proj.weight.shape[0] for mlp in mlps]
        if pretraining_tp < 1 or any(width % pretraining_tp for width in widths):
            raise ValueError(
                f"pretraining_tp must divide both expert widths, got {pretraining_tp} for {sorted(set(widths))}"
            )
        self.num_experts_per_tok = block.num_experts_per_tok
        alpha = getattr(block, "alpha", getattr(block.gate, "alpha", 0.01))
        self.gate = PeerGate(block.gate.weight, self.num_experts_per_tok, alpha)
        peers = [PeerMLP(mlp, pretraining_tp) for mlp in mlps]
        self.experts = nn.ModuleList(peers[: len(block.experts)])
        self.shared_experts = peers[-1] if len(peers) > len(self.experts) else None
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids, aux = self.gate(x)
        out = self.routed(x.view(-1, x.shape[-1]), topk_weights, topk_ids).view(x.shape)
        if aux is not None:
            out = InjectAuxLoss.apply(out, aux)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def on_given_picks(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run routed and shared experts on flat tokens (T, H) and picks (T, K) from elsewhere; no aux loss."""
        out = self.routed(x, topk_weights, topk_ids)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        raise NotImplementedError


class AuthorsMoE(PeerMoE):
    """The original's algorithm: training path when .training, inference path (no gradient at all) otherwise.

    As in the original, the training path writes fp32 rows into a buffer of x's dtype: it needs fp32 tokens (autocast
    is fine).
    """

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        flat_ids = topk_ids.view(-1)
        if self.training:
            return self._train_path(x, topk_weights, flat_ids)
        return self._infer_path(x, topk_weights.view(-1, 1), flat_ids)

    def _train_path(self, x: Tensor, topk_weights: Tensor, flat_ids: Tensor) -> Tensor:
        x = x.repeat_interleave(self.num_experts_per_tok, dim=0)
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            y[flat_ids == e] = expert(x[flat_ids == e]).float()  # two masks: two host syncs per expert
        return (y.view(*topk_weights.shape, -1) * topk_weights.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def _infer_path(self, x: Tensor, flat_weights: Tensor, flat_ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = flat_ids.argsort()
        ends = flat_ids.bincount().cpu().numpy().cumsum(0)
        row_token = order // self.num_experts_per_tok
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            tokens = row_token[start:end]
            y = self.experts[e](x[tokens])
            y.mul_(flat_weights[order[start:end]])
            out = out.to(y.dtype)
            out.scatter_reduce_(0, tokens.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
        return out


class SortedLoopMoE(PeerMoE):
    """Tokens gathered once in expert order, torch.mm per non-empty expert, one weighted index_add; one host sync."""

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        flat_ids = topk_ids.reshape(-1)
        order = flat_ids.argsort(stable=True)
        row_token = order // topk_ids.shape[1]
        counts = flat_ids.bincount(minlength=len(self.experts)).tolist()
        rows = x[row_token].split(counts)
        y = torch.cat([expert(r) for expert, r in zip(self.experts, rows, strict=True) if len(r)])
        weighted = y * topk_weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=weighted.dtype).index_add(0, row_token, weighted).to(x.dtype)


def install(model: nn.Module, pretraining_tp: int = 1, peer: type[PeerMoE] = AuthorsMoE) -> int:
    """Swap, in place, every DiT-MoE block of model for a peer that owns the same Parameter objects.

    Args:
        model: any module tree; a block is recognised by gate.weight, experts[i].gate_proj, shared_experts and
            num_experts_per_tok.
        pretraining_tp: 1, or the number of slices each GEMM is cut into.
        peer: AuthorsMoE or SortedLoopMoE.
    Returns:
        the number of blocks swapped.
    Raises:
        ValueError: model itself is a block (it cannot be swapped in place), or it has none.
    """
    if is_moe_block(model):
        raise ValueError(f"model is itself an MoE block ({type(model).__name__}): use {peer.__name__}(model)")
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_moe_block(child)
    ]
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no DiT-MoE block (gate, experts, shared_experts, num_experts_per_tok)"
        )
    for parent, name, block in found:
        setattr(parent, name, peer(block, pretraining_tp))
    return len(found)


def is_moe_block(module: nn.Module) -> bool:
    """Tell whether module has the attribute structure of a DiT-MoE block."""
    experts = getattr(module, "experts", None)
    return (
        isinstance(experts, nn.ModuleList)
        and len(experts) > 0
        and all(hasattr(experts[0], name) for name in ("gate_proj", "up_proj", "down_proj"))
        and hasattr(getattr(module, "gate", None), "weight")
        and hasattr(module, "shared_experts")
        and hasattr(module, "num_experts_per_tok")
    )
