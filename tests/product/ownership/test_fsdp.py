"""FSDP2 around a replaced block and around each of its experts trains like one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.contenders import BACKENDS
from tests.product.ownership.models import (
    STEPS,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
    on_the_cpu,
    ten_losses,
)

pytestmark = [
    pytest.mark.unpoisoned,
    on_the_cpu,
    pytest.mark.filterwarnings("ignore:replace_moe", "ignore:FSDP2-wrapped module"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch is built without gloo"),
]
SEED = 5  # what two processes train does not depend on a test's name


def block(model):
    fully_shard(model.moe)


def block_and_model(model):
    fully_shard(model.moe)
    fully_shard(model)


def model_alone(model):
    fully_shard(model)


def each_expert(model):
    for expert in (*model.moe.experts, model.moe.shared_experts):
        fully_shard(expert)
    fully_shard(model)


UNITS = {way.__name__: way for way in (block, block_and_model, model_alone, each_expert)}
each_unit = pytest.mark.parametrize("unit", UNITS)


@contextmanager
def process_group(path: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        init_device_mesh("cpu", (world,))
        yield
    finally:
        distributed.destroy_process_group()


def make_single(seed: int, unit: str, backend: str) -> torch.nn.Module:
    """Make what one process trains: where each expert is a unit, the original's forward calls them."""
    return make_model(seed) if unit == "each_expert" else make_replaced(seed, backend)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def whole_state(model) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@native_and_eager
@each_unit
def test_one_process_trains_to_the_same_bits(unit, backend, seed, tmp_path):
    single, model = make_single(seed, unit, backend), make_replaced(seed, backend)
    expected = ten_losses(single, seed, adamw(single).step)
    with process_group(tmp_path / "store"):
        UNITS[unit](model)
        assert torch.equal(ten_losses(model, seed, adamw(model).step), expected)
        state = whole_state(model)
    assert all(torch.equal(state[name], value) for name, value in single.state_dict().items())


@native_and_eager
@each_unit
def test_whole_state_dicts_go_round(unit, backend, seed, tmp_path):
    single = make_single(seed + 1, unit, backend)
    with process_group(tmp_path / "store"):
        model = make_replaced(seed, backend)
        UNITS[unit](model)
        set_model_state_dict(model, single.state_dict(), options=StateDictOptions(full_state_dict=True))
        state = whole_state(model)
        assert all(torch.equal(state[name], value) for name, value in single.state_dict().items())
        assert torch.equal(model(make_x(seed)), single(make_x(seed)))


def train_on_two(rank: int, path: str) -> None:
    """Each rank trains on half of each batch; the weights must be those of one process with the mean of both halves."""
    torch.set_num_threads(1)
    with process_group(Path(path), rank, 2):
        for unit, shard in UNITS.items():
            compare_on_two(rank, BACKENDS[0], unit, shard)
        distributed.barrier()


def compare_on_two(rank: int, backend: str, unit: str, shard) -> None:
    single, model = make_single(SEED, unit, backend), make_replaced(SEED, backend)
    for other in (single, model):
        other.moe.gate.alpha = 0.0  # injected, it would not follow the factor of one half
    shard(model)
    optimizers = adamw(single), adamw(model)
    for i in range(STEPS):
        x = make_x(SEED + i)
        for half in x.split(1):
            (single(half).square().mean() / 2).backward()
        model(x[rank : rank + 1]).square().mean().backward()
        for p in model.head.parameters() if unit == "block" else ():  # no unit: nobody reduces its gradients
            distributed.all_reduce(p.grad)
            p.grad /= 2
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = whole_state(model)
    if rank == 0:
        for name, value in single.state_dict().items():
            assert torch.equal(state[name], value), f"{backend} {unit} {name}"


def test_two_processes_train_like_one(tmp_path):
    torch.multiprocessing.spawn(train_on_two, (str(tmp_path / "store"),), nprocs=2)
