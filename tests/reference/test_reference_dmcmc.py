"""reference.dmcmc where posterior, denoiser and moments are exact: a Gaussian mixture."""

from __future__ import annotations

import pytest
import torch

from reference.denoiser import Counted
from reference.diffusion import sample_generators
from reference.dmcmc import Langevin, LangevinGibbs, VariancePreserving, level_grid
from reference.mixture import GaussianMixture
from reference.samplers import dpmpp_2m, euler, heun, karras_sigmas

GRID = level_grid(0.05, 20.0, 200)


def mixture(D: int, K: int = 10) -> GaussianMixture:
    """Modes as far apart as digits are: about sqrt(2 D) of each other."""
    generator = torch.Generator().manual_seed(0)
    return GaussianMixture(torch.randn(K, D, generator=generator, dtype=torch.float64), 0.05)


def chains(data: GaussianMixture, kernel, **choices) -> LangevinGibbs:
    return LangevinGibbs(data.denoise, lambda y: data.levels(y, GRID), GRID, kernel, **choices)


def carried_to(kernel, steps: int, draw: bool) -> float:
    """Return the median level of 100 chains after `steps` from sigma 0.5."""
    data = mixture(256)
    generator = torch.Generator().manual_seed(1)
    state = chains(data, kernel, draw=draw).begin(data.sample(100, generator)[0], 0.5, steps, generator)
    return state.sigma.median().item()


@pytest.mark.parametrize("eta, steps, draw", [(0.8, 200, False), (0.2, 200, True), (0.2, 200, False)])
def test_the_level_drifts_as_the_law_says(eta, steps, draw):
    law = (0.5**4 + eta**2 * steps / 2) ** 0.25
    assert law > 1.4 and carried_to(Langevin(eta), steps, draw) == pytest.approx(law, rel=0.05)


def test_the_variance_preserving_step_does_not_drift():
    """Of a step of the same size, eta = 0.2 sigma^2: Langevin's law says 0.5 (1 + 0.04 / 2 * 200)^(1/4), at least."""
    assert carried_to(VariancePreserving(0.1), 200, False) == pytest.approx(0.5, rel=0.1)


