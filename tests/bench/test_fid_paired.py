"""The paired interval: against exact limits, against simulation, and the verdicts drawn from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.special import gammaincinv

from bench.__main__ import main
from bench.images.fid import DIFFERENT, Moments, PairedDifference, compare, estimate, frechet_distance, moments
from bench.images.fid import coverage as simulation
from bench.images.fid.coverage import FLIPS, SMOOTH, simulate
from bench.images.fid.paired import PARITY, UNSURE, interval, tost

D = 6
NAMED = {change.name: change for change in (*SMOOTH, *FLIPS)}


def reference(dim: int = D) -> Moments:
    factor = np.random.default_rng(8).normal(size=(dim, dim)) * np.linspace(1.5, 0.3, dim)
    return Moments(np.full(dim, 0.2), factor @ factor.T, 0)


def draw(seed: int, N: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, D))


def paired(a: np.ndarray, b: np.ndarray, data: Moments, *margin_and_level: float) -> PairedDifference:
    return compare(estimate(a, data), estimate(b, data), *margin_and_level)


def changed(a: np.ndarray, seed: int = 15) -> np.ndarray:
    return 1.02 * a + 0.02 + 0.05 * np.random.default_rng(seed).normal(size=a.shape)


# 400 repetitions at 95 %: four standard errors of the simulation below 95 is 90.6; few flips are covered too often.
@pytest.mark.parametrize("name", ["smooth 2 %", "5 flips, own directions (4 sd)", "10 flips, near (1 sd)"])
def test_interval_covers_the_true_difference(name):
    row = simulate(NAMED[name], 200, D, repetitions=400)
    assert row["cover_95"] >= 0.906 and row["cover_90"] < row["cover_95"]
    assert row["width"] < 4, "covering by being wide is no art"


def test_smooth_changes_are_not_covered_too_often():
    row = simulate(NAMED["smooth 10 %"], 500, D, repetitions=400)
    assert 0.84 <= row["cover_90"] <= 0.96 and row["width"] < 1.15


def test_the_simulation_sees_intervals_that_do_not_cover():
    """The control: normal limits around the uncorrected difference do not hold for few flips."""
    assert simulate(NAMED["3 flips, own directions (4 sd)"], 200, D, repetitions=200)["plain_95"] < 0.85


def test_bias_is_removed_where_pairing_does_not_cancel_it():
    row = simulate(NAMED["smooth 10 %"], 120, 60, repetitions=100)
    assert row["plain_95"] < 0.5 and row["cover_95"] >= 0.88 and abs(row["bias"]) < 0.5


@pytest.mark.parametrize("name", NAMED)
def test_the_truth_of_the_simulation_is_the_moments_of_its_draws(name):
    """By many draws, as the closed forms are what coverage is judged by."""
    change = dataclasses.replace(NAMED[name], flips=NAMED[name].flips * 200)
    rng = np.random.default_rng(0)
    drawn, exact = moments(change.apply(rng, change.draw(rng, 200_000, 3))), change.moments(200_000, 3)
    assert np.allclose(drawn.mean, exact.mean, atol=0.02) and np.allclose(drawn.cov, exact.cov, atol=0.05)


@pytest.mark.parametrize("k", [5, 20, 100])
def test_equal_jumps_get_nearly_the_exact_limits_of_a_count(k):
    """k flips of size 1 among many pairs: Garwood's limits of a Poisson mean, to one flip, and wider for few."""
    delta = np.zeros(100_000)
    delta[:k] = 1
    low, high, effective = interval(k / 1e5, delta - delta.mean(), 0.95)
    exact = gammaincinv(k, 0.025), gammaincinv(k + 1, 0.975)
    assert effective == pytest.approx(k, rel=0.01)
    assert low * 1e5 <= exact[0] and high * 1e5 >= exact[1] - 1
    assert (high - low) * 1e5 < (1.15 + 6 / k) * (exact[1] - exact[0])


def test_interval_of_many_small_contributions_is_the_normal_one():
    delta = np.random.default_rng(3).normal(size=100_000)
    delta -= delta.mean()
    low, high, _ = interval(0.0, delta, 0.95)
    error = delta.std(ddof=1) / len(delta) ** 0.5
    assert (-low / error, high / error) == pytest.approx((1.96, 1.96), rel=2e-3)


