"""One case on a device: everybody verified, timed interleaved, and held against ceilings of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu import counters
from bench.gpu.contenders import Contender
from bench.gpu.floors import floor_s
from bench.instrument import measure, store, workloads
from bench.instrument.cases import DTYPES, Case
from bench.instrument.verify import Check

Begin = Callable[[str], None]


def ceilings(device: str, side: int, seconds: float) -> dict[str, float]:
    """Measure what a device reaches in this run.

    Args:
        side: of the square matrices that torch.mm multiplies, random data; 8 side^2 floats are copied.
        seconds: for everything together.
    Returns: FLOP/s by dtype, and "copy" in bytes read and written per second.
    """
    names = ("bf16", "fp16", "tf32", "fp32") if device == "cuda" else ("bf16", "fp32")
    source = torch.randn(8 * side * side, device=device)
    target = torch.empty_like(source)
    tasks: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name in names:
        tasks[name] = _product(name, *torch.randn(2, side, side, device=device).to(DTYPES[name]))
    work = {"copy": 2 * source.nbytes} | dict.fromkeys(names, 2 * side**3)
    samples = measure.interleave(tasks, 5, seconds, device=device)
    return {name: work[name] / s.summary().median for name, s in samples.items()}


def _product(dtype: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    out = torch.empty_like(a)

    def multiply() -> torch.Tensor:
        with workloads.arithmetic(dtype):
            return torch.mm(a, b, out=out)

    return multiply


def race(
    case: Case,
    contenders: Sequence[Contender],
    roof: Mapping[str, float],
    min_rounds: int,
    max_seconds: float,
    begin: Begin = lambda name: None,
) -> Iterator[dict]:
    """Time a case; yield a row of kind "time" for each contender, with the reason where there is no number.

    Args:
        roof: what `ceilings` returned.
        begin: told who is built or called next.
    """
    cases = {c.name: replace(case, backend=c.name) for c in contenders}
    with workloads.arithmetic(case.dtype):
        works, reasons = _build(cases, contenders, begin)
        bounds = {c.name: c.bound for c in contenders}
        samples, checks = _time(works, bounds, min_rounds, max_seconds, begin)
        extras = {}
        for name in [name for name, s in samples.items() if not s.wrong]:
            begin(name)
            extras[name] = counters.count(works[name].run, case.device)
    for contender in contenders:
        name, s = contender.name, samples.get(contender.name)
        wrong = s.wrong if s else None
        if wrong and memory_ran_out(wrong):
            reasons[name], wrong, s = wrong, None, None
        timed = bool(s) and not wrong
        others = [o for o in samples.values() if timed and o is not s and not o.wrong]
        figures = s.figures(case.flops, case.bytes) | _shares(case, s, roof) | extras[name] if timed else {}
        yield store.row(
            "time",
            case=cases[name].id,
            **facts(case),
            contender=name,
            ours=contender.ours,
            version=contender.version if s else "",
            reason=reasons.get(name),
            wrong=wrong,
            figures=figures,
            speedups={o.name: asdict(measure.ratio(s, o)) for o in others},
            errors=checks[name].errors if name in checks else {},
            samples_us=store.thin([round(t * 1e6, 3) for t in s.times()]) if timed else [],
        )


def memory_ran_out(why: str) -> bool:
    """Tell whether a contender raised for want of memory, which makes no result of it wrong."""
    return "OutOfMemoryError" in why.partition(":")[0]


def facts(case: Case) -> dict[str, Any]:
    """Return what a row says of its case."""
    words = {"level": case.level, "model": case.shape.name, "routing": case.routing, "T": case.T, "dtype": case.dtype}
    return {"race": replace(case, backend="any").id, **words, "mode": case.mode, "device": case.device}


def _build(
    cases: Mapping[str, Case], contenders: Sequence[Contender], begin: Begin
) -> tuple[dict[str, workloads.Workload], dict[str, str]]:
    """Return the workloads of those that can run, and why the others cannot."""
    works, reasons = {}, {}
    for contender in contenders:
        name = contender.name
        reason = contender.why_not(cases[name])
        if not reason:
            begin(name)
            try:
                works[name] = contender.build(cases[name])
                continue
            except Exception as error:  # whatever somebody else's code raises is its answer
                reason = _short(error)
        reasons[name] = reason
    return works, reasons


def _time(
    works: Mapping[str, workloads.Workload],
    bounds: Mapping[str, float],
    min_rounds: int,
    max_seconds: float,
    begin: Begin,
) -> tuple[dict[str, measure.Samples], dict[str, Check]]:
    checks: dict[str, Check] = {}

    def verify(name: str, result: Sequence[torch.Tensor]) -> str | None:
        work = works[name]
        checks[name] = workloads.check(work.case, work.named(result), bounds[name])
        return checks[name].wrong

    if not works:
        return {}, checks
    case = next(iter(works.values())).case
    runs = {name: work.run for name, work in works.items()}
    how = {"threads": case.threads, "device": case.device, "timer": workloads.timer_of(case), "begin": begin}
    samples = measure.interleave(runs, min_rounds, max_seconds, verify, **how)
    for s in samples.values():
        s.wrong = s.wrong and s.wrong.splitlines()[0][:300]
    return samples, checks


def _shares(case: Case, s: measure.Samples, roof: Mapping[str, float]) -> dict[str, float | None]:
    """Return the share of the GEMM ceiling, the floor, and how many times the floor it took."""
    seconds, ceiling = s.summary().median, roof.get(case.dtype)
    floor = floor_s(case, ceiling, roof["copy"]) if ceiling else None
    return {
        "ceiling_share": case.flops / seconds / ceiling if ceiling else None,
        "floor_us": floor * 1e6 if floor else None,
        "x_floor": seconds / floor if floor else None,
    }


def _short(error: Exception) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:200] if words else ''}"
