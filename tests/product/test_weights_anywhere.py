"""Weights that lie anywhere are read there: no copies, and the bits of the stack, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import experts, moe_mlp
from moe_kernels.backends.registry import get
from moe_kernels.weights import LayerWeights, indexed
from tests.contenders import BACKENDS, plan_of
from tests.trap_cases import Problem, Trap, make_problem, poison

KINDS = ("gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj")
SIZES = {"T": 9, "H": 40, "I": 64, "Is": 128, "E": 3}
TRAPS = (
    Trap("swiglu", "two matrices along the sum of dx", **SIZES),
    Trap("gelu", "one matrix", **SIZES, activation="gelu"),
    Trap("no_shared", "no matrices behind those of the experts", **SIZES | {"Is": 0}),
)
STEP = 48  # bytes: no power of two, so matrices begin at every multiple of 16
each_kernel = pytest.mark.parametrize("backend", [b for b in ("native", "triton", "cuda") if b in BACKENDS])
each_trap = pytest.mark.parametrize("trap", TRAPS, ids=str)


def parts_of(trap: Trap, name: str) -> int:
    return 2 if name.endswith("gate_up_proj") and trap.activation == "swiglu" else 1


def matrices_of(problem: Problem, name: str) -> list[Tensor]:
    weight = getattr(problem, name)
    count = parts_of(problem.trap, name) * (1 if name.startswith("shared") else problem.trap.E)
    return list(weight.reshape(-1, weight.shape[-1]).chunk(count))


def scattered(matrices: list[Tensor]) -> list[Tensor]:
    """Put them into one buffer, shuffled, with gaps between them that hold NaN."""
    size = matrices[0].element_size()
    step = STEP // size
    slots = [-(-m.numel() // step) + int(torch.randint(1, 4, ())) for m in matrices]
    buffer = matrices[0].new_full((sum(slots) * step,), poison(matrices[0].dtype))
    found, start = [None] * len(matrices), 0
    for i in torch.randperm(len(matrices)).tolist():
        found[i] = buffer[start : start + matrices[i].numel()].view_as(matrices[i]).copy_(matrices[i])
        start += slots[i] * step
    return found


def in_turn(problem: Problem, name: str) -> list[Tensor]:
    return scattered(matrices_of(problem, name))


def fresh(problem: Problem, name: str) -> list[Tensor]:
    """Make them as LoRA does, W + B A, each on an allocation of its own."""
    found = []
    for m in matrices_of(problem, name):
        b, a = torch.zeros_like(m[:, :4]), torch.randn_like(m[:4])
        found.append(m + b @ a)
    return found


def some_by_themselves(problem: Problem, name: str) -> list[Tensor]:
    """Leave one kind of weights stacked."""
    return in_turn(problem, name) if name.endswith("gate_up_proj") else [getattr(problem, name)]


def others_by_themselves(problem: Problem, name: str) -> list[Tensor]:
    return in_turn(problem, name) if not name.endswith("gate_up_proj") else [getattr(problem, name)]


def up_first(problem: Problem, name: str) -> list[Tensor]:
    weight = getattr(problem, name)
    parts = weight.chunk(parts_of(problem.trap, name), dim=-2)
    return [torch.cat(parts[::-1], dim=-2)]


def two_stacks(problem: Problem, name: str) -> list[Tensor]:
    """Stack gate and up each by itself; the shared expert's are two matrices."""
    if parts_of(problem.trap, name) == 1:
        return [getattr(problem, name)]
    matrices = matrices_of(problem, name)
    return scattered(matrices if name.startswith("shared") else [torch.stack(matrices[i::2]) for i in (0, 1)])


def two_stacks_up_first(problem: Problem, name: str) -> list[Tensor]:
    """As two_stacks, gate before up, beside the shared expert's one stack, [up; gate]."""
    return (up_first if name.startswith("shared") else two_stacks)(problem, name)


PLACES = {
    "in_turn": (in_turn, "gate_up"),
    "fresh": (fresh, "gate_up"),
    "gate_up_by_themselves": (some_by_themselves, "gate_up"),
    "down_by_themselves": (others_by_themselves, "gate_up"),
    "up_first": (up_first, "up_gate"),
    "in_turn_in_out": (lambda problem, name: [m.T.contiguous() for m in matrices_of(problem, name)], "gate_up_in_out"),
    "two_stacks": (two_stacks, "gate_up"),
    "two_stacks_up_first": (two_stacks_up_first, "up_gate"),
    "two_stacks_in_out": (
        lambda problem, name: [m.mT.contiguous() for m in two_stacks(problem, name)],
        "gate_up_in_out",
    ),
}
each_place = pytest.mark.parametrize("place", PLACES)
IN_PLACE = (
    "in_turn", "gate_up_by_themselves", "down_by_themselves", "up_first", "two_stacks", "two_stacks_up_first",
)  # fmt: skip


