"""The DiT-MoE model: patches in, adaLN-Zero blocks of attention and MoE, patches out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.family import RULES, RoutedMoE
from reference.moe import SparseMoeBlock

GEOMETRY = {  # depth, hidden_size, num_heads, qk_norm as in the public checkpoints
    "S": (12, 384, 6, False),
    "B": (12, 768, 12, False),
    "L": (24, 1024, 16, False),
    "XL": (28, 1152, 16, True),
    "G": (40, 1408, 16, True),
}


@dataclass(frozen=True)
class DiTMoEConfig:
    """Everything that shapes a DiTMoE. Routed experts are mlp_ratio * hidden_size wide, the shared one num_shared *
    hidden_size; qk_norm selects the attention layout; input_size counts latent pixels (32 for 256-pixel images)."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    num_experts: int
    top_k: int
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    qk_norm: bool = False
    mlp_ratio: int = 4
    num_shared: int = 2
    label_dropout: float = 0.1
    aux_alpha: float = 0.01
    router: str = "token_choice"

    def __post_init__(self):
        if self.router not in RULES:
            raise ValueError(f"router: got {self.router!r}, expected one of {', '.join(RULES)}")
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "num_experts", "input_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of 4 and of num_heads")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: got {self.input_size}, expected a multiple of patch_size {self.patch_size}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}, expected 1..{self.num_experts} (num_experts)")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def from_name(cls, name: str, **overrides) -> DiTMoEConfig:
        """Return the named configuration, e.g. "DiT-MoE-S/2-8E2A" (size/patch, experts, active experts).

        Raises:
            ValueError: a name that is not of this form.
        """
        match = re.fullmatch(r"(?:DiT-MoE-)?(S|B|L|XL|G)/(2|4|8)-(\d+)E(\d+)A", name)
        if match is None:
            raise ValueError(f"name: got {name!r}, expected DiT-MoE-<S|B|L|XL|G>/<2|4|8>-<n>E<k>A")
        depth, hidden_size, num_heads, qk_norm = GEOMETRY[match[1]]
        sizes = (depth, hidden_size, num_heads, *map(int, match.groups()[1:]))
        return replace(cls(*sizes, qk_norm=qk_norm), **overrides)


