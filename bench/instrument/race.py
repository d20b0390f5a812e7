"""The race: contenders of one case verified, timed against each other, and written down, a row each.

Where they run is an executor's business: here in this process, in workers (crew.py), on shared parameters
(bench/gpu/steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case
from bench.instrument.contender import Contender
from bench.instrument.verify import Check

Begin = Callable[[str], None]
Run = Callable[[], Any]
More = Callable[[str, Run, Mapping[str, measure.Samples]], Mapping[str, Any]]


class Executor(Protocol):
    """Where contenders run. `reasons`: why some cannot; `fell`: what others raised, in the order in which they did, or
    how their workers died; `checks`: what was judged before the race.
    """

    reasons: Mapping[str, str]
    fell: Mapping[str, str]
    checks: Mapping[str, Check]

    def seat(self, cases: Mapping[Contender, Case]) -> Mapping[str, Run]:
        """Build each contender's case; return those that run, and yardsticks beside them, by name."""

    def judge(self, contender: Contender, case: Case, result: Any) -> Check:
        """Hold what a run returned against the oracle."""

    def timing(self, case: Case) -> Mapping[str, Any]:
        """Return how `measure.interleave` is to time: timer, min_call_s, begin."""

    def version(self, contender: Contender) -> str:
        """Return whose code ran, in which version."""


@dataclass
class InProcess:
    """All in this process, which GPUs' contenders share. begin: told who is built or called next."""

    begin: Begin = lambda name: None
    reasons: dict[str, str] = field(default_factory=dict)
    fell: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    works: dict[str, workloads.Workload] = field(default_factory=dict)

    def seat(self, cases: Mapping[Contender, Case]) -> dict[str, Run]:
        for contender, case in cases.items():
            self.begin(contender.name)
            try:
                self.works[contender.name] = contender.build(case)
            except Exception as error:  # whatever somebody else's code raises is its answer
                self.fell[contender.name] = short(error)
        return {name: work.run for name, work in self.works.items()}

    def judge(self, contender: Contender, case: Case, result: Any) -> Check:
        return workloads.check(case, self.works[contender.name].named(result), contender.bound)

    def timing(self, case: Case) -> dict[str, Any]:
        return {"timer": workloads.timer_of(case), "begin": self.begin}

    def version(self, contender: Contender) -> str:
        return contender.version


def race(
    case: Case,
    contenders: Sequence[Contender],
    min_rounds: int,
    max_seconds: float,
    executor: Executor | None = None,
    more: More = lambda name, run, samples: {},
    kind: str = "time",
    **limits: float,
) -> Iterator[dict]:
    """Verify and time the contenders at one case, of any backend; yield a row for each, failures included.

    Args:
        min_rounds, max_seconds: see `measure.interleave`. executor: by default all run in this process.
        more: from (name, its run, everybody's samples) to further figures of one that was right.
        kind: of the rows. limits: `until` and `hopeless` of `measure.interleave`.
    """
    executor = executor or InProcess()
    cases = {c: replace(case, backend=c.name) for c in contenders}
    reasons = {c.name: why for c in contenders if (why := c.why_not(cases[c]))}
    known = {c.name: c for c in contenders}
    checks: dict[str, Check] = {}

    def verify(name: str, result: Any) -> str | None:
        if name not in known:  # a yardstick
            return None
        checks[name] = executor.judge(known[name], cases[known[name]], result)
        return checks[name].wrong

    with workloads.arithmetic(case.dtype):
        runs = executor.seat({c: cases[c] for c in contenders if c.name not in reasons})
        how = {"threads": case.threads, "device": case.device, **executor.timing(case), **limits}
        samples = measure.interleave(runs, min_rounds, max_seconds, verify, **how) if runs else {}
        right = [name for name, s in samples.items() if name in known and not s.wrong]
        added = {name: more(name, runs[name], samples) for name in right}
    checks = {**executor.checks, **checks}
    reasons |= executor.reasons
    raced = {name: s for name, s in samples.items() if name in known}
    raised = _raised(executor, raced)
    for c in contenders:
        fell, s, check = executor.fell.get(c.name), raced.get(c.name), checks.get(c.name)
        outcome = _outcome(c, reasons.get(c.name), fell, s, check)
        outcome["raised"] = raised.index(c.name) if c.name in raised else None
        version = executor.version(c) if s else ""
        yield row(kind, cases[c], c, raced, outcome, check, added.get(c.name, {}), version)


