"""What the model is trained on: rectified flow, and DDPM with a learned variance range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(like: Tensor, generators: Generators = None) -> Tensor:
    """Draw standard normal noise with the shape, dtype and device of `like`.

    The numbers are drawn in float64 where the generator lives and then cast, so that runs in other dtypes or on other
    devices see the same noise. With one generator per sample, a sample's noise does not depend on its batch.

    Args:
        like: (B, ...), any float dtype.
        generators: one for the whole batch, a sequence of B, or None for torch's default.
    Raises:
        ValueError: a sequence of another length than B.
    """
    if generators is None or isinstance(generators, torch.Generator):
        return _normal(like.shape, generators).to(like)
    if len(generators) != like.shape[0]:
        raise ValueError(f"generators: got {len(generators)}, expected {like.shape[0]}, one per sample")
    return torch.stack([_normal(like.shape[1:], g) for g in generators]).to(like)


def sample_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per seed, for paired runs."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _normal(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=device)


class RectifiedFlow:
    """x_t = (1 - t) x0 + t noise; the model predicts the velocity noise - x0 from (x_t, t, y) with t in 0..1."""

    @staticmethod
    def loss(
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        x0: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the mean of (model(x_t, t, y) - (noise - x0))^2 with t = sigmoid(standard normal).

        Args:
            model: (x (B, C, ...), t (B,), y) -> (B, C or 2C, ...), the second half ignored; or a pair with a balance
                loss, which is added (so it is scaled with the loss): functools.partial(model, return_aux_loss=True).
            x0: (B, C, ...), any float dtype. y: (B,).
            generator: of t, then noise. t: (B,) and noise: like x0, to fix them.
        Returns:
            scalar.
        Source: SD3, arXiv 2403.03206 (logit-normal t); DiT-MoE feeds t to its embedding without the factor 1000.
        """
        t = _normal(x0.shape[:1], generator).sigmoid() if t is None else t
        t = t.to(x0.device, torch.promote_types(x0.dtype, torch.float32))
        noise = draw_noise(x0, generator) if noise is None else noise
        weight = _per_sample(t, x0)
        prediction, aux = _predict(model, (1 - weight) * x0 + weight * noise, t, y)
        return (prediction[:, : x0.shape[1]] - (noise - x0)).square().mean() + aux