def test_one_step_changes_the_noise_as_the_law_says():
    """One point: the residual is the noise, and its variance v becomes v + eta^2 / (4 v), or stays."""
    point = GaussianMixture(torch.zeros(1, 40000, dtype=torch.float64), 0.0)
    y = 0.7 * torch.randn(1, 40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.randn(1, 40000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.tensor([0.7], dtype=torch.float64)
    for kernel, added in ((Langevin(0.8), 0.64 / (4 * 0.49)), (VariancePreserving(0.6), 0.0)):
        after = kernel(y, point.denoise(y, sigma), sigma, z)
        assert after.var().item() == pytest.approx(0.49 + added, rel=0.03)


def test_without_a_step_chains_freeze():
    data = mixture(16)
    states = chains(data, Langevin(1e-12))
    start = states.begin(data.means, 0.5, 0, torch.Generator().manual_seed(0))
    end, sent = states.window(start, 20, torch.Generator().manual_seed(1))
    assert torch.allclose(end.y, start.y, atol=1e-4) and torch.equal(sent.sigma, start.sigma)


@pytest.mark.parametrize("skip", [1, 3])
def test_share_of_states_sent_twice(skip):
    """Of independent levels: a state ends one window and begins the next, least of 2 skip + 1: 1 / (2 skip + 1)."""
    random = torch.Generator().manual_seed(0)
    grid = level_grid(0.05, 20.0, 4000)
    states = LangevinGibbs(lambda y, _: y, lambda y: torch.nn.functional.one_hot(
        torch.randint(4000, (len(y),), generator=random), 4000).float(), grid, Langevin(0.1))  # fmt: skip
    start = states.begin(torch.zeros(100, 1))
    sent = torch.stack([state.sigma for _, state in states.run(start, 60, skip, lambda _, y, sigma: y)])
    assert (sent[1:] == sent[:-1]).double().mean().item() == pytest.approx(1 / (2 * skip + 1), abs=0.02)
    last = LangevinGibbs(states.denoise, states.levels, grid, Langevin(0.1), least=False)
    sent = torch.stack([state.sigma for _, state in last.run(start, 60, skip, lambda _, y, sigma: y)])
    assert (sent[1:] == sent[:-1]).double().mean() < 0.01


def test_the_least_of_a_window_is_sent_and_the_last_goes_on():
    levels = iter([5, 3, 4, 9, 8, 7, 6])  # of the grid's falling levels, so that a larger index is less noise
    grid = level_grid(0.1, 10.0, 10)
    states = LangevinGibbs(
        lambda y, _: y + 1, lambda y: torch.eye(10)[[next(levels)] * len(y)], grid, lambda y, D, sigma, z: D
    )
    sent = [(y.item(), sigma.item()) for _, (y, sigma) in states.run(
        states.begin(torch.zeros(1, 1), noise=0.0), 2, 3, lambda denoise, y, sigma: y)]  # fmt: skip
    assert sent == [(3.0, grid[9].item()), (3.0, grid[9].item())], "sent twice: the window begins with where it was"


def test_levels_are_drawn_by_their_probability():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20000, 3)
    states = LangevinGibbs(None, lambda y: logits, torch.tensor([3.0, 2.0, 1.0]), Langevin(0.1), draw=True)
    drawn = states.level(torch.zeros(20000, 1), torch.Generator().manual_seed(0))
    assert [(drawn == s).double().mean().item() for s in (3, 2, 1)] == pytest.approx([0.1, 0.2, 0.7], abs=0.012)


INTEGRATORS = {"euler": (euler, 60, 60), "heun": (heun, 20, 39), "dpmpp_2m": (dpmpp_2m, 20, 20)}


@pytest.mark.parametrize("name", INTEGRATORS)
def test_every_evaluation_is_counted_and_any_integrator_arrives(name):
    sampler, nodes, cost = INTEGRATORS[name]
    data = mixture(16)
    denoise, levels = Counted(data.denoise, "denoiser"), Counted(lambda y: data.levels(y, GRID), "classifier")
    states = LangevinGibbs(denoise, levels, GRID, Langevin(0.2))
    generators = sample_generators(range(30))
    start = states.begin(data.means.repeat(3, 1), 0.5, 7, generators)
    run = states.run(start, 5, 2, lambda d, y, sigma: sampler(d, y, karras_sigmas(nodes, sigma, 0.005)), generators)
    images = torch.cat([x for x, _ in run])
    assert (denoise.evaluations, levels.evaluations) == (30 * (7 + 5 * (2 + cost)), 30 * (1 + 7 + 5 * 2))
    off = (images - data.means[data.modes(images)]).square().mean().sqrt().item()
    assert off == pytest.approx(data.std, rel=0.08), "samples lie about a mode as the data do"


@pytest.mark.parametrize("draw", [False, True])
def test_a_chain_does_not_depend_on_its_batch_and_goes_on_from_its_state(draw):
    data = mixture(8)
    states = chains(data, VariancePreserving(0.3), draw=draw)

    def run(b, stops):
        generators = sample_generators([3, 1, 4][b])
        state = states.begin(data.means[:3][b], 0.5, 2, generators)
        for n in stops:
            state, sent = states.window(state, n, generators)
        return state.y, sent.sigma

    together = run(slice(None), [3, 4])
    alone = [run(slice(i, i + 1), [3, 4]) for i in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(whole, torch.cat(parts), rtol=1e-12)
    assert torch.equal(together[0], run(slice(None), [7])[0])


def test_grid_and_bad_input():
    assert GRID[0] == pytest.approx(20.0) and 0.05 < GRID[-1] < 0.052 and (GRID[1:] < GRID[:-1]).all()
    with pytest.raises(ValueError, match="grid: got 1000 levels from 2"):
        level_grid(2.0, 1.0)
    with pytest.raises(ValueError, match="windows, skip: got 1, 0"):
        next(chains(mixture(2), Langevin(0.1)).run(None, 1, 0, None))
