"""The Frechet distance against closed forms and scipy, its influence against differences, statistics files."""

from __future__ import annotations

import numpy as np
import pytest

from bench.images.fid.distance import Moments, frechet_distance, load_moments, moments, save_moments, transport

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
    phi = transport(moments(x), reference).influence(x)

    def distance(weights):
        mean = weights @ x
        return frechet_distance(Moments(mean, (weights[:, None] * (x - mean)).T @ (x - mean) * 50 / 49, 0), reference)

    for i in (0, 17):
        up, down = (np.full(50, (1 - s * 1e-4) / 50) + s * 1e-4 * np.eye(50)[i] for s in (1, -1))
        assert phi[i] == pytest.approx((distance(up) - distance(down)) / 2e-4, rel=0.03, abs=0.03 * phi.std())


def test_influence_of_the_sample_itself_has_mean_zero():
    x = np.random.default_rng(16).normal(size=(40, D))
    assert abs(transport(moments(x), gaussian(7)).influence(x).mean()) < 1e-12


def test_the_two_ways_to_the_distance_agree():
    x = np.random.default_rng(17).normal(size=(40, D))
    reference = gaussian(7)
    assert transport(moments(x), reference).distance == pytest.approx(
        frechet_distance(moments(x), reference), rel=1e-12
    )


def test_moments_survive_the_file(tmp_path):
    value = moments(np.random.default_rng(12).normal(size=(20, 3)), "pixels-192")
    save_moments(tmp_path / "a.stats", value)
    again = load_moments(tmp_path / "a.stats")
    assert np.array_equal(again.mean, value.mean) and np.array_equal(again.cov, value.cov)
    assert (again.count, again.extractor) == (20, "pixels-192")


def test_files_of_other_tools_are_read(tmp_path):
    """pytorch-fid and clean-fid write these two keys, ADM float32 statistics among others."""
    cov = np.diag([1.0, 2, 3])
    np.savez(tmp_path / "b.npz", mu=np.ones(3, np.float32), sigma=cov.astype(np.float32), mu_s=np.zeros(2))
    again = load_moments(tmp_path / "b.npz")
    assert again.mean.dtype == again.cov.dtype == np.float64
    assert np.array_equal(again.cov, cov) and (again.count, again.extractor) == (0, "")


BAD_FILES = {
    "no sigma": (dict(mu=np.zeros(3)), r"sigma.*missing"),
    "other shape": (dict(mu=np.zeros(3), sigma=np.eye(2)), r"\(D, D\), got \(3,\) and \(2, 2\)"),
    "NaN in mu": (dict(mu=np.array([0, np.nan]), sigma=np.eye(2)), "mu: expected finite values, got 1"),
    "NaN in sigma": (dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "sigma: expected finite values, got 4"),
    "not symmetric": (dict(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0, 1]])), "sigma: expected a symmetric"),
    "objects": (dict(mu=np.array([None, None]), sigma=np.eye(2)), "Object arrays"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_statistics_are_named(tmp_path, name):
    arrays, message = BAD_FILES[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        load_moments(tmp_path / "bad.npz")


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((1, 3)), np.full((4, 3), np.nan)])
def test_bad_features_are_named(bad):
    with pytest.raises(ValueError, match="features"):
        moments(bad)
