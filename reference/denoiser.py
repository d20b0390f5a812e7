"""One denoiser for every way a model was trained, and what it is watched with: evaluations counted, NaN found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.diffusion import GaussianDiffusion, _per_sample

KINDS = ("flow", "reversed_flow", "ddpm")


class Denoiser:
    """D(y, sigma, cond) = E[x0 | y = x0 + sigma noise] from a model of another parameterisation.

    | kind | the model | t | its input x | D |
    |---|---|---|---|---|
    | flow | v = noise - x0 at x = (1 - t) x0 + t noise (DiT-MoE) | sigma / (1 + sigma) | y / (1 + sigma) | x - t v |
    | reversed_flow | v = x0 - noise at x = t x0 + (1 - t) noise (DiffMoE) | 1 / (1 + sigma) | t y | x + (1 - t) v |
    | ddpm | noise at x = sqrt(a) x0 + sqrt(1 - a) noise | where a = 1 / (1 + sigma^2) | sqrt(a) y | y - sigma v |

    The score of p(y; sigma) is (D - y) / sigma^2. With guidance D is no expectation, and that no score: a heuristic.
    Steps of ddpm are interpolated in log sigma, so t is a fraction; beyond the schedule's `sigma_range` it is told the
    first or the last step.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        kind: str,
        diffusion: GaussianDiffusion | None = None,
    ):
        """Args: model: (x (B, C, ...), t (B,), cond) -> (B, C or 2C, ...), the second half ignored. kind: one of KINDS.
        diffusion: the schedule of ddpm; DiT's by default. Raises: ValueError for another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        self.model, self.kind, self.sigma_range = model, kind, (0.0, float("inf"))
        if kind == "ddpm":
            diffusion = diffusion or GaussianDiffusion()
            a = diffusion.alphas_cumprod
            self._log_sigmas, self._timesteps = ((1 - a) / a).log() / 2, diffusion.timesteps.double()
            self.sigma_range = tuple(self._log_sigmas[[0, -1]].exp().tolist())

    def __call__(self, y: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoise y (B, C, ...) of noise levels sigma (B,) > 0; returns the like of y."""
        sigma = sigma.to(y.device)
        if self.kind == "ddpm":
            scale, t = (1 + sigma.square()).rsqrt(), self._step(sigma)
        else:
            scale = 1 / (1 + sigma)
            t = scale if self.kind == "reversed_flow" else sigma * scale
        x = _per_sample(scale, y) * y
        told = t.to(torch.promote_types(y.dtype, torch.float32))
        output = self.model(x, told, cond)[:, : y.shape[1]].to(y.dtype)
        if self.kind == "ddpm":
            return y - _per_sample(sigma, y) * output
        forward = _per_sample(sigma * scale, y) * output  # both flows are as far from the data, in opposite directions
        return x - forward if self.kind == "flow" else x + forward

    def _step(self, sigma: Tensor) -> Tensor:
        table, steps = self._log_sigmas.to(sigma.device), self._timesteps.to(sigma.device)
        place = sigma.double().log().clamp(table[0], table[-1])
        i = torch.searchsorted(table, place).clamp(1, len(table) - 1)
        return torch.lerp(steps[i - 1], steps[i], (place - table[i - 1]) / (table[i] - table[i - 1]))


class Counted:
    """Pass calls on to a function of batches, count them, and remember the first call that gave NaN or infinity.

    calls; evaluations: rows of all calls, that is calls times images. No call makes the host wait; `check` does once.
    """

    def __init__(self, function: Callable[..., Tensor], name: str):
        self.function, self.name = function, name
        self.calls = self.evaluations = 0
        self._first: Tensor | None = None

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        output = self.function(x, *args)
        if self._first is None or len(self._first) != len(x):
            self.check()
            self._first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.calls += 1
        self.evaluations += len(x)
        broken = ~output.flatten(1).isfinite().all(1) & (self._first == 0)
        self._first.masked_fill_(broken, self.calls)
        return output

    def check(self) -> None:
        """Raise FloatingPointError naming the call and the image of the first value that was not finite."""
        if self._first is None or not self._first.any():
            return
        image = int(torch.where(self._first > 0, self._first, self.calls + 1).argmin())
        raise FloatingPointError(
            f"{self.name}: NaN or infinity in evaluation {int(self._first[image])}, image {image} of {len(self._first)}"
        )
