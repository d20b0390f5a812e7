"""The budget of a run: who gets how much, who is called once, what is left out, and that rows and report say so."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import MappingProxyType, SimpleNamespace

import pytest

from bench import run, stages
from bench.__main__ import main
from bench.images import climbs, parity
from bench.instrument import budget, ledger, measure, store
from bench.instrument.cases import Case
from bench.instrument.contender import Contender
from bench.instrument.race import race
from bench.instrument.workloads import build
from tests.bench.test_measure import spin


class Clock:
    """A clock that is set."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_what_a_stage_leaves_goes_on_to_the_next_and_what_it_overdraws_is_missing(clock):
    shared = budget.Budget(100, {"a": 1, "b": 1, "c": 2}, clock=clock)
    assert shared.begin("a") == 1025 and shared.share("b", "c") == 100
    clock.now += 10  # 15 are left over
    assert shared.begin("b") == clock.now + 30
    clock.now += 80
    assert shared.begin("c") == clock.now + 10
    clock.now += 50
    assert shared.left == 0
    with pytest.raises(KeyError):
        shared.begin("c")


def test_an_earlier_run_has_spent_its_seconds(clock):
    assert budget.Budget(100, {"a": 1}, spent=70, clock=clock).begin("a") == 1030
    assert budget.Budget(100, {"a": 1}, spent=170, clock=clock).left == 0


def test_what_is_left_out_is_said_in_a_row(clock, capsys):
    row = budget.Budget(90, {"a": 1}, clock=clock).left_out("a")
    assert row["kind"] == "left_out" and row["what"] == "a: left out for time, beyond 1.5 minutes"
    assert row["what"] in capsys.readouterr().out


@pytest.fixture
def taking(clock, monkeypatch):
    """Return a maker of contenders by name that take so many seconds of the clock, and the list of who was called."""
    every = SimpleNamespace(perf_counter=clock, process_time=clock, monotonic=clock)
    monkeypatch.setattr(measure, "time", every)
    calls = []

    def contender(name: str, seconds: float):
        calls.append(name)
        clock.now += seconds

    return lambda **seconds: {name: partial(contender, name, s) for name, s in seconds.items()}, calls


def test_hopeless_contenders_are_called_once_and_have_no_ratio(taking):
    make, calls = taking
    samples = measure.interleave(make(slow=1.0, fast=0.05), 5, 1.0, hopeless=10.0)
    assert calls.count("slow") == 1 and calls.count("fast") > 5
    assert samples["slow"].n == 1 and samples["fast"].once is None
    assert samples["slow"].once == "called once: 1 s, 20 times the CPU time of fast"
    assert samples["slow"].figures()["time_us_median"] == pytest.approx(1e6)


@pytest.mark.parametrize(("times", "max_seconds"), [(30.0, 1.0), (10.0, 3.0)], ids=["not so slow", "rounds fit"])
def test_who_is_slow_but_fits_is_timed_like_everybody(taking, times, max_seconds):
    samples = measure.interleave(taking[0](slow=1.0, fast=0.05), 2, max_seconds, hopeless=times)
    assert samples["slow"].once is None and samples["slow"].n >= 2


def test_a_wrong_result_is_no_measure_of_others_and_gets_no_number(taking):
    def cheating(name, result):
        return "wrong" if name == "cheat" else None

    samples = measure.interleave(taking[0](cheat=0.01, honest=1.0), 2, 0.0, cheating, hopeless=10.0)
    assert samples["honest"].once is None and samples["honest"].n == 2 and samples["cheat"].wrong == "wrong"
    samples = measure.interleave(taking[0](fast=0.01, slow=1.0), 2, 0.0, lambda *_: "wrong", hopeless=10.0)
    assert all(s.wrong and not s.once and not s.n for s in samples.values())


def test_rounds_shrink_to_those_that_an_interval_needs(taking, clock):
    assert measure.interleave(taking[0](a=1.0), 15, 4.0, until=clock.now)["a"].n == measure.LEAST_ROUNDS
    assert measure.interleave(taking[0](a=1.0), 15, 4.0, until=clock.now + 10)["a"].n == 9  # two calls came before
    assert measure.interleave(taking[0](a=1.0), 3, 0.0, until=clock.now)["a"].n == 3


CASE = Case("layer", "any", stages.DIGITS, "position_skewed", 32, "fp32", "fwd", 1)


def slow_build(case: Case):
    work = build(dataclasses.replace(case, backend="eager"))
    return dataclasses.replace(work, run=lambda: (spin(0.3)(), work.run())[1])


def test_rows_say_who_was_called_once_and_later_races_of_the_dtype_do_without(monkeypatch):
    slow = Contender("sorted_loop", build=slow_build, strict=True)
    known = {"native": Contender("native", package=store.DISTRIBUTION), "sorted_loop": slow}
    monkeypatch.setattr(stages, "by_name", known.get)
    first = stages.Race(CASE, tuple(known), 2, 0.05)
    native, once = first.run(rows=[])
    assert once["figures"]["n"] == 1 and once["once"].endswith("the CPU time of native") and not once["wrong"]
    assert once["errors"], "it was verified"
    assert not native["speedups"] and not once["speedups"] and "once" not in native
    later = stages.Race(dataclasses.replace(CASE, mode="fwdbwd"), tuple(known), 2, 0.05)
    native, untried = later.run(rows=[native, once])
    assert native["figures"]["n"] >= 2 and not untried["figures"]
    assert untried["reason"] == f"hopeless in fp32: layer fwd {once['once']}"
    other = dataclasses.replace(CASE, level="gating"), dataclasses.replace(CASE, dtype="bf16")
    assert not any(stages.hopeless([once], case) for case in other)
    assert not any("once" in row for row in race(CASE, list(known.values()), 2, 0.05)), "only where asked for"


