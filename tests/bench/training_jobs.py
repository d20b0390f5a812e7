"""`bench train` of a tiny model, as the tests' workers call it, and as a script for torchrun that has an accident."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from torch import distributed

from bench.__main__ import main
from bench.training import command
from bench.training.trainer import Trainer

TINY = dict(hidden_size=32, depth=2, num_heads=2, num_experts=4, mlp_ratio=2)
COMMON = "--batch 5 --warmup 2 --ema 0.9 --lr 1e-3 --backend eager --save-every 2 --timeout 120".split()
STRUCK_AT = 5


def tiny_job(args, source):
    job = JOB_OF(args, source)
    return replace(job, recipe=replace(job.recipe, **TINY))


JOB_OF, WRITE = command.job_of, command._write


def write_shards(folder: Path, count: int = 40, bad: int | None = None) -> Path:
    """Write latents (count, 2, 4, 4) in two shards of unequal sizes, one of them NaN."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    latents, labels = rng.standard_normal((count, 2, 4, 4)).astype(np.float16), np.arange(count) % 3
    if bad is not None:
        latents[bad] = np.nan
    for i, part in enumerate((slice(0, 15), slice(15, count))):
        np.save(folder / f"latents_{i}.npy", latents[part])
        np.save(folder / f"labels_{i}.npy", labels[part].astype(np.int32))
    return folder


def train(words: list[str], second: list[str] = [], trouble: str = "") -> tuple[int, str, str]:  # noqa: B006
    """Run the command on this rank; return its exit code and what it said to stdout and stderr.

    second: further words for rank 1 alone; trouble: a context manager of this module, by name, around it.
    """
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    out, err = io.StringIO(), io.StringIO()
    around = globals()[trouble](rank) if trouble else contextlib.nullcontext()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), around:
        with mock.patch.object(command, "job_of", tiny_job), mock.patch.dict(os.environ, {"RANK": str(rank)}):
            code = main(["train", *COMMON, *words, *(second if rank == 1 else [])])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def other_code(rank: int) -> Iterator[None]:
    with mock.patch.object(command, "source_digest", lambda suffixes: f"code {rank}"):
        yield


@contextlib.contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Let files of rank 1 grow no longer than a page once four steps are done."""
    save, (soft, hard) = Trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, folder):
        if rank == 1 and self.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return save(self, folder)

    try:
        with mock.patch.object(Trainer, "save", limited):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_for_weights(rank: int) -> Iterator[None]:
    """Let files of rank 0 grow no longer than a page while it writes the final weights."""

    def limited(*given):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            WRITE(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with mock.patch.object(command, "_write", limited):
        yield


@contextlib.contextmanager
def no_way_to_forget(rank: int) -> Iterator[None]:
    with mock.patch.object(command, "_forget", side_effect=OSError(errno.EROFS, "Read-only file system")):
        yield


def accident() -> None:
    """Let one rank, before a step, be killed, hang, or find that the disk is full, the first time that the job runs."""
    advance, (rank, what) = Trainer.advance, os.environ["ACCIDENT"].split()

    def struck(self):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.step == STRUCK_AT and os.environ["RANK"] == rank and first:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "hangs":
                time.sleep(3600)
            elif what == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return advance(self)

    Trainer.advance = struck


if __name__ == "__main__":
    command.job_of = tiny_job
    accident()
    sys.exit(main(["train", *COMMON, *sys.argv[1:]]))
