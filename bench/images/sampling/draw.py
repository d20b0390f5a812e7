"""One range of images: noise and labels from (seed, i) alone, then the sampler, then pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import moe_kernels
from bench.images.sampling.samplers import SAMPLERS, VELOCITY, ModelFn
from reference.diffusion import draw_noise

STRIDE = 1_000_003  # images between the generators of two seeds
PIXELS = (1, 3)  # channels of a model that paints pixels; of others they are latents


def generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of image `index`.

    torch's generator on the CPU looks at 32 bits of a seed. seed * STRIDE + index differs there for all images of a
    run, and between two seeds that are less than 4294 apart for their first million images.
    """
    return torch.Generator().manual_seed((seed * STRIDE + index) % 2**32)


def label(rule: str | list[int], seed: int, index: int, num_classes: int) -> int:
    """Return the label of image `index`: "random" (uniform), "cycle" (0, 1, ... and again), or a list, in turns."""
    if rule == "random":
        return int(np.random.default_rng([seed, index]).integers(num_classes))
    return index % num_classes if rule == "cycle" else rule[index % len(rule)]


@dataclass
class Drawing:
    """Everything an image depends on. `decode` turns latents (n, C, h, w) into uint8 (n, height, width, 3)."""

    model: nn.Module
    time_scale: float
    sampler: str
    steps: int
    guidance: float
    channels: str
    labels: str | list[int]
    seed: int
    batch: int
    predicts: str = VELOCITY
    device: str = "cpu"
    decode: Callable[[Tensor], np.ndarray] | None = None

    def labels_of(self, first: int) -> Tensor:
        """Return the labels of the batch that begins with image `first`: (batch,) int64 on the device."""
        classes, numbers = self.model.config.num_classes, range(first, first + self.batch)
        return torch.tensor([label(self.labels, self.seed, i, classes) for i in numbers], device=self.device)

    @torch.no_grad()
    def range(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Draw images first ... first + count - 1, in a batch that is always full: others behind them, forgotten.

        Returns: arr_0 (count, height, width, C) uint8 and arr_1, their labels, as ADM names them; of a model of
            latents without a decoder latents (count, C, height, width) float32 and labels.
        Raises: FloatingPointError naming image and step, where the model's output is not finite.
        """
        config, y = self.model.config, self.labels_of(first)
        generators = [generator(self.seed, i) for i in range(first, first + self.batch)]
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        shape = (self.batch, config.in_channels, config.input_size, config.input_size)
        noise = draw_noise(torch.empty(shape, dtype=wide, device=self.device), generators)
        fn = ModelFn(self.model, y, self.guidance, self.channels, self.time_scale)
        moe_kernels.set_nonfinite("propagate")  # NaN is to come out at its image, whose number `check` tells
        try:
            x = SAMPLERS[self.sampler].run(fn, noise, self.steps, generators, self.predicts)[:count]
        finally:
            moe_kernels.set_nonfinite("raise")
        fn.check(first, count)
        labels = y[:count].cpu().numpy()
        if self.decode:
            return {"arr_0": self.decode(x), "arr_1": labels}
        if config.in_channels in PIXELS:
            return {"arr_0": to_uint8(x), "arr_1": labels}
        return {"latents": x.float().cpu().numpy(), "labels": labels}


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images (n, C, height, width) of -1..1 into (n, height, width, C) uint8 by the rule of DiT's samplers.

    floor(127.5 x + 128), clipped to 0..255.
    """
    pixels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