def test_interval_mirrors_and_scales():
    delta = np.random.default_rng(4).exponential(size=50) - 1
    delta -= delta.mean()
    low, high, _ = interval(0.3, delta, 0.9)
    mirrored, scaled = interval(-0.3, -delta, 0.9), interval(3.0, 10 * delta, 0.9)
    assert mirrored[:2] == pytest.approx((-high, -low)) and scaled[:2] == pytest.approx((10 * low, 10 * high))


def test_interval_widens_when_few_samples_carry_the_difference():
    a = draw(14)
    few = a.copy()
    few[:3] += 2
    carried, spread = (paired(a, b, reference(), 1.0) for b in (few, changed(a)))
    assert carried.effective < 4 and spread.effective > 50
    reach = (carried.high - carried.low) / 2 / carried.standard_error
    assert reach > 3 and (spread.high - spread.low) / 2 / spread.standard_error == pytest.approx(1.645, rel=0.1)


def test_jackknife_finds_the_bias_of_the_distance():
    """Over 60 sets of 200 samples in 20 dimensions the corrected distance is right on average, the plain one not."""
    rng, target = np.random.default_rng(5), reference(20)
    truth = frechet_distance(Moments(np.zeros(20), np.eye(20), 0), target)
    found = [estimate(rng.normal(size=(200, 20)), target) for _ in range(60)]
    plain, corrected = (np.array(x) for x in zip(*((e.distance, e.distance - e.bias) for e in found), strict=True))
    error = plain.std() / 60**0.5
    assert plain.mean() - truth > 5 * error and abs(corrected.mean() - truth) < 3 * error
    assert np.median([e.standard_error for e in found]) == pytest.approx(plain.std(), rel=0.3)


def test_tenths_do_not_follow_the_order_of_classes():
    """Rows of ten classes, sorted: leaving out neighbours would leave out a class, and the bias would be its share."""
    x = draw(18) + 10 * np.repeat(np.eye(10, D), 50, axis=0)
    shuffled = np.random.default_rng(19).permutation(x)
    assert estimate(x, reference()).bias == pytest.approx(estimate(shuffled, reference()).bias, abs=0.2)


def test_pairing_beats_independent_samples():
    a = draw(10)
    pairs = paired(a, changed(a), reference(), 1.0)
    independent = paired(a, changed(draw(11)), reference(), 1.0)
    assert pairs.standard_error < independent.standard_error / 5
    assert pairs.correlation > 0.95 and abs(independent.correlation) < 0.2


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.9, PARITY), (1.1, 2, DIFFERENT), (-3, -1.5, DIFFERENT), (0.5, 1.5, UNSURE), (-2, 2, UNSURE)],
)
def test_tost_verdicts(low, high, verdict):
    assert tost(low, high, 1.0) == verdict


def test_identical_samples_are_at_parity_and_a_gross_change_is_not():
    a = draw(11, 300)
    same = paired(a, a, reference(), 0.01)
    assert same.verdict == PARITY and (same.low, same.high, same.correlation) == (0, 0, 1)
    assert same.unseen > 0.01, "identical pairs do not rule out flips that are rarer than 3 in N"
    assert paired(a, a + 1, reference(), 0.01).verdict == DIFFERENT


def test_more_dimensions_than_samples_still_give_finite_figures():
    rng = np.random.default_rng(20)
    a = rng.normal(size=(40, 60))
    result = paired(a, a + 0.01 * rng.normal(size=a.shape), reference(60), 100.0)
    assert np.isfinite([result.difference, result.low, result.high, result.bias_a]).all()
    assert result.low < result.difference < result.high


def test_bad_arguments_of_the_paired_test_are_named():
    a = draw(13, 20)
    for b, margin, level, name in (
        (draw(13, 21), 1.0, 0.9, "b: expected 20 rows"), (a, 0.0, 0.9, "margin"), (a, 1.0, 1.0, "level"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            paired(a, b, reference(), margin, level)
    with pytest.raises(ValueError, match="at least 20 samples, got 19"):
        estimate(a[1:], reference())


def test_the_command_of_the_simulation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "SMOOTH", SMOOTH[:1])
    file = tmp_path / "rows.json"
    assert main(["fid-coverage", "--shapes", "40x2", "-k", "2 %", "--repetitions", "3", "--json", str(file)]) == 0
    assert "1 settings, 3 repetitions" in capsys.readouterr().out and '"cover_95"' in file.read_text()
    for words, named in ((["--shapes", "40"], "--shapes"), (["-k", "nothing"], "-k")):
        assert main(["fid-coverage", *words]) == 2
        assert named in capsys.readouterr().err
