"""The three ways to compute a problem: the float64 oracle, a plain torch loop over experts, and a backend of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import moe_kernels
import reference.moe
import reference.rooms
import reference.routing
from bench.instrument import rooms
from moe_kernels import RoutingPlan
from moe_kernels.backends.base import Request
from moe_kernels.backends.registry import get
from tests.error_rule import judge
from tests.trap_cases import DEVICE, PLAIN, TRAPS, Problem, Trap, make_problem

BACKENDS = tuple(
    info.name
    for info in moe_kernels.backends()
    if info.available and not get(info.name).supports(Request("moe_mlp", torch.float32, DEVICE))
)
DTYPES = {
    "eager": (torch.float32, torch.bfloat16, torch.float64),
    "native": (torch.float32, torch.bfloat16, torch.float16),
    # Interpreted, float16 would take a third of the minutes again, through the code of bfloat16.
    "triton": (torch.float32, torch.bfloat16, *((torch.float16,) if DEVICE == "cuda" else ())),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
SCALES = (1e-3, 1.0, 30.0)
IN_TORCH = ("oracle", "loop")  # the code of reference/, in float64 and in the dtype of a case
CONTENDERS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in BACKENDS
    for dtype in DTYPES.get(backend, (torch.float32, torch.bfloat16))
]
# Traps in where things lie and how many there are: the interpreter, slow as it is, tries them in float32 alone.
OF_ANY_DTYPE = frozenset(
    "wide no_token one_token below_tile all_experts single_expert no_shared expert_choice expert_choice_shared strided "
    "expanded_dout poisoned_ends misaligned int64_ids".split()
)
WIDTH_STEP = {"cuda": 8}  # of what widths have to be multiples
each_contender = pytest.mark.parametrize(("backend", "dtype"), CONTENDERS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
# Tests of what goes on around the kernels, whose calls of them would take the interpreter minutes.
each_backend_but_interpreted = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if (name, DEVICE) != ("triton", "cpu")]
)
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="native is not built, or not for this device")


def each_trap(*left_out: str) -> pytest.MarkDecorator:
    """Every trap at scale 1, and the plain one at the other scales."""
    cases = [(trap, 1.0) for trap in TRAPS if trap.name not in left_out] + [(PLAIN, s) for s in SCALES if s != 1]
    params = [pytest.param(trap, scale, id=f"{trap}-{scale:g}") for trap, scale in cases]
    return pytest.mark.parametrize(("trap", "scale"), params)


def rooms_of(how: str) -> SimpleNamespace:
    """Return the rooms of a backend, or those of reference/."""
    return rooms.PLAIN if how in IN_TORCH else rooms.ours(how)


def plan_of(problem: Problem, how: str) -> RoutingPlan | reference.rooms.Plan:
    trap = problem.trap
    if problem.topk_ids is None:
        return rooms_of(how).dispatch_expert_choice(problem.routing, trap.capacity, max(trap.T, 1))
    return rooms_of(how).dispatch(problem.topk_ids, problem.routing, trap.E)


def moe_loop(problem: Problem) -> Tensor:
    """The layer room by room: unlike in `moe_oracle` the shared expert is added before the sum is rounded."""
    p, activation, shared, plan = problem, problem.trap.activation, None, plan_of(problem, "loop")
    if p.shared_down_proj is not None:
        shared = reference.moe.expert_mlp(p.x, p.shared_gate_up_proj, p.shared_down_proj, activation)
    y_rows = reference.rooms.experts(p.x, plan, p.gate_up_proj, p.down_proj, activation)
    return reference.rooms.combine(y_rows, plan, shared)


def moe_oracle(problem: Problem) -> Tensor:
    p, activation = problem, problem.trap.activation
    if p.topk_ids is not None:
        shared = (p.shared_gate_up_proj, p.shared_down_proj)
        return reference.moe.moe(p.x, p.routing, p.topk_ids.long(), p.gate_up_proj, p.down_proj, *shared, activation)
    picks = reference.routing.take_tokens(p.routing, p.trap.capacity, max(p.trap.T, 1))
    out = reference.moe.moe_expert_choice(p.x, p.routing, picks, p.gate_up_proj, p.down_proj, activation)
    if p.shared_down_proj is None:
        return out
    return out + reference.moe.expert_mlp(p.x, p.shared_gate_up_proj, p.shared_down_proj, activation)


def moe_ours(problem: Problem, backend: str) -> Tensor:
    p, trap = problem, problem.trap
    weights = (p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj)
    return moe_kernels.moe_mlp(p.x, plan_of(p, backend), *weights, activation=trap.activation, backend=backend)


def gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def moe_compute(trap: Trap, dtype: torch.dtype, scale: float = 1.0):
    """Return compute(seed, how) for `judge`: the output of the layer and all its gradients."""

    def compute(seed: int, how: str) -> dict[str, Tensor]:
        problem = make_problem(trap, seed, dtype, scale)
        problem, leaves = (problem.double() if how == "oracle" else problem).with_leaves()
        ways = {"oracle": moe_oracle, "loop": moe_loop}
        out = ways[how](problem) if how in ways else moe_ours(problem, how)
        return gradients(out, leaves, problem.dout)

    return compute


def judge_trap(op: str, make_compute, trap: Trap, scale: float, backend: str, dtype: torch.dtype, seed: int) -> None:
    if (backend, dtype, DEVICE) == ("triton", torch.bfloat16, "cpu") and trap.name in OF_ANY_DTYPE:
        pytest.skip("interpreted in float32 already; the minutes go to what rounds")
    with refusals(backend, trap.may_refuse):
        judge(op, make_compute(trap, dtype, scale), backend, dtype, seed, scale)


@contextmanager
def refusals(backend: str, allowed: bool) -> Iterator[None]:
    """Where one is allowed, a clear refusal naming the backend counts as an answer."""
    try:
        yield
    except (ValueError, RuntimeError) as refusal:
        if not allowed or backend not in str(refusal):
            raise
        pytest.skip(f"refused: {refusal}")