def lists_of(problem: Problem, place: str) -> list[list[Tensor]]:
    make = PLACES[place][0]
    return [[t.detach() for t in make(problem, name)] for name in KINDS if getattr(problem, name) is not None]


def gate_up_form(gradient: Tensor, problem: Problem, name: str, layout: str) -> Tensor:
    """Bring the gradient of a kind, or of one matrix of it, to rows as layout "gate_up" has them."""
    if layout.endswith("in_out"):
        gradient = gradient.mT
    if layout.startswith("up_gate"):
        gradient = torch.cat(gradient.chunk(parts_of(problem.trap, name), dim=-2)[::-1], dim=-2)
    return gradient.reshape(-1, gradient.shape[-1])


def as_one_stack(stacks: list[Tensor], layout: str) -> Tensor:
    gate, up = (stack.mT if layout.endswith("in_out") else stack for stack in stacks)
    return torch.cat([gate, up], -2).flatten(0, 1)


def run(call, problem: Problem, backend: str, lists: list[list[Tensor]], layout: str) -> list[Tensor]:
    """Return y, dx, the gradient of the rows' weights, and those of the four kinds, as layout "gate_up" has them."""
    x, routing = problem.x.detach().requires_grad_(), problem.routing.detach().requires_grad_()
    leaves = [[m.detach().requires_grad_() for m in kind] for kind in lists[: 2 if call is experts else 4]]
    arguments = [kind if len(kind) > 1 else kind[0] for kind in leaves]
    plan = plan_of(problem.map(lambda t: routing if t is problem.routing else t), backend)
    y = call(x, plan, *arguments, activation=problem.trap.activation, backend=backend, layout=layout)
    inputs = [x, *([] if call is experts else [routing]), *(m for kind in leaves for m in kind)]
    grads = list(torch.autograd.grad(y.square().sum(), inputs))
    results = [y.detach(), *grads[: len(inputs) - sum(map(len, leaves))]]
    rest = iter(grads[len(results) - 1 :])
    for name, kind in zip(KINDS, leaves, strict=False):
        parts = [next(rest) for _ in kind]
        if len(kind) == 2 and kind[0].dim() == 3:
            results.append(as_one_stack(parts, layout))
        else:
            results.append(torch.cat([gate_up_form(part, problem, name, layout) for part in parts]))
    return results


@each_kernel
@each_trap
@each_place
@pytest.mark.parametrize("call", [experts, moe_mlp], ids=["experts", "moe_mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bits_of_the_stack(dtype, call, place, trap, backend, seed, monkeypatch):
    problem = make_problem(trap, seed, dtype)
    torch.manual_seed(seed)
    lists = lists_of(problem, place)
    expected = run(call, problem, backend, [[getattr(problem, n)] for n in KINDS[: len(lists)]], "gate_up")
    if get(backend).reads == "indexed" and place in IN_PLACE:
        monkeypatch.setattr(LayerWeights, "_stacked", uncopied(LayerWeights._stacked))
    got = run(call, problem, backend, lists, PLACES[place][1])
    wrong = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)]
    assert wrong == []


def uncopied(stacked):
    def checked(self: LayerWeights, position: int) -> Tensor:
        found = stacked(self, position)
        assert found.data_ptr() == self.kinds[position][0].data_ptr(), "weights are copied"
        return found

    return checked


def layer_weights(problem: Problem, place: str) -> LayerWeights:
    return LayerWeights(*lists_of(problem, place), layout=PLACES[place][1])


class Allocations(TorchDispatchMode):
    """The storages of what operators return, as ranges of addresses."""

    def __init__(self):
        super().__init__()
        self.ranges: list[range] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor):
                start = t.untyped_storage().data_ptr()
                self.ranges.append(range(start, start + t.untyped_storage().nbytes()))
        return out


@pytest.mark.parametrize("place", IN_PLACE)
@each_trap
def test_an_index_copies_nothing(trap, place, seed):
    problem = make_problem(trap, seed, torch.bfloat16)
    torch.manual_seed(seed)
    w = layer_weights(problem, place)
    originals = [t.untyped_storage() for kind in w.kinds for t in kind]
    with Allocations() as seen:
        found = w.indexed()
    for made in seen.ranges:
        inside = any(s.data_ptr() <= made.start and made.stop <= s.data_ptr() + s.nbytes() for s in originals)
        assert inside or len(made) < 256, f"{len(made)} bytes are made"
    for name, index in {"gate_up_proj": found.gate_up_index, "down_proj": found.down_index}.items():
        lie_stacked = place == "gate_up_by_themselves" and name == "down_proj"
        lie_stacked |= place == "down_by_themselves" and name == "gate_up_proj"
        lie_stacked |= place in ("up_first", "two_stacks", "two_stacks_up_first") and parts_of(trap, name) == 1
        assert (index is None) == lie_stacked


