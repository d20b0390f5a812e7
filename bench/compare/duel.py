"""Two revisions raced: pairs of processes under one scheduler, both sides verified first, and rows for both.

The instrument and the oracle are those of the checkout that compares, on both sides; only moe_kernels differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compare import trial
from bench.compare.revisions import Checkout
from bench.instrument import measure, stats, store
from bench.instrument.cases import Case
from bench.instrument.contender import by_name
from bench.instrument.crew import Crew, Runner, judge_file, timer
from bench.instrument.progress import say
from bench.instrument.race import row
from bench.instrument.verify import Check
from bench.instrument.worker import WorkerError

SEAT = "bench.compare.seat:RevisionSeat"
ROUND_S = 0.015  # of calls, on each side in every round
SIDES = ("base", "head")
INTERRUPTED = "interrupted before it was timed"


@dataclass
class RevisionCrew(Crew):
    """A worker for either side, which finds its revision's package before everybody else's."""

    checkouts: Mapping[str, Checkout] = field(default_factory=dict)

    def _paths(self, name: str) -> dict[str, Any]:
        return {"path": [self.checkouts[name].site, store.ROOT], "path_first": True}

    def sit(self, case: Case) -> dict[str, Runner]:
        """Build the case on both sides."""
        targets = {
            name: (SEAT, {"case": case.id, "folder": str(checkout.site)}) for name, checkout in self.checkouts.items()
        }
        return self.seat(targets, case.threads)


class CrewPool:
    """The pairs of workers that stay, by number, and new ones on demand."""

    def __init__(self, base: Checkout, head: Checkout):
        self.checkouts = {"base": base, "head": head}
        self.staying: dict[int, RevisionCrew] = {}

    @contextmanager
    def pair(self, number: int | None) -> Iterator[RevisionCrew]:
        """Lend a pair; None: a new one, which ends with the block."""
        if number is None:
            with RevisionCrew(checkouts=self.checkouts) as pair:
                yield pair
        else:
            yield self.staying.setdefault(number, RevisionCrew(checkouts=self.checkouts))

    def __enter__(self) -> CrewPool:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self.staying.values():
            pair.close()


@dataclass
class CaseDuel:
    """A case of a duel: what was found before any time was taken, and all rounds of the last look."""

    case: Case
    pool: CrewPool
    reasons: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    fixed: dict[str, dict] = field(default_factory=dict)
    samples: dict[str, measure.Samples] = field(default_factory=dict)
    again: bool = False

    def verify(self, folder: Path) -> None:
        """Run both sides once and judge the results; `reasons` says who cannot run."""
        path = folder / "result.pt"
        with self.pool.pair(0) as pair:
            for name, runner in pair.sit(self.case).items():
                try:
                    if runner.reason:
                        raise WorkerError(runner.reason)
                    runner.ask("save", path=str(path))
                    self.checks[name] = judge_file(self.case, path)
                    self.fixed[name] = runner.ask("fixed")
                except WorkerError as error:
                    self.reasons[name] = str(error)

    @property
    def sound(self) -> bool:
        """Whether both sides run and are right: otherwise nothing is timed."""
        return not self.reasons and not any(check.wrong for check in self.checks.values())

    def visit(self, rounds: int, number: int | None) -> tuple[list[float], list[float]]:
        """Build the case anew in a pair of workers and time both sides interleaved: a `trial.Visit`.

        A side that falls is noted in `reasons`; this visit and later ones are empty.
        """
        if not self.samples or self.again != (number is None):
            self.again, self.samples = (
                number is None,
                {side: measure.Samples(side, self.case.threads) for side in SIDES},
            )
        if self.reasons:
            return [], []
        with self.pool.pair(number) as pair:
            runners = pair.sit(self.case)
            self.reasons = {name: runner.reason for name, runner in runners.items() if runner.reason}
            if self.reasons:
                return [], []
            how = {"threads": self.case.threads, "timer": timer, "min_call_s": ROUND_S}
            taken = measure.interleave(runners, rounds, 0.0, **how)
        self.reasons = {name: s.wrong for name, s in taken.items() if s.wrong}
        if self.reasons:
            return [], []
        for name, s in taken.items():
            self.samples[name].wall_s += s.wall_s
            self.samples[name].cpu_s += s.cpu_s
        quiet = sorted(set(taken["base"].quiet_rounds()) & set(taken["head"].quiet_rounds()))
        return taken["base"].times(quiet), taken["head"].times(quiet)

    def row(self, name: str) -> dict:
        """Return a side's row of kind "time", as it would have written it itself."""
        case, check, s = self.case, self.checks.get(name), self.samples.get(name)
        contender = by_name(case.backend)
        outcome = {"reason": None, "wrong": self.reasons.get(name) or (check.wrong if check else None)}
        timed = {case.backend: s} if self.sound and s is not None and s.n > 0 else {}
        written = row("time", case, contender, timed, outcome, check, {}, contender.version if timed else "")
        fixed = {"flops": case.flops, "bytes": case.bytes, **self.fixed.get(name, {})}
        return written | fixed | {"commit": self.pool.checkouts[name].commit, "dirty": False}


@dataclass
class Outcome:
    """What a duel found: rows of both sides, verdicts, and why a case is missing on a side or was not judged."""

    rows: dict[str, list[dict]] = field(default_factory=lambda: {name: [] for name in SIDES})
    verdicts: list[stats.Verdict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def duel(base: Checkout, head: Checkout, cases: Sequence[Case], budget: trial.Budget) -> Outcome:
    """Verify every case on both sides, race those that are right, and return rows and verdicts.

    A case that base lacks has no row of base: it is new. One that only head cannot run is wrong there, whatever the
    reason. Interrupted (Ctrl-C), it returns what it has.
    """
    out, duels = Outcome(missing={case.id: INTERRUPTED for case in cases}), {}
    with tempfile.TemporaryDirectory() as folder, CrewPool(base, head) as pool:
        judge = trial.Judge({}, budget, say)
        with suppress(KeyboardInterrupt):
            for case in sorted(cases, key=lambda case: case.threads):
                case_duel = CaseDuel(case, pool)
                case_duel.verify(Path(folder))
                duels[case.id] = case_duel
            judge.visits = {name: case_duel.visit for name, case_duel in duels.items() if case_duel.sound}
            judge.run()
    out.verdicts = [verdict for verdict in judge.verdicts() if duels[verdict.case].sound]
    for name, case_duel in duels.items():
        del out.missing[name]
        lacking, why = case_duel.reasons.get("base", "").partition("LookupError: ")[1:]
        out.rows["head"].append(case_duel.row("head"))
        if lacking:
            out.missing[name] = f"base lacks it: {why}"
        else:
            out.rows["base"].append(case_duel.row("base"))
        if case_duel.sound and name not in judge.first:
            out.missing[name] = INTERRUPTED
    return out