class GaussianDiffusion:
    """DDPM: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise with a_t = prod (1 - b_s), by default of 1000 linear betas b_s.

    The model predicts the noise and, with 2C output channels, where the log variance lies between log b_t and that of
    the posterior. An index i counts this schedule's steps from 0; timesteps[i] is the number the model is told, which
    differs after respacing. Tables are float64 on the CPU.
    """

    def __init__(self, betas: Tensor | None = None, timesteps: Tensor | None = None):
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64) if betas is None else betas.double()
        if len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas: got {len(betas)} values, expected at least 2, all in (0, 1)")
        self.betas, self.num_steps = betas, len(betas)
        self.timesteps = torch.arange(self.num_steps) if timesteps is None else timesteps
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.max_log_variance = betas.log()
        self.min_log_variance = self.posterior_variance[[1, *range(1, self.num_steps)]].log()  # it is 0 at i = 0

    def respaced(self, steps: int) -> GaussianDiffusion:
        """Return the schedule that visits `steps` evenly spaced timesteps, first and last included, with the same a_t.

        Raises:
            ValueError: steps outside 2..num_steps.
        """
        if not 2 <= steps <= self.num_steps:
            raise ValueError(f"steps: got {steps}, expected 2..{self.num_steps}")
        kept = torch.tensor([round(i * (self.num_steps - 1) / (steps - 1)) for i in range(steps)])
        alphas_cumprod = self.alphas_cumprod[kept]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        return GaussianDiffusion(1 - alphas_cumprod / previous, self.timesteps[kept])

    def q_sample(self, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise; i (B,) int64."""
        signal, spread = self._signal_and_spread(i, x0)
        return signal * x0 + spread * noise

    def predict_x0(self, eps: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """Return (x_t - sqrt(1 - a_t) eps) / sqrt(a_t); i (B,) int64."""
        signal, spread = self._signal_and_spread(i, x)
        return (x - spread * eps) / signal

    def posterior_mean(self, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x0); its variance is posterior_variance[i]."""
        a, a_prev = self.alphas_cumprod, self.alphas_cumprod_prev
        from_x0 = self.betas * a_prev.sqrt() / (1 - a)
        from_x = (1 - a_prev) * (1 - self.betas).sqrt() / (1 - a)
        return self._at(from_x0, i, x) * x0 + self._at(from_x, i, x) * x

    def p_mean_log_variance(self, output: Tensor, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of p(x_{t-1} | x_t) from a model output of C or 2C channels.

        log variance = f log b_t + (1 - f) log posterior variance, f = (v + 1) / 2; with C channels f = 0.
        """
        eps, v = _split(output, x.shape[1])
        lower, upper = self._at(self.min_log_variance, i, x), self._at(self.max_log_variance, i, x)
        log_variance = lower.expand_as(x) if v is None else lower + (v + 1) / 2 * (upper - lower)
        return self.posterior_mean(self.predict_x0(eps, x, i), x, i), log_variance

    def vb_term(self, output: Tensor, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """Return each sample's term of the variational bound in bits per dimension: (B,), never negative.

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at i = 0 the code length of x0, taken as 8-bit values in
        [-1, 1], under p.
        """
        mean, log_variance = self.p_mean_log_variance(output, x, i)
        true_mean, true_log_variance = self.posterior_mean(x0, x, i), self._at(self.min_log_variance, i, x)
        ratio = true_log_variance - log_variance
        kl = 0.5 * (ratio.expm1() - ratio + (true_mean - mean).square() * (-log_variance).exp())
        nats = torch.where(_per_sample(i, x) == 0, _discretized_nll(x0, mean, log_variance), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def loss(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        x0: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return mean (eps - noise)^2 + num_steps / 1000 * mean vb_term, the latter training the variance only.

        Args:
            model, x0, y, generator, noise: as RectifiedFlow.loss; with C output channels there is no vb_term.
            t: (B,) int64 indices into the schedule, uniform when None.
        Returns:
            scalar.
        Source: Improved DDPM, arXiv 2102.09672: L_hybrid = L_simple + 0.001 L_vlb.
        """
        if t is None:
            device = "cpu" if generator is None else generator.device
            t = torch.randint(self.num_steps, x0.shape[:1], generator=generator, device=device)
        t = t.to(x0.device)
        noise = draw_noise(x0, generator) if noise is None else noise
        x = self.q_sample(x0, t, noise)
        output, aux = _predict(model, x, self.timesteps.to(t.device)[t], y)
        eps, v = _split(output, x0.shape[1])
        mse = (eps - noise).square().mean()
        if v is None:
            return mse + aux
        vb = self.vb_term(torch.cat([eps.detach(), v], dim=1), x0, x, t).mean()
        return mse + self.num_steps / 1000 * vb + aux

    def _signal_and_spread(self, i: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod
        return self._at(a.sqrt(), i, like), self._at((1 - a).sqrt(), i, like)

    @staticmethod
    def _at(table: Tensor, i: Tensor, like: Tensor) -> Tensor:
        return _per_sample(table.to(like.device)[i], like)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def _predict(model: Callable, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | float]:
    output = model(x, t, y)
    return output if isinstance(output, tuple) else (output, 0.0)


def _split(output: Tensor, C: int) -> tuple[Tensor, Tensor | None]:
    if output.shape[1] not in (C, 2 * C):
        raise ValueError(f"model output: got {output.shape[1]} channels, expected {C} or {2 * C}")
    return output[:, :C], (output[:, C:] if output.shape[1] == 2 * C else None)


def _discretized_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log P(the 8-bit bin of x) for N(mean, exp(log_variance)); the outermost bins reach to infinity."""
    inverse_std = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp(min=1e-12).log()
