"""Contenders in worker processes of their own, so that no library's OpenMP, oneDNN or patching disturbs another.

One scheduler interleaves their rounds; those that are not timed block on a pipe. This process judges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case
from bench.instrument.contender import Contender
from bench.instrument.verify import Check
from bench.instrument.worker import Worker, WorkerError

PEAK = "peak"
ROUND_S = 0.03  # of calls, for every contender in every round


@dataclass
class Runner:
    """A contender in its worker, as `measure.interleave` sees contenders; `reason`: why it cannot run, or how it fell.

    Its result is itself: what it computed stays in the worker until the judge asks.
    """

    worker: Worker | None = None
    reason: str | None = None

    def __call__(self) -> Runner:
        return self

    def ask(self, method: str, **arguments: Any) -> Any:
        return self.noting(self.worker.call, method, **arguments)

    def noting(self, function: Callable, *args: Any, **arguments: Any) -> Any:
        """Call a method of the worker; an error of it is kept as the reason, and raised."""
        try:
            return function(*args, **arguments)
        except WorkerError as error:
            self.reason = str(error)
            raise


def timer(runner: Runner, calls: int, device: str) -> tuple[float, float, Runner]:
    wall, cpu = runner.ask("time", calls=calls)
    return wall, cpu, runner


@dataclass
class Crew:
    """The workers, kept from case to case; another number of threads gets new ones (OpenMP reads it at its start)."""

    threads: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)

    def seat(self, targets: Mapping[str, tuple[str, dict]], threads: int) -> dict[str, Runner]:
        """Build each target (module:callable, arguments) in the worker of its name, all of them at once."""
        if threads != self.threads:
            self.close()
            self.threads = threads
        for name in self.workers.keys() - targets:  # one that does not take part needs no memory
            with suppress(WorkerError):
                self.workers[name].build("builtins:object")
        runners = {name: Runner(self._worker(name)) for name in targets}
        for name, (target, keywords) in targets.items():
            runners[name].worker.send("build", target=target, **keywords)
        for runner in runners.values():
            with suppress(WorkerError):
                runner.noting(runner.worker.receive)
        return runners

    def _worker(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            env = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "passive"}
            self.workers[name] = Worker(env=env, **self._paths(name))
        return self.workers[name]

    def _paths(self, name: str) -> dict[str, Any]:
        """Return where a worker imports from."""
        return {"path": [store.ROOT]}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class InWorkers:
    """An executor (bench/instrument/race.py): each contender in a worker of a crew, and the peak of the threads beside.

    target: the seat (module:class) that a worker builds from (name, case). folder: for results on their way here.
    """

    crew: Crew
    target: str
    folder: Path
    runners: dict[str, Runner] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    reasons: ClassVar[dict[str, str]] = {}

    @property
    def fell(self) -> dict[str, str]:
        return {name: runner.reason for name, runner in self.runners.items() if runner.reason}

    def seat(self, cases: Mapping[Contender, Case]) -> dict[str, Runner]:
        if not cases:
            return {}
        case = next(iter(cases.values()))
        targets = {c.name: (self.target, {"name": c.name, "case": own.id}) for c, own in cases.items()}
        targets[PEAK] = ("bench.instrument.seat:Peak", {"case": case.id})
        self.runners = self.crew.seat(targets, case.threads)
        return {name: runner for name, runner in self.runners.items() if not runner.reason}

    def judge(self, contender: Contender, case: Case, result: Runner) -> Check:
        """Judge what a runner computes now; the same result is judged once."""
        path, name = self.folder / "result.pt", contender.name
        known = self.digests.get(name, "")
        self.digests[name] = result.ask("save", path=str(path), known=known)
        if self.digests[name] != known:
            self.checks[name] = judge_file(case, path, contender.bound)
        return self.checks[name]

    def timing(self, case: Case) -> dict[str, Any]:
        return {"timer": timer, "min_call_s": ROUND_S}

    def version(self, contender: Contender) -> str:
        with suppress(WorkerError):
            return self.runners[contender.name].ask("version")
        return ""


def judge_file(case: Case, path: Path, *bound: float) -> Check:
    """Judge the tensors that a seat saved, on all cores, for nobody is timed meanwhile; the file goes."""
    with measure.threads(len(os.sched_getaffinity(0))):
        check = workloads.check(case, torch.load(path, mmap=True), *bound)
    path.unlink()
    return check
