"""Samplers of anything that denoises: y = x0 + sigma noise, D(y, sigma) = E[x0 | y], from large sigma to small.

All take denoise: (y (B, ...), sigma (B,)) -> (B, ...); y, drawn at the first sigma; and sigmas, falling, (N + 1,) or,
to start each sample at a noise level of its own, (N + 1, B). The step to sigma = 0 returns D, whatever the sampler.
What is random comes from `generators` alone (diffusion.draw_noise). No step makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from reference.diffusion import Generators, _per_sample, draw_noise

Denoise = Callable[[Tensor, Tensor], Tensor]


def karras_sigmas(count: int, sigma_max: float | Tensor, sigma_min: float, rho: float = 7.0) -> Tensor:
    """Return `count` noise levels whose roots of order rho are equally spaced, sigma_max to sigma_min, and 0.

    sigma_i = (sigma_max^(1/rho) + i / (count - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i = 0..count - 1.

    Args: count: at least 1 (then sigma_max and 0). sigma_max: a number, or (B,) for one schedule per sample.
    Returns: (count + 1,) or (count + 1, B) float64.
    Raises: ValueError for count < 1 or rho <= 0. Source: EDM, arXiv 2206.00364, equation 5.
    """
    if rho <= 0:
        raise ValueError(f"rho: got {rho}, expected a positive number")
    top, ramp = _ramp(count, sigma_max)
    return _ended((top ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - top ** (1 / rho))) ** rho)


def geometric_sigmas(count: int, sigma_max: float | Tensor, sigma_min: float) -> Tensor:
    """Return sigma_max (sigma_min / sigma_max)^(i / (count - 1)), i = 0..count - 1, and 0; else as karras_sigmas."""
    top, ramp = _ramp(count, sigma_max)
    return _ended(top * (sigma_min / top) ** ramp)


@dataclass(frozen=True)
class Churn:
    """Noise put back before a step from `low` <= sigma <= `high`: up to sigma (1 + min(amount / N, sqrt 2 - 1)).

    The names of EDM: S_churn, S_tmin, S_tmax, S_noise. These values are those of Denoising MCMC for CIFAR-10.
    """

    amount: float = 80.0
    low: float = 0.05
    high: float = 1.0
    inflation: float = 1.007


@torch.no_grad()
def euler(
    denoise: Denoise, y: Tensor, sigmas: Tensor, churn: Churn | None = None, generators: Generators = None
) -> Tensor:
    """Integrate dy/dsigma = (y - D) / sigma by y <- y + (1 - sigma' / sigma) (D - y); order 1, N evaluations.

    This is DDIM. With churn it is random (EDM, arXiv 2206.00364, algorithm 2 without its correction).
    """
    nodes = _nodes(sigmas, y)
    for sigma, after in pairwise(nodes):
        y, sigma = _churned(y, sigma, churn, len(nodes) - 1, generators)
        y = _towards(y, denoise(y, sigma), 1 - after / sigma)
    return y


@torch.no_grad()
def heun(
    denoise: Denoise, y: Tensor, sigmas: Tensor, churn: Churn | None = None, generators: Generators = None
) -> Tensor:
    """Integrate as euler by the mean of the slopes at both ends; order 2, 2N evaluations, one less where it ends at 0.

    Source: EDM, arXiv 2206.00364, algorithms 1 and (churn) 2; KAR1 and KAR2 of Denoising MCMC.
    """
    nodes = _nodes(sigmas, y)
    ends = bool((nodes[-1] == 0).all())
    for step, (sigma, after) in enumerate(pairwise(nodes)):
        y, sigma = _churned(y, sigma, churn, len(nodes) - 1, generators)
        first = denoise(y, sigma)
        ahead = _towards(y, first, 1 - after / sigma)
        if ends and step == len(nodes) - 2:
            return ahead
        slope = (y - first) / _per_sample(sigma, y) + (ahead - denoise(ahead, after)) / _per_sample(after, y)
        y = y + _per_sample((after - sigma) / 2, y) * slope
    return y


@torch.no_grad()
def probability_flow(denoise: Denoise, y: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate dy = -score d(sigma^2) / 2 by Euler steps in sigma^2; order 1, N evaluations.

    y <- y + (sigma^2 - sigma'^2) / 2 score. Source: arXiv 2011.13456, the variance-exploding case.
    """
    return _one_step(denoise, y, sigmas, lambda sigma, after: ((1 - (after / sigma) ** 2) / 2, None))


@torch.no_grad()
def reverse_diffusion(denoise: Denoise, y: Tensor, sigmas: Tensor, generators: Generators = None) -> Tensor:
    """Sample the reverse process: y <- y + d score + sqrt(d) z, d = sigma^2 - sigma'^2; weak order 1, N evaluations.

    Source: arXiv 2011.13456, algorithm 2 without corrector.
    """

    def step(sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        d = sigma**2 - after**2
        return d / sigma**2, d.sqrt()

    return _one_step(denoise, y, sigmas, step, generators)


@torch.no_grad()
def euler_maruyama(denoise: Denoise, y: Tensor, sigmas: Tensor, generators: Generators = None) -> Tensor:
    """Sample the reverse SDE by equal steps of h = log(sigma / sigma'); weak order 1, N evaluations.

    y <- y + 2 h sigma^2 score + sigma sqrt(2 h) z: g^2 dt of arXiv 2011.13456 on a geometric schedule.
    """

    def step(sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        h = (sigma / after).log()
        return 2 * h, sigma * (2 * h).sqrt()

    return _one_step(denoise, y, sigmas, step, generators)


@torch.no_grad()
def dpmpp_2m(denoise: Denoise, y: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate as euler, D carried on along log sigma from the last two evaluations; order 2, N evaluations.

    D' = D_i + (D_i - D_{i-1}) h / (2 h_before), h = log(sigma / sigma'). Source: DPM-Solver++(2M), arXiv 2211.01095.
    """
    before, h_before = None, None
    for sigma, after in pairwise(_nodes(sigmas, y)):
        h, D = (sigma / after).log(), denoise(y, sigma)
        y = _towards(y, _carried(before, D, h, h_before), 1 - after / sigma)
        before, h_before = D, h
    return y


@torch.no_grad()
def unipc(denoise: Denoise, y: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate by dpmpp_2m's steps, each corrected by the evaluation the next one needs; order 3, N evaluations.

    The correction integrates exp(tau - h) D(tau) over 0..h, D the parabola through the last two values and the new one.
    Source: UniPC-2, arXiv 2302.04867, its corrector solved in closed form (the first, of a line, by exact weights too).
    """
    start, past, steps = y, [], []
    for sigma, after in pairwise(_nodes(sigmas, y)):
        D = denoise(y, sigma)
        if past:
            y = _corrected(start, [*past[-2:], D], steps[-2:])
        start, h = y, (sigma / after).log()
        y = _towards(y, _carried(past[-1] if past else None, D, h, steps[-1] if steps else None), 1 - after / sigma)
        past, steps = [*past[-1:], D], [*steps[-1:], h]
    return y


def _one_step(
    denoise: Denoise,
    y: Tensor,
    sigmas: Tensor,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    generators: Generators = None,
) -> Tensor:
    """Repeat y <- y + share (D - y) + spread z with (share, spread) = step(sigma, sigma')."""
    for sigma, after in pairwise(_nodes(sigmas, y)):
        share, spread = step(sigma, after)
        y = _towards(y, denoise(y, sigma), torch.where(after == 0, torch.ones_like(share), share))
        if spread is not None:
            y = y + _per_sample(torch.where(after == 0, 0.0, spread), y) * draw_noise(y, generators)
    return y


def _carried(before: Tensor | None, D: Tensor, h: Tensor, h_before: Tensor | None) -> Tensor:
    """Return D at the middle of a step of h, on the line through the last two evaluations; at sigma' = 0 D itself."""
    if before is None:
        return D
    ahead = torch.where(h.isinf(), 0.0, h / (2 * h_before))
    return _towards(before, D, 1 + ahead)


def _corrected(start: Tensor, D: list[Tensor], h: list[Tensor]) -> Tensor:
    """Return y after the step h[-1] from `start`; D was evaluated after it, before it, and (of three) h[-2] earlier."""
    width = h[-1]
    zeroth = -torch.expm1(-width)
    first = width - zeroth
    second = width**2 - 2 * first
    slope = (D[-1] - D[-2]) / _per_sample(width, start)
    y = _towards(start, D[-2], zeroth)
    if len(D) < 3:
        return y + _per_sample(first, start) * slope
    bend = (slope - (D[-2] - D[-3]) / _per_sample(h[-2], start)) / _per_sample(width + h[-2], start)
    return y + _per_sample(first, start) * slope + _per_sample(second - width * first, start) * bend


def _towards(y: Tensor, D: Tensor, share: Tensor) -> Tensor:
    """Return y + share (D - y), exactly D at share 1."""
    return torch.lerp(y, D, _per_sample(share, y))


def _churned(
    y: Tensor, sigma: Tensor, churn: Churn | None, steps: int, generators: Generators
) -> tuple[Tensor, Tensor]:
    if churn is None:
        return y, sigma
    gamma = min(churn.amount / steps, 2**0.5 - 1)
    raised = torch.where((sigma >= churn.low) & (sigma <= churn.high), sigma * (1 + gamma), sigma)
    spread = churn.inflation * (raised**2 - sigma**2).sqrt()
    return y + _per_sample(spread, y) * draw_noise(y, generators), raised


def _ramp(count: int, sigma_max: float | Tensor) -> tuple[Tensor, Tensor]:
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    top = torch.as_tensor(sigma_max, dtype=torch.float64)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64, device=top.device)
    return top, ramp.view(-1, *[1] * top.ndim)


def _ended(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros_like(sigmas[:1])])


def _nodes(sigmas: Tensor, y: Tensor) -> Tensor:
    """Return the schedule as (N + 1, B) float64 on y's device; looks at it once."""
    B = y.shape[0]
    if sigmas.ndim not in (1, 2) or len(sigmas) < 2 or (sigmas.ndim == 2 and sigmas.shape[1] != B):
        raise ValueError(f"sigmas: got {tuple(sigmas.shape)}, expected (N + 1,) or (N + 1, {B}), N at least 1")
    nodes = sigmas.to(y.device, torch.float64).view(len(sigmas), -1).expand(-1, B)
    if not ((nodes[1:] < nodes[:-1]).all() and (nodes[-1] >= 0).all() and nodes[0].isfinite().all()):
        raise ValueError(
            f"sigmas: got {nodes[0].max():g} to {nodes[-1].min():g}, expected finite values that fall to 0 or above"
        )
    return nodes
