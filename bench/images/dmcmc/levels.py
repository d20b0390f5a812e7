"""How noisy is it? A classifier of noise levels that knows the data and the noise, and no generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LevelClassifier(nn.Module):
    """y (B, C, height, width) of any noise level -> logits (B, J) of the grid's levels.

    Sees y / rms(y), log rms(y) and the log rms of the differences between neighbours, which noise makes large. `grid`
    (J,) is part of it.
    """

    def __init__(self, shape: tuple[int, int, int], grid: Tensor, width: int = 256):
        super().__init__()
        channels, height, side = shape
        self.register_buffer("grid", grid)
        self.net = nn.Sequential(
            nn.Linear(channels * height * side + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, len(grid)),
        )  # fmt: skip

    def forward(self, y: Tensor) -> Tensor:
        size, change = (_rms(v) for v in (y, y.diff(dim=-1)))
        return self.net(torch.cat([y.flatten(1) / size, size.log(), change.log()], 1))


def _rms(y: Tensor) -> Tensor:
    return y.flatten(1).square().mean(1, keepdim=True).add(1e-6).sqrt()


def train_levels(images: Tensor, grid: Tensor, steps: int, seed: int = 0) -> tuple[LevelClassifier, list[float]]:
    """Train by cross-entropy on y = x0 + grid_j noise, j uniform (Adam 1e-3 falling to 0 as a cosine, batch 256).

    Returns: (classifier in eval mode, losses in nats). Cost for 4,000 steps on the digits: half a minute of one core.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LevelClassifier(tuple(images.shape[1:]), grid)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        losses = []
        for _ in range(steps):
            x0, j = images[torch.randint(len(images), (256,))], torch.randint(len(grid), (256,))
            y = x0 + grid[j].float().view(-1, 1, 1, 1) * torch.randn_like(x0)
            loss = nn.functional.cross_entropy(model(y), j)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return model.eval().requires_grad_(False), losses


@torch.no_grad()
def level_error(model: LevelClassifier, images: Tensor, seed: int = 1) -> float:
    """Return the median of |log(found / true level)| over the images, each at a level of its own."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.randint(len(model.grid), (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    found = model.grid[model(images + model.grid[j].float().view(-1, 1, 1, 1) * noise).argmax(1)]
    return float((found / model.grid[j]).log().abs().median())