class DiTMoE(nn.Module):
    """Class-conditional diffusion transformer with an MoE in every block; label num_classes means "no label"."""

    def __init__(self, config: DiTMoEConfig):
        super().__init__()
        self.config = config
        H, patch = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbedder(config.in_channels, patch, H)
        self.t_embedder = TimestepEmbedder(H)
        self.y_embedder = LabelEmbedder(config.num_classes, H)
        self.pos_embed = nn.Parameter(position_embedding(H, config.input_size // patch)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(H, patch * patch * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.detach().flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(embedding.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_aux_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Predict velocity or noise, and the variance channels with learn_sigma.

        Args:
            x: (B, in_channels, height, width), dtype of the parameters; height = width = input_size.
            t: (B,) float or int: 0..1 for rectified flow (fed unscaled, as the original does), 0..999 for DDPM.
            y: (B,) int64 in 0..num_classes; num_classes is "no label". In training mode a label is dropped with
                probability label_dropout (torch's default generator).
            return_aux_loss: return (prediction, sum of the blocks' balance losses) and inject none.
        Returns:
            (B, out_channels, height, width).
        Raises:
            ValueError: shapes or labels that do not fit the configuration.
        """
        self._check(x, t, y)
        if self.training and self.config.label_dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.config.label_dropout
            y = torch.where(dropped, self.config.num_classes, y)
        condition = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x) + self.pos_embed
        aux = tokens.new_zeros(())
        for block in self.blocks:
            if return_aux_loss:
                tokens, block_aux = block(tokens, condition, return_aux_loss=True, labels=y)
                aux = aux + block_aux
            else:
                tokens = block(tokens, condition, labels=y)
        out = self._unpatchify(self.final_layer(tokens, condition))
        return (out, aux) if return_aux_loss else out

    def forward_with_guidance(self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: str = "all") -> Tensor:
        """Predict with classifier-free guidance: uncond + scale * (cond - uncond), both halves in one batch.

        Args:
            x, t, y: as forward. scale: 1 is no guidance.
            channels: "all" guides every image channel (the RF samplers), "first3" only the first three (the DDPM
                samplers of DiT and DiT-MoE); the other channels, the variance among them, stay conditional.
        Returns:
            (B, out_channels, height, width).
        Raises:
            ValueError: unknown channels; as forward.
        """
        if channels not in ("all", "first3"):
            raise ValueError(f"channels: got {channels!r}, expected 'all' or 'first3'")
        null = torch.full_like(y, self.config.num_classes)
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        cond, uncond = both.chunk(2)
        guided = self.config.in_channels if channels == "all" else min(3, self.config.in_channels)
        mixed = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([mixed, cond[:, guided:]], dim=1)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        B, _, _ = tokens.shape
        p, C, side = self.config.patch_size, self.config.out_channels, self.config.input_size // self.config.patch_size
        grid = tokens.view(B, side, side, p, p, C)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * p, side * p)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        size, B = self.config.input_size, x.shape[0]
        if x.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {self.config.in_channels}, {size}, {size})")
        for name, value in (("t", t), ("y", y)):
            if value.shape != (B,):
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({B},) as x has {B} images")
        if B and not 0 <= int(y.min()) <= int(y.max()) <= self.config.num_classes:
            raise ValueError(f"y: got labels {int(y.min())}..{int(y.max())}, expected 0..{self.config.num_classes}")


def count_parameters(model: DiTMoE) -> tuple[int, int]:
    """Return (total, active) parameters: active counts top_k of the num_experts routed experts, and all the rest."""
    total = sum(p.numel() for p in model.parameters())
    names = "gate_up_proj", "down_proj"
    routed = sum(
        sum(getattr(block.moe, name).numel() for name in names)
        if block.conditioned
        else sum(p.numel() for p in block.moe.experts.parameters())
        for block in model.blocks
    )
    E, K = model.config.num_experts, model.config.top_k
    return total, total - routed * (E - K) // E


class DiTBlock(nn.Module):
    """adaLN-Zero block: x += gate * attn(modulate(norm(x))), then the same with the MoE.

    Rules other than token choice may look at norm(x), the condition and the labels, too.
    """

    def __init__(self, config: DiTMoEConfig):
        super().__init__()
        H = config.hidden_size
        self.norm1 = nn.LayerNorm(H, elementwise_affine=False, eps=1e-6)
        self.attn = (QKNormAttention if config.qk_norm else Attention)(H, config.num_heads)
        self.norm2 = nn.LayerNorm(H, elementwise_affine=False, eps=1e-6)
        I, E, K, Is = config.mlp_ratio * H, config.num_experts, config.top_k, config.num_shared * H
        self.conditioned = config.router != "token_choice"
        if self.conditioned:
            self.moe = RoutedMoE(H, I, E, K, Is, config.router, config.num_classes)
        else:
            self.moe = SparseMoeBlock(H, I, E, K, Is, config.aux_alpha)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(H, 6 * H))

    def forward(
        self, x: Tensor, condition: Tensor, return_aux_loss: bool = False, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        modulation = self.adaLN_modulation(condition)[:, None]
        shift_attn, scale_attn, gate_attn, shift_moe, scale_moe, gate_moe = modulation.chunk(6, dim=-1)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        normed = self.norm2(x)
        moe_input, call = modulate(normed, shift_moe, scale_moe), {}
        if self.conditioned:
            call = {"router_input": normed, "conditioning": {"timestep": condition, "labels": labels}}
        if return_aux_loss:
            y, aux = self.moe(moe_input, return_aux_loss=True, **call)
            return x + gate_moe * y, aux
        return x + gate_moe * self.moe(moe_input, **call)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Attention(nn.Module):
    """The plain layout (S, B, L): qkv, proj."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        return self.proj(attend(q, k, v))


class QKNormAttention(nn.Module):
    """The qk-norm layout (XL, G): Wqkv, q_norm, k_norm, out_proj."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.Wqkv(x), self.num_heads)
        return self.out_proj(attend(self.q_norm(q), self.k_norm(k), v))


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, L, 3H), rows q | k | v with heads inside, into three (B, heads, L, H / heads)."""
    B, L, H3 = qkv.shape
    return qkv.view(B, L, 3, num_heads, H3 // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(head size)) v with the heads merged: (B, heads, L, D) -> (B, L, heads * D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PatchEmbedder(nn.Module):
    def __init__(self, in_channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # the last row is "no label"

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # bf16 cannot hold t = 999
        return self.mlp(timestep_embedding(t.to(wide), self.frequencies).to(dtype))


def timestep_embedding(t: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
    """Return [cos(t f), sin(t f)] with f_i = max_period^(-i / (size / 2)): t (B,) float -> (B, size)."""
    half = size // 2
    exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angles = t[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(hidden_size: int, side: int) -> Tensor:
    """Return the fixed 2-D table (side * side, hidden_size) in torch's default dtype: the first half of a row encodes
    the column, the second half the row of the patch, each as [sin, cos] with max period 10000."""
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    table = torch.cat([line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1)
    return table.reshape(side * side, hidden_size).to(torch.get_default_dtype())
