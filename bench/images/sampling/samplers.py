"""The samplers by name, and the model as they call it: guided, in its dtype, watched for values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.images.sampling.integrators import INTEGRATORS, Integrator
from reference import samplers as reference
from reference.denoiser import Denoiser

VELOCITY, NOISE = "velocity", "noise"
KINDS = {VELOCITY: "flow", NOISE: "ddpm"}  # as denoisers
SIGMAS = {  # where samplers by noise level end, and begin
    VELOCITY: (0.05, 20.0),  # logit-normal times have log sigma = logit t of standard deviation 1: three of them
    NOISE: (0.02, 80.0),
}
Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Sampler:
    """run(model_fn, noise (B, C, height, width), steps, generators, one per image, predicts) -> samples like noise.

    predicts: what model_fn may return. least: of steps; steps: by default, as the authors of DiT-MoE sample.
    evaluations: of the model in so many steps. scores: draws noise by the score of a density, which a guided field is
    of none.
    """

    predicts: tuple[str, ...]
    least: int
    steps: int
    run: Callable[[reference.ModelFn, Tensor, int, Generators, str], Tensor]
    evaluations: Callable[[int], int] = int
    scores: bool = False


def _by_level(
    integrator: Integrator, fn: reference.ModelFn, noise: Tensor, steps: int, generators: Generators, predicts: str
) -> Tensor:
    """Bring noise down the levels of SIGMAS, whatever the model predicts: as a denoiser."""
    low, high = SIGMAS[predicts]
    sigma = torch.full((len(noise),), high, dtype=torch.float64, device=noise.device)
    denoise = Denoiser(lambda x, t, _: fn(x, t), KINDS[predicts])
    return integrator(denoise, high * noise, sigma, low, _evaluations(integrator, steps), generators)


def _evaluations(integrator: Integrator, steps: int) -> int:
    return 2 * steps - 1 if integrator.twice else steps


SAMPLERS = {  # the first that fits what a model predicts is its default
    "rf_euler": Sampler((VELOCITY,), 1, 50, lambda fn, noise, steps, *_: reference.rf_euler(fn, noise, steps)),
    "rf_heun": Sampler(
        (VELOCITY,), 1, 25, lambda fn, noise, steps, *_: reference.rf_heun(fn, noise, steps), lambda steps: 2 * steps
    ),
    "ddpm": Sampler(
        (NOISE,), 2, 250, lambda fn, noise, steps, generators, _: reference.ddpm(fn, noise, steps, generators)
    ),
    "ddim": Sampler((NOISE,), 2, 50, lambda fn, noise, steps, *_: reference.ddim(fn, noise, steps)),
    **{
        name: Sampler((VELOCITY, NOISE), 1, 20, partial(_by_level, way), partial(_evaluations, way), scores=way.random)
        for name, way in INTEGRATORS.items()
    },
}


def choose(name: str | None, predicts: str, steps: int | None) -> tuple[str, int]:
    """Return a sampler's name and its steps, both by default those of what the model predicts.

    Raises: ValueError for a sampler of models that predict something else, or too few steps.
    """
    fitting = [key for key, sampler in SAMPLERS.items() if predicts in sampler.predicts]
    name = name or fitting[0]
    sampler = SAMPLERS[name]
    if name not in fitting:
        raise ValueError(
            f"--sampler {name}: integrates models that predict {sampler.predicts[0]}, but this checkpoint predicts "
            f"{predicts}, expected one of {', '.join(fitting)}"
        )
    if steps is not None and steps < sampler.least:
        raise ValueError(f"--steps: got {steps}, expected at least {sampler.least} for {name}")
    return name, steps or sampler.steps


class ModelFn:
    """A DiT-MoE as samplers call it: fn(x (B, C, height, width), t (B,)) -> (B, C or 2C, height, width), dtype of x.

    guidance: uncond + guidance * (cond - uncond) in one batch of both; 1 means one forward without.
    channels: "all" or "first3" are guided, as DiTMoE.forward_with_guidance.
    What is not finite is noted on the device and asked for once at the end, so that no step waits for the host.
    """

    def __init__(self, model: nn.Module, labels: Tensor, guidance: float, channels: str, time_scale: float):
        self.model, self.labels, self.guidance, self.channels = model, labels, guidance, channels
        self.time_scale, self.calls = time_scale, 0
        self.dtype = next(model.parameters()).dtype
        self.first_bad = torch.full_like(labels, -1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = t * self.time_scale if t.is_floating_point() else t
        if self.guidance == 1.0:
            out = self.model(x.to(self.dtype), t, self.labels)
        else:
            out = self.model.forward_with_guidance(x.to(self.dtype), t, self.labels, self.guidance, self.channels)
        bad = ~out.isfinite().flatten(1).all(1)
        self.first_bad = torch.where((self.first_bad < 0) & bad, self.calls, self.first_bad)
        self.calls += 1
        return out.to(x.dtype)

    def check(self, first: int, count: int) -> None:
        """Raise FloatingPointError naming image and step, where one of the first `count` images went wrong.

        first: the number of the batch's first image. Cost: one host sync.
        """
        steps = self.first_bad[:count].tolist()
        wrong = [(step, image) for image, step in enumerate(steps) if step >= 0]
        if wrong:
            step, image = min(wrong)
            raise FloatingPointError(
                f"image {first + image} (label {int(self.labels[image])}): the model's output is not finite at "
                f"evaluation {step + 1} of {self.calls}; so are {len(wrong)} of the {count} images of this batch"
            )
