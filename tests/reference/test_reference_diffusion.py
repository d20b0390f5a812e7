"""reference.diffusion: losses by hand, tables against Gaussian conditioning, the variational bound in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from reference.diffusion import GaussianDiffusion, RectifiedFlow, draw_noise, sample_generators

DDPM = GaussianDiffusion()


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, expected, rel=1e-12):
    return torch.allclose(ours, expected, rtol=rel, atol=0)


def test_noise_of_a_sample_does_not_depend_on_batch_dtype_or_order():
    like = torch.zeros(3, 2, 4, 4)
    noise = draw_noise(like, sample_generators([5, 6, 7]))
    assert torch.equal(noise[1:2], draw_noise(like[:1], sample_generators([6])))
    assert torch.equal(noise.bfloat16(), draw_noise(like.bfloat16(), sample_generators([5, 6, 7])))
    assert torch.equal(noise.flip(0), draw_noise(like, sample_generators([7, 6, 5])))
    assert torch.equal(draw_noise(like, generator()), draw_noise(like, generator()))
    with pytest.raises(ValueError, match="generators: got 2, expected 3"):
        draw_noise(like, sample_generators([1, 2]))


def test_rectified_flow_loss_by_hand():
    x0, noise = torch.full((1, 1, 1, 2), 3.0).double(), torch.tensor([[[[1.0, 5.0]]]]).double()

    def model(x, t, y):
        assert x.flatten().tolist() == [0.75 * 3 + 0.25 * 1, 0.75 * 3 + 0.25 * 5] and t.tolist() == [0.25] and y == "y"
        return torch.cat([torch.ones_like(x), torch.full_like(x, math.nan)], dim=1)  # the second half is ignored

    loss = RectifiedFlow.loss(model, x0, "y", t=torch.tensor([0.25]), noise=noise)
    assert loss.item() == ((1 - (1 - 3)) ** 2 + (1 - (5 - 3)) ** 2) / 2


def test_rectified_flow_loss_is_zero_for_the_true_velocity():
    x0, noise = normal(0, 4, 1, 2, 2), normal(1, 4, 1, 2, 2)
    assert RectifiedFlow.loss(lambda x, t, y: noise - x0, x0, None, noise=noise).item() == 0


def test_rectified_flow_times_are_logit_normal():
    seen = []

    def model(x, t, y):
        seen.append(t)
        return x

    RectifiedFlow.loss(model, torch.zeros(20000, 1), None, generator())
    quantiles = torch.quantile(seen[0].logit().double(), torch.tensor([0.1587, 0.5, 0.8413]).double())
    assert quantiles.tolist() == pytest.approx([-1, 0, 1], abs=0.04)


@pytest.mark.parametrize("flow", [RectifiedFlow(), DDPM])
def test_losses_depend_on_their_generator_alone(flow):
    def loss(seed, global_seed):
        torch.manual_seed(global_seed)
        return flow.loss(lambda x, t, y: x * t.view(-1, 1).to(x), normal(2, 8, 3), None, generator(seed)).item()

    assert loss(1, 0) == loss(1, 5) != loss(2, 0)


@pytest.mark.parametrize("flow", [RectifiedFlow(), DDPM])
def test_a_returned_balance_loss_is_added(flow):
    x0 = normal(3, 4, 2)
    plain = flow.loss(lambda x, t, y: x, x0, None, generator())
    assert flow.loss(lambda x, t, y: (x, torch.tensor(0.5)), x0, None, generator()).item() == plain.item() + 0.5


def test_ddpm_tables():
    assert DDPM.betas[0].item() == 1e-4 and DDPM.betas[-1].item() == 2e-2 and DDPM.num_steps == 1000
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * t / 999)
        assert DDPM.alphas_cumprod[t].item() == pytest.approx(product, rel=1e-12)


def test_ddpm_posterior_is_gaussian_conditioning():
    """q(x_{t-1} | x_t, x0): multiply the prior N(sqrt(a') x0, 1 - a') with the likelihood N(x_t; sqrt(1-b) x, b)."""
    x0, x = torch.tensor(1.7).double(), torch.tensor(-0.4).double()
    for i in (1, 2, 10, 500, 999):
        b, a_prev = DDPM.betas[i], DDPM.alphas_cumprod[i - 1]
        precision = 1 / (1 - a_prev) + (1 - b) / b
        mean = (a_prev.sqrt() * x0 / (1 - a_prev) + (1 - b).sqrt() * x / b) / precision
        assert close(DDPM.posterior_variance[i], 1 / precision, rel=1e-10)
        assert close(DDPM.min_log_variance[i], -precision.log(), rel=1e-10)
        assert close(DDPM.posterior_mean(x0.view(1, 1), x.view(1, 1), torch.tensor([i])), mean.view(1, 1), rel=1e-9)
    assert DDPM.posterior_variance[0] == 0 and DDPM.min_log_variance[0] == DDPM.min_log_variance[1]
    at_zero = DDPM.posterior_mean(x0.view(1, 1), x.view(1, 1), torch.tensor([0]))
    assert close(at_zero, x0.view(1, 1)), "the last step returns x0"


def test_noising_and_prediction_are_inverse():
    x0, noise, i = normal(4, 5, 3), normal(5, 5, 3), torch.tensor([0, 1, 10, 500, 999])
    x = DDPM.q_sample(x0, i, noise)
    assert close(DDPM.predict_x0(noise, x, i), x0, rel=1e-9)
    assert close(x[4], DDPM.alphas_cumprod[999].sqrt() * x0[4] + (1 - DDPM.alphas_cumprod[999]).sqrt() * noise[4])


def test_learned_range_runs_from_posterior_variance_to_beta():
    x, i = normal(6, 3, 2), torch.tensor([3, 400, 999])
    lower, upper = DDPM.posterior_variance[i].view(3, 1), DDPM.betas[i].view(3, 1)
    for v, variance in ((-1, lower), (1, upper), (0, (lower * upper).sqrt())):
        output = torch.cat([normal(7, 3, 2), torch.full((3, 2), v).double()], dim=1)
        mean, log_variance = DDPM.p_mean_log_variance(output, x, i)
        assert close(log_variance.exp(), variance.expand(3, 2))
        assert close(mean, DDPM.posterior_mean(DDPM.predict_x0(output[:, :2], x, i), x, i))
    _, fixed = DDPM.p_mean_log_variance(normal(7, 3, 2), x, i)
    assert close(fixed.exp(), lower.expand(3, 2)), "without variance channels: the posterior variance"


def test_vb_term_is_the_kl_in_bits():
    x0, noise, i = normal(8, 4, 6), normal(9, 4, 6), torch.tensor([1, 50, 500, 999])
    x = DDPM.q_sample(x0, i, noise)
    output = normal(10, 4, 12)
    mean, log_variance = DDPM.p_mean_log_variance(output, x, i)
    true = Normal(DDPM.posterior_mean(x0, x, i), DDPM.posterior_variance[i].sqrt().view(4, 1))
    expected = kl_divergence(true, Normal(mean, (log_variance / 2).exp())).mean(1) / math.log(2)
    assert close(DDPM.vb_term(output, x0, x, i), expected, rel=1e-10)


def test_vb_term_by_hand():
    """Right noise and v = 1 (variance beta): KL = (r - 1 - log r) / 2 with r = posterior variance / beta."""
    x0, noise, i = normal(11, 1, 2), normal(12, 1, 2), torch.tensor([2])
    b = [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(3)]
    a_prev = (1 - b[0]) * (1 - b[1])
    r = (1 - a_prev) / (1 - a_prev * (1 - b[2]))
    vb = DDPM.vb_term(torch.cat([noise, torch.ones(1, 2)], dim=1), x0, DDPM.q_sample(x0, i, noise), i)
    assert vb.item() == pytest.approx((r - 1 - math.log(r)) / 2 / math.log(2), rel=1e-6)


def test_vb_term_is_never_negative_and_vanishes_for_the_true_posterior():
    x0, noise = normal(13, 1000, 4), normal(14, 1000, 4)
    i = torch.arange(1000)
    x = DDPM.q_sample(x0, i, noise)
    for seed in range(3):
        vb = DDPM.vb_term(normal(seed, 1000, 8), x0, x, i)
        assert vb.shape == (1000,) and vb.min() >= 0 and vb.isfinite().all()
    exact = DDPM.vb_term(torch.cat([noise, -torch.ones(1000, 4)], dim=1), x0, x, i)
    assert exact[1:].min() >= 0 and exact[1:].max() < 1e-20 < exact[0], "i = 0 costs bits even when exact"


def test_vb_term_at_zero_is_the_code_length_of_the_8_bit_value():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    x, output = torch.full((1, 1), 0.02, dtype=torch.float64), torch.tensor([[-0.5, 0.3]], dtype=torch.float64)
    mean, log_variance = DDPM.p_mean_log_variance(output, x, torch.tensor([0]))
    mean, std = mean.item(), (log_variance / 2).exp().item()
    bits = DDPM.vb_term(output.expand(256, 2), values[:, None], x.expand(256, 1), torch.zeros(256).long())
    probability = torch.exp2(-bits)
    assert probability.sum().item() == pytest.approx(1, rel=1e-9), "the 256 bins tile the line"
    for k in (0, int((mean + 1) * 127.5), 255):
        edges = [math.erf((values[k].item() + side / 255 - mean) / std / math.sqrt(2)) for side in (-1, 1)]
        lower, upper = (-1 if k == 0 else edges[0]), (1 if k == 255 else edges[1])
        assert probability[k].item() == pytest.approx(max(1e-12, (upper - lower) / 2), rel=1e-9)


@pytest.mark.parametrize("steps", [1000, 500])
def test_ddpm_loss_is_mse_plus_scaled_vb(steps):
    ddpm = GaussianDiffusion(torch.linspace(1e-4, 2e-2, steps))
    x0, noise, i, output = normal(15, 4, 3), normal(16, 4, 3), torch.tensor([0, 3, 100, 499]), normal(17, 4, 6)
    output.requires_grad_()

    def model(x, t, y):
        assert close(x, ddpm.q_sample(x0, i, noise)) and t.tolist() == i.tolist()
        return output

    loss = ddpm.loss(model, x0, None, t=i, noise=noise)
    mse = (output[:, :3] - noise).square().mean()
    vb = ddpm.vb_term(output, x0, ddpm.q_sample(x0, i, noise), i).mean()
    assert loss.item() == pytest.approx((mse + steps / 1000 * vb).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    (of_mse,), (of_vb,) = torch.autograd.grad(mse, output), torch.autograd.grad(steps / 1000 * vb, output)
    assert torch.equal(gradient[:, :3], of_mse[:, :3]), "the bound does not train the mean"
    assert close(gradient[:, 3:], of_vb[:, 3:]) and (gradient[:, 3:] != 0).any()


def test_ddpm_loss_without_variance_channels():
    x0, noise = normal(18, 4, 3), normal(19, 4, 3)
    assert DDPM.loss(lambda x, t, y: noise + 2, x0, None, noise=noise).item() == pytest.approx(4, rel=1e-12)
    seen = []
    DDPM.loss(lambda x, t, y: seen.append(t) or x, torch.zeros(4000, 1), None, generator())
    assert seen[0].min() < 10 and seen[0].max() > 989 and seen[0].dtype == torch.int64


@pytest.mark.parametrize("steps", [2, 10, 250, 999, 1000])
def test_respacing_keeps_the_noise_levels(steps):
    spaced = DDPM.respaced(steps)
    assert spaced.num_steps == steps == len(set(spaced.timesteps.tolist()))
    assert spaced.timesteps[0] == 0 and spaced.timesteps[-1] == 999
    assert spaced.timesteps.diff().max() - spaced.timesteps.diff().min() <= 1, "evenly spaced"
    assert close(spaced.alphas_cumprod, DDPM.alphas_cumprod[spaced.timesteps], rel=1e-10)
    if steps == 1000:
        assert close(spaced.betas, DDPM.betas, rel=1e-9)
    seen, last = [], torch.full((3,), steps - 1)
    spaced.loss(lambda x, t, y: seen.append(t) or x, torch.zeros(3, 1), None, t=last)
    assert seen[0].tolist() == [999] * 3, "the model is told the original timestep"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DDPM.respaced(1), "steps: got 1, expected 2..1000"),
        (lambda: DDPM.respaced(1001), "steps: got 1001"),
        (lambda: GaussianDiffusion(torch.tensor([0.1, 1.5])), "betas: got 2 values"),
        (lambda: DDPM.loss(lambda x, t, y: x[:, :2], torch.ones(2, 3), None), "got 2 channels, expected 3 or 6"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
