"""reference.samplers on data whose exact solution is known: one point, and a Gaussian."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reference.diffusion import GaussianDiffusion, draw_noise, sample_generators
from reference.dit import DiTMoE, DiTMoEConfig
from reference.samplers import ddim, ddpm, rf_euler, rf_heun

MEAN, STD = 1.5, 0.4
DDPM = GaussianDiffusion()


def initial(n=5):
    return torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1, 1, 1)


def gaussian_velocity(x, t):
    """Return E[noise - x0 | x_t] for x0 ~ N(MEAN, STD^2), where x_t ~ N((1-t) MEAN, (1-t)^2 STD^2 + t^2)."""
    t = t.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def gaussian_eps(std):
    """Return E[noise | x_t] for DDPM's x_t of x0 ~ N(MEAN, std^2)."""

    def eps_fn(x, t):
        a = DDPM.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * std**2 + 1 - a)

    return eps_fn


def with_variance(eps_fn, v):
    return lambda x, t: torch.cat([eps_fn(x, t), torch.full_like(x, v)], dim=1)


def errors(sample, exact, steps):
    return [(sample(n) - exact).abs().max().item() for n in steps]


@pytest.mark.parametrize("sampler, order", [(rf_euler, 1), (rf_heun, 2)])
def test_rectified_flow_converges_at_its_order(sampler, order):
    """The flow of a Gaussian is linear: noise z ends at MEAN + STD z."""
    found = errors(lambda n: sampler(gaussian_velocity, initial(), n), MEAN + STD * initial(), [40, 80, 160])
    assert found[2] < 0.02
    for coarse, fine in pairwise(found):
        assert coarse / fine == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_rectified_flow_to_one_point_is_exact_at_any_step_count(steps):
    """The paths to a point are straight: v = (x - MEAN) / t."""
    sample = rf_euler(lambda x, t: (x - MEAN) / t.view(-1, 1, 1, 1), initial(), steps)
    assert (sample - MEAN).abs().max() < 1e-13


def test_rectified_flow_times():
    for sampler, expected in ((rf_euler, [1, 0.75, 0.5, 0.25]), (rf_heun, [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0])):
        seen = []
        sampler(lambda x, t, seen=seen: seen.append(t) or torch.cat([x, x], dim=1), initial(3).bfloat16(), 4)
        assert [t.tolist() for t in seen] == [[e] * 3 for e in expected] and seen[0].dtype == torch.float32


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_ddim_to_one_point_is_exact_at_any_step_count(steps):
    assert (ddim(gaussian_eps(0.0), initial(), steps) - MEAN).abs().max() < 1e-11


def test_ddim_converges_to_the_exact_flow_of_a_gaussian():
    """(x_t - sqrt(a) MEAN) / sqrt(a STD^2 + 1 - a) is constant along the flow."""
    a = DDPM.alphas_cumprod[-1]
    exact = MEAN + STD * (initial() - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    found = errors(lambda n: ddim(with_variance(gaussian_eps(STD), 9.0), initial(), n), exact, [25, 50, 100, 1000])
    assert found[0] > 1.7 * found[1] > 1.7**2 * found[2] and found[3] < 4e-3


@pytest.mark.parametrize("steps", [2, 10, 250])
def test_ddpm_to_one_point_arrives_there(steps):
    for model_fn in (gaussian_eps(0.0), with_variance(gaussian_eps(0.0), 0.5)):
        assert (ddpm(model_fn, initial(), steps, sample_generators(range(5))) - MEAN).abs().max() < 1e-11


def test_ddpm_samples_have_the_mean_and_variance_of_the_data():
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = ddpm(with_variance(gaussian_eps(STD), 0.0), noise, 150, torch.Generator().manual_seed(1))
    assert sample.mean().item() == pytest.approx(MEAN, abs=5 * STD / 20000**0.5)
    assert sample.std().item() == pytest.approx(STD, rel=0.03)


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    fixed = ddpm(gaussian_eps(STD), initial(), 20, sample_generators(range(5)))
    assert torch.allclose(ddim(gaussian_eps(STD), initial(), 20, 1.0, sample_generators(range(5))), fixed, rtol=1e-10)
    learned = ddpm(with_variance(gaussian_eps(STD), -1.0), initial(), 20, sample_generators(range(5)))
    assert torch.allclose(learned, fixed, rtol=1e-12), "v = -1 is the posterior variance"
    widest = ddpm(with_variance(gaussian_eps(STD), 1.0), initial(), 20, sample_generators(range(5)))
    assert not torch.allclose(widest, fixed, rtol=1e-3)


def test_models_are_told_the_original_timesteps():
    for sampler in (ddim, ddpm):
        seen = []
        sampler(lambda x, t, seen=seen: seen.append(t) or x, initial(3), 4)
        assert [t.tolist() for t in seen] == [[999] * 3, [666] * 3, [333] * 3, [0] * 3]
        assert seen[0].dtype == torch.int64


STOCHASTIC = {
    "ddim": lambda noise, generators: ddim(gaussian_eps(STD), noise, 12, 0.7, generators),
    "ddpm": lambda noise, generators: ddpm(with_variance(gaussian_eps(STD), 0.2), noise, 12, generators),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(name):
    sample, seeds = STOCHASTIC[name], [3, 1, 4, 15]
    torch.manual_seed(0)
    together = sample(initial(4), sample_generators(seeds))
    torch.manual_seed(99)
    alone = torch.cat([sample(initial(4)[b : b + 1], sample_generators(seeds[b : b + 1])) for b in range(4)])
    assert torch.equal(together, alone) and len(set(together.flatten().tolist())) == 4
    assert torch.equal(together.flip(0), sample(initial(4).flip(0), sample_generators(seeds[::-1])))
    assert not torch.equal(together, sample(initial(4), sample_generators([9, 8, 7, 6]))), "the generators must matter"


def test_every_sampler_runs_the_model():
    torch.manual_seed(0)
    config = DiTMoEConfig(2, 16, 2, 2, 4, 2, input_size=8, in_channels=1, num_classes=10)
    model = DiTMoE(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    noise = draw_noise(torch.zeros(3, 1, 8, 8, dtype=torch.float64), sample_generators(range(3)))

    def run(sampler, b, **options):
        y = torch.tensor([4, 7, 10])[b]
        return sampler(lambda x, t: model.forward_with_guidance(x, t, y, 1.5), noise[b], 3, **options)

    for sampler in (rf_euler, rf_heun, ddim, ddpm):

        def options(seeds, sampler=sampler):
            return {} if sampler in (rf_euler, rf_heun) else {"generators": sample_generators(seeds)}

        together = run(sampler, slice(None), **options(range(3)))
        alone = torch.cat([run(sampler, slice(b, b + 1), **options([b])) for b in range(3)])
        assert together.shape == noise.shape and not together.requires_grad
        assert (together - alone).norm() / alone.norm() < 1e-10


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rf_euler(gaussian_velocity, initial(), 0), "steps: got 0"),
        (lambda: rf_heun(gaussian_velocity, initial(), -1), "steps: got -1"),
        (lambda: ddim(gaussian_eps(STD), initial(), 10, 1.5), "eta: got 1.5"),
        (lambda: ddim(gaussian_eps(STD), initial(), 1), "steps: got 1, expected 2..1000"),
        (lambda: ddpm(gaussian_eps(STD), initial(), 10, sample_generators([1])), "generators: got 1, expected 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