class Paced:
    """A ladder that takes `sample_s` for a sample."""

    sabotages, case = parity.SABOTAGES, parity.Case()

    def __init__(self, sample_s: float):
        self.sample_s = sample_s

    def pace(self, dtype) -> float:
        return self.sample_s


@pytest.mark.parametrize(
    ("sample_s", "samples"), [(0.01, 500), (0.04, 425), (0.1, 125), (0.2, 100), (1.0, 40), (3.0, 0)]
)
def test_samples_fit_into_their_time(sample_s, samples):
    row = climbs.pace(Paced(sample_s), "bf16", 100.0, 4.0)
    assert (row["samples"], row["asked"], row["sample_s"]) == (samples, 500, sample_s)


class Drawn(Paced):
    """A ladder whose oracle takes 20 seconds on a clock that is set."""

    sabotages = MappingProxyType({"fault": lambda model: "broken"})
    labels = ("label",) * 500

    def __init__(self, clock: Clock):
        self.clock, self.climbed = clock, []

    def baseline(self, dtype, count):
        self.clock.now += 20
        return self

    model, samples = "model", None

    def first(self, count):
        self.climbed.append(count)
        return self

    def replaced(self, model, backend):
        return backend

    def climb(self, model, baseline):
        self.climbed.append(model)
        self.clock.now += 20
        return {"verdict": "PARITY"}, None


@pytest.mark.parametrize(
    ("seconds", "climbed"),
    [
        (1000, ["native", "grouped", "eager", 100, "broken"]),
        (70, ["native", "grouped", 100, "broken"]),
        (1, ["native"]),
    ],
)
def test_who_would_take_too_long_does_not_climb(clock, monkeypatch, tmp_path, seconds, climbed):
    monkeypatch.setattr(climbs.time, "monotonic", clock)
    ladder, kept = Drawn(clock), []
    shared = budget.Budget(600, {"parity": 1}, clock=clock)
    climb = climbs.Climbs(ladder, "fp32", 500, shared, clock.now + seconds, lambda name, *_: kept.append(name))
    rows = ledger.Ledger(tmp_path / "rows.jsonl", {})
    climb.run(rows, ["grouped", "native", "eager"])
    assert ladder.climbed == climbed
    left = [row["what"] for row in rows.rows if row["kind"] == "left_out"]
    assert len(rows.rows) == 4 and len(left) == 4 - len([name for name in climbed if name != 100])
    assert all("left out for time" in what for what in left)
    assert kept == ["oracle fp32", *(f"{name} fp32" for name in climbed if name not in (100, "broken"))]


def test_nobody_climbs_without_samples(clock, tmp_path):
    shared = budget.Budget(600, {"parity": 1}, clock=clock)
    ladder, rows = Drawn(clock), ledger.Ledger(tmp_path / "rows.jsonl", {})
    climbs.Climbs(ladder, "bf16", 0, shared, 9e9, print).run(rows, ["native"])
    assert not ladder.climbed and {row["kind"] for row in rows.rows} == {"left_out"}


def test_a_run_without_time_says_what_it_left_out_and_goes_on_like_that(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger, "source_digest", lambda: "frozen")
    monkeypatch.setattr(store, "commit", lambda: {"commit": "frozen", "dirty": False})
    tiny = run.SIZES["tiny"]
    case = dataclasses.replace(tiny.parity, samples=20, steps=2)
    recipe = tiny.recipe | dict(depth=1, steps=5)
    monkeypatch.setitem(run.SIZES, "tiny", dataclasses.replace(tiny, parity=case, epochs=1, recipe=recipe))
    argv = ["run", "--size", "tiny", "--threads", "1", "--backends", "native,eager", "--minutes", "1e-5"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    rows = store.read(tmp_path / "rows.jsonl")
    left = [row for row in rows if row["kind"] == "left_out"]
    assert {"figures", "samplers", "parity: native, fp32"} <= {row["stage"] for row in left}
    races = {f"time {race.name}" for race in stages.plan("tiny", ["native", "eager"], 1)}
    assert len(races) > 9 and races <= {row["stage"] for row in left}
    assert not [row for row in rows if row["kind"] in ("figures", "parity", "time")]
    assert all(row["stage_s"] >= 0 and row["minutes"] == 1e-5 for row in rows)
    for name in ("index.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert all(row["what"] in text for row in left) and "of 1e-05 minutes" in text
        assert "fp32: 0 samples instead of 20 for time" in text
    before = (tmp_path / "rows.jsonl").read_text()
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before
    capsys.readouterr()
    assert main([*argv[:-1], "9", "--out", str(tmp_path)]) == 2 and "minutes 1e-05" in capsys.readouterr().err
