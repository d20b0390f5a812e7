"""FSDP2, alone and beside expert parallelism, trains like one process: by the error rule, over several steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moe_kernels import MoELayer, TokenChoice, replace_moe
from moe_kernels.distributed import data_parallel, expert_parallel, fully_shard, stack_experts
from moe_kernels.weights import unstack_dit_moe
from reference.moe import SparseMoeBlock
from tests.error_rule import judge
from tests.product.distributed import problems
from tests.product.distributed.problems import BACKEND, E, H, I, Is, K, L, Problem, mesh_of

pytestmark = pytest.mark.unpoisoned
STEPS, PARTS = 4, 2  # a step accumulates gradients over its parts


class Block(nn.Module):
    def __init__(self, recomputed: bool, bias: bool):
        super().__init__()
        self.moe, self.recomputed = SparseMoeBlock(H, I, E, K, Is, alpha=0.0), recomputed
        if bias:
            self.moe = MoELayer(H, I, E, K, Is, bias=True, router=TokenChoice(K, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.moe, x, use_reentrant=False) if self.recomputed else self.moe(x))


class Model(nn.Module):
    """Two blocks, so that there are two units."""

    def __init__(self, recomputed: bool, bias: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(recomputed, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def by_fsdp(model: nn.Module) -> nn.Module:
    mesh = mesh_of(dp=distributed.get_world_size())
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def stack(model: nn.Module) -> None:
    if not isinstance(model.blocks[0].moe, MoELayer):
        stack_experts(model)


def by_ep_and_fsdp(model: nn.Module) -> nn.Module:
    mesh = mesh_of(dp=distributed.get_world_size() // 2, ep=2)
    stack(model)
    expert_parallel(model, mesh)
    for block in model.blocks:
        fully_shard(block, mesh)
    return fully_shard(model, mesh)


def by_ep_and_ddp(model: nn.Module) -> nn.Module:
    mesh = mesh_of(dp=distributed.get_world_size() // 2, ep=2)
    stack(model)
    return data_parallel(expert_parallel(model, mesh), mesh)


def by_ep_and_one_unit(model: nn.Module) -> nn.Module:
    """No experts are left for FSDP2, and both blocks are gathered together."""
    mesh = mesh_of(dp=1, ep=distributed.get_world_size())
    stack(model)
    expert_parallel(model, mesh)
    fully_shard(list(model.blocks), mesh)
    return fully_shard(model, mesh)


WAYS = {way.__name__: way for way in (by_fsdp, by_ep_and_fsdp, by_ep_and_ddp, by_ep_and_one_unit)}


def without_sync(model: nn.Module, last: bool):
    """Let the parts but the last of a step communicate no gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()


def batch(seed: int, step: int, part: int, rank: int) -> Tensor:
    g = torch.Generator().manual_seed(seed * 1000 + step * 100 + part * 10 + rank)
    return torch.randn(1 + rank % 2, L, H, generator=g)


def train(model: nn.Module, backward: Callable[[int, int], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for step in range(STEPS):
        for part in range(PARTS):
            backward(step, part)
        optimizer.step()
        optimizer.zero_grad()


def computed_by(model: nn.Module, how: str) -> None:
    biased = [block for block in model.blocks if isinstance(block.moe, MoELayer)]
    if how == "oracle":
        for block in biased:
            block.moe = problems.oracle(block.moe)
        model.double()
    elif biased:
        for block in biased:
            block.moe.backend = how
    else:
        replace_moe(model, backend=how)


def updates(way: str, recomputed: bool, world: int, bias: bool) -> Callable[[int, str], dict[str, Tensor]]:
    """Return compute(seed, how) for `judge`: by how much each weight has moved."""

    def computed(seed: int, how: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model, single = Model(recomputed, bias), how in ("oracle", "eager")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        computed_by(model, how)
        model = model if single else WAYS[way](model)

        def loss(step: int, part: int, rank: int) -> Tensor:
            x = batch(seed, step, part, rank)
            return model(x.double() if how == "oracle" else x).square().mean() / PARTS

        def backward(step: int, part: int) -> None:
            if single:
                sum(loss(step, part, rank) for rank in range(world)).div(world).backward()
                return
            with without_sync(model, part == PARTS - 1):
                loss(step, part, distributed.get_rank()).backward()

        train(model, backward)
        after = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
        after = after if before.keys() == after.keys() else unstack_dit_moe(after)
        return {f"_{name}": (after[name] - t.to(after[name].dtype))[None] for name, t in before.items()}

    return computed


def whole(p: Tensor) -> Tensor:
    return p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()


def judge_training(way: str, recomputed: bool, seed: int, bias: bool = False) -> None:
    world = distributed.get_world_size()
    judge(f"train_{way}", updates(way, recomputed, world, bias), BACKEND, torch.float32, seed)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("way", ["by_fsdp", "by_ep_and_one_unit"])
def test_two_ranks_train_like_one_process(two, way, recomputed, seed):
    two.run(judge_training, way=way, recomputed=recomputed, seed=seed)


@pytest.mark.parametrize(
    ("way", "recomputed"), [("by_ep_and_fsdp", False), ("by_ep_and_fsdp", True), ("by_ep_and_ddp", False)]
)
def test_four_ranks_with_expert_parallelism_train_like_one_process(four, way, recomputed, seed):
    four.run(judge_training, way=way, recomputed=recomputed, seed=seed)


@pytest.mark.parametrize("way", ["by_ep_and_fsdp", "by_ep_and_ddp"])
def test_biases_train_like_those_of_one_process(four, way, seed):
    four.run(judge_training, way=way, recomputed=False, seed=seed, bias=True)


def judge_mixed(with_ep: bool, bias: bool, seed: int) -> None:
    """Weights in float32, computed in bfloat16, reduced in float32: against a layer in bfloat16."""
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    problem = Problem((2, 1), dtype=torch.bfloat16, bias=bias)

    def make(layer):
        if not with_ep:
            return fsdp.fully_shard(layer.float(), mesh=mesh_of(dp=2), mp_policy=policy)
        mesh = mesh_of(dp=1, ep=2)
        return fully_shard(expert_parallel(layer.float(), mesh), mesh, mp_policy=policy)

    judge("mixed", problems.compute(problem, make, averaged=True), BACKEND, problem.dtype, seed)


@pytest.mark.parametrize(("with_ep", "bias"), [(False, False), (True, False), (True, True)])
def test_mixed_precision_keeps_the_error_rule(two, with_ep, bias, seed):
    two.run(judge_mixed, with_ep=with_ep, bias=bias, seed=seed)
