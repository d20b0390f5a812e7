"""The statistics do not cry wolf and find what is there: simulated on autocorrelated, heavy-tailed noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench.instrument import stats
from bench.instrument.measure import QUIET_SHARE


def noise(rng: np.random.Generator, shape: tuple[int, ...], phi: float, sd: float = 0.02) -> np.ndarray:
    """Times around 1: log-normal AR(1) drift along the last axis, 5 % of the rounds hit by a Pareto disturbance."""
    e = rng.standard_normal(shape)
    drift = np.empty(shape)
    drift[..., 0] = e[..., 0]
    for i in range(1, shape[-1]):
        drift[..., i] = phi * drift[..., i - 1] + np.sqrt(1 - phi**2) * e[..., i]
    hit = rng.random(shape) < 0.05
    return np.exp(sd * drift) * (1 + hit * 0.3 * rng.pareto(1.5, shape))


def file_pair(rng, rows=50, n=100, **kind) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    series = noise(rng, (2, rows, n), **kind)
    return {f"row{i}": (series[0, i], series[1, i]) for i in range(rows)}


def test_same_code_raises_an_alarm_in_at_most_1_of_20_comparisons_of_50_rows():
    rng = np.random.default_rng(20)
    alarms = 0
    for run in range(40):
        judged = stats.verdicts(file_pair(rng, phi=(0.0, 0.5, 0.7, 0.8)[run % 4]), resamples=100)
        alarms += any(v.verdict in ("FASTER", "SLOWER") for v in judged)
    assert alarms <= 2


def test_without_the_autocorrelation_in_the_variance_the_alarm_bell_rings(monkeypatch):
    monkeypatch.setattr(stats, "autocorrelation_time", lambda values: 1.0)
    rng = np.random.default_rng(20)
    alarms = sum(
        any(v.verdict in ("FASTER", "SLOWER") for v in stats.verdicts(file_pair(rng, phi=0.8), resamples=100))
        for _ in range(10)
    )
    assert alarms >= 5


@pytest.mark.parametrize(("factor", "want"), [(1.05, "SLOWER"), (1 / 1.05, "FASTER")])
def test_a_planted_5_percent_is_found_in_19_of_20_and_never_called_the_other_way(factor, want):
    rng = np.random.default_rng(5)
    found = []
    for _ in range(20):
        pairs = file_pair(rng, n=150, phi=0.5)
        pairs["row7"] = (pairs["row7"][0], pairs["row7"][1] * factor)
        found.append(stats.verdicts(pairs, resamples=100)[7].verdict)
    assert found.count(want) >= 19
    assert set(found) <= {want, "UNSURE"}


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[np.ndarray]]:
    """Times of one small GEMM on a shared two-core machine at load 6, cut into stretches of 200 rounds.

    Of the wall clock only the rounds count in which the thread had its core, as measure.Samples has it.
    """
    with np.load(Path(__file__).parent / "data" / "busy_machine.npz") as file:
        cpu, wall = file["cpu"], file["wall"]
    wall = wall[cpu >= QUIET_SHARE * wall]
    return {clock: np.split(x[: len(x) // 200 * 200], len(x) // 200) for clock, x in (("cpu", cpu), ("wall", wall))}


def recorded_pair(rng, stretches, factor=1.0) -> tuple[dict, dict]:
    """Base and head taken at different times: even rounds are the case, odd rounds the peer interleaved with it."""
    pairs, controls = {}, {}
    for i in range(25):
        base, head = (stretches[j] for j in rng.choice(len(stretches), 2, replace=False))
        pairs[f"row{i}"], pairs[f"peer{i}"] = (base[::2], factor * head[::2]), (base[1::2], head[1::2])
        controls[f"row{i}"] = [f"peer{i}"]
    return pairs, controls


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_on_recorded_noise_the_same_code_raises_no_alarm_thanks_to_the_peers(recorded, clock):
    rng = np.random.default_rng(7)
    alarms = with_peers = 0
    for _ in range(20):
        pairs, controls = recorded_pair(rng, recorded[clock])
        rows = [v for v in stats.verdicts(pairs, controls, resamples=100) if v.case in controls]
        with_peers += any(v.verdict in ("FASTER", "SLOWER") for v in rows)
        alarms += any(v.verdict in ("FASTER", "SLOWER") for v in stats.verdicts(pairs, resamples=100))
    assert with_peers <= 1
    assert alarms >= 15, "without the peers the machine's own drift looks like a change"


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_on_recorded_noise_a_planted_10_percent_is_mostly_found_and_never_called_faster(recorded, clock):
    rng = np.random.default_rng(8)
    found: list[str] = []
    for _ in range(4):
        pairs, controls = recorded_pair(rng, recorded[clock], 1.1)
        found += [v.verdict for v in stats.verdicts(pairs, controls, resamples=100) if v.case in controls]
    assert found.count("SLOWER") >= 0.4 * len(found) and "FASTER" not in found


def test_a_tiny_but_certain_change_is_same_not_slower():
    rng = np.random.default_rng(1)
    base, head = noise(rng, (2, 400), phi=0.0, sd=0.005)
    verdict = stats.verdicts({"row": (base, head * 1.01)})[0]
    assert verdict.p < stats.ALPHA and verdict.verdict == "SAME"


@pytest.mark.parametrize("factor", [1.0, 0.9, 3.0])
def test_too_few_samples_are_unsure_whatever_they_say(factor):
    x = np.linspace(1.0, 1.01, stats.MIN_EFFECTIVE - 1)
    assert stats.verdicts({"row": (x, x * factor)})[0].verdict == "UNSURE"


def test_many_samples_of_one_slow_wander_are_few():
    wander = np.exp(0.05 * np.sin(np.linspace(0, 3, 100)))
    assert stats.ratio(wander, wander * 1.1).effective < stats.MIN_EFFECTIVE


@pytest.mark.parametrize(("phi", "tau"), [(0.0, 1.0), (0.5, 3.0), (0.8, 9.0)])
def test_autocorrelation_time_of_an_ar1_series(phi, tau):
    rng = np.random.default_rng(2)
    e = rng.standard_normal((100, 400))
    x = np.zeros_like(e)
    for i in range(1, 400):
        x[:, i] = phi * x[:, i - 1] + e[:, i]
    assert np.median([stats.autocorrelation_time(row) for row in x]) == pytest.approx(tau, rel=0.25)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_interval_covers_the_true_ratio(phi, paired):
    rng = np.random.default_rng(3)
    covered = 0
    for base, head in noise(rng, (300, 2, 80), phi=phi):
        interval = stats.ratio(base, head * 1.1, paired=paired, resamples=300)
        covered += interval.low <= 1 / 1.1 <= interval.high
    assert 0.92 <= covered / 300 <= 0.995


def test_a_short_series_with_a_trend_has_no_interval_of_width_zero():
    drift = np.linspace(1.0, 1.2, 15)
    for paired in (False, True):
        interval = stats.ratio(drift, drift[::-1] * 1.5, paired=paired)
        assert interval.low < 0.97 * interval.value and 1.03 * interval.value < interval.high


def test_pairing_cancels_what_disturbs_both():
    rng = np.random.default_rng(4)
    common = noise(rng, (60,), phi=0.6, sd=0.2)
    own = np.exp(0.005 * rng.standard_normal((2, 60)))
    paired = stats.ratio(common * own[0], common * own[1], paired=True)
    unpaired = stats.ratio(common * own[0], common * own[1])
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)
    assert paired.low <= paired.value <= paired.high


def test_mann_whitney_equals_scipy_when_samples_are_independent(monkeypatch):
    monkeypatch.setattr(stats, "autocorrelation_time", lambda values: 1.0)
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.5, 2.0):
        a, b = rng.integers(1, 12, 30) + shift, rng.integers(1, 12, 41)  # ties on purpose
        want = scipy_stats.mannwhitneyu(a, b, method="asymptotic").pvalue
        assert stats.mann_whitney(a, b) == pytest.approx(want, rel=1e-12)
    assert stats.mann_whitney([1.0] * 9, [1.0] * 9) == 1.0


def test_holm_steps_down_keeps_order_and_caps_at_one():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_summary_and_direction_of_the_ratio():
    assert stats.summarise([3.0, 1.0, 2.0]) == stats.Summary(3, 2.0, pytest.approx(1.4), pytest.approx(2.6))
    assert stats.ratio([2.0] * 9, [1.0] * 9).value == 2.0  # base takes 2, head 1: head is twice as fast


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [1.0, 0.0], [[1.0], [2.0]], [1.0, -2.0]])
def test_bad_samples_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="head must be"):
        stats.ratio([1.0], bad)


def test_paired_needs_equal_lengths():
    with pytest.raises(ValueError, match="equal length, got 2 and 3"):
        stats.ratio([1.0, 1.0], [1.0, 1.0, 1.0], paired=True)
