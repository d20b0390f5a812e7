"""The fused layer: every trap on every backend by the error rule, and what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moe_kernels import combine, experts, moe_mlp
from tests.contenders import (
    each_backend,
    each_contender,
    each_trap,
    gradients,
    judge_trap,
    moe_compute,
    moe_ours,
    plan_of,
)
from tests.trap_cases import BY_NAME, PLAIN, Problem, Trap, make_problem, sample

WEIGHTS = ("gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")


@each_trap()
@each_contender
def test_trap(trap, scale, backend, dtype, seed):
    judge_trap("moe_mlp", moe_compute, trap, scale, backend, dtype, seed)


def views(problem: Problem) -> dict[str, list[Tensor]]:
    """The weights as leaves of their own: [gate_0, up_0, gate_1, ...], [down_0, ...]."""
    halves = {"gate_up_proj": problem.trap.I, "shared_gate_up_proj": problem.trap.Is}
    stacks = {name: getattr(problem, name).detach() for name in WEIGHTS}
    parts = {
        n: s.reshape(-1, halves[n], s.shape[-1]) if n in halves else s.reshape(-1, *s.shape[-2:])
        for n, s in stacks.items()
    }
    return {name: [part.requires_grad_() for part in stack.unbind()] for name, stack in parts.items()}


def apart(t: Tensor) -> Tensor:
    return t.clone()


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


PLACES = {"side by side": lambda t: t, "apart": apart, "transposed": transposed}


@each_contender
@pytest.mark.parametrize("place", PLACES)
def test_weights_one_by_one_equal_stacked_weights(place, backend, dtype, seed):
    problem, leaves = make_problem(PLAIN, seed, dtype).with_leaves()
    stacked = gradients(moe_ours(problem, backend), leaves, problem.dout)
    lists = {
        name: [PLACES[place](part.detach()).requires_grad_() for part in parts]
        for name, parts in views(problem).items()
    }
    out = moe_mlp(problem.x, plan_of(problem, backend), *lists.values(), backend=backend)
    out.backward(problem.dout)
    assert torch.equal(out, stacked["out"])
    for name, parts in lists.items():
        assert torch.equal(torch.cat([p.grad for p in parts]), stacked[f"d{name}"].flatten(0, -2)), name
        assert all(p.grad.untyped_storage().nbytes() == p.grad.nbytes for p in parts), name


@each_backend
@pytest.mark.parametrize("trap", ["plain", "no_shared", "gelu", "expert_choice"])
def test_saved_for_backward_is_exactly_what_is_listed(trap, backend, seed):
    problem, _ = make_problem(BY_NAME[trap], seed, torch.float32).with_leaves()
    plan, saved = plan_of(problem, backend), {}
    weights = [getattr(problem, name) for name in WEIGHTS]
    with saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t.detach()), lambda t: t):
        moe_mlp(problem.x, plan, *weights, activation=problem.trap.activation, backend=backend)
    given = {t.data_ptr() for t in (problem.x, *weights, *plan.tensors()) if t is not None}
    own = sorted(tuple(t.shape) for pointer, t in saved.items() if pointer not in given and t.numel())
    wide = problem.gate_up_proj.shape[1]
    shared = [(problem.trap.T, problem.shared_gate_up_proj.shape[0])] if problem.trap.Is else []
    assert own == sorted([(plan.num_rows, wide), *shared])
    assert {t.data_ptr() for t in (problem.x, *weights) if t is not None} <= saved.keys()


@each_backend
@pytest.mark.parametrize("trap", ["plain", "no_shared", "gelu", "expert_choice"])
def test_recompute_saves_no_activation_and_gives_the_same_gradients(trap, backend, seed):
    problem, leaves = make_problem(BY_NAME[trap], seed, torch.float32).with_leaves()
    weights = [getattr(problem, name) for name in WEIGHTS]

    def run(recompute):
        plan, saved = plan_of(problem, backend), {}
        given = {t.data_ptr() for t in (problem.x, *weights, *plan.tensors()) if t is not None}
        with saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t.detach()), lambda t: t):
            out = moe_mlp(
                problem.x, plan, *weights, activation=problem.trap.activation, backend=backend, recompute=recompute
            )
        own = [t for pointer, t in saved.items() if pointer not in given and t.numel()]
        return own, gradients(out, leaves, problem.dout)

    (kept, expected), (nothing, got) = run(False), run(True)
    assert kept and not nothing
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@each_backend
def test_nothing_is_saved_without_grad(backend, seed):
    problem, _ = make_problem(PLAIN, seed, torch.float32).with_leaves()
    plan, saved = plan_of(problem, backend), []
    with torch.no_grad(), saved_tensors_hooks(saved.append, lambda t: t):
        out = moe_ours(problem, backend)
    assert not saved and not out.requires_grad and plan.row_weight.requires_grad


@each_backend
@pytest.mark.parametrize(
    "wanted", [("x",), ("routing",), ("down_proj",), ("shared_gate_up_proj",), ("x", "gate_up_proj")]
)
def test_gradients_of_some_inputs_only(wanted, backend, seed):
    problem, leaves = make_problem(PLAIN, seed, torch.float32).with_leaves()
    everything = gradients(moe_ours(problem, backend), leaves, problem.dout)
    problem, leaves = make_problem(PLAIN, seed, torch.float32).with_leaves()
    for name in leaves.keys() - set(wanted):
        leaves[name].requires_grad_(False)
    some = gradients(moe_ours(problem, backend), {name: leaves[name] for name in wanted}, problem.dout)
    assert all(torch.equal(some[name], everything[name]) for name in some)


@each_backend
def test_float64_row_weights_beside_narrower_tokens(backend, seed):
    """Nothing else has a gradient: `experts`, which has none to give then, must not stand in the way of theirs."""
    problem, answers = make_problem(PLAIN, seed, torch.float32), []
    weights, plan = [getattr(problem, name) for name in WEIGHTS], plan_of(problem, backend)
    for dtype in (torch.float32, torch.float64):
        row_weight = plan.row_weight.to(dtype).requires_grad_()
        given = replace(plan, row_weight=row_weight)
        rows = experts(problem.x, given, *weights[:2], backend=backend)
        outs = combine(rows, given, backend=backend), moe_mlp(problem.x, given, *weights, backend=backend)
        (grad,) = torch.autograd.grad(outs, row_weight, (problem.dout, problem.dout))
        assert grad.dtype == dtype
        answers.append((*outs, grad.float()))
    for narrow, wide in zip(*answers, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6 * narrow.abs().max().item())


@each_backend
def test_a_float64_residual_keeps_its_bits(backend, seed):
    problem, images = make_problem(Trap("images", "", T=6, I=8, Is=8), seed, torch.float32), 3
    weights, plan = [getattr(problem, name) for name in WEIGHTS], plan_of(problem, backend)
    residual, gate, dout = (sample(torch.randn, n, 32, dtype=torch.float64).requires_grad_() for n in (6, images, 6))
    out = moe_mlp(problem.x, plan, *weights, backend=backend, residual=residual, gate=gate)
    y = moe_mlp(problem.x, plan, *weights, backend=backend).double()
    assert torch.equal(out, residual + (gate[:, None] * y.view(images, 2, 32)).view(6, 32))
    dresidual, dgate = torch.autograd.grad(out, (residual, gate), dout)
    assert torch.equal(dresidual, dout)
    torch.testing.assert_close(dgate, (dout * y).view(images, 2, 32).sum(1))


@each_contender
@pytest.mark.parametrize("through_data", [False, True])
def test_weights_changed_in_place_between_calls(through_data, backend, dtype, seed):
    """A pack of the old weights, cached by version, is stale: `.data` writes do not even bump the version."""
    problem, other = make_problem(PLAIN, seed, dtype), make_problem(PLAIN, seed + 1, dtype)
    for name in WEIGHTS:
        weight = getattr(problem, name)
        before = moe_ours(problem, backend)
        (weight.data if through_data else weight).copy_(getattr(other, name))
        assert not torch.equal(moe_ours(problem, backend), before), name
    expected = make_problem(PLAIN, seed, dtype)
    for name in WEIGHTS:
        setattr(expected, name, getattr(other, name).clone())
    assert torch.equal(moe_ours(problem, backend), moe_ours(expected, backend))


@each_backend
@pytest.mark.parametrize("name", ["x", *WEIGHTS])
def test_inputs_changed_before_backward_are_noticed(name, backend, seed):
    problem, _ = make_problem(PLAIN, seed, torch.float32).with_leaves()
    out = moe_ours(problem, backend)
    with torch.no_grad():
        getattr(problem, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_contender
def test_nan_stays_with_its_token_and_experts(backend, dtype, seed):
    """Tiles, padding and packed panels must not spread it: 0 times NaN is NaN."""
    problem = make_problem(PLAIN, seed, dtype)
    problem.x[11] = torch.nan
    problem, leaves = problem.with_leaves()
    tensors = gradients(moe_ours(problem, backend), leaves, problem.dout)
    spoilt = {name: t.isnan().flatten(1).any(1).nonzero().flatten().tolist() for name, t in tensors.items()}
    experts = sorted(problem.topk_ids[11].tolist())
    assert [spoilt[name] for name in ("out", "dx", "drouting")] == [[11]] * 3
    assert [spoilt[name] for name in ("dgate_up_proj", "ddown_proj")] == [experts] * 2


@each_backend
def test_inputs_are_not_written(backend, seed):
    problem, leaves = make_problem(PLAIN, seed, torch.float32).with_leaves()
    gradients(moe_ours(problem, backend), leaves, problem.dout)
    untouched = make_problem(PLAIN, seed, torch.float32)
    assert all(torch.equal(leaf, getattr(untouched, name)) for name, leaf in leaves.items())
    assert torch.equal(problem.dout, untouched.dout) and torch.equal(problem.topk_ids, untouched.topk_ids)


def test_eager_gradcheck(seed):
    problem, leaves = make_problem(BY_NAME["below_tile"], seed, torch.float64).with_leaves()
    names = list(leaves)

    def layer(*tensors: Tensor) -> Tensor:
        for name, tensor in zip(names, tensors, strict=True):
            setattr(problem, name, tensor)
        return moe_ours(problem, "eager")

    assert torch.autograd.gradcheck(layer, tuple(leaves.values()), fast_mode=True)
