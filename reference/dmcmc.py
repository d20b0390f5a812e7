"""Denoising MCMC: chains over image and noise level together, whose states any sampler brings down to noise 0.

Target: p(y, sigma) proportional to p(y; sigma) p(sigma), p(sigma) uniform on a logarithmic grid; y = x0 + sigma noise.
Denoising Langevin Gibbs alternates a Langevin step of y (one evaluation of the denoiser) with a new sigma from
q(sigma | y), a classifier trained on data alone. Source: arXiv 2209.14593. Where the released code and the theory
differ, both can be had:

| choice | released | theory |
|---|---|---|
| new sigma | the most likely: `draw=False` | a draw: `draw=True` |
| state sent down | the least sigma of a window and the state before it: `least=True` | the last: `least=False` |
| kernel | Langevin | the same with an infinitesimal step; VariancePreserving keeps the level at any step |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reference.diffusion import Generators, _per_sample, draw_noise

Denoise = Callable[[Tensor, Tensor], Tensor]


def level_grid(sigma_min: float, sigma_max: float, levels: int = 1000) -> Tensor:
    """Return (levels,) float64: sigma_min (sigma_max / sigma_min)^u, u from 1 down to 1 / levels."""
    if not 0 < sigma_min < sigma_max or levels < 2:
        raise ValueError(
            f"grid: got {levels} levels from {sigma_min} to {sigma_max}, expected 2 or more from above 0 to more"
        )
    u = torch.linspace(1, 1 / levels, levels, dtype=torch.float64)
    return sigma_min * (sigma_max / sigma_min) ** u


@dataclass(frozen=True)
class Langevin:
    """y <- y + eta / 2 score + sqrt(eta) z, one eta > 0 at every level, no rejection: what the released code does.

    A step adds eta^2 / (4 sigma^2) to the noise's variance, so n steps carry the level from sigma_0 to
    (sigma_0^4 + eta^2 n / 2)^(1/4): the chain warms up, which is what lets it change the mode.
    """

    eta: float

    def __call__(self, y: Tensor, D: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        return torch.lerp(y, D, _per_sample(self.eta / (2 * sigma**2), y)) + self.eta**0.5 * z


@dataclass(frozen=True)
class VariancePreserving:
    """y <- y + a (D - y) + sigma sqrt(1 - (1 - a)^2) z, 0 < a <= 1: exact for a Gaussian residual, so the level stays.

    Langevin's step of eta = 2 a sigma^2 with the variance eta - eta^2 / (4 sigma^2).
    """

    a: float

    def __call__(self, y: Tensor, D: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        return y + self.a * (D - y) + _per_sample(sigma * (1 - (1 - self.a) ** 2) ** 0.5, y) * z


class State(NamedTuple):
    """Where the chains are: y (B, ...) and its noise level sigma (B,) float64. With the generators, all of a run."""

    y: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class LangevinGibbs:
    """A batch of chains, one row each; a label per chain is the denoiser's business.

    denoise: (y, sigma (B,)) -> D. levels: y -> logits (B, J) of the grid's levels. grid (J,) float64. kernel: a
    Langevin or VariancePreserving. draw, least: as in the table above. generators, of every method: one per chain, or
    one for all.
    """

    denoise: Denoise
    levels: Callable[[Tensor], Tensor]
    grid: Tensor
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    draw: bool = False
    least: bool = True

    @torch.no_grad()
    def begin(self, images: Tensor, noise: float = 0.5, steps: int = 0, generators: Generators = None) -> State:
        """Start from images (B, ...) of any sampler: add noise, find its level, go `steps` steps (burn-in)."""
        y = images + noise * draw_noise(images, generators)
        state = State(y, self.level(y, generators))
        for _ in range(steps):
            state = self.step(state, generators)
        return state

    @torch.no_grad()
    def step(self, state: State, generators: Generators = None) -> State:
        """Move y at its level, then find the level of the new y; one evaluation of denoiser and classifier each."""
        z = draw_noise(state.y, generators)
        y = self.kernel(state.y, self.denoise(state.y, state.sigma), state.sigma, z)
        return State(y, self.level(y, generators))

    def window(self, state: State, skip: int, generators: Generators = None) -> tuple[State, State]:
        """Go `skip` steps; returns where the chains are, and the state of each to send down."""
        sent = state
        for _ in range(skip):
            state = self.step(state, generators)
            lower = state.sigma < sent.sigma
            sent = State(*(torch.where(_rows(lower, new), new, old) for new, old in zip(state, sent, strict=True)))
        return state, sent if self.least else state

    def run(
        self,
        state: State,
        windows: int,
        skip: int,
        integrate: Callable[[Denoise, Tensor, Tensor], Tensor],
        generators: Generators = None,
    ) -> Iterator[tuple[Tensor, State]]:
        """Yield, per window, images (B, ...) and the state they came from; the chains go on from their last state.

        integrate: (denoise, y, sigma (B,)) -> images, any sampler that starts each row at a level of its own, as
        lambda denoise, y, sigma: dpmpp_2m(denoise, y, karras_sigmas(4, sigma, sigma_min)).
        """
        if skip < 1 or windows < 1:
            raise ValueError(f"windows, skip: got {windows}, {skip}, expected at least 1")
        for _ in range(windows):
            state, sent = self.window(state, skip, generators)
            yield integrate(self.denoise, *sent), sent

    def level(self, y: Tensor, generators: Generators = None) -> Tensor:
        """Return the level of y (B,): the most likely one, or with `draw` one of them by its probability."""
        logits, grid = self.levels(y), self.grid.to(y.device)
        if not self.draw:
            return grid[logits.argmax(-1)]
        u = torch.special.ndtr(draw_noise(logits[:, :1].double(), generators))
        below = logits.double().softmax(-1).cumsum(-1) < u
        return grid[below.sum(-1).clamp(max=len(grid) - 1)]


def _rows(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.view(-1, *[1] * (like.ndim - 1))
