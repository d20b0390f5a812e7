"""Data whose denoiser, noise levels and moments are known: what samplers are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GaussianMixture:
    """sum_k weights_k N(means_k, std^2): every conditional expectation of diffusion has a closed form.

    means (K, D) and weights (K,), float64; std > 0. Points y are (B, D) or (B, ...) of D values each.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None):
        self.means, self.std = means, std
        K = len(means)
        self.weights = means.new_full((K,), 1 / K) if weights is None else weights / weights.sum()

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw points (count, D) and the modes they come from (count,)."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[modes] + self.std * noise, modes

    def log_density(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(y; sigma) of y = x0 + sigma noise: y (B, D), sigma (J,) -> (B, J)."""
        return torch.logsumexp(self._log_joint(y, sigma[None, :, None]), -1)

    def denoise(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | y] = sum_k p(k | y) (sigma^2 means_k + std^2 y) / (sigma^2 + std^2): y (B, ...), sigma (B,)."""
        flat, sigma = y.flatten(1), sigma.to(y.dtype)
        shares = self._log_joint(flat, sigma[:, None, None])[:, 0].softmax(-1)
        kept = (self.std**2 / (self.std**2 + sigma**2))[:, None]
        return torch.lerp(shares @ self.means, flat, kept).view_as(y)

    def levels(self, y: Tensor, grid: Tensor) -> Tensor:
        """Return log p(sigma = grid_j | y) + constant under a uniform prior of j: what a perfect classifier gives."""
        return self.log_density(y.flatten(1), grid)

    def modes(self, x: Tensor) -> Tensor:
        """Return the most likely mode of each point (B,)."""
        return self._log_joint(x.flatten(1), x.new_zeros(1, 1, 1))[:, 0].argmax(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        centred = self.means - mean
        spread = (self.weights[:, None] * centred).T @ centred
        return mean, spread + self.std**2 * torch.eye(len(mean), dtype=mean.dtype)

    def _log_joint(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Return log weights_k N(y; means_k, std^2 + sigma^2): y (B, D), sigma (B or 1, J, 1) -> (B, J, K)."""
        variance = self.std**2 + sigma**2
        square = torch.cdist(y, self.means, compute_mode="donot_use_mm_for_euclid_dist").square()[:, None]
        D = y.shape[1]
        return self.weights.log() - square / (2 * variance) - D / 2 * (2 * math.pi * variance).log()
