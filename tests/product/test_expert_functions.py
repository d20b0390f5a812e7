"""Expert functions: biases, GELU's tanh form, clamped SwiGLU; on every backend, or refused by name."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import reference
from moe_kernels import Biases, ClampedSwiGLU, MoELayer, dispatch, dispatch_mask, experts, moe_mlp, packed_weights
from tests.contenders import BACKENDS, gradients
from tests.error_rule import judge
from tests.trap_cases import DEVICE, Trap, make_problem, sample

FUNCTIONS = ("swiglu", "gelu", "gelu_tanh", "clamped_swiglu")
CLAMP = ClampedSwiGLU(limit=1.5, alpha=1.3, shift=0.5)
SELDOM = replace(CLAMP, limit=7.0)  # for bfloat16: whatever rounding takes past the limit has another gradient
COMPUTE = [b for b in BACKENDS if b in ("native", "grouped", "eager")]
REFUSE = [b for b in BACKENDS if b not in COMPUTE]
NAMES = ("gate_up", "down", "shared_gate_up", "shared_down")
CONTENDERS = [pytest.param(b, d, id=f"{b}-{d}") for b in COMPUTE for d in (torch.float32, torch.bfloat16)]
SHAPES = {
    "plain": Trap("plain", "ragged"),
    "empty_experts": Trap("empty_experts", "their biases get zeros", picks="empty_experts"),
    "odd": Trap("odd", "nothing is a multiple of a vector; several panels", T=19, H=45, I=77, Is=35),
    "no_shared": Trap("no_shared", "two biases", Is=0),
    "no_token": Trap("no_token", "gradients are zeros", T=0),
}


def activation_of(function: str, dtype: torch.dtype, how: str):
    """Return a function as the oracle and plain torch, or as the product takes it."""
    if function != "clamped_swiglu":
        return function
    clamp = CLAMP if dtype == torch.float32 else SELDOM
    return partial(reference.moe.clamped_swiglu, **asdict(clamp)) if how in ("oracle", "loop") else clamp


def draw(trap: Trap, function: str, seed: int, dtype: torch.dtype):
    """Return a problem, four biases, and all of them as leaves by name."""
    glu = function not in ("gelu", "gelu_tanh")
    problem, leaves = make_problem(replace(trap, activation="swiglu" if glu else "gelu"), seed, dtype).with_leaves()
    generator, n = torch.Generator().manual_seed(seed + 1), 2 if glu else 1
    shapes = (trap.E, n * trap.I), (trap.E, trap.H), (n * trap.Is,), (trap.H,)
    biases = [sample(torch.randn, *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    if not trap.Is:
        biases[2:] = None, None
    return problem, biases, leaves | {f"{n}_bias": b for n, b in zip(NAMES, biases, strict=True) if b is not None}


def double(problem, biases):
    problem, leaves = problem.double().with_leaves()
    biases = [None if b is None else b.detach().double().requires_grad_() for b in biases]
    return problem, biases, leaves | {f"{n}_bias": b for n, b in zip(NAMES, biases, strict=True) if b is not None}


def compute(trap: Trap, function: str, dtype: torch.dtype, seed: int, how: str) -> dict[str, Tensor]:
    problem, biases, leaves = draw(trap, function, seed, dtype)
    if how == "oracle":
        problem, biases, leaves = double(problem, biases)
    weights = problem.gate_up_proj, problem.down_proj, problem.shared_gate_up_proj, problem.shared_down_proj
    activation = activation_of(function, dtype, how)
    if how in ("oracle", "loop"):
        ids = problem.topk_ids.long()
        y = reference.moe.moe(problem.x, problem.routing, ids, *weights, activation, *biases)
    else:
        plan = dispatch(problem.topk_ids, problem.routing, trap.E, how)
        y = moe_mlp(problem.x, plan, *weights, activation=activation, backend=how, biases=Biases(*biases))
    return gradients(y, leaves, problem.dout)


@pytest.mark.parametrize(("backend", "dtype"), CONTENDERS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_functions_with_biases(shape, function, backend, dtype, seed):
    if shape == "odd" and backend == "grouped":
        pytest.skip("grouped_mm needs rows of a multiple of 16 bytes")
    judge("expert_functions", cache(partial(compute, SHAPES[shape], function, dtype)), backend, dtype, seed)


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("function", ["gelu_tanh", "clamped_swiglu"])
def test_a_function_without_biases(function, backend, seed):
    def without(seed: int, how: str) -> dict[str, Tensor]:
        problem, biases, leaves = draw(SHAPES["plain"], function, seed, torch.float32)
        if how == "oracle":
            problem, biases, leaves = double(problem, biases)
        leaves = {name: leaf for name, leaf in leaves.items() if not name.endswith("bias")}
        weights = problem.gate_up_proj, problem.down_proj, problem.shared_gate_up_proj, problem.shared_down_proj
        activation = activation_of(function, torch.float32, how)
        if how in ("oracle", "loop"):
            ids = problem.topk_ids.long()
            y = reference.moe.moe(problem.x, problem.routing, ids, *weights, activation)
        else:
            plan = dispatch(problem.topk_ids, problem.routing, problem.trap.E, how)
            y = moe_mlp(problem.x, plan, *weights, activation=activation, backend=how)
        return gradients(y, leaves, problem.dout)

    judge("expert_functions", without, backend, torch.float32, seed)


@pytest.mark.parametrize("backend", COMPUTE)
def test_room_by_room_behind_a_bound_and_in_other_forms(backend, seed):
    """Rows behind the bound reach no gradient; vectors one by one, and halves in the other order, are the same bits."""
    problem, biases, _ = draw(SHAPES["plain"], "swiglu", seed, torch.float32)
    problem = problem.map(Tensor.detach)
    weights, picks = problem.routing.new_zeros(37, 5), torch.zeros(37, 5, dtype=torch.bool, device=DEVICE)
    weights.scatter_(1, problem.topk_ids.long(), problem.routing), picks.scatter_(1, problem.topk_ids.long(), True)
    gate_up, down = (b.detach() for b in biases[:2])
    I = SHAPES["plain"].I

    def swapped(t: Tensor, dim: int) -> Tensor:
        return torch.cat(t.chunk(2, dim)[::-1], dim)

    vectors = [half.clone() for row in gate_up for half in row.split(I)], [row.clone() for row in down]
    forms = {
        "stacked": ("gate_up", problem.gate_up_proj, [gate_up.clone()], [down.clone()]),
        "vectors": ("gate_up", problem.gate_up_proj, *vectors),
        "[up; gate]": ("up_gate", swapped(problem.gate_up_proj, 1), [swapped(gate_up, 1)], [down.clone()]),
    }
    found = {}
    for name, (layout, proj, gate_up_bias, down_bias) in forms.items():
        for bound in (74, 100):
            plan = dispatch_mask(weights, picks, bound)
            leaves = [b.requires_grad_() for b in (*gate_up_bias, *down_bias)]
            how = {"layout": layout, "backend": backend, "biases": Biases(gate_up_bias, down_bias)}
            y = experts(problem.x, plan, proj, problem.down_proj, **how)[:74]
            y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y))
            first, second = (
                torch.cat([b.grad.flatten() for b in kind]).view(5, -1) for kind in (gate_up_bias, down_bias)
            )
            found[name, bound] = y.detach(), swapped(first, 1) if name == "[up; gate]" else first, second
            for leaf in leaves:
                leaf.grad = None
    for other in found.values():
        assert all(torch.equal(*pair) for pair in zip(found["stacked", 74], other, strict=True))


@pytest.mark.parametrize("backend", COMPUTE)
def test_layer(backend, seed):
    """Compiled, recomputed and packed it gives the same bits; biases begin at zero and are trained alone, too."""
    torch.manual_seed(seed)
    layer = MoELayer(32, 24, 5, 2, 16, activation=CLAMP, bias=True, backend=backend, device=DEVICE)
    assert not any(b.any() for name, b in layer.named_parameters() if name.endswith("bias"))
    assert f"activation='{CLAMP}', bias=True" in repr(layer) and repr(layer).endswith(f"backend={backend})")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = sample(torch.randn, 2, 8, 32)

    def gradients_of(call, wanted=""):
        layer.requires_grad_(False)
        trained = [p.requires_grad_() for name, p in layer.named_parameters() if wanted in name]
        y = call(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), trained)

    y, grads = gradients_of(layer)
    compiled, again = gradients_of(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert torch.equal(y, compiled) and all(torch.equal(*pair) for pair in zip(grads, again, strict=True))
    _, alone = gradients_of(layer, "bias")
    assert len(alone) == 4 and all(any(torch.equal(g, other) for other in grads) for g in alone)
    layer.recompute = True
    assert all(torch.equal(*pair) for pair in zip(grads, gradients_of(layer)[1], strict=True))
    with torch.no_grad(), packed_weights(layer):
        assert torch.equal(layer(x), y)
        layer.down_bias.add_(1)  # not packed, so read as it is
        assert not torch.equal(layer(x), y)


@pytest.mark.parametrize("backend", REFUSE)
@pytest.mark.parametrize(
    ("given", "said"), [({"bias": True}, "experts with biases"), ({"activation": "gelu_tanh"}, "'gelu_tanh'")]
)
def test_backends_without_a_function_refuse_it_by_name(given, said, backend):
    layer = MoELayer(32, 24, 5, 2, **given, backend=backend, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"'{backend}' does not support .*{said}.*native, grouped and eager"):
        layer(sample(torch.randn, 8, 32))
    layer.backend = "auto"
    assert "auto -> " in repr(layer) and layer(sample(torch.randn, 8, 32)).isfinite().all()


X = torch.zeros(3, 4, device=DEVICE)
PLAN = dispatch(torch.zeros(3, 1, dtype=torch.int32, device=DEVICE), torch.ones(3, 1, device=DEVICE), 2, "eager")


@pytest.mark.parametrize(
    ("biases", "said"),
    [
        ({}, "biases: got dict, expected moe_kernels.Biases"),
        (Biases(torch.zeros(2, 5)), r"biases.gate_up: got shapes \[\(2, 5\)\], expected \(2, 6\), or 4 of \(3,\)"),
        (Biases(down=[torch.zeros(4)]), r"biases.down: got shapes \[\(4,\)\], expected \(2, 4\), or 2 of \(4,\)"),
        (Biases(down=torch.zeros(2, 4).double()), "biases.down: got torch.float64, expected torch.float32"),
        (Biases(shared_down=torch.zeros(4)), "biases.shared_down: got a bias, expected None"),
    ],
)
def test_bad_biases_are_named(biases, said):
    with pytest.raises((TypeError, ValueError), match=said):
        moe_mlp(X, PLAN, torch.zeros(2, 6, 4), torch.zeros(2, 4, 3), biases=biases)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [({"limit": 0}, "limit: got 0.0"), ({"alpha": torch.inf}, "alpha: got inf"), ({"shift": "1"}, "shift: got str")],
)
def test_bad_numbers_of_a_clamp_are_named(numbers, said):
    with pytest.raises((TypeError, ValueError), match=said):
        ClampedSwiGLU(**numbers)


@pytest.mark.parametrize("backend", [b for b in COMPUTE if b != "grouped"])
def test_a_misspelled_clamp_is_no_other_function(backend):
    with pytest.raises(ValueError, match=r"activation: .*expected"):
        moe_mlp(X, PLAN, torch.zeros(2, 6, 4), torch.zeros(2, 4, 3), activation="clamped_swiglu(7)", backend=backend)
