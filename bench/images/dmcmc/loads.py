"""Experts' load: of all calls of an arm, and along chains against trajectories at the same levels of noise.

Chains spend their evaluations where there is little noise. How much of the difference in load comes from that, and how
much from states that a trajectory would not have at those levels? All picks of chains are counted by level, and those
of trajectories at every level of the grid.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from bench.images.analysis.statistics import max_over_mean, total_variation
from bench.images.analysis.watch import routed_layers, watch
from bench.images.dmcmc.arms import Amount, Problem, begin, noise
from reference.diffusion import sample_generators
from reference.samplers import euler, karras_sigmas

SLICES = 5  # of the grid of levels, equal on a logarithmic scale
ORDINARY = 20  # levels of the trajectory that a chain as a whole is held against


class Loads:
    """Largest load of an expert over the mean, by layer: of every call, summed, and of all calls together.

    Takes picks as analysis.counts.Counter does, so that `watch` can hand them over, whatever routes.
    """

    def __init__(self, model: nn.Module):
        self.L, self.calls = len(routed_layers(model)), 0
        self.counts: list[Tensor | int] = [0] * self.L
        self.per_call = [0.0] * self.L

    def take(self, layer: int, T: int, E: int, cells: Tensor, weights: Tensor) -> None:
        """Take a layer's picks: cells (R,) = token * E + expert."""
        count = torch.bincount(cells.flatten() % E, minlength=E)
        self.counts[layer] = self.counts[layer] + count
        self.per_call[layer] += float(count.max() / count.double().mean())
        self.calls += layer == 0

    def summary(self) -> dict:
        whole = [float(c.max() / c.double().mean()) for c in self.counts]
        return {"per_call": [x / self.calls for x in self.per_call], "whole": whole}


class LevelLoads:
    """Picks by noise level, image and layer, counted on the device: `at` before each call, whose images have levels.

    picks (J, B, L, E) int32, of the conditional half where there are two; visits (J, B) int32: calls at each level.
    Takes picks as analysis.counts.Counter does.
    """

    def __init__(self, layers: int, grid: Tensor, images: int, halves: int = 1):
        self.L, self.grid, self.B, self.halves = layers, grid, images, halves
        self.visits = torch.zeros(len(grid), images, dtype=torch.int32, device=grid.device)
        self.picks: Tensor | None = None
        self._levels = self._images = torch.arange(images, device=grid.device)

    def at(self, sigma: Tensor) -> None:
        """Say the levels (B,), or one of all images, of the call that follows: each the nearest of the grid."""
        apart = self.grid.log() - sigma.double().reshape(-1, 1).log()
        self._levels = apart.abs().argmin(1).expand(self.B)
        self.visits[self._levels, self._images] += 1

    def take(self, layer: int, T: int, E: int, cells: Tensor, weights: Tensor) -> None:
        """Take a layer's picks: cells (R,) = token * E + expert; a cell T * E is nobody's."""
        picked = torch.zeros(T * E + 1, dtype=torch.int32, device=cells.device)
        picked.index_fill_(0, cells.flatten().long(), 1)
        if self.picks is None:
            self.picks = picked.new_zeros(len(self.grid), self.B, self.L, E)
        own = picked[:-1].view(self.halves, self.B, -1, E)[0].sum(1, dtype=torch.int32)
        self.picks[self._levels, self._images, layer] += own


def count_chains(
    model: nn.Module, problem: Problem, choice: str, amount: Amount, seed: int, halves: int = 1
) -> LevelLoads:
    """Count the steps of chains: as many as the grid has levels, those of the start left out."""
    labels = torch.arange(amount.chains) % problem.classes
    states, state, generators = begin(
        choice, problem, amount, seed, lambda y, sigma: problem.denoise(y, sigma, labels), problem.levels
    )
    loads = LevelLoads(len(routed_layers(model)), problem.grid, amount.chains, halves)
    with watch(model, loads):
        for _ in range(len(problem.grid)):
            loads.at(state.sigma)
            state = states.step(state, generators)
    return loads


def count_trajectories(model: nn.Module, problem: Problem, amount: Amount, seed: int, halves: int = 1) -> LevelLoads:
    """Count an evaluation at every level of the grid, along Euler's trajectories of as many images as chains."""
    labels = torch.arange(amount.chains) % problem.classes
    first = seed * 1_000_003 + amount.chains  # the images of an arm's second batch: not the chains' first noise
    y = problem.sigma_max * noise(problem, amount, sample_generators(range(first, first + amount.chains)))
    loads = LevelLoads(len(routed_layers(model)), problem.grid, amount.chains, halves)

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        loads.at(sigma)
        return problem.denoise(y, sigma, labels)

    with watch(model, loads):
        euler(denoise, y, torch.cat([problem.grid, problem.grid.new_zeros(1)]))
    return loads


def compare(chains: LevelLoads, trajectories: LevelLoads, labels: np.ndarray) -> dict:
    """Return what a row says: levels that chains visit, and of each layer both loads and how far they are apart.

    same_levels: chains against the trajectory of as many images, of the same labels, each evaluated as often at each
    level as its chain was; total variation by slice of the grid, their mean weighted by the chains' picks. whole:
    against a trajectory of ORDINARY Karras levels, whatever the level.
    """
    grid = chains.grid
    nodes = karras_sigmas(ORDINARY, float(grid[0]), float(grid[-1]))[:-1]
    nearest = (grid.log() - nodes[:, None].log()).abs().argmin(1)
    often = np.bincount(nearest.numpy(), minlength=len(grid))[:, None, None, None]
    a, b = (loads.picks.cpu().numpy().astype(np.float64) for loads in (chains, trajectories))
    visits = chains.visits.cpu().numpy()[..., None, None]
    same, ordinary = _sliced(visits * b), (often * b).sum(0, keepdims=True)
    sliced, whole = _sliced(a), a.sum(0, keepdims=True)
    share = _sliced(visits).sum((1, 2, 3))
    return {
        "slices": [[float(part[-1]), float(part[0])] for part in grid.tensor_split(SLICES)],
        "visits": (share / share.sum()).tolist(),
        "layers": [
            {
                "layer": layer,
                "chains": float(max_over_mean(whole[0, :, layer].sum(0))),
                "trajectories": float(max_over_mean(ordinary[0, :, layer].sum(0))),
                "same_levels": asdict(total_variation(sliced[:, :, layer], same[:, :, layer], labels)),
                "whole": asdict(total_variation(whole[:, :, layer], ordinary[:, :, layer], labels)),
            }
            for layer in range(chains.L)
        ],
    }  # fmt: skip


def _sliced(counts: np.ndarray) -> np.ndarray:
    """Sum counts (J, ...) over the levels of each slice: (SLICES, ...)."""
    return np.stack([part.sum(0) for part in np.array_split(counts, SLICES)])
