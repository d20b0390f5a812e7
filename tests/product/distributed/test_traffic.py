"""What travels, when, and what is done with what does not fit; what is refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.clusters import cost
from moe_kernels import ExpertRace, MoELayer, replace_moe
from moe_kernels.distributed import (
    BoundedDispatcher,
    ExactDispatcher,
    check_in_sync,
    expert_parallel,
    fully_shard,
)
from reference.moe import expert_mlp, of_each_expert
from tests.contenders import BACKENDS
from tests.product.distributed.problems import BACKEND, E, H, K, L, Problem, call, mesh_of
from tests.product.ownership.models import make_model

pytestmark = pytest.mark.unpoisoned
PLAIN = Problem((2, 2))


class Record(TorchDispatchMode):
    """The operators called, in order: collectives with the bytes of what they write and read, and our own."""

    def __init__(self):
        super().__init__()
        self.called: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space in ("c10d", "moe_kernels"):
            self.called.append((name, *(t.nbytes for t in args if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))

    def sent(self) -> list[int]:
        return [sizes[1] for name, *sizes in self.called if name == "alltoall_base_"]


def parallel(problem: Problem, seed: int, dispatcher=None) -> MoELayer:
    return expert_parallel(problem.layer(seed, BACKEND), mesh_of(ep=distributed.get_world_size()), dispatcher)


def mine(problem: Problem, seed: int) -> dict[str, Tensor]:
    return problem.batches(seed)[distributed.get_rank()]


def count_messages(problem: Problem, seed: int) -> None:
    tokens, bound = mine(problem, seed)["x"].shape[0] * L, 3 * L
    formula = cost.rows_bytes(tokens, K, H, 4)
    for dispatcher, counts, expected in (
        (ExactDispatcher(), [E * 4], formula),
        (BoundedDispatcher(bound), [], formula * E * bound // (tokens * K)),
    ):
        layer = parallel(problem, seed, dispatcher)
        with Record() as forward:
            y = layer(mine(problem, seed)["x"])
        with Record() as backward:
            y.sum().backward()
        there, back = forward.sent()[-2:]
        assert forward.sent()[:-2] == counts
        assert there == expected and backward.sent() == [there, back]
        totals = [None] * distributed.get_world_size()
        distributed.all_gather_object(totals, (there, back))
        assert sum(t for t, _ in totals) == sum(b for _, b in totals), "what comes back is what was sent"


class HostReads(TorchFunctionMode):
    """How often sizes are read on the host; what is only checked on CPUs (`bool`, `int`) does not count."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (Tensor.tolist, Tensor.item)
        return func(*args, **(kwargs or {}))


def count_waits(seed: int) -> None:
    """By the backend whose rooms read nothing themselves, for plans with and without rows behind their last."""
    race = MoELayer(H, 8, E, 2, router=ExpertRace(2), backend="grouped").eval()
    for layer in (PLAIN.layer(seed, "grouped"), race):
        for dispatcher, expected in ((ExactDispatcher(), 1), (BoundedDispatcher(2 * L), 0)):
            parallel = expert_parallel(deepcopy(layer), mesh_of(ep=distributed.get_world_size()), dispatcher)
            x = mine(PLAIN, seed)["x"].requires_grad_()
            with HostReads() as reads:
                y = parallel(x)
            assert reads.count == expected
            with HostReads() as reads:
                y.sum().backward()
            assert reads.count == 0


@pytest.mark.skipif("grouped" not in BACKENDS, reason="this torch has no grouped_mm for CPUs")
def test_the_exact_dispatcher_waits_once_and_the_bounded_never(two, seed):
    two.run(count_waits, seed=seed)


class Doubled(MoELayer):
    def forward(self, x, return_aux_loss=False, **call):
        return 2 * super().forward(x, return_aux_loss, **call)


def race_in_eval(seed: int) -> None:
    """Fewer rows than their bound, in a layer whose class is the user's."""
    torch.manual_seed(seed)
    layers = [Doubled(H, 8, E, 2, router=ExpertRace(2), backend=BACKEND).eval() for _ in range(3)]
    x = torch.randn(2, L, H)
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer.router.threshold.fill_(0.1)
    expected = layers[0](x)
    for layer, dispatcher in zip(layers[1:], (ExactDispatcher(), BoundedDispatcher(2 * L)), strict=True):
        y = expert_parallel(layer, mesh_of(ep=distributed.get_world_size()), dispatcher)(x)
        torch.testing.assert_close(y, expected)  # the same kernels on other rows
        assert isinstance(layer, Doubled)


