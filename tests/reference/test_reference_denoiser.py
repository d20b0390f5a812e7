"""reference.denoiser: a Gaussian's score from every parameterisation; evaluations counted, NaN found."""

from __future__ import annotations

import pytest
import torch

from reference.denoiser import KINDS, Counted, Denoiser
from reference.diffusion import GaussianDiffusion
from reference.mixture import GaussianMixture

MEAN, STD = 1.5, 0.4
DDPM = GaussianDiffusion()


def velocity(x, t, cond):
    """E[noise - x0 | x] at x = (1 - t) x0 + t noise, of x0 ~ N(cond, STD^2)."""
    t, m = t.view(-1, 1, 1, 1), cond.view(-1, 1, 1, 1)
    return (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * m) - m


def predicted_noise(x, t, cond):
    """E[noise | x] at x = sqrt(a) x0 + sqrt(1 - a) noise, a between the steps' as log sigma is."""
    below = t.floor().long().clamp(max=998)
    log_sigma = torch.lerp(
        *(((1 - DDPM.alphas_cumprod) / DDPM.alphas_cumprod).log()[i] / 2 for i in (below, below + 1)), t - below
    )
    a, m = (v.view(-1, 1, 1, 1) for v in (torch.sigmoid(-2 * log_sigma), cond))
    return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * STD**2 + 1 - a)


MODELS = {
    "flow": velocity,
    "reversed_flow": lambda x, t, cond: -velocity(x, 1 - t, cond),
    "ddpm": predicted_noise,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameterisation_gives_the_score_of_a_gaussian(kind):
    sigma = torch.tensor([0.011, 0.3, 1.0, 7.0, 49.0], dtype=torch.float64)
    y = torch.linspace(-9, 9, 5 * 4, dtype=torch.float64).view(5, 1, 2, 2)
    cond = torch.tensor([MEAN, -2.0, 0.5, MEAN, 3.0], dtype=torch.float64)
    denoiser = Denoiser(lambda *args: torch.cat([MODELS[kind](*args), torch.full_like(args[0], 9.0)], 1), kind)
    s, m = (v.view(-1, 1, 1, 1) for v in (sigma, cond))
    score = (denoiser(y, sigma, cond) - y) / s**2
    exact = -(y - m) / (STD**2 + s**2)
    assert ((score - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-8, "the variance channels are ignored"
    single = Denoiser(lambda x, t, cond: x.double(), kind)(y.float(), sigma)
    assert single.dtype == torch.float32, "whatever the model's own dtype"


def test_steps_of_ddpm_are_those_of_its_schedule():
    told = []
    denoiser = Denoiser(lambda x, t, cond: told.append(t) or x, "ddpm")
    sigmas = ((1 - DDPM.alphas_cumprod) / DDPM.alphas_cumprod).sqrt()
    middle = (sigmas[500] * sigmas[501]).sqrt()
    denoiser(
        torch.zeros(6, 1), torch.stack([sigmas[0], sigmas[499], middle, sigmas[999], sigmas[0] / 2, 2 * sigmas[999]])
    )
    assert told[0].tolist() == pytest.approx([0, 499, 500.5, 999, 0, 999], abs=1e-3)
    assert denoiser.sigma_range == pytest.approx((sigmas[0].item(), sigmas[999].item()))


def test_a_mixture_denoises_as_its_density_says():
    """Tweedie: D = y + sigma^2 grad log p(y; sigma)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    mixture = GaussianMixture(means, 0.3, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    y = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    density = mixture.log_density(y, sigma).diagonal()
    (score,) = torch.autograd.grad(density.sum(), y)
    assert torch.allclose(mixture.denoise(y, sigma), y + sigma[:, None] ** 2 * score, rtol=1e-10)
    points, modes = mixture.sample(20000, generator)
    mean, cov = mixture.moments()
    assert torch.allclose(points.mean(0), mean, atol=0.05) and torch.allclose(points.T.cov(), cov, atol=0.05)
    assert torch.allclose(torch.bincount(modes) / 20000, mixture.weights.float(), atol=0.02)


def test_evaluations_are_counted_and_the_first_nan_is_named():
    def broken(x, sigma):
        return torch.where((sigma == 3)[:, None] & (x > 1), torch.nan, x)

    counted = Counted(broken, "denoiser")
    x, sigmas = torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([[5.0, 4.0, 5.0], [5.0, 4.0, 3.0], [5.0, 3.0, 3.0]])
    for sigma in sigmas:
        counted(x, sigma)
    assert (counted.calls, counted.evaluations) == (3, 9)
    with pytest.raises(FloatingPointError, match="denoiser: NaN or infinity in evaluation 2, image 2 of 3"):
        counted.check()
    with pytest.raises(FloatingPointError, match="image 2 of 3"):
        counted(x[:1], sigmas[0, :1])
    whole = Counted(broken, "denoiser")
    whole(x, sigmas[0])
    whole.check()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind: got 'edm', expected one of flow, reversed_flow, ddpm"):
        Denoiser(velocity, "edm")
