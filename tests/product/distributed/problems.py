"""A layer and each rank's batch, computed by one process and by many: run in the workers, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import reference.moe
from moe_kernels import ExpertChoice, MoELayer, TokenChoice
from moe_kernels.weights import LAYOUTS, stack_dit_moe, unstack_dit_moe
from tests.contenders import BACKENDS
from tests.trap_cases import draw_router

L, H, I, Is, E, K = 5, 32, 24, 16, 8, 2
BACKEND = "native" if "native" in BACKENDS else "eager"
BIASES = ("gate_up_bias", "down_bias", "shared_gate_up_bias", "shared_down_bias")
PARAMETERS = ("gate_weight", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj", *BIASES)


@dataclass(frozen=True)
class Problem:
    images: tuple[int, ...]  # of each rank
    router: TokenChoice | ExpertChoice = TokenChoice(K, 0.1)  # noqa: RUF009 (it is frozen)
    shared: bool = True
    used: int = E  # token choice takes the first of the experts alone
    adaln: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "gate_up"
    activation: str = "swiglu"
    recompute: bool = False
    bias: bool = False

    def layer(self, seed: int, backend: str) -> MoELayer:
        torch.manual_seed(seed)
        sizes = H, I, E, getattr(self.router, "top_k", K), Is if self.shared else 0, self.activation
        how = {"backend": backend, "dtype": self.dtype, "layout": self.layout, "recompute": self.recompute}
        layer = MoELayer(*sizes, router=self.router, bias=self.bias, **how)
        layer.gate_weight.data.copy_(self.routed(seed)[1])
        for name in BIASES:  # zeros at first
            if getattr(layer, name) is not None:
                nn.init.normal_(getattr(layer, name), std=0.3)
        return layer

    def routed(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw x (T, H) without near ties, and the gate's weight; with used < E, a last column of x shuts the rest."""
        T, used = sum(self.images) * L, self.used
        x, weight = draw_router(T, H - 1, used, min(K, used), self.dtype, 1.0, seed)
        shut = weight.new_full((E, H), -8.0)
        shut[:used] = nn.functional.pad(weight, (0, 1))
        return nn.functional.pad(x, (0, 1), value=1.0), shut

    def batches(self, seed: int) -> list[dict[str, Tensor]]:
        """Return x (B, L, H) of each rank and the gradient of its output; for adaLN shift, scale and gate (B, H)."""
        x = self.routed(seed)[0].view(-1, L, H)
        g = torch.Generator().manual_seed(seed)
        named = {"x": x, "dout": torch.randn(x.shape, generator=g).to(self.dtype)}
        if self.adaln:
            named |= {n: torch.randn(len(x), H, generator=g).to(self.dtype) for n in ("shift", "scale", "gate")}
        parts = {name: t.split(self.images) for name, t in named.items()}
        return [{name: part[r] for name, part in parts.items()} for r in range(len(self.images))]


class Biased(nn.Module):
    """The parameters of a layer with biases, in its layout, and the oracle's functions around them."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router, self.activation, self.layout = layer.router, layer.activation, LAYOUTS[layer.layout]
        for name in PARAMETERS:
            p = getattr(layer, name)
            self.register_parameter(name, None if p is None else nn.Parameter(p.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        tokens, aux = x.reshape(-1, H), None
        if isinstance(self.router, ExpertChoice):
            group = self.router.tokens_per_group or x.shape[-2]
            chosen = reference.moe.expert_choice(tokens, self.gate_weight, self.router.capacity_factor, group)
        else:
            weights, ids, probs = reference.moe.token_choice(tokens, self.gate_weight, self.router.top_k)
            aux = reference.moe.aux_loss(probs, ids, self.router.aux_loss_alpha)
            chosen = reference.moe.spread_picks(weights, ids, E)
        y = reference.moe.moe_expert_choice(tokens, *chosen, **self.of("") | {"activation": self.activation})
        if self.shared_down_proj is not None:
            y = y + reference.moe.expert_mlp(tokens, **self.of("shared_") | {"activation": self.activation})
        return (y if aux is None else reference.moe.inject_aux(y, aux)).view(x.shape)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Return matrices (out, in) with rows [gate; up], and biases."""
        named = {name: getattr(self, prefix + name) for name in ("gate_up_proj", "down_proj", *BIASES[:2])}
        if self.layout.in_out:
            named |= {name: t.mT for name, t in named.items() if name.endswith("proj")}
        if self.layout.up_first:
            for name, dim in (("gate_up_proj", -2), ("gate_up_bias", -1)):
                named[name] = torch.cat(named[name].chunk(2, dim)[::-1], dim)
        return named


