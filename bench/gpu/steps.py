"""Whole DiT-MoE models: sampling and training steps of our backends against the authors' code path.

A large model with AdamW, 16 bytes a parameter, fits a GPU once. So all contenders of a case own the same Parameter
objects and the same optimizer state. Results are verified in two blocks of the same width, where a float64 oracle fits
too; at full depth they must be finite. bf16 means bf16 parameters in sampling, and in training float32 parameters under
autocast: the only low-precision training that the authors' path survives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from bench.gpu import counters
from bench.instrument import measure, workloads
from bench.instrument.cases import Case, backends_on
from bench.instrument.contender import Contender, by_name
from bench.instrument.race import Begin, race, short
from bench.instrument.verify import Check
from reference.dit import DiTMoE

AUTHORS = "authors_tp1"
VERIFIED_BLOCKS = 2
LOST = "a run of these sources lost the GPU, perhaps by a capture"
Step = workloads.Run


@dataclass
class SharedParameters:
    """An executor (bench/instrument/race.py): steps on the very same parameters, verified before in a shallow model."""

    begin: Begin = lambda name: None
    reasons: dict[str, str] = field(default_factory=dict)
    fell: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    def seat(self, cases: Mapping[Contender, Case]) -> dict[str, Step]:
        for contender, case in cases.items():
            self.begin(contender.name)
            with measure.threads(case.threads):
                self.checks[contender.name] = _verify(case, contender)
        right = [c.name for c in cases if not self.checks[c.name].wrong]
        if right:
            self.steps = {name: work.run for name, work in _steps(next(iter(cases.values())), right).items()}
        return self.steps

    def judge(self, contender: Contender, case: Case, result: Sequence[Tensor]) -> Check:
        finite = all(bool(value.isfinite().all()) for value in result)
        return replace(self.checks[contender.name], wrong=None if finite else "the result is not finite")

    def timing(self, case: Case) -> dict[str, Any]:
        return {"min_call_s": 0.0, "begin": self.begin}

    def version(self, contender: Contender) -> str:
        return contender.version


@dataclass
class Graph(SharedParameters):
    """One step as a CUDA graph, beside steps that are not: two graphs of a large model do not fit, for each holds
    gradients and activations of its own. capture: the replay, or why there is none.
    """

    capture: Callable[[], Step | str] = lambda: LOST

    def seat(self, cases: Mapping[Contender, Case]) -> dict[str, Step]:
        graph, *_ = cases
        self.begin(graph.name)
        replay = self.capture()
        if isinstance(replay, str):
            self.reasons[graph.name] = f"no CUDA graph: {replay}"
            return {}
        return {graph.name: replay, **{c.name: self.steps[c.name] for c in cases if c.name in self.steps}}


def race_steps(
    case: Case,
    min_rounds: int,
    max_seconds: float,
    without: Collection[str] = (),
    begin: Begin = lambda name: None,
) -> Iterator[dict]:
    """Verify and time a step of level "sampling_step" or "train_step"; yield one row for each way to run it.

    Each contender that has a number runs once more as a CUDA graph, against its own step and the authors'.

    Args: without: contenders that stay out; "" stands for graphs. begin: told who runs next.
    """
    names = [name for name in (*backends_on(case.device), AUTHORS) if name != "eager" and name not in without]
    shared = SharedParameters(begin)
    counted: dict[str, dict] = {}

    def more(name: str, step: Step, samples: Mapping[str, measure.Samples]) -> dict:
        begin(name)
        if name not in counted:
            counted[name] = counters.count(step, case.device)
        return counted[name]

    how = min_rounds, max_seconds
    for row in list(race(case, [_contender(name) for name in names], *how, shared, more)):
        name = row["contender"]
        yield row | {"verified": f"in {VERIFIED_BLOCKS} blocks"}
        if not row["figures"]:
            continue
        lost = not {"", f"{name}_graph"}.isdisjoint(without)
        capture = (lambda: LOST) if lost else partial(_graph, case, shared.steps[name], counted[name]["host_syncs"])
        graph = Graph(begin, checks=shared.checks, steps=shared.steps, capture=capture)
        rivals = [_contender(rival) for rival in dict.fromkeys((name, AUTHORS))]
        counted[f"{name}_graph"] = counted[name]
        shared.checks[f"{name}_graph"] = shared.checks[name]
        ways = [replace(_contender(name), name=f"{name}_graph"), *rivals]
        first, *_ = race(case, ways, *how, graph, more)
        yield first | {"verified": f"in {VERIFIED_BLOCKS} blocks"}


def _contender(name: str) -> Contender:
    return replace(by_name(name), strict=name != AUTHORS)  # under autocast their path may trade accuracy for speed


def _verify(case: Case, contender: Contender) -> Check:
    """Judge a contender's gradients or velocity in a shallow model; what it raises is its answer."""
    shape = replace(case.shape, model=f"{case.shape.model}x{VERIFIED_BLOCKS}", depth=VERIFIED_BLOCKS)
    shallow = replace(case, shape=shape)
    try:
        work = _steps(shallow, [contender.name])[contender.name]
        tensors = {key: value.clone() for key, value in work.named(work.run()).items()}
        return workloads.check(shallow, tensors, contender.bound)
    except Exception as error:
        return Check({}, f"raised {short(error)}")


def _steps(case: Case, names: Sequence[str]) -> dict[str, workloads.Workload]:
    """Build the steps of some contenders on the same parameters."""
    model, on_gpu = workloads.build_model(DiTMoE, case, AUTHORS), case.device == "cuda"
    if on_gpu:
        model._check = _trust  # it reads the labels, which waits for the device and cannot be captured
    batch = workloads.latents(case, AUTHORS)
    models = {name: model if name == AUTHORS else _twin(model, name) for name in names}
    if case.level == "sampling_step":
        return {name: workloads.sampling_step(case, twin, batch) for name, twin in models.items()}
    how = workloads.adamw(model, capturable=on_gpu), case.torch_dtype.itemsize == 2
    return {name: workloads.train_step(case, twin, batch, *how) for name, twin in models.items()}


def _trust(*_: Any) -> None:
    """Stand in for the model's check of its arguments."""


def _twin(model: nn.Module, backend: str) -> nn.Module:
    """Return the model with our layer in it, on the very same Parameter objects."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    moe_kernels.replace_moe(twin, backend)
    return twin


def _graph(case: Case, step: Step, host_syncs: float | None) -> Step | str:
    """Capture a step as a CUDA graph; return its replay, or why there is none."""
    if case.device != "cuda":
        return "runs on cuda"
    if host_syncs:
        return f"the step waits for the GPU {host_syncs} times"
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is initialised at a first call cannot be captured
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    except Exception as error:  # torch says what it cannot capture, or that memory ran out
        return short(error)

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return out

    return replay
