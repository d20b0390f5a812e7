"""Processes that are started once and then run one check after the other, all ranks the same one."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
from torch import distributed

PRELOADED = [  # imported once, and not in each process: the optimizers import Dynamo
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "tests.product.distributed.workers",
    "tests.product.distributed.test_checkpoints",
]
PATIENCE_S = 60  # for a check
COLLECTIVE_S = 30  # for a collective of which some rank does not come


class Workers:
    """`world` processes of one gloo group; `run` fails with the first traceback, and hangs never."""

    def __init__(self, world: int):
        self.world = world
        self.processes, self.pipes = [], []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        store = tempfile.mktemp(prefix="gloo-")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, self.world, store), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, check, **arguments: Any) -> list[Any]:
        """Call the function `check` of a test module on every rank; return what each returned."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((check.__module__, check.__name__, arguments))
        answers: dict[int, tuple[str, Any]] = {}
        waiting = dict(zip(self.pipes, range(self.world), strict=True))
        while waiting and (ready := wait(list(waiting), PATIENCE_S)):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = "the process has ended", None
        failures = [f"rank {rank}: {answers[rank][0]}" for rank in sorted(answers) if answers[rank][0]]
        failures += [f"rank {rank}: no answer in {PATIENCE_S} s, see stderr" for rank in waiting.values()]
        for rank in waiting.values():
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # where it stands
            time.sleep(0.5)
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)
        return [answers[rank][1] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    patience = timedelta(seconds=COLLECTIVE_S)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
            pipe.send(("", result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
