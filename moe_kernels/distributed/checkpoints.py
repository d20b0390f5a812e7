"""Checkpoints of distributed training: saved by any number of ranks, loaded by any other, never half there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from ..weights import stack_dit_moe, unstack_dit_moe
from .in_sync import check_in_sync

_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save model and optimizer to folder/step_N, which appears when all ranks have written everything.

    Collective; every rank writes what it owns. Layouts do not matter: FSDP2, expert parallelism and one process read
    each other's. Written beside it first, under a name that `latest` does not know.

    Args:
        folder: on a file system that all ranks see.
        step: N.
        model, optimizer: as they train, wrapped or not.
        extra: further tensors, the same on all ranks.
    Returns: folder/step_N.
    Raises: FileExistsError where it is there already; ValueError where replicated parameters differ between ranks;
        torch's CheckpointException on all ranks where one could not write, and then what was saved before is untouched.
    Source: torch.distributed.checkpoint.
    """
    folder = Path(folder)
    done, partial = folder / f"step_{step:08d}", folder / f"step_{step:08d}{_PARTIAL}"
    _all_or_none(lambda: _prepare(done, partial))
    if distributed.is_initialized():
        check_in_sync(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "extra": dict(extra or {})}
    checkpoint.save(state, checkpoint_id=partial, no_dist=not distributed.is_initialized())
    _all_or_none(lambda: partial.rename(done))
    return done


def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor] = {}
) -> None:
    """Load what `save` wrote into model, optimizer and the tensors of extra, in place.

    Collective. The number of ranks, FSDP2 and expert parallelism may be others than when it was saved.

    Args:
        path: folder/step_N, as `save` and `latest` return it.
        model, optimizer: of the same model and optimizer.
        extra: tensors by the names they were saved under.
    Raises: FileNotFoundError without a checkpoint; torch's CheckpointException, or RuntimeError, naming keys of another
        model.
    """
    if not (Path(path) / ".metadata").is_file():
        raise FileNotFoundError(f"path: got {path}, expected a checkpoint that save() wrote")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "extra": dict(extra or {})}
    checkpoint.load(state, checkpoint_id=path, no_dist=not distributed.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def latest(folder: str | Path) -> Path | None:
    """Return the checkpoint with the highest step in folder, None where there is none; unfinished ones do not count."""
    found = [path for path in Path(folder).glob("step_*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), default=None)


def gather_dit_moe(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole model on the CPU of rank 0 under the names of DiT-MoE's public checkpoints; {} elsewhere.

    Collective. Save it with `moe_kernels.weights.save`. Raises: as `unstack_dit_moe`, on rank 0.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return unstack_dit_moe(state) if state else {}


def scatter_dit_moe(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the names of DiT-MoE into a distributed model; only rank 0 has to have read it.

    Collective. Raises: as `stack_dit_moe` and set_model_state_dict, on rank 0.
    """
    state = stack_dit_moe(state_dict) if state_dict else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed.is_initialized())
    set_model_state_dict(model, state, options=options)


def _prepare(done: Path, partial: Path) -> None:
    if done.exists():
        raise FileExistsError(f"folder: got one that holds {done.name}, expected none of this step")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)


def _all_or_none(action: Any) -> None:
    """Let rank 0 do it, and all ranks wait and raise what it raised."""
    outcome: list[Exception | None] = [None]
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome[0] = error
    if distributed.is_initialized():
        distributed.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
