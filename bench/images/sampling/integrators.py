"""From noise levels down to 0: the oracle's samplers, each given a number of evaluations, and SciPy's RK45."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reference import samplers
from reference.diffusion import Generators
from reference.samplers import Churn, geometric_sigmas, karras_sigmas

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Integrator:
    """A sampler with its schedule. random: it takes generators. twice: Heun's way, 2 nodes - 1 evaluations."""

    title: str
    sampler: Callable[..., Tensor]
    schedule: Callable[..., Tensor]
    random: bool = False
    twice: bool = False

    def evaluations(self, most: int) -> int:
        """Return how many of at most `most` evaluations are made."""
        return most - (most + 1) % 2 if self.twice else most

    def __call__(
        self, denoise: Denoise, y: Tensor, sigma: Tensor, sigma_min: float, most: int, generators: Generators = None
    ) -> Tensor:
        """Bring y (B, ...) of levels sigma (B,) down to 0, all rows by the same number of evaluations."""
        nodes = (self.evaluations(most) + 1) // 2 if self.twice else most
        options = {"generators": generators} if self.random else {}
        return self.sampler(denoise, y, self.schedule(nodes, sigma, sigma_min), **options)


INTEGRATORS = {
    "euler": Integrator("Euler (DDIM)", samplers.euler, karras_sigmas),
    "heun": Integrator("Heun (KAR1)", samplers.heun, karras_sigmas, twice=True),
    "heun_churn": Integrator(
        "Heun with churn (KAR2)", functools.partial(samplers.heun, churn=Churn()), karras_sigmas, True, True
    ),
    "dpmpp_2m": Integrator("DPM-Solver++(2M)", samplers.dpmpp_2m, karras_sigmas),
    "unipc": Integrator("UniPC", samplers.unipc, karras_sigmas),
    "probability_flow": Integrator("probability flow, Euler", samplers.probability_flow, geometric_sigmas),
    "reverse_diffusion": Integrator("reverse diffusion", samplers.reverse_diffusion, geometric_sigmas, True),
    "euler_maruyama": Integrator("Euler-Maruyama", samplers.euler_maruyama, geometric_sigmas, True),
}


@torch.no_grad()
def rk45(denoise: Denoise, y: Tensor, sigma: Tensor, sigma_min: float, tolerance: float = 1e-3) -> Tensor:
    """Integrate the probability flow by SciPy's adaptive RK45 in log sigma down to sigma_min, and return D there.

    All rows share the steps, so what it costs is a number of evaluations per batch, not one that can be asked for.
    Here and not in reference/, which imports torch alone.
    """
    from scipy.integrate import solve_ivp

    sigma = sigma.double()

    def level(u: float) -> Tensor:
        return sigma ** (1 - u) * sigma_min**u

    def slope(u: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).to(y).view_as(y)
        rate = (sigma_min / sigma).log().view(-1, *[1] * (y.ndim - 1))  # of log sigma over u
        return (rate * (x - denoise(x, level(u))).double()).flatten().numpy()

    done = solve_ivp(slope, (0.0, 1.0), y.double().flatten().numpy(), rtol=tolerance, atol=tolerance)
    if not done.success:
        getattr(denoise, "check", lambda: None)()  # a model's NaN, which SciPy takes for too large a step
        raise ValueError(f"rk45: {done.message}")
    return denoise(torch.from_numpy(done.y[:, -1]).to(y).view_as(y), level(1.0))
