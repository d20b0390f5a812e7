"""The processes of a job: one alone or those of torchrun, who agree at the start and stop together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class AgreedError(ValueError):
    """Bad input that all ranks know of, so that one of them may tell it."""


class DiskError(OSError):
    """What a rank could not write or remove while training, which is no bad input, and all ranks know of."""


def lost_another(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another process has ended, or did not come in time.

    NCCL's errors have a class of their own, gloo's are known by their words.
    """
    words = ("gloo/transport", "Connection reset by peer", "Connection closed by peer", "timeout caused pair closure")
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)


@dataclass(frozen=True)
class Ranks:
    """Who this process is: rank of world; device: where it computes."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot be changed)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank. Collective."""
        if not distributed.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T], error: type[Exception] = AgreedError) -> T:
        """Let every rank do something by itself; where it fails for one, it fails for all. Collective.

        Raises: `error` with the first rank's reason, for ValueError and OSError.
        """
        result, reason = None, None
        try:
            result = action()
        except (ValueError, OSError) as failure:
            reason = str(failure)
        reasons = self.gather(reason)
        failed = [rank for rank, found in enumerate(reasons) if found is not None]
        if failed:
            alone = f"rank {failed[0]}: " if len(failed) < self.world else ""
            raise error(f"{alone}{reasons[failed[0]]}")
        return result

    def first(self, action: Callable[[], T], error: type[Exception] = AgreedError) -> T:
        """Let rank 0 do something and return its result on all ranks. Collective. Raises: as `together`."""
        return self.gather(self.together(lambda: action() if self.rank == 0 else None, error))[0]

    def expect_same(self, values: Mapping[str, Any]) -> None:
        """Compare values, by name, that must not differ between ranks. Collective.

        Raises: AgreedError naming what differs, and what two ranks have.
        """
        everyone = self.gather(dict(values))
        for name in everyone[0]:
            for rank, other in enumerate(everyone):
                if other.get(name) != everyone[0][name]:
                    raise AgreedError(
                        f"{name}: got {everyone[0][name]!r} on rank 0 and {other.get(name)!r} on rank {rank}, expected "
                        "the same code, command and data on all ranks"
                    )


@contextmanager
def joined(parallel: str | None, device: str, patience_s: float) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, or be one alone; a group that is there already is used.

    Args:
        parallel: what --parallel asks for, None for nothing; device: "cpu" (gloo) or "cuda" (NCCL, a GPU each);
        patience_s: after so long in a collective, of which some rank does not come, a rank ends with an error.
    Raises: ValueError where torchrun's environment is missing, whole or in part, or there is no such GPU.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    started = len(missing) < len(ENVIRONMENT)
    if not distributed.is_initialized() and missing and (started or parallel):
        raise ValueError(
            f"{f'--parallel {parallel}' if parallel else 'processes'}: got an environment without "
            f"{', '.join(missing)}, expected torchrun's: torchrun --nproc-per-node N -m bench train ..."
        )
    local = int(os.environ.get("LOCAL_RANK", 0)) if started else 0
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"--device: got cuda for local rank {local}, but torch sees {torch.cuda.device_count()} GPUs")
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), place)
        return
    if not started:
        yield Ranks(device=place)
        return
    if device == "cuda":
        torch.cuda.set_device(place)
    patience = timedelta(seconds=patience_s)
    store, rank, world = next(distributed.rendezvous("env://", timeout=patience))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun's store outlives a restart, and gloo would look for dead processes at their old addresses. Agents of
        # several machines may count restarts differently.
        store = distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        distributed.destroy_process_group()