def test_plans_that_are_not_full(two, seed):
    two.run(race_in_eval, seed=seed)


def test_messages_have_the_size_of_the_formula(two, seed):
    two.run(count_messages, problem=Problem((2, 1)), seed=seed)


def count_gathers(seed: int) -> None:
    """Two gathers of the weights and a reduction of the gradients, in pieces of one rank."""
    layer = PLAIN.layer(seed, BACKEND)
    parameters = sum(p.numel() for p in layer.parameters())
    sharded = fsdp.fully_shard(nn.Sequential(layer, nn.Identity()), mesh=mesh_of(dp=2))
    with Record() as record:
        sharded(mine(PLAIN, seed)["x"]).sum().backward()
    expected = cost.sharded_bytes(parameters, 2, 4)
    collectives = [call for call in record.called if call[0].endswith("_base_")]
    received = [output - own for name, output, own in collectives if name == "_allgather_base_"]
    sent = [own - output for name, output, own in collectives if name == "_reduce_scatter_base_"]
    assert received in ([expected], [expected] * 2) and sent == [expected], collectives


def test_fsdp_moves_the_bytes_of_the_formula(two, seed):
    two.run(count_gathers, seed=seed)


def overlap(problem: Problem, seed: int) -> None:
    """What is called in front of the wait for rows, and in backward in front of what reads their gradients."""
    layer = parallel(problem, seed)
    waits = []

    class Late(ExactDispatcher):
        def send(self, take, plan, mesh):
            arrived = super().send(take, plan, mesh)

            def received() -> Tensor:
                waits.append(len(record.called))
                return arrived.rows()

            return replace(arrived, rows=received)

    layer.dispatcher = Late()
    x = mine(problem, seed)["x"].requires_grad_()
    with Record() as record:
        y = layer(x)
    names = [name for name, *_ in record.called]
    _, rows, _ = (i for i, name in enumerate(names) if name == "alltoall_base_")
    assert rows < names.index("experts") < waits[0] <= names.index("moe_mlp")
    with Record() as record:
        y.sum().backward()
    names = [name for name, *_ in record.called]
    on_the_way = names[names.index("moe_mlp_bwd") :]
    assert on_the_way.index("alltoall_base_") < on_the_way.index("experts_bwd") < on_the_way.index("combine")


def test_the_shared_expert_is_computed_while_rows_travel(two, seed):
    """Its backward, too: behind the call that sends the rows' gradients, in front of what reads them."""
    two.run(overlap, problem=PLAIN, seed=seed)


def overflow(problem: Problem, seed: int) -> None:
    batch = mine(problem, seed)
    with pytest.raises(RuntimeError, match="rows_per_expert: got more rows for an expert on a rank, expected 1"):
        parallel(problem, seed, BoundedDispatcher(1))(batch["x"])
    layer, bound = parallel(problem, seed, BoundedDispatcher(2, overflow="drop")), 2
    y, _ = call(layer, batch)

    plain = problem.layer(seed, BACKEND)
    plan, _ = plain.router.route(batch["x"].flatten(0, 1), plain.gate_weight, BACKEND)
    assert layer.dropped_rows == (plan.expert_counts - bound).clamp(min=0).sum() > 0
    place = torch.arange(plan.num_rows) - plan.expert_offsets[:-1].repeat_interleave(plan.expert_counts)
    kept = torch.zeros(len(y) * L, E, dtype=torch.bool)
    kept[plan.row_token[place < bound].long(), experts_of(plan)[place < bound]] = True
    expected = without(plain, batch["x"].flatten(0, 1), kept).view_as(y)
    torch.testing.assert_close(y, expected)  # plain torch in float32: no rule of ours judges what nobody else drops


def experts_of(plan) -> Tensor:
    return torch.arange(E).repeat_interleave(plan.expert_counts)


def without(layer: MoELayer, x: Tensor, kept: Tensor) -> Tensor:
    """Compute the layer in plain torch with the picks that were kept."""
    weights, ids = (x @ layer.gate_weight.T).softmax(-1).topk(K)
    weights = torch.zeros_like(kept, dtype=x.dtype).scatter(1, ids, weights) * kept

    own = of_each_expert(layer.gate_up_proj, layer.down_proj, layer.gate_up_bias, layer.down_bias)
    experts = [expert_mlp(x, gate_up, down, "swiglu", *biases) for gate_up, down, *biases in own]
    shared_biases = layer.shared_gate_up_bias, layer.shared_down_bias
    y = expert_mlp(x, layer.shared_gate_up_proj, layer.shared_down_proj, "swiglu", *shared_biases)
    return y + sum(weights[:, e, None] * experts[e] for e in range(E))