def oracle(layer: MoELayer) -> nn.Module:
    (e, h, i), own = layer.down_proj.shape, layer.state_dict()
    if layer.down_bias is not None:
        return Biased(layer).double()
    if isinstance(layer.router, ExpertChoice):
        router = layer.router
        block = reference.moe.ExpertChoiceMoE(h, i, e, router.capacity_factor, router.tokens_per_group)
    else:
        wide = 0 if layer.shared_down_proj is None else layer.shared_down_proj.shape[1]
        block = reference.moe.SparseMoeBlock(h, i, e, layer.router.top_k, wide, alpha=layer.router.aux_loss_alpha)
        own = unstack_dit_moe(own)
    block.double().load_state_dict(own)
    return block


def call(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward; return the output and the gradients of the inputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in batch.items() if name != "dout"}
    if len(leaves) == 1:
        y = module(leaves["x"])
    elif isinstance(module, (reference.moe.SparseMoeBlock, Biased)):
        x, shift, scale, gate = (t if t.dim() == 3 else t[:, None] for t in leaves.values())
        y = x + gate * module(nn.functional.layer_norm(x, (H,), eps=1e-6) * (1 + scale) + shift)
    else:
        y = module.forward_adaln(*leaves.values())
    (y * batch["dout"]).sum().backward()
    return y.detach(), {name: t.grad for name, t in leaves.items()}


def by_one(problem: Problem, seed: int, how: str) -> dict[str, Tensor]:
    """Compute each rank's part; the mean over ranks of the gradients."""
    layer = problem.layer(seed, "eager")
    batches = problem.batches(seed)
    if how == "oracle":
        layer, batches = oracle(layer), [{name: t.double() for name, t in batch.items()} for batch in batches]
    parts = [call(layer, batch) for batch in batches]
    grads = {name: p.grad / len(parts) for name, p in layer.named_parameters()}
    return named(parts, stack_dit_moe(grads) if isinstance(layer, reference.moe.SparseMoeBlock) else grads)


def named(parts: list[tuple[Tensor, dict[str, Tensor]]], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put what all ranks have beside each other; an expert's gradient is one slice, see tests/error_rule.py."""
    outs, inputs = zip(*parts, strict=True)
    results = {"out": torch.cat(outs)} | {f"d{name}": torch.cat([i[name] for i in inputs]) for name in inputs[0]}
    return results | {f"d{name}": grads[name] for name in PARAMETERS if name in grads}


def by_many(module: nn.Module, problem: Problem, seed: int, averaged: bool) -> dict[str, Tensor]:
    """Compute this rank's part and gather all; averaged: somebody averages the gradients of what is replicated."""
    mine = call(module, problem.batches(seed)[distributed.get_rank()])
    return of_all(mine, module, problem.dtype, averaged)


def of_all(
    mine: tuple[Tensor, dict[str, Tensor]], module: nn.Module, dtype: torch.dtype, averaged: bool
) -> dict[str, Tensor]:
    """Gather the ranks' parts and the gradients of the parameters."""
    world = distributed.get_world_size()
    parts = [None] * world
    distributed.all_gather_object(parts, mine)
    grads = {}
    for name, p in module.named_parameters():
        grad = p.grad
        if grad is None:
            continue
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        elif not averaged:
            distributed.all_reduce(grad)
            grad = grad / world
        grads[name.removeprefix("module.")] = grad.to(dtype)  # a policy of mixed precision keeps more
    return named(parts, grads)


def compute(problem: Problem, make: Callable[[MoELayer], nn.Module], averaged: bool = False):
    """Return compute(seed, how) for `judge`; `make` distributes a layer."""

    def computed(seed: int, how: str) -> dict[str, Tensor]:
        if how in ("oracle", "eager", "loop"):
            return by_one(problem, seed, how)
        return by_many(make(problem.layer(seed, BACKEND)), problem, seed, averaged)

    return computed


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def of_world(problem: Problem, world: int) -> Problem:
    """Repeat the images of two ranks for more of them."""
    return replace(problem, images=problem.images * (world // len(problem.images)))
