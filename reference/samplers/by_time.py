"""Samplers in a model's own time. All take a function (x (B, C, ...), t (B,)) -> (B, C or 2C, ...), so any model on
any backend plugs in; what is random comes from `noise` and `generators` alone (diffusion.draw_noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reference.diffusion import GaussianDiffusion, Generators, draw_noise

ModelFn = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def rf_euler(velocity_fn: ModelFn, noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity from t = 1 (noise) to t = 0 (data) in equal Euler steps.

    x <- x - v(x, t) / steps; error O(1 / steps). Of 2C output channels the second half is ignored.

    Args:
        velocity_fn: (x, t (B,) in 0..1) -> velocity. noise: (B, C, ...), any float dtype. steps: at least 1.
    Returns:
        samples like noise.
    Raises:
        ValueError: steps < 1.
    Cost: `steps` evaluations.
    """
    x = noise
    for t, dt in _rf_times(steps):
        x = x - dt * _velocity(velocity_fn, x, t)
    return x


@torch.no_grad()
def rf_heun(velocity_fn: ModelFn, noise: Tensor, steps: int) -> Tensor:
    """Integrate as rf_euler with Heun's rule (the mean of the slopes at both ends); error O(1 / steps^2).

    Cost: 2 * steps evaluations, the last one at t = 0.
    """
    x = noise
    for t, dt in _rf_times(steps):
        slope = _velocity(velocity_fn, x, t)
        ahead = _velocity(velocity_fn, x - dt * slope, t - dt)
        x = x - dt / 2 * (slope + ahead)
    return x


@torch.no_grad()
def ddim(
    eps_fn: ModelFn,
    noise: Tensor,
    steps: int,
    eta: float = 0.0,
    generators: Generators = None,
    diffusion: GaussianDiffusion | None = None,
) -> Tensor:
    """Sample by DDIM on a respaced schedule.

    x <- sqrt(a') x0 + sqrt(1 - a' - s^2) eps + s z with a' the next a and s^2 = eta^2 times the posterior variance

    Args:
        eps_fn: (x, t (B,) int64 in 0..999) -> predicted noise; variance channels are ignored.
        noise: (B, C, ...). steps: 2..1000. eta: 0 deterministic ... 1 as random as DDPM.
        generators: of z, one per sample or one for all. diffusion: the schedule before respacing.
    Returns:
        samples like noise.
    Raises:
        ValueError: steps, eta or generators out of range.
    Source: arXiv 2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected 0..1")
    schedule = (diffusion or GaussianDiffusion()).respaced(steps)
    x = noise
    for step, i, t in _indices(schedule, noise):
        a_prev = schedule.alphas_cumprod_prev[step].item()
        sigma = eta * schedule.posterior_variance[step].item() ** 0.5
        eps = eps_fn(x, t)[:, : x.shape[1]]
        x = a_prev**0.5 * schedule.predict_x0(eps, x, i) + (1 - a_prev - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * draw_noise(x, generators)
    return x


@torch.no_grad()
def ddpm(
    model_fn: ModelFn,
    noise: Tensor,
    steps: int = 250,
    generators: Generators = None,
    diffusion: GaussianDiffusion | None = None,
) -> Tensor:
    """Sample by ancestral DDPM on a respaced schedule, with the learned variance if the model gives one.

    x <- mean + exp(log variance / 2) z, no z in the last step; without variance channels the posterior variance.

    Args:
        model_fn: (x, t (B,) int64 in 0..999) -> noise, or noise and variance channels.
        noise, steps, generators, diffusion: as ddim.
    Returns:
        samples like noise.
    Raises:
        ValueError: steps or generators out of range.
    Source: arXiv 2006.11239 and 2102.09672; no clipping of x0, as for latents.
    """
    schedule = (diffusion or GaussianDiffusion()).respaced(steps)
    x = noise
    for step, i, t in _indices(schedule, noise):
        x, log_variance = schedule.p_mean_log_variance(model_fn(x, t), x, i)
        if step > 0:
            x = x + (0.5 * log_variance).exp() * draw_noise(x, generators)
    return x


def _rf_times(steps: int) -> Iterator[tuple[float, float]]:
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return ((i / steps, 1 / steps) for i in range(steps, 0, -1))


def _velocity(velocity_fn: ModelFn, x: Tensor, t: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return velocity_fn(x, torch.full(x.shape[:1], t, dtype=dtype, device=x.device))[:, : x.shape[1]]


def _indices(schedule: GaussianDiffusion, noise: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step in reversed(range(schedule.num_steps)):
        i = torch.full(noise.shape[:1], step, device=noise.device)
        yield step, i, torch.full_like(i, int(schedule.timesteps[step]))
