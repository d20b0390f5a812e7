"""How long two revisions are raced at a case: until the interval decides, and in doubt again in fresh processes.

A process has a speed of its own: two of the same code differ by up to 10 % for as long as they live (where their pages
lie in memory), in small training steps above all. So times are taken in visits to several pairs of processes: a few
that stay for the first look at every case, a new pair for every visit to a case that this left unsure or suspect. What
pairs differ in counts as autocorrelation of the series, pair after pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.instrument import stats

PAIRS = 3  # that stay
HOPELESS = 0.6  # p above which a second look ends at its first judgement; half of it at the next, and so on
CHANGES = ("FASTER", "SLOWER")
# (rounds, number of the pair that stays, None for a new one) -> times of base and head, of the same rounds
Visit = Callable[[int, int | None], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Budget:
    """Rounds of a visit; most visits and seconds of the first look; the same of a doubt, in new processes.

    looks: after how many visits a doubt is judged; its p is multiplied by their number.
    """

    rounds: int = 20
    visits: int = 15
    seconds: float = 10.0
    looks: tuple[int, ...] = (8, 16, 32, 64)
    doubt_seconds: float = 300.0
    resamples: int = stats.RESAMPLES


@dataclass
class Trial:
    """Times of base and head by pair of processes, and what they say so far."""

    resamples: int = stats.RESAMPLES
    times: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, pair: int, base: list[float], head: list[float]) -> None:
        mine = self.times.setdefault(pair, ([], []))
        mine[0].extend(base)
        mine[1].extend(head)

    @property
    def sides(self) -> tuple[list[float], list[float]]:
        """Return base and head, pair after pair."""
        base, head = ([t for pair in self.times.values() for t in pair[side]] for side in (0, 1))
        return base, head

    def speedup(self) -> stats.Ratio | None:
        """Return None while no round counts: none was quiet."""
        return stats.by_round(*self.sides, resamples=self.resamples) if self.sides[0] else None

    def p(self) -> float:
        return stats.signed_rank(*self.sides) if self.sides[0] else 1.0

    def verdict(self, p: float) -> str:
        speedup = self.speedup()
        return stats.decide(speedup, p) if speedup else "UNSURE"


def first_look(visit: Visit, budget: Budget) -> Trial:
    """Visit the pairs that stay in turn until the interval lies inside the threshold or beyond 1, or time is up."""
    trial, end = Trial(budget.resamples), time.monotonic() + budget.seconds
    for count in range(1, budget.visits + 1):
        pair = count % PAIRS
        trial.add(pair, *visit(budget.rounds, pair))
        turned = count % PAIRS == 0
        if turned and (trial.verdict(0.0) != "UNSURE" or time.monotonic() > end):
            break
    return trial


def second_look(visit: Visit, budget: Budget, cases: int, suspect: bool) -> tuple[Trial, float]:
    """Measure a case anew, each visit in new processes; return the times, and p times the number of looks.

    It goes on until a verdict would hold among as many cases, or there is no hope of one; a suspect's hope is tried one
    judgement later. The times of the first look are not used: they chose the case for looking like a change.
    """
    trial, end, p = Trial(budget.resamples), time.monotonic() + budget.doubt_seconds, 1.0
    for count in range(1, budget.looks[-1] + 1):
        trial.add(count, *visit(budget.rounds, None))
        late = time.monotonic() > end
        if count in budget.looks or late:
            once = trial.p()
            p = min(1.0, once * len(budget.looks))
            judgements = sum(count >= look for look in budget.looks) - suspect
            hopeless = judgements > 0 and once > HOPELESS / judgements
            if late or hopeless or trial.verdict(min(1.0, p * cases)) != "UNSURE":
                break
    return trial, p


@dataclass
class Judge:
    """Looks at every case, and again at those in doubt; `verdicts` tells what is known, at any time."""

    visits: Mapping[str, Visit]
    budget: Budget
    say: Callable[[str], None] = lambda line: None
    first: dict[str, Trial] = field(default_factory=dict)
    second: dict[str, tuple[Trial, float]] = field(default_factory=dict)

    def run(self) -> None:
        for case, visit in self.visits.items():
            self.first[case] = trial = first_look(visit, self.budget)
            self.say(f"  {case}: first look {_line(trial, trial.verdict(0.0))}")
        seen = {case: trial.verdict(0.0) for case, trial in self.first.items() if trial.sides[0]}
        for case in (case for case, verdict in seen.items() if verdict != "SAME"):
            suspect = seen[case] in CHANGES
            self.second[case] = second_look(self.visits[case], self.budget, len(self.visits), suspect)
            trial, p = self.second[case]
            self.say(f"  {case}: second look {_line(trial, trial.verdict(min(1.0, p * len(self.visits))))}")

    def verdicts(self) -> list[stats.Verdict]:
        """Judge what was measured, p values adjusted by Holm over the cases that were to be.

        FASTER and SLOWER come from the second look and must not contradict the first. A case without a counted round
        has no verdict.
        """
        p_values = {case: self.second[case][1] if case in self.second else 1.0 for case in self.visits}
        adjusted = dict(zip(p_values, stats.holm(list(p_values.values())), strict=True))
        out = []
        for case, first in self.first.items():
            trial = self.second[case][0] if case in self.second else first
            verdict, opposite = trial.verdict(adjusted[case]), first.verdict(0.0)
            if verdict in CHANGES and opposite in CHANGES and verdict != opposite:
                verdict = "UNSURE"
            if speedup := trial.speedup():
                out.append(stats.Verdict(case, verdict, speedup, adjusted[case]))
        return out


def _line(trial: Trial, verdict: str) -> str:
    speedup = trial.speedup()
    return f"{verdict} {speedup}, {speedup.n} rounds" if speedup else "no quiet round"
