"""The Frechet distance against closed forms and scipy; the paired interval against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from bench.fid import (
    DIFFERENT,
    PARITY,
    UNSURE,
    Moments,
    frechet_distance,
    influence,
    load_moments,
    moments,
    paired_difference,
    save_moments,
    tost,
)

D = 6


def gaussian(seed: int, dim: int = D, rank: int | None = None) -> Moments:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dim, rank or dim)) * np.linspace(1.5, 0.3, rank or dim)
    return Moments(rng.normal(size=dim) * 0.3, factor @ factor.T, 0)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    shift = np.array([0.5, -1.0, 2.0])
    expected = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(Moments(shift, np.diag(a), 0), Moments(np.zeros(3), np.diag(b), 0))
    assert got == pytest.approx(expected, rel=1e-14)


def test_distance_of_a_gaussian_to_itself_is_zero():
    same = gaussian(0)
    assert abs(frechet_distance(same, same)) < 1e-13 * np.trace(same.cov)


@pytest.mark.parametrize("dim", [5, 64])
def test_distance_agrees_with_scipy_sqrtm(dim):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(1, dim), gaussian(2, dim)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.cov + b.cov - 2 * np.real(linalg.sqrtm(a.cov @ b.cov)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_singular_covariances_is_the_distance_on_their_span():
    full = gaussian(3, 4), gaussian(4, 4)
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(9, 4)))[0]
    embedded = [Moments(basis @ m.mean, basis @ m.cov @ basis.T, 0) for m in full]
    assert frechet_distance(*embedded) == pytest.approx(frechet_distance(*full), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 4], ids=["full rank", "N spans a subspace only"])
def test_influence_is_the_derivative_of_the_distance(rank):
    rng = np.random.default_rng(6)
    reference, x = gaussian(7), rng.normal(size=(50, rank or D)) @ rng.normal(size=(rank or D, D))
    phi = influence(x, moments(x), reference)

    def distance(weights):
        mean = weights @ x
        return frechet_distance(Moments(mean, (weights[:, None] * (x - mean)).T @ (x - mean) * 50 / 49, 0), reference)

    for i in (0, 17):
        up, down = (np.full(50, (1 - s * 1e-4) / 50) + s * 1e-4 * np.eye(50)[i] for s in (1, -1))
        assert phi[i] == pytest.approx((distance(up) - distance(down)) / 2e-4, rel=0.03, abs=0.03 * phi.std())


def smooth(rng, a):
    """Every sample moves a little: B = 1.02 A + 0.02, plus rounding-like noise."""
    return 1.02 * a + 0.02 + 0.05 * rng.normal(size=a.shape)


def flipped(rng, a):
    """4 % of the samples are replaced by others of the same kind, shifted far: what a flipped routing does."""
    mask = rng.random(len(a)) < 0.04
    return np.where(mask[:, None], rng.normal(size=a.shape) + 1.0, a)


def population_b(kind) -> Moments:
    """The moments of B when A is standard normal."""
    if kind is smooth:
        return Moments(np.full(D, 0.02), np.eye(D) * (1.02**2 + 0.05**2), 0)
    return Moments(np.full(D, 0.04), np.eye(D) + 0.04 * 0.96 * np.ones((D, D)), 0)


@pytest.mark.parametrize("kind", [smooth, flipped])
def test_interval_covers_the_true_difference(kind):
    reference, runs = gaussian(8), 2000
    standard = Moments(np.zeros(D), np.eye(D), 0)
    truth = frechet_distance(population_b(kind), reference) - frechet_distance(standard, reference)
    rng = np.random.default_rng(9)
    found, covered = [], 0
    for _ in range(runs):
        a = rng.normal(size=(500, D))
        result = paired_difference(a, kind(rng, a), reference, margin=1.0, level=0.95)
        covered += result.low <= truth <= result.high
        found.append((result.difference, result.standard_error))
    difference, error = np.array(found).T
    assert 0.93 <= covered / runs <= 0.99
    assert np.median(error) == pytest.approx(difference.std(), rel=0.1)


def test_interval_widens_when_few_samples_carry_the_difference():
    a = np.random.default_rng(14).normal(size=(500, D))
    few, many = a.copy(), a + 0.1 * np.random.default_rng(15).normal(size=a.shape)
    few[:3] += 2
    carried, spread = (paired_difference(a, b, gaussian(8), 1.0) for b in (few, many))
    assert carried.degrees < 6 and spread.degrees > 100
    reach = (carried.high - carried.low) / 2 / carried.standard_error
    assert reach > 1.9


def test_pairing_beats_independent_samples():
    rng, reference = np.random.default_rng(10), gaussian(8)
    a = rng.normal(size=(500, D))
    paired = paired_difference(a, smooth(rng, a), reference, 1.0).standard_error
    independent = paired_difference(a, smooth(rng, rng.normal(size=a.shape)), reference, 1.0).standard_error
    assert paired < independent / 5


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.9, PARITY), (1.1, 2, DIFFERENT), (-3, -1.5, DIFFERENT), (0.5, 1.5, UNSURE), (-2, 2, UNSURE)],
)
def test_tost_verdicts(low, high, verdict):
    assert tost(low, high, 1.0) == verdict


def test_identical_samples_are_at_parity_and_a_gross_change_is_not():
    a = np.random.default_rng(11).normal(size=(300, D))
    assert paired_difference(a, a, gaussian(8), 0.01).verdict == PARITY
    assert paired_difference(a, a + 1, gaussian(8), 0.01).verdict == DIFFERENT


def test_moments_survive_the_file_and_foreign_files_are_named(tmp_path):
    value = moments(np.random.default_rng(12).normal(size=(20, 3)))
    save_moments(tmp_path / "a.npz", value)
    again = load_moments(tmp_path / "a.npz")
    assert np.array_equal(again.mean, value.mean) and np.array_equal(again.cov, value.cov) and again.count == 20
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"b\.npz.*sigma"):
        load_moments(tmp_path / "b.npz")


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((1, 3)), np.full((4, 3), np.nan)])
def test_bad_features_are_named(bad):
    with pytest.raises(ValueError, match="features"):
        moments(bad)


def test_bad_arguments_of_the_paired_test_are_named():
    a = np.random.default_rng(13).normal(size=(20, D))
    with pytest.raises(ValueError, match="features_b"):
        paired_difference(a, a[1:], gaussian(8), 1.0)
    with pytest.raises(ValueError, match="features_a"):
        paired_difference(a[:, 1:], a[:, 1:], gaussian(8), 1.0)
    with pytest.raises(ValueError, match="margin"):
        paired_difference(a, a, gaussian(8), 0.0)
