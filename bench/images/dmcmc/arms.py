"""Who competes: trajectories from the largest noise, and chains whose states an integrator brings down.

All evaluations count: those of chains' steps, of the way down, and of the start shared by a chain's samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.images.sampling.integrators import INTEGRATORS, rk45
from reference.denoiser import Counted
from reference.diffusion import draw_noise, sample_generators
from reference.dmcmc import Langevin, LangevinGibbs, State, VariancePreserving

ETA, SHARE = 0.8, 0.2  # of the Langevin step, and of the step that preserves the variance
START = (
    "dpmpp_2m"  # down to a chain's first image: Heun in as few evaluations leaves chains where they never return from
)
DOWN = 9  # evaluations of the way down at most
CHOICES = {  # name -> kernel, options of LangevinGibbs
    "released": (Langevin(ETA), {}),
    "drawn level": (Langevin(ETA), {"draw": True}),
    "last state": (Langevin(ETA), {"least": False}),
    "preserving": (VariancePreserving(SHARE), {}),
}


@dataclass(frozen=True)
class Problem:
    """What is sampled: denoise (y, sigma, labels) -> D, levels y -> logits over the grid, one image's shape."""

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    levels: Callable[[Tensor], Tensor]
    grid: Tensor
    shape: tuple[int, ...]
    classes: int
    sigma_min: float
    sigma_max: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Amount:
    """How much: `chains` chains (and images of a trajectory's batch), `windows` samples of each (batches).

    start: evaluations down to a chain's first image. burn: steps before its first window.
    """

    chains: int
    windows: int
    start: int
    burn: int

    @property
    def samples(self) -> int:
        return self.chains * self.windows


@dataclass(frozen=True)
class Arm:
    """A contender: an integrator alone, or one of CHOICES with it."""

    integrator: str
    choice: str = ""

    @property
    def title(self) -> str:
        name = "RK45" if self.integrator == "rk45" else INTEGRATORS[self.integrator].title
        return f"chains ({self.choice}), {name}" if self.choice else name


@dataclass
class Samples:
    """What an arm made: images (windows, chains, ...) float, each chain's labels (chains,), and what it took.

    evaluations, classified: calls of denoiser and classifier per image, all included. sigmas (windows, chains): levels
    that chains sent down; sent_twice: share of states sent a second time in a row.
    """

    images: Tensor
    labels: Tensor
    evaluations: float
    classified: float
    seconds: float
    cpu_s: float
    split: dict
    sigmas: Tensor | None = None
    sent_twice: float = 0.0


def split(arm: Arm, budget: int, amount: Amount) -> dict:
    """Divide `budget` evaluations per image: a chain's share of its start, steps skipped between images, the way down.

    Half of what the start leaves goes into the way down, at least 3 where there are 4, and DOWN at most.
    Raises: ValueError where nothing is left to divide.
    """
    integrator = INTEGRATORS[arm.integrator]
    begun = amount.start + amount.burn
    rest = int(budget - begun / amount.windows)
    if rest < 2:
        raise ValueError(
            f"budget: got {budget} evaluations, of which a chain's start takes {begun / amount.windows:.2f}"
        )
    down = integrator.evaluations(min(DOWN, max(3, (rest + 1) // 2), rest - 1))
    return {"start": begun / amount.windows, "skip": rest - down, "down": down}


def run(arm: Arm, budget: int, problem: Problem, amount: Amount, seed: int) -> Samples:
    """Draw the arm's samples; image and chain i depend on (seed, i) alone.

    Raises: FloatingPointError naming evaluation and image where the model gives NaN.
    """
    labels = torch.arange(amount.chains) % problem.classes
    denoise = Counted(lambda y, sigma: problem.denoise(y, sigma, labels), "the model")
    levels = Counted(problem.levels, "the classifier of levels")
    wall, cpu = time.perf_counter(), time.process_time()
    make = _chains if arm.choice else _trajectories
    images, sent, shares = make(arm, budget, problem, amount, seed, denoise, levels)
    took = time.perf_counter() - wall, time.process_time() - cpu
    counts = (c.evaluations / amount.samples for c in (denoise, levels))
    sigmas = torch.stack([sigma for _, sigma in sent]) if sent else None
    again = [(a == b).flatten(1).all(1) for (a, _), (b, _) in zip(sent[1:], sent[:-1], strict=True)]
    twice = float(torch.stack(again).double().mean()) if again else 0.0
    return Samples(torch.stack(images), labels, *counts, *took, shares, sigmas, twice)


def _trajectories(
    arm: Arm, budget: int, problem: Problem, amount: Amount, seed: int, denoise: Counted, levels: Counted
) -> tuple[list[Tensor], list[State], dict]:
    images, sigma = [], torch.full((amount.chains,), problem.sigma_max, dtype=torch.float64)
    for batch in range(amount.windows):
        first = seed * 1_000_003 + batch * amount.chains
        generators = sample_generators(range(first, first + amount.chains))
        y = problem.sigma_max * noise(problem, amount, generators)
        if arm.integrator == "rk45":
            images.append(rk45(denoise, y, sigma, problem.sigma_min))
        else:
            down = INTEGRATORS[arm.integrator]
            images.append(down(denoise, y, sigma, problem.sigma_min, budget, generators))
        denoise.check()
    return images, [], {}


def _chains(
    arm: Arm, budget: int, problem: Problem, amount: Amount, seed: int, denoise: Counted, levels: Counted
) -> tuple[list[Tensor], list[State], dict]:
    down, shares = INTEGRATORS[arm.integrator], split(arm, budget, amount)
    states, state, generators = begin(arm.choice, problem, amount, seed, denoise, levels)
    images, sent = [], []
    for x, where in states.run(
        state, amount.windows, shares["skip"],
        lambda d, y, sigma: down(d, y, sigma, problem.sigma_min, shares["down"], generators), generators,
    ):  # fmt: skip
        denoise.check()
        levels.check()
        images.append(x)
        sent.append(where)
    return images, sent, shares


def begin(
    choice: str,
    problem: Problem,
    amount: Amount,
    seed: int,
    denoise: Callable[[Tensor, Tensor], Tensor],
    levels: Callable[[Tensor], Tensor],
) -> tuple[LangevinGibbs, State, list[torch.Generator]]:
    """Start chains of a choice: START's images with noise, and the burn-in; chain i depends on (seed, i) alone."""
    kernel, options = CHOICES[choice]
    states = LangevinGibbs(denoise, levels, problem.grid, kernel, **options)
    generators = sample_generators(range(seed * 1_000_003, seed * 1_000_003 + amount.chains))
    sigma = torch.full((amount.chains,), problem.sigma_max, dtype=torch.float64)
    y = problem.sigma_max * noise(problem, amount, generators)
    first = INTEGRATORS[START](denoise, y, sigma, problem.sigma_min, amount.start)
    return states, states.begin(first, 0.5, amount.burn, generators), generators


def noise(problem: Problem, amount: Amount, generators: list[torch.Generator]) -> Tensor:
    """Draw a batch of standard noise (chains, ...), one generator for each."""
    return draw_noise(torch.zeros(amount.chains, *problem.shape, dtype=problem.dtype), generators)
