"""Checkpoints go from any layout and number of ranks to any other, bit for bit, and none is ever half there."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from moe_kernels import MoELayer, replace_moe
from moe_kernels.distributed import checkpoints, data_parallel, expert_parallel, fully_shard, stack_experts
from tests.product.distributed import problems
from tests.product.distributed.problems import BACKEND, H, mesh_of
from tests.product.distributed.workers import Workers
from tests.product.ownership.models import Model, make_x

pytestmark = pytest.mark.unpoisoned


class WithEightExperts(Model):
    def __init__(self):
        super().__init__()
        self.moe = type(self.moe)(H, 24, 8, 2, 16, alpha=0.1)


def dit_moe(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return WithEightExperts()


def stacked(seed: int) -> nn.Module:
    model = dit_moe(seed)
    replace_moe(model, backend=BACKEND)
    assert stack_experts(model) == 1
    return model


def biased(seed: int) -> nn.Module:
    model = dit_moe(seed)
    model.moe = MoELayer(H, 24, 8, 2, 16, bias=True, backend=BACKEND)
    for name in problems.BIASES:
        nn.init.normal_(getattr(model.moe, name))
    return model


def by_fsdp(model: nn.Module) -> nn.Module:
    return fsdp.fully_shard(model, mesh=mesh_of(dp=distributed.get_world_size()))


def by_ep(model: nn.Module) -> nn.Module:
    return expert_parallel(model, mesh_of(ep=distributed.get_world_size()))


def by_ep_and_ddp(model: nn.Module) -> nn.Module:
    mesh = mesh_of(dp=2, ep=distributed.get_world_size() // 2)
    return data_parallel(expert_parallel(model, mesh), mesh)


def by_ep_and_fsdp(model: nn.Module) -> nn.Module:
    mesh = mesh_of(dp=2, ep=distributed.get_world_size() // 2)
    return fully_shard(expert_parallel(model, mesh), mesh)


def by_one(model: nn.Module) -> nn.Module:
    return model


LAYOUTS = {make.__name__: make for make in (by_fsdp, by_ep, by_ep_and_ddp, by_ep_and_fsdp, by_one)}
PLACES = [("two", "by_fsdp"), ("two", "by_ep"), ("four", "by_ep_and_fsdp"), ("four", "by_ep_and_ddp")]


MODELS = {"stacked": stacked, "biased": biased}


def made(layout: str, seed: int, kind: str = "stacked") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = LAYOUTS[layout](MODELS[kind](seed))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(make_x(seed)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    moments = state.get("state", {}).items()
    return weights | {f"{name} {kind}": t for name, kinds in moments for kind, t in kinds.items()}


def save_as(layout: str, folder: str, seed: int, step: int = 1, kind: str = "stacked") -> dict[str, Tensor]:
    model, optimizer = made(layout, seed, kind)
    train(model, optimizer, seed)
    checkpoints.save(folder, step, model, optimizer, {"seen": torch.tensor(seed)})
    return whole(model, optimizer)


def load_as(layout: str, folder: str, seed: int, kind: str = "stacked") -> dict[str, Tensor]:
    model, optimizer = made(layout, seed + 1, kind)
    extra = {"seen": torch.tensor(0)}
    checkpoints.load(checkpoints.latest(folder), model, optimizer, extra)
    assert extra["seen"] == seed
    return whole(model, optimizer)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 20
    assert not [name for name, t in expected.items() if not torch.equal(got[name], t)]


@pytest.mark.parametrize(("group", "layout"), PLACES)
def test_from_any_layout_to_any_other(group, layout, seed, tmp_path, request):
    saved = request.getfixturevalue(group).run(save_as, layout=layout, folder=str(tmp_path), seed=seed)[0]
    for other, into in PLACES:
        loaded = request.getfixturevalue(other).run(load_as, layout=into, folder=str(tmp_path), seed=seed)[0]
        assert_same(loaded, saved)
    assert_same(load_as("by_one", str(tmp_path), seed), saved)


def test_from_one_process_to_many(four, seed, tmp_path):
    saved = save_as("by_one", str(tmp_path), seed)
    assert_same(four.run(load_as, layout="by_ep_and_fsdp", folder=str(tmp_path), seed=seed)[0], saved)


@pytest.mark.parametrize(("group", "layout"), [("two", "by_ep"), ("four", "by_ep_and_fsdp"), (None, "by_one")])
def test_biases_go_from_any_layout_to_any_other(group, layout, seed, tmp_path, request):
    how = {"folder": str(tmp_path), "seed": seed, "kind": "biased"}
    if group is None:
        saved = save_as(layout, **how)
    else:
        saved = request.getfixturevalue(group).run(save_as, layout=layout, **how)[0]
    assert {f"moe.{name}" for name in problems.BIASES} < saved.keys()
    for other, into in PLACES:
        assert_same(request.getfixturevalue(other).run(load_as, layout=into, **how)[0], saved)
    assert_same(load_as("by_one", **how), saved)


def biases_as_dit_moe(seed: int) -> None:
    model = by_ep(biased(seed))
    if distributed.get_rank() == 0:
        with pytest.raises(ValueError, match=r"state_dict: moe\.gate_up_bias: got biases, expected none"):
            checkpoints.gather_dit_moe(model)
    else:
        assert checkpoints.gather_dit_moe(model) == {}


def test_biases_have_no_public_names(two, seed):
    two.run(biases_as_dit_moe, seed=seed)


def to_and_from_dit_moe(layout: str, seed: int) -> dict[str, Tensor]:
    model, _ = made(layout, seed + 1)
    checkpoints.scatter_dit_moe(model, dit_moe(seed).state_dict() if distributed.get_rank() == 0 else {})
    return checkpoints.gather_dit_moe(model)


@pytest.mark.parametrize(("group", "layout"), PLACES)
def test_the_public_state_dict_goes_in_and_comes_out(group, layout, seed, request):
    got, *others = request.getfixturevalue(group).run(to_and_from_dit_moe, layout=layout, seed=seed)
    expected = dit_moe(seed).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], t) for name, t in expected.items())
    assert not any(others)


def fail_to_write(layout: str, folder: str, seed: int, how: str) -> None:
    write = FileSystemWriter.write_data

    def broken(*_):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")

    if distributed.get_rank() == 1:
        FileSystemWriter.write_data = broken
    try:
        with pytest.raises(CheckpointException, match="No space left"):
            save_as(layout, folder, seed, step=2)
    finally:
        FileSystemWriter.write_data = write


def test_a_full_disk_of_one_rank_stops_all_and_harms_nothing(two, seed, tmp_path):
    saved = two.run(save_as, layout="by_ep", folder=str(tmp_path), seed=seed)[0]
    two.run(fail_to_write, layout="by_ep", folder=str(tmp_path), seed=seed + 2, how="full")
    assert_same(two.run(load_as, layout="by_fsdp", folder=str(tmp_path), seed=seed)[0], saved)
    two.run(save_as, layout="by_ep", folder=str(tmp_path), seed=seed, step=2)
    assert [path.name for path in sorted(Path(tmp_path).iterdir())] == ["step_00000001", "step_00000002"]


def test_a_rank_killed_while_saving_harms_nothing(two, seed, tmp_path):
    saved = two.run(save_as, layout="by_ep", folder=str(tmp_path), seed=seed)[0]
    doomed = Workers(2)
    with pytest.raises(pytest.fail.Exception, match="rank 1: the process has ended"):
        doomed.run(fail_to_write, layout="by_ep", folder=str(tmp_path), seed=seed + 2, how="killed")
    assert (tmp_path / "step_00000002.partial").is_dir()
    assert_same(two.run(load_as, layout="by_ep", folder=str(tmp_path), seed=seed)[0], saved)


def refuse(folder: str, seed: int) -> None:
    model, optimizer = made("by_ep", seed)
    train(model, optimizer, seed)
    with pytest.raises(FileExistsError, match=r"folder: got one that holds step_00000001, expected none of this step"):
        checkpoints.save(folder, 1, model, optimizer)
    with pytest.raises(FileNotFoundError, match=r"path: got .*nothing, expected a checkpoint that save\(\) wrote"):
        checkpoints.load(f"{folder}/nothing", model, optimizer)
    if distributed.get_rank() == 1:
        model.moe.gate_weight.data += 1
    with pytest.raises(ValueError, match=r"module: got different moe.gate_weight on the ranks"):
        checkpoints.save(folder, 3, model, optimizer)
    wider = MoELayer(H, 48, 8, 2, 16, backend=BACKEND)
    optimizer = torch.optim.AdamW(wider.parameters())
    with pytest.raises((CheckpointException, RuntimeError), match="gate_weight"):
        checkpoints.load(checkpoints.latest(folder), wider, optimizer)


def test_what_cannot_be_is_refused_on_all_ranks(two, seed, tmp_path):
    assert checkpoints.latest(tmp_path) is None
    two.run(save_as, layout="by_ep", folder=str(tmp_path), seed=seed)
    two.run(refuse, folder=str(tmp_path), seed=seed)
