"""The race of two revisions neither cries wolf nor sleeps: played with times recorded from processes of the same code.

data/paired_processes.npz: six cases, 36 pairs of processes each, 40 interleaved rounds a pair, process CPU time
in us, on two shared cores at load 2 to 10. Processes differ by up to 10 % for as long as they live; rounds are
autocorrelated and heavy-tailed. A visit is a stretch of consecutive rounds of one recorded pair, sides at random.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.compare import trial
from bench.instrument import stats

BUDGET = trial.Budget(seconds=1e9, doubt_seconds=1e9, resamples=100)
REPEATS = 10 if os.environ.get("MOE_LONG_TESTS") else 1


@pytest.fixture(scope="module")
def recorded() -> np.ndarray:
    with np.load(Path(__file__).parent / "data" / "paired_processes.npz") as file:
        return file["cpu"]  # (case, pair, side, round)


def visitor(rng, pairs: np.ndarray, factor: float = 1.0) -> trial.Visit:
    """Play a case's recordings: a pair that stays keeps its recording, a new one draws; head takes factor as long."""
    staying: dict[int, tuple[np.ndarray, int]] = {}

    def visit(rounds, number):
        drawn = pairs[rng.integers(len(pairs))], int(rng.integers(2))
        times, swap = drawn if number is None else staying.setdefault(number, drawn)
        start = rng.integers(times.shape[1] - rounds + 1)
        base, head = (times[side, start : start + rounds].astype(float) for side in (swap, 1 - swap))
        return list(base), list(factor * head)

    return visit


def still(rounds, number):
    return [1.0] * rounds, [1.0] * rounds


def judged(visits) -> dict[str, stats.Verdict]:
    judge = trial.Judge(visits, BUDGET)
    judge.run()
    return {v.case: v for v in judge.verdicts()}


def test_same_code_in_50_cases_raises_an_alarm_in_at_most_1_of_20_runs(recorded):
    rng, alarms, seen = np.random.default_rng(11), 0, Counter()
    for _ in range(20 * REPEATS):
        verdicts = judged({f"row{i}": visitor(rng, recorded[i % 6]) for i in range(50)})
        alarms += any(v.verdict in trial.CHANGES for v in verdicts.values())
        seen.update(v.verdict for v in verdicts.values())
    assert alarms <= REPEATS
    assert seen["SAME"] > 0.5 * sum(seen.values()), "nor is everything UNSURE"


@pytest.mark.parametrize(("factor", "want"), [(1.05, "SLOWER"), (1 / 1.05, "FASTER")])
def test_5_percent_planted_in_one_of_50_is_found_in_19_of_20_and_never_called_the_other_way(recorded, factor, want):
    rng, found = np.random.default_rng(12), Counter()
    for run in range(20 * REPEATS):
        rows = {f"row{i}": still for i in range(49)}
        verdicts = judged({"planted": visitor(rng, recorded[run % 6], factor), **rows})
        found[verdicts["planted"].verdict] += 1
    assert found[want] >= 19 * REPEATS and set(found) <= {want, "UNSURE", "SAME"}, found


def test_a_pair_of_processes_that_stays_would_cry_wolf(recorded, monkeypatch):
    """What new processes are for: with one pair for all visits the same code is called changed in most runs."""
    monkeypatch.setattr(trial, "PAIRS", 1)
    rng, alarms = np.random.default_rng(11), 0
    for _ in range(10):
        rows = {f"row{i}": visitor(rng, recorded[i % 6]) for i in range(50)}
        one_pair = {case: lambda rounds, number, visit=visit: visit(rounds, 0) for case, visit in rows.items()}
        alarms += any(v.verdict in trial.CHANGES for v in judged(one_pair).values())
    assert alarms >= 8


def test_a_doubt_is_judged_by_new_processes_only():
    """The pairs that stay are 10 % apart, new ones are not."""
    rng = np.random.default_rng(13)

    def visit(rounds, number):
        base, head = 1 + 0.01 * rng.random((2, rounds))
        return list(base), list(head * (1.1 if number is not None else 1.0))

    judge = trial.Judge({"case": visit}, BUDGET)
    judge.run()
    assert judge.first["case"].verdict(0.0) == "SLOWER"
    assert [v.verdict for v in judge.verdicts()] == ["SAME"]


def test_looks_that_contradict_each_other_are_unsure():
    rng = np.random.default_rng(14)

    def visit(rounds, number):
        base, head = 1 + 0.01 * rng.random((2, rounds))
        return list(base), list(head * (1.1 if number is not None else 0.9))

    assert judged({"case": visit})["case"].verdict == "UNSURE"


def test_a_case_whose_rounds_were_all_disturbed_has_no_verdict_and_an_interrupted_doubt_is_unsure():
    def slower(rounds, number):
        if number is None:
            raise KeyboardInterrupt
        return [1.0] * rounds, [1.2] * rounds

    judge = trial.Judge({"silent": lambda rounds, number: ([], []), "slower": slower, "still": still}, BUDGET)
    with pytest.raises(KeyboardInterrupt):
        judge.run()
    assert {v.case: v.verdict for v in judge.verdicts()} == {"slower": "UNSURE", "still": "SAME"}


def test_the_budget_ends_a_case_that_does_not_decide():
    visits = []

    def wide(rounds, number):
        visits.append(number)
        rng = np.random.default_rng(len(visits))
        return list(np.exp(rng.standard_normal(rounds))), list(np.exp(rng.standard_normal(rounds)))

    judge = trial.Judge({"case": wide}, trial.Budget(seconds=0.0, doubt_seconds=0.0))
    judge.run()
    assert visits == [1, 2, 0, None], "every pair that stays once, and one new one"
    assert judge.verdicts()[0].verdict == "UNSURE"


def test_paired_rounds_cancel_what_slowed_both(recorded):
    rng = np.random.default_rng(15)
    common = np.where(rng.random(200) < 0.5, 1.0, 1.6) * (1 + 0.01 * rng.random(200))
    base, head = common * (1 + 0.01 * rng.random((2, 200)))
    by_round, of_medians = stats.by_round(base, head * 1.1), stats.ratio(base, head * 1.1, paired=True)
    assert by_round.low <= 1 / 1.1 <= by_round.high and by_round.value == pytest.approx(1 / 1.1, rel=0.01)
    assert by_round.high - by_round.low < 0.5 * (of_medians.high - of_medians.low)
    assert stats.signed_rank(base, head * 1.1) < 1e-20 < stats.mann_whitney(base, head * 1.1)


def test_signed_rank_equals_scipy_when_rounds_are_independent(monkeypatch):
    from scipy import stats as scipy_stats

    monkeypatch.setattr(stats, "autocorrelation_time", lambda values: 1.0)
    rng = np.random.default_rng(16)
    for shift in (1.0, 1.1, 1.5):
        base, head = rng.lognormal(size=(2, 40))
        logs = np.log(base / (head * shift))
        want = scipy_stats.wilcoxon(logs, correction=True, method="approx").pvalue
        assert stats.signed_rank(base, head * shift) == pytest.approx(want, rel=1e-6)
    assert stats.signed_rank([1.0] * 9, [1.0] * 9) == 1.0
    assert stats.signed_rank([2.0] * 3, [1.0] * 3) == 1.0, "three rounds say nothing"
    for function in (stats.signed_rank, stats.by_round):
        with pytest.raises(ValueError, match="equal length, got 3 and 4"):
            function([1.0] * 3, [1.0] * 4)
