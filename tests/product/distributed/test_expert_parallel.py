"""Expert parallelism equals one process by the error rule: values, the gradients of inputs and of every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_kernels import ExpertChoice, ops
from moe_kernels.distributed import BoundedDispatcher, data_parallel, expert_parallel, fully_shard
from moe_kernels.distributed.expert_parallel import _all_to_one
from tests.error_rule import judge
from tests.product.distributed import problems
from tests.product.distributed.problems import E, L, Problem, compute, mesh_of
from tests.router_cases import CASES, by_oracle, double, draw

pytestmark = pytest.mark.unpoisoned
PER_IMAGE, PER_GROUP = ExpertChoice(2.0), ExpertChoice(2.0, tokens_per_group=10)
PROBLEMS = {
    "plain": Problem((2, 2)),
    "uneven": Problem((3, 1)),
    "idle": Problem((2, 0)),
    "to_one_rank": Problem((2, 2), used=E // 2),
    "to_one_expert": Problem((1, 2), router=replace(problems.Problem.router, top_k=1), used=1),
    "no_shared": Problem((2, 2), shared=False),
    "adaln": Problem((2, 1), adaln=True),
    "expert_choice": Problem((2, 2), router=PER_IMAGE, shared=False, activation="gelu"),
    "groups": Problem((2, 4), router=PER_GROUP, shared=False, activation="gelu"),
    "recompute": Problem((2, 2), recompute=True),
    "bf16": Problem((2, 2), dtype=torch.bfloat16),
    "biases": Problem((2, 1), bias=True),
    "biases_of_idle_ranks": Problem((2, 0), bias=True, used=E // 2),
    "biases_adaln": Problem((2, 1), bias=True, adaln=True, recompute=True),
    "biases_bf16": Problem((2, 2), bias=True, dtype=torch.bfloat16),
    "biases_no_shared": Problem((1, 2), bias=True, shared=False, layout="up_gate_in_out"),
    "biases_gelu": Problem((1, 2), bias=True, activation="gelu_tanh"),
    "biases_expert_choice": Problem((2, 2), bias=True, router=PER_IMAGE, activation="gelu"),
}
DISPATCHERS = {"exact": None, "bounded": BoundedDispatcher(4 * L)}
WRAPPERS = {"ddp": data_parallel, "fsdp": fully_shard}


def judge_case(case: str, dispatcher: str, sizes: dict[str, int], wrapper: str | None, seed: int) -> None:
    mesh, problem = mesh_of(**sizes), problems.of_world(PROBLEMS[case], torch.distributed.get_world_size())

    def make(layer):
        layer = expert_parallel(layer, mesh, DISPATCHERS[dispatcher])
        return WRAPPERS[wrapper](layer, mesh) if wrapper else layer

    judge(case, compute(problem, make, averaged=bool(wrapper)), problems.BACKEND, problem.dtype, seed)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_two_ranks_equal_one_process(two, case, dispatcher, seed):
    two.run(judge_case, case=case, dispatcher=dispatcher, sizes={"ep": 2}, wrapper=None, seed=seed)


@pytest.mark.parametrize("wrapper", [None, "ddp", "fsdp"])
@pytest.mark.parametrize("case", ["uneven", "to_one_rank", "biases"])
def test_four_ranks_equal_one_process(four, case, wrapper, seed):
    sizes = {"dp": 2, "ep": 2} if wrapper else {"ep": 4}
    four.run(judge_case, case=case, dispatcher="exact", sizes=sizes, wrapper=wrapper, seed=seed)


class Autocast(torch.nn.Module):
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x)


def judge_autocast(bias: bool, seed: int) -> None:
    """Weights in float32, of bfloat16 values, computed in bfloat16: against a layer in bfloat16."""
    problem, mesh = Problem((2, 1), bias=bias, dtype=torch.bfloat16), mesh_of(ep=2)
    made = compute(problem, lambda layer: Autocast(expert_parallel(layer.float(), mesh)))
    judge("autocast", made, problems.BACKEND, problem.dtype, seed)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_keeps_the_error_rule(two, bias, seed):
    two.run(judge_autocast, bias=bias, seed=seed)


def judge_router(name: str, dispatcher: str, seed: int) -> None:
    """Both ranks have the same images in another order, and other gradients of the output."""
    case, mesh = CASES[name], mesh_of(ep=2)

    def computed(seed: int, how: str) -> dict[str, torch.Tensor]:
        plain = how in ("oracle", "eager")
        layer, x, asked = draw(case, "eager" if plain else how, seed, bias=True)
        layer, x, asked = double(layer, x, asked) if how == "oracle" else (layer, x, asked)
        images = {"x": x, "router_input": asked["router_input"], **asked["conditioning"]}

        def part(rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            named = {name: t.roll(rank, 0) for name, t in images.items()}
            x, unmodulated = named.pop("x").requires_grad_(), named.pop("router_input")
            call = {"router_input": unmodulated, "conditioning": named}
            dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + rank)).to(x.dtype)
            out, aux = by_oracle(case, layer, x, call) if plain else layer(x, return_aux_loss=True, **call)
            ((out * dout).sum() + (0 if aux is None else aux)).backward()
            return out.detach().flatten(0, 1), {"x": x.grad.flatten(0, 1)}

        if plain:
            parts = [part(rank) for rank in range(2)]
            grads = {name: p.grad / 2 for name, p in layer.named_parameters() if p.grad is not None}
            results = problems.named(parts, grads)
        else:
            every_token = BoundedDispatcher(x.shape[0] * x.shape[1])
            layer = expert_parallel(layer, mesh, every_token if dispatcher == "bounded" else None)
            results = problems.of_all(part(torch.distributed.get_rank()), layer, torch.float32, averaged=False)
        if "dgate_weight" in results:  # an expert's row may cancel: see tests/product/test_routers.py
            results["dgate_weight"] = results["dgate_weight"].T
        return results

    judge("ep_router", computed, problems.BACKEND, torch.float32, seed)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("name", CASES)
def test_every_router_with_biases(two, name, dispatcher, seed):
    two.run(judge_router, name=name, dispatcher=dispatcher, seed=seed)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_shared_experts_plan_is_the_one_that_dispatch_makes(tokens):
    plan = _all_to_one(torch.randn(tokens, 8))
    expected = ops.dispatch(torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1), 1, "eager")
    assert all(map(torch.equal, plan.tensors(), expected.tensors()))
