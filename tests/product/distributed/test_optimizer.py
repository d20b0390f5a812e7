"""AdamW and the gradients' norm on parts: plain parameters, and DTensors on several meshes, as one process has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from moe_kernels.distributed import AdamW, clip_grad_norm, data_parallel, expert_parallel, fully_shard
from tests.product.distributed.problems import BACKEND, Problem, by_one, call, mesh_of

pytestmark = pytest.mark.unpoisoned


def norms(problem: Problem, seed: int, world: int) -> None:
    """Clip what lies on two meshes, or on one and none, as one process does by torch's function."""
    mesh = mesh_of(dp=2, ep=world // 2)
    for wrap in (fully_shard, data_parallel):
        model = wrap(expert_parallel(problem.layer(seed, BACKEND), mesh), mesh)
        call(model, problem.batches(seed)[distributed.get_rank()])
        one = problem.layer(seed, BACKEND)
        for name, grad in by_one(problem, seed, "eager").items():
            if name[1:] in dict(one.named_parameters()):
                getattr(one, name[1:]).grad = grad
        expected = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        total = clip_grad_norm(model.parameters(), 0.1)
        torch.testing.assert_close(total, expected)
        again = clip_grad_norm(model.parameters(), 1.0)
        torch.testing.assert_close(again, torch.tensor(0.1))


def test_the_norm_of_gradients_on_two_meshes(four, seed):
    for bias in (False, True):
        four.run(norms, problem=Problem((2, 1, 1, 2), bias=bias), seed=seed, world=4)


def spread(t: Tensor) -> list[Tensor]:
    """Return t plain, divided by rows (unevenly) and by columns, and as copies: on meshes of one and two dimensions."""
    one, two = mesh_of(ranks=2), mesh_of(dp=1, ep=2)
    placements = [(one, [Shard(0)]), (one, [Replicate()]), (two, [Replicate(), Shard(1)])]
    return [t.clone(), *(distribute_tensor(t.clone(), mesh, how) for mesh, how in placements)]


def steps(seed: int) -> None:
    """Parts of numbers take the same step as all of them, to the bit, whatever torch's implementation."""
    torch.manual_seed(seed)
    start, grads = torch.randn(3, 64), torch.randn(3, 3, 64)  # parts of whole vectors: their tails round otherwise
    for how in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        plain = nn.Parameter(start.clone())
        parameters = [nn.Parameter(p) for p in spread(start)]
        optimizers = [torch.optim.AdamW([plain], lr=0.1, **how), AdamW(parameters, lr=0.1, **how)]
        for grad in grads:
            plain.grad = grad
            for p, g in zip(parameters, spread(grad), strict=True):
                p.grad = g
            for optimizer in optimizers:
                optimizer.step()
        for p in parameters:
            assert torch.equal(whole(p), plain), how
            state = optimizers[1].state[p]
            assert type(state["exp_avg"]) is type(p.data) and state["step"] == 3
            assert torch.equal(whole(state["exp_avg"]), optimizers[0].state[plain]["exp_avg"])


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def test_a_step_over_parts_is_that_of_the_whole(two, seed):
    two.run(steps, seed=seed)


def any_placement(seed: int) -> None:
    torch.manual_seed(seed)
    grad = torch.randn(3, 4)
    parts = [*spread(grad), DTensor.from_local(grad / 2, mesh_of(ranks=2), [Partial()])]
    parameters = [nn.Parameter(part.clone()) for part in parts]
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part
    torch.testing.assert_close(clip_grad_norm(parameters, 1.0), grad.norm() * len(parts) ** 0.5)
    torch.testing.assert_close(clip_grad_norm(parameters, torch.inf), torch.tensor(1.0))
    torch.testing.assert_close(whole(parameters[-1].grad), grad / grad.norm() / len(parts) ** 0.5)


def test_the_norm_of_any_placement(two, seed):
    """Copies count once, sums that are not yet taken as their sum."""
    two.run(any_placement, seed=seed)


def test_no_gradients_have_no_norm():
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0) == 0
