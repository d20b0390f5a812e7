"""The timer: wrong results get no number, rounds interleave, clocks are as stated, a planted slowdown shows."""

from __future__ import annotations

import time

import pytest
import torch

from bench.instrument import measure
from bench.instrument.measure import Samples, interleave, ratio


def spin(seconds: float):
    """Return a call that keeps one core busy for that much CPU time."""

    def run():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return "done"

    return run


def test_the_wrong_get_no_number_and_the_others_run_on():
    def verify(name, result):
        return None if result == 42 else f"got {result}"

    contenders = {"right": lambda: 42, "wrong": lambda: 41, "raises": lambda: 1 / 0}
    samples = interleave(contenders, 3, 0.0, verify)
    assert list(samples) == ["right", "wrong", "raises"]
    assert samples["right"].n == 3 and samples["right"].wrong is None
    assert (samples["wrong"].n, samples["wrong"].wrong) == (0, "got 41")
    assert samples["raises"].wrong == "raised ZeroDivisionError: division by zero"
    with pytest.raises(ValueError, match="wrong has no number: got 41"):
        samples["wrong"].figures()


def test_going_wrong_while_being_timed_costs_the_number():
    calls = iter(range(10**6))
    samples = interleave({"stale": lambda: next(calls)}, 3, 0.0, lambda name, result: "stale" if result > 2 else None)
    assert samples["stale"].wrong == "stale"


def test_rounds_alternate_direction(monkeypatch):
    monkeypatch.setattr(measure, "MIN_CALL_S", 0.0)
    seen = []
    interleave({name: lambda name=name: seen.append(name) for name in "abc"}, 4, 0.0)
    warm_up, rounds = "".join(seen[:6]), "".join(seen[6:])
    assert warm_up == "abcabc" and rounds == "abccbaabccba"


def test_short_calls_are_repeated_within_a_round():
    samples = interleave({"short": lambda: None, "long": spin(0.003)}, 3, 0.0)
    assert samples["short"].calls > 100 and samples["long"].calls == 1


def test_rounds_stop_at_the_budget_the_cap_or_the_precision(monkeypatch):
    assert interleave({"a": spin(0.002)}, 3, 0.0)["a"].n == 3
    assert 3 < interleave({"a": spin(0.002)}, 3, 0.1)["a"].n < 60
    monkeypatch.setattr(measure, "MAX_ROUNDS", 7)
    assert interleave({"a": spin(0.001)}, 3, 9.0)["a"].n == 7
    monkeypatch.undo()
    assert interleave({"a": spin(0.002), "b": spin(0.002)}, 10, 9.0, precision=9.0)["a"].n == 10


def test_a_planted_slowdown_shows_in_the_ratio_and_same_code_does_not():
    samples = interleave({"fast": spin(0.004), "slow": spin(0.005), "again": spin(0.004)}, 15, 0.0)
    slow = ratio(samples["fast"], samples["slow"])
    assert slow.low > 1.15 and slow.low <= slow.value <= slow.high < 1.35 and slow.n == 15
    again = ratio(samples["fast"], samples["again"])
    assert again.low < 1.03 and again.high > 0.97


def test_one_thread_is_timed_by_cpu_time_several_by_quiet_wall_time():
    one = Samples("one", threads=1, wall_s=[3.0, 1.0], cpu_s=[1.0, 1.0])
    assert one.clock == "cpu" and one.times() == [1.0, 1.0]
    two = Samples("two", threads=2, wall_s=[1.0] * 5 + [4.0], cpu_s=[1.9] * 6)
    assert two.clock == "wall" and two.times() == [1.0] * 5 and not two.disturbed
    busy = Samples("busy", threads=2, wall_s=[1.0, 2.0, 3.0], cpu_s=[1.0] * 3)
    assert busy.disturbed and busy.times() == [1.0, 2.0, 3.0] and busy.cpu_share == pytest.approx(0.25)
    assert Samples("gpu", device="cuda").clock == "cuda"


def test_figures_carry_rates_and_how_they_were_taken():
    figures = Samples("a", wall_s=[0.5], cpu_s=[0.5]).figures(flops=10**9, nbytes=2 * 10**9)
    assert figures["time_us_median"] == 5e5 and figures["gflops"] == 2.0 and figures["gbps"] == 4.0
    assert figures["clock"] == "cpu" and figures["n"] == 1 and figures["cpu_share"] == 1.0
    assert "gflops" not in Samples("a", wall_s=[0.5], cpu_s=[0.5]).figures()


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    seen = []
    interleave({"a": lambda: seen.append(torch.get_num_threads())}, 1, 0.0, threads=before + 1)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(RuntimeError), measure.threads(1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="got 0 and 15"):
        interleave({})
    with pytest.raises(ValueError, match="threads: got 0"):
        interleave({"a": spin(0)}, threads=0)
    with pytest.raises(ValueError, match="one interleaved race"):
        ratio(Samples("a", wall_s=[1.0], cpu_s=[1.0]), Samples("b", wall_s=[1.0] * 2, cpu_s=[1.0] * 2))


def test_ceilings_are_positive_and_gemm_stays_below_the_register_loop():
    ceilings = measure.ceilings(1, 0.05)
    assert all(v is None or v > 0 for v in ceilings.values())
    for dtype in ("fp32", "bf16"):
        peak = ceilings[f"fma_{dtype}_gflops"]
        assert peak is None or ceilings[f"mm_{dtype}_gflops"] < 1.25 * peak  # the clock may move between the two