def test_what_does_not_fit_is_an_error_on_all_ranks_or_counted(two, seed):
    """One rank alone has too many rows for a bound of 1: images 2 and 0."""
    two.run(overflow, problem=PLAIN, seed=seed)
    two.run(overflow, problem=replace(PLAIN, bias=True), seed=seed)
    two.run(overflow_of_one, problem=Problem((2, 0)), seed=seed)


def overflow_of_one(problem: Problem, seed: int) -> None:
    with pytest.raises(RuntimeError, match="rows_per_expert: got more rows"):
        parallel(problem, seed, BoundedDispatcher(1))(mine(problem, seed)["x"])


def compiled(problem: Problem, seed: int, dispatcher) -> None:
    layer, x = parallel(problem, seed, dispatcher), mine(problem, seed)["x"]
    found = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)):
        y = module(x)
        grads = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
        found.append([y, *(grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads)])
    assert all(map(torch.equal, *found))


def test_the_bounded_dispatcher_compiles_as_one_graph(two, seed):
    """A graph without breaks reads nothing on the host."""
    for bias in (False, True):
        two.run(compiled, problem=replace(PLAIN, bias=bias), seed=seed, dispatcher=BoundedDispatcher(4 * L))


def refusals(seed: int) -> None:
    mesh, layer = mesh_of(ep=2), PLAIN.layer(seed, BACKEND)
    with pytest.raises(ValueError, match="got num_experts = 7 in the root, expected a multiple of the 2 ranks of mesh"):
        expert_parallel(MoELayer(8, 8, 7, 1), mesh)
    with pytest.raises(ValueError, match=r"mesh: got dimensions \('dp',\), expected one called 'ep'"):
        expert_parallel(layer, mesh_of(dp=2))
    with pytest.raises(TypeError, match="dispatcher: got str, expected one with a method send"):
        expert_parallel(layer, mesh, "exact")
    with pytest.raises(TypeError, match="mesh: got int, expected a DeviceMesh"):
        expert_parallel(layer, 2)
    with pytest.raises(ValueError, match="module: got Linear without a MoELayer"):
        expert_parallel(nn.Linear(2, 2), mesh)
    model = make_model(seed)
    replace_moe(model)
    with pytest.raises(ValueError, match=r"got a replaced block at moe, expected .* of DiT-MoE's"):
        expert_parallel(model, mesh)
    with pytest.raises(ValueError, match="module: got different gate_weight on the ranks"):
        expert_parallel(PLAIN.layer(seed + distributed.get_rank(), BACKEND), mesh)
    with pytest.raises(ValueError, match="module: got different shared_down_bias on the ranks"):
        biased = replace(PLAIN, bias=True).layer(seed, BACKEND)
        biased.shared_down_bias.data += distributed.get_rank()
        expert_parallel(biased, mesh)
    with pytest.raises(ValueError, match="module: got different modules on the ranks"):
        other = replace(PLAIN, shared=distributed.get_rank() == 0).layer(seed, BACKEND)
        expert_parallel(other, mesh)
    expert_parallel(layer, mesh)
    with pytest.raises(ValueError, match="module: got the root with distributed weights"):
        expert_parallel(layer, mesh)
    with pytest.raises(ValueError, match=r"mesh: got dimensions \('ep',\), expected two, one of them 'ep'"):
        fully_shard(layer, mesh)
    check_in_sync(layer, mesh)
    with pytest.raises(ValueError, match="with distributed weights"):
        expert_parallel(fsdp.fully_shard(PLAIN.layer(seed, BACKEND), mesh=mesh_of(dp=2)), mesh)


def test_what_does_not_fit_together_is_refused(two, seed):
    two.run(refusals, seed=seed)


def test_a_bound_is_a_number_and_a_policy():
    with pytest.raises(ValueError, match="rows_per_expert: got 0, expected at least 1"):
        BoundedDispatcher(0)
    with pytest.raises(ValueError, match="overflow: got 'wait', expected one of 'error', 'drop'"):
        BoundedDispatcher(1, "wait")