def untried(case: Case, contender: Contender, reason: str) -> dict:
    """Return the row of a contender that was not asked to run a case, and why."""
    outcome = {"reason": reason, "wrong": None, "raised": None}
    return row("time", replace(case, backend=contender.name), contender, {}, outcome, None, {}, "")


def _outcome(
    contender: Contender, reason: str | None, fell: str | None, s: measure.Samples | None, check: Check | None
) -> dict[str, str | int | None]:
    """Return why a contender has no number: `wrong`, or `reason` where nothing of its result is."""
    wrong = (s.wrong if s else None) or (check.wrong if check else None)
    if fell and contender.ours:
        wrong = f"raised {fell}"  # our own code has no excuse
    elif fell:
        reason = reason or fell
    if wrong and memory_ran_out(wrong):
        reason = reason or wrong
    return {"reason": _line(reason), "wrong": None if reason else _line(wrong)}


def _raised(executor: Executor, raced: Mapping[str, measure.Samples]) -> list[str]:
    """Return who raised, in order: at first in building, then in checks before the race, then in it."""
    judged = [name for name, check in executor.checks.items() if (check.wrong or "").startswith("raised")]
    in_race = sorted((s.raised_s, name) for name, s in raced.items() if s.raised_s)
    return list(dict.fromkeys([*executor.fell, *judged, *(name for _, name in in_race)]))


def _line(text: str | None) -> str | None:
    return text and text.splitlines()[0][:300]


def memory_ran_out(why: str) -> bool:
    """Tell whether a contender raised for want of memory, which makes no result of it wrong."""
    return "OutOfMemoryError" in why.partition(":")[0]


def short(error: Exception) -> str:
    """Return an error's name and the first line of what it says."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:200] if words else ''}"


def row(
    kind: str,
    case: Case,
    contender: Contender,
    samples: Mapping[str, measure.Samples],
    outcome: Mapping[str, str | int | None],
    check: Check | None,
    figures: Mapping[str, Any],
    version: str,
) -> dict:
    """Return the row of a contender: the fields that results/README.md describes for what is timed."""
    s = samples.get(contender.name)
    timed = s is not None and not (outcome["reason"] or outcome["wrong"])
    others = [o for o in samples.values() if timed and not s.once and o is not s and not (o.wrong or o.once)]
    return store.row(
        kind,
        case=case.id,
        **facts(case),
        contender=contender.name,
        title=contender.title or contender.name,
        ours=contender.ours,
        version=version,
        bound=contender.bound,
        **outcome,
        **({"once": s.once} if timed and s.once else {}),
        figures={**s.figures(case.flops, case.bytes), **rates(case, s), **figures} if timed else {},
        speedups={o.name: asdict(measure.ratio(s, o)) for o in others},
        errors=check.errors if check else {},
        samples_us=store.thin([round(t * 1e6, 3) for t in s.times()]) if timed else [],
    )


def facts(case: Case) -> dict[str, Any]:
    """Return what a row says of its case."""
    words = {"level": case.level, "model": case.shape.name, "routing": case.routing, "T": case.T, "dtype": case.dtype}
    where = {"mode": case.mode, "threads": case.threads, "device": case.device}
    return {"race": replace(case, backend="any").id, **words, **where}


def rates(case: Case, s: measure.Samples) -> dict[str, float]:
    """Return images a second of a whole step: of training, or of one step of sampling with guidance."""
    halves = {"train_step": 1, "sampling_step": 2}.get(case.level)
    if halves is None:
        return {}
    return {"images_per_s": case.T / (halves * case.shape.tokens_per_image) / s.summary().median}