@pytest.mark.parametrize("place", IN_PLACE)
@each_trap
def test_an_index_finds_every_matrix(trap, place, seed):
    problem = make_problem(trap, seed, torch.bfloat16)
    torch.manual_seed(seed)
    w = layer_weights(problem, place)  # an index keeps no weights alive
    found = w.indexed()
    for kind, index in ((0, found.gate_up_index), (1, found.down_index)):
        names = [name for name in KINDS[kind::2] if getattr(problem, name) is not None]
        if index is None:
            assert all(torch.equal(getattr(found, name), getattr(problem, name)) for name in names)
            continue
        numbers = iter(index.tolist())
        for name in names:
            for expected in matrices_of(problem, name):
                assert torch.equal(getattr(found, name)[next(numbers)], expected)
        assert next(numbers, None) is None


@each_trap
def test_gradients_have_the_shapes_of_the_stack(trap, seed):
    problem = make_problem(trap, seed, torch.float32)
    torch.manual_seed(seed)
    expected = [tuple(getattr(problem, name).shape) for name in KINDS if getattr(problem, name) is not None]
    for place in PLACES:
        assert [tuple(s) for s in layer_weights(problem, place).indexed().stacked_shapes(trap.E)] == expected


NARROW = Trap("narrow", "widths that end within a step of a sum", **SIZES | {"I": 72, "Is": 40})


@pytest.mark.parametrize(
    ("trap", "place"),
    [
        *((NARROW, place) for place in ("in_turn", "up_first", "two_stacks")),
        *((TRAPS[0], place) for place in ("in_turn_in_out", "two_stacks_in_out")),
    ],
)
def test_what_has_no_index_is_stacked(trap, place, seed):
    problem = make_problem(trap, seed, torch.float32)
    torch.manual_seed(seed)
    w = layer_weights(problem, place)
    found = w.indexed()
    assert found.gate_up_index is None
    assert found.down_index is None
    assert all(torch.equal(getattr(found, name), getattr(problem, name)) for name in KINDS)


@each_kernel
@pytest.mark.parametrize("place", ["in_turn", "fresh", "up_first", "two_stacks"])
def test_narrow_weights_have_the_bits_of_the_stack(place, backend, seed):
    problem = make_problem(NARROW, seed, torch.float32)
    torch.manual_seed(seed)
    expected = run(moe_mlp, problem, backend, [[getattr(problem, n)] for n in KINDS], "gate_up")
    got = run(moe_mlp, problem, backend, lists_of(problem, place), PLACES[place][1])
    assert [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)] == []


@pytest.fixture
def tables(monkeypatch) -> indexed._Tables:
    monkeypatch.setattr(indexed, "MOST_TABLES", 3)
    return indexed._Tables()


def test_tables_are_kept_and_old_ones_given_up(tables):
    cpu = torch.device("cpu")
    kinds = ((2, 0, 1),), (range(3, 8, 4), range(5, 10, 4))
    first = tables.get(kinds, cpu)
    assert first.tolist() == [2, 0, 1, 3, 5, 7, 9] and first.dtype == torch.int32
    assert tables.get(kinds, cpu) is first
    for n in range(3):
        tables.get((((n,),),), cpu)
    assert len(tables.kept) == 3 and tables.get(kinds, cpu) is not first


def test_a_graph_being_captured_uploads_nothing_and_keeps_what_it_reads(tables, monkeypatch):
    """An upload would become part of the graph, and a replay would read host memory that is another's by then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu, table, kinds = torch.device("cuda:0"), torch.tensor([1, 0], dtype=torch.int32), (((1, 0),),)
    assert tables.get(kinds, gpu) is None and not tables.kept
    tables.kept[gpu, kinds] = (table, None, None)  # as a call before the capture leaves it
    assert tables.get(kinds, gpu) is table
    tables.kept.clear()
    assert tables.get(kinds, gpu) is table


def test_without_a_table_weights_are_copied(monkeypatch):
    """As in that capture: still right."""
    problem = make_problem(TRAPS[0], 0, torch.float32)
    w = LayerWeights(*(in_turn(problem, name) for name in KINDS))
    monkeypatch.setattr(indexed.tables, "get", lambda kinds, device: None)
    got = w.indexed()
    assert got.gate_up_index is None and got.down_index is None
    assert all(map(torch.equal, got[:4], w.stacked()[:4]))
