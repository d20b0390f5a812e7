"""Whole DiT-MoE models: sampling and training steps of our backends against the authors' code path.

A large model with AdamW, 16 bytes a parameter, fits a GPU once. So all contenders of a case own the same Parameter
objects and the same optimizer state. Results are verified in two blocks of the same width, where a float64 oracle fits
too; at full depth they must be finite. bf16 means bf16 parameters in sampling, and in training float32 parameters under
autocast: the only low-precision training that the authors' path survives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from bench.gpu import counters
from bench.gpu.contenders import FOREIGN_BOUND
from bench.gpu.race import Begin, facts, memory_ran_out
from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case, backends_on
from bench.instrument.verify import BOUND
from reference.diffusion import RectifiedFlow
from reference.dit import DiTMoE

AUTHORS = "authors_tp1"
VERIFIED_BLOCKS = 2
LOST = "a run of these sources lost the GPU, perhaps by a capture"
Step = Callable[[], Tensor]


def race(
    case: Case,
    min_rounds: int,
    max_seconds: float,
    without: Collection[str] = (),
    begin: Begin = lambda name: None,
) -> Iterator[dict]:
    """Verify and time a step of level "sampling_step" or "train_step"; yield one row for each way to run it.

    without: contenders that stay out; "" stands for graphs. begin: told who runs next.
    """
    shallow = replace(case, shape=replace(case.shape, model=f"{case.shape.model}x2", depth=VERIFIED_BLOCKS))
    names = [name for name in _contenders(case.device) if name not in without]
    absent = {name: why for name in names if (why := workloads.why_not(replace(case, backend=name)))}
    with measure.threads(case.threads):
        wrong = dict(_verify(shallow, [name for name in names if name not in absent], begin))
    steps = {n: step for n, (step, _) in _steps(case, [n for n, why in wrong.items() if not why]).items()}
    counted = {}
    for name, step in steps.items():
        begin(name)
        counted[name] = counters.count(step, case.device)
    timed = partial(_time, case, min_rounds, max_seconds, begin)
    samples = timed(steps)
    for name, why in absent.items():
        yield _row(case, name, reason=why)
    for name, why in wrong.items():
        yield _outcome(case, name, why, samples, counted.get(name, {}))
        why = why or samples[name].wrong
        if why:
            yield _outcome(case, f"{name}_graph", why, {}, {})
            continue
        begin(f"{name}_graph")
        lost = not {"", f"{name}_graph"}.isdisjoint(without)
        capture = partial(_graph, case, steps[name], counted[name]["host_syncs"])
        yield _graph_outcome(case, name, (lambda: LOST) if lost else capture, steps, timed, counted[name])


def _time(
    case: Case, min_rounds: int, max_seconds: float, begin: Begin, runs: Mapping[str, Step]
) -> dict[str, measure.Samples]:
    how = {"threads": case.threads, "device": case.device, "min_call_s": 0.0, "begin": begin}
    return measure.interleave(runs, min_rounds, max_seconds, _finite, **how) if runs else {}


def _outcome(
    case: Case, name: str, why: str | None, samples: Mapping[str, measure.Samples], counted: Mapping[str, Any]
) -> dict:
    """Return the row of a way: its times, or why it has none."""
    s = samples.get(name)
    why = why or (s.wrong if s else None)
    if why:
        return _row(case, name, **{"reason" if memory_ran_out(why) else "wrong": why.splitlines()[0]})
    return _row(case, name, **_timed(case, s, samples, counted))


def _graph_outcome(
    case: Case,
    name: str,
    capture: Callable[[], Step | str],
    steps: Mapping[str, Step],
    timed: Callable[[Mapping[str, Step]], dict[str, measure.Samples]],
    counted: Mapping[str, Any],
) -> dict:
    """Race one graph against the step it was captured from and the authors', and free it: two of a large model's do
    not fit, for each holds gradients and activations of its own.
    """
    graph = capture()
    if isinstance(graph, str):
        return _row(case, f"{name}_graph", reason=f"no CUDA graph: {graph}")
    rivals = {other: steps[other] for other in (name, AUTHORS) if other in steps}
    return _outcome(case, f"{name}_graph", None, timed({f"{name}_graph": graph, **rivals}), counted)


def _timed(case: Case, s: measure.Samples, samples: Mapping[str, measure.Samples], counted: Mapping) -> dict[str, Any]:
    others = [o for o in samples.values() if o is not s and not o.wrong]
    return {
        "figures": {**s.figures(case.flops), **_rates(case, s), **counted},
        "speedups": {o.name: asdict(measure.ratio(s, o)) for o in others},
        "samples_us": [round(t * 1e6, 1) for t in s.times()],
    }


def _row(case: Case, name: str, **found: Any) -> dict:
    empty = {"reason": None, "wrong": None, "figures": {}, "speedups": {}, "samples_us": []}
    ours = name.removesuffix("_graph") in backends_on(case.device)
    who = {"case": replace(case, backend=name).id, **facts(case), "contender": name, "ours": ours}
    return store.row("time", **who, verified=f"in {VERIFIED_BLOCKS} blocks", **{**empty, **found})


def _contenders(device: str) -> tuple[str, ...]:
    return (*(name for name in backends_on(device) if name != "eager"), AUTHORS)


def _verify(case: Case, names: Sequence[str], begin: Begin) -> Iterator[tuple[str, str | None]]:
    """Yield what is wrong with each contender's gradients or velocity in a shallow model, None where nothing is."""
    for name in names:
        begin(name)
        try:
            step, named = _steps(case, [name])[name]
            tensors = {key: value.clone() for key, value in named(step()).items()}
            bound = FOREIGN_BOUND if name == AUTHORS else BOUND
            yield name, workloads.check(replace(case, backend=name), tensors, bound).wrong
        except Exception as error:  # whatever a contender raises is its answer
            yield name, f"raised {type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _steps(case: Case, names: Sequence[str]) -> dict[str, tuple[Step, Callable[[Tensor], dict[str, Tensor]]]]:
    """Build the steps of some contenders on the same parameters, each with what makes its result comparable."""
    if not names:
        return {}
    model = workloads.build_model(DiTMoE, case, AUTHORS)
    if case.device == "cuda":
        model._check = _trust  # it reads the labels, which waits for the device and cannot be captured
    halves = 2 if case.level == "sampling_step" else 1
    batch = workloads.latents(case, AUTHORS, case.T // (halves * case.shape.tokens_per_image))
    models = {name: model if name == AUTHORS else _twin(model, name) for name in names}
    if case.level == "sampling_step":
        return {name: (partial(_sample, twin, batch), lambda out: {"velocity": out}) for name, twin in models.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    on_gpu = case.device == "cuda"
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0, fused=True, capturable=on_gpu)

    def gradients(_: Tensor) -> dict[str, Tensor]:
        named = {f"d{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        return workloads.group_parameters(named)

    return {name: (partial(_train, case, twin, batch, optimizer), gradients) for name, twin in models.items()}


def _trust(*_: Any) -> None:
    """Stand in for the model's check of its arguments."""


def _twin(model: nn.Module, backend: str) -> nn.Module:
    """Return the model with our layer in it, on the very same Parameter objects."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    moe_kernels.replace_moe(twin, backend)
    return twin


def _sample(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    _, noise, t, y = batch
    with torch.no_grad():
        return model.forward_with_guidance(noise, t, y, workloads.GUIDANCE)


def _train(case: Case, model: nn.Module, batch: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """Take a step of learning rate 0, which does all the work and leaves the weights alone; return the loss."""
    x0, noise, t, y = batch
    optimizer.zero_grad()
    low = case.torch_dtype.itemsize == 2
    with torch.autocast(case.device, case.torch_dtype if low else None, enabled=low):
        loss = RectifiedFlow.loss(model, x0, y, t=t, noise=noise)
    loss.backward()
    optimizer.step()
    return loss.detach()


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
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _finite(name: str, result: Tensor) -> str | None:
    return None if bool(result.isfinite().all()) else "the result is not finite"


def _rates(case: Case, s: measure.Samples) -> Mapping[str, float]:
    halves = 2 if case.level == "sampling_step" else 1
    return {"images_per_s": case.T / (halves * case.shape.tokens_per_image) / s.summary().median}
