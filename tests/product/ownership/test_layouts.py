"""Weights in every layout, stacked or one by one, wherever and however each lies: the bits of the plain stack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_kernels import MoELayer, experts, moe_mlp
from moe_kernels.weights import LAYOUTS
from tests.contenders import each_backend, each_backend_but_interpreted, plan_of
from tests.product.ownership.models import E, H, I, Is, K, assert_same, make_x
from tests.trap_cases import DEVICE, PLAIN, Trap, make_problem, poison

KINDS = ("gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")
each_activation = pytest.mark.parametrize("activation", ["swiglu", "gelu"])
GELU = Trap("gelu", "two matrices", activation="gelu")


def arranged(weight: Tensor, name: str, layout: str, activation: str) -> Tensor:
    """Store a weight of layout "gate_up" in another one."""
    how = LAYOUTS[layout]
    if name.endswith("gate_up_proj") and how.up_first and activation == "swiglu":
        gate, up = weight.chunk(2, dim=-2)
        weight = torch.cat([up, gate], dim=-2)
    return (weight.mT if how.in_out else weight).contiguous()


def back(weight: Tensor, name: str, layout: str, activation: str) -> Tensor:
    """Undo `arranged`."""
    weight = weight.mT if LAYOUTS[layout].in_out else weight
    if name.endswith("gate_up_proj") and LAYOUTS[layout].up_first and activation == "swiglu":
        up, gate = weight.chunk(2, dim=-2)
        weight = torch.cat([gate, up], dim=-2)
    return weight.contiguous()


def layer_gradients(layer: MoELayer, x: Tensor, activation: str) -> dict[str, Tensor]:
    """Return y and all gradients, those of the weights as layout "gate_up" has them."""
    x = x.detach().to(layer.gate_weight.dtype).requires_grad_()
    y = layer(x)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(y.square().mean(), [x, *parameters.values()])
    results = {"y": y.detach()} | dict(zip(["x", *parameters], grads, strict=True))
    for name in set(KINDS) & set(results):
        results[name] = back(results[name], name, layer.layout, activation)
    return results


@each_backend
@each_activation
@pytest.mark.parametrize("shared", [Is, 0], ids=["shared", "no shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "gate_up"])
def test_a_layer_in_another_layout_gives_the_same_bits(layout, dtype, shared, activation, backend, seed):
    torch.manual_seed(seed)
    options = {"shared_intermediate_size": shared, "activation": activation, "backend": backend, "dtype": dtype}
    plain = MoELayer(H, I, E, K, **options)
    layer = MoELayer(H, I, E, K, **options, layout=layout)
    weights = {name: arranged(p, name, layout, activation) for name, p in plain.state_dict().items() if name in KINDS}
    layer.load_state_dict(weights | {"gate_weight": plain.gate_weight})
    expected = layer_gradients(plain, make_x(seed), activation)
    for _ in range(2):
        assert_same(layer_gradients(layer, make_x(seed), activation), expected)
    with torch.no_grad():
        for p in (*plain.parameters(), *layer.parameters()):
            p.mul_(0.5)
    expected = layer_gradients(plain, make_x(seed), activation)
    assert_same(layer_gradients(layer, make_x(seed), activation), expected)


def separate(matrices: list[Tensor]) -> list[Tensor]:
    return [m.clone() for m in matrices]


def shuffled(matrices: list[Tensor]) -> list[Tensor]:
    """Put them into one buffer in an order of no use."""
    order = torch.randperm(len(matrices)).tolist()
    buffer = torch.stack([matrices[i] for i in order])
    return [buffer[order.index(i)] for i in range(len(matrices))]


def padded(matrices: list[Tensor]) -> list[Tensor]:
    found = []
    for m in matrices:
        buffer = m.new_full((m.shape[0] + 2, m.shape[1] + 3), poison(m.dtype))
        buffer[1:-1, 1:-2] = m
        found.append(buffer[1:-1, 1:-2])
    return found


def differently_padded(matrices: list[Tensor]) -> list[Tensor]:
    found = []
    for i, m in enumerate(matrices):
        buffer = m.new_full((m.shape[0], m.shape[1] + i), poison(m.dtype))
        buffer[:, : m.shape[1]] = m
        found.append(buffer[:, : m.shape[1]])
    return found


def transposed(matrices: list[Tensor]) -> list[Tensor]:
    return [m.T.contiguous().T for m in matrices]


def some_transposed(matrices: list[Tensor]) -> list[Tensor]:
    return [m.T.contiguous().T if i % 2 else m.clone() for i, m in enumerate(matrices)]


def strided(matrices: list[Tensor]) -> list[Tensor]:
    return [torch.stack([m, torch.full_like(m, poison(m.dtype))], dim=-1)[..., 0] for m in matrices]


def off_by_one_element(matrices: list[Tensor]) -> list[Tensor]:
    return [m.new_empty(m.numel() + 1)[1:].view(m.shape).copy_(m) for m in matrices]


PLACES = [separate, shuffled, padded, differently_padded, transposed, some_transposed, strided, off_by_one_element]
each_place = pytest.mark.parametrize("place", PLACES)


def matrices_of(problem, name: str, activation: str) -> list[Tensor]:
    weight = getattr(problem, name)
    weight = weight if name.startswith("shared") else weight.flatten(0, 1)
    parts = 2 if name.endswith("gate_up_proj") and activation == "swiglu" else 1
    count = parts * (1 if name.startswith("shared") else problem.trap.E)
    return list(weight.detach().chunk(count))


def run(call, problem, backend: str, weights: list[Tensor | list[Tensor]], count: int) -> list[Tensor]:
    """Return y and the gradients of x and of the weights, those of the matrices of one kind put together."""
    x = problem.x.detach().requires_grad_()
    weights = [[m.detach().requires_grad_() for m in (w if isinstance(w, list) else [w])] for w in weights[:count]]
    arguments = [w if len(w) > 1 else w[0] for w in weights]
    activation = problem.trap.activation
    y = call(x, plan_of(problem, backend), *arguments, activation=activation, backend=backend)
    grads = iter(torch.autograd.grad(y.square().mean(), [x, *(m for w in weights for m in w)]))
    dx = next(grads)
    return [y.detach(), dx, *(torch.cat([next(grads).reshape(-1, m.shape[-1]) for m in w]) for w in weights)]


@each_backend
@each_place
@each_activation
@pytest.mark.parametrize(("call", "count"), [(experts, 2), (moe_mlp, 4)], ids=["experts", "moe_mlp"])
def test_matrices_by_themselves_give_the_bits_of_the_stack(call, count, activation, place, backend, seed):
    problem = make_problem(GELU if activation == "gelu" else PLAIN, seed, torch.float32)
    expected = run(call, problem, backend, [getattr(problem, name) for name in KINDS], count)
    torch.manual_seed(seed)
    weights = [place(matrices_of(problem, name, activation)) for name in KINDS]
    got = run(call, problem, backend, weights, count)
    assert [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)] == []


@each_backend
@pytest.mark.parametrize("call", [experts, moe_mlp])
def test_gradients_are_asked_for_some_of_the_matrices(call, backend, seed):
    problem = make_problem(PLAIN, seed, torch.float32)
    gate_up, down = (separate(matrices_of(problem, name, "swiglu")) for name in KINDS[:2])
    plan = plan_of(problem, backend)

    def grads(wanted):
        leaves = [m.detach().requires_grad_(wanted(i)) for i, m in enumerate([*gate_up, *down])]
        y = call(problem.x, plan, leaves[: len(gate_up)], leaves[len(gate_up) :], backend=backend)
        return torch.autograd.grad(y.square().mean(), [m for m in leaves if m.requires_grad])

    some = [i for i in range(len(gate_up) + len(down)) if i % 3 == 0]
    whole, part = grads(lambda i: True), grads(lambda i: i in some)
    assert all(torch.equal(whole[i], g) for i, g in zip(some, part, strict=True))


def of_one_stack(gate: Tensor, up: Tensor) -> list[Tensor]:
    return list(torch.cat([gate, up], 1).chunk(2, 1))


def of_longer_ones(gate: Tensor, up: Tensor) -> list[Tensor]:
    return [torch.cat([torch.full_like(t[:1], poison(t.dtype)), t])[1:] for t in (gate, up)]


STACKS = {place.__name__: lambda *both, place=place: place(both) for place in (separate, strided, off_by_one_element)}
STACKS |= {
    "transposed": lambda *both: [t.mT.contiguous().mT for t in both],
    "one_transposed": lambda gate, up: [gate.mT.contiguous().mT, up],
    "of_one_stack": of_one_stack,
    "of_longer_ones": of_longer_ones,
}
SINGLE = Trap("single_expert", "two stacks of one matrix", E=1, K=1)
STACKED = [(PLAIN, place, layout) for place in STACKS for layout in ("gate_up", "gate_up_in_out")]
STACKED += [(PLAIN, "separate", "up_gate"), (PLAIN, "separate", "up_gate_in_out"), (SINGLE, "separate", "gate_up")]


def two_stacks_and_in_turn(problem, call, place: str, layout: str, backend: str) -> list[list[Tensor]]:
    """Return y and the gradients of x, gate and up of both ways to give the same memory."""
    gate_up, *others = (getattr(problem, name).detach() for name in KINDS[: 2 if call is experts else 4])
    others = [arranged(w, name, layout, "swiglu") for name, w in zip(KINDS[1:], others, strict=False)]
    stacks = STACKS[place](*(t.mT if LAYOUTS[layout].in_out else t for t in gate_up.chunk(2, 1)))
    results = []
    for weights in (stacks, [matrix for pair in zip(*stacks, strict=True) for matrix in pair]):
        x, *leaves = (t.detach().requires_grad_() for t in (problem.x, *weights))
        y = call(x, plan_of(problem, backend), leaves, *others, backend=backend, layout=layout)
        dx, *grads = torch.autograd.grad(y.square().mean(), [x, *leaves])
        assert all(g.untyped_storage().nbytes() == g.nbytes for g in grads)
        results.append([y, dx, *(grads if weights is stacks else (torch.stack(grads[i::2]) for i in (0, 1)))])
    return results


@each_backend
@pytest.mark.parametrize(("trap", "place", "layout"), STACKED)
@pytest.mark.parametrize("call", [experts, moe_mlp])
def test_gate_and_up_in_two_stacks_give_the_bits_of_their_matrices_in_turn(call, trap, place, layout, backend, seed):
    problem = make_problem(trap, seed, torch.float32)
    stacks, in_turn = two_stacks_and_in_turn(problem, call, place, layout, backend)
    assert [i for i, (a, b) in enumerate(zip(stacks, in_turn, strict=True)) if not torch.equal(a, b)] == []


@each_backend_but_interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_stacks_under_autocast(layout, backend, seed):
    problem = make_problem(PLAIN, seed, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        stacks, in_turn = two_stacks_and_in_turn(problem, moe_mlp, "separate", layout, backend)
    assert stacks[0].dtype == torch.bfloat16 and stacks[2].dtype == torch.float32
    assert all(map(torch.equal, stacks, in_turn))


@each_backend
def test_a_gradient_is_asked_for_one_of_two_stacks(backend, seed):
    problem = make_problem(PLAIN, seed, torch.float32)
    gate, up = problem.gate_up_proj.chunk(2, 1)

    def grads(**wanted: Tensor) -> tuple[Tensor, ...]:
        y = moe_mlp(problem.x, plan_of(problem, backend), [gate, up], problem.down_proj, backend=backend)
        return torch.autograd.grad(y.square().mean(), list(wanted.values()))

    for t in (gate, up):
        t.requires_grad_()
    both = grads(gate=gate, up=up)
    for t, expected in ((gate, both[0]), (up, both[1])):
        gate.requires_grad_(t is gate), up.requires_grad_(t is up)
        assert torch.equal(grads(t=t)[0], expected)
