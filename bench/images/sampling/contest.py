"""Which sampler, at how many evaluations? All that fit a model, from the same noise, judged by distance and label."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import moe_kernels
from bench.images import checkpoints
from bench.images.sampling.draw import Drawing
from bench.images.sampling.samplers import SAMPLERS, VELOCITY
from bench.instrument import store
from bench.instrument.progress import track

BUDGETS = (5, 10, 20)
BATCH = 100
SHOWN = 10  # images in a strip: the same noise and labels in each


@dataclass(frozen=True)
class Entry:
    """A sampler with as many steps as a budget of evaluations allows."""

    sampler: str
    budget: int

    @property
    def steps(self) -> int:
        """The most steps of at most `budget` evaluations; 0 where one is too many."""
        count = SAMPLERS[self.sampler].evaluations
        return max((n for n in range(1, self.budget + 1) if count(n) <= self.budget), default=0)


def entries(predicts: str = VELOCITY, budgets: Sequence[int] = BUDGETS) -> list[Entry]:
    """Return every sampler that fits at every budget that it can keep, the smallest first, all samplers at each."""
    fit = [name for name, sampler in SAMPLERS.items() if predicts in sampler.predicts]
    found = [Entry(name, b) for b in sorted(budgets) for name in fit]
    return [entry for entry in found if entry.steps >= SAMPLERS[entry.sampler].least]


def compete(
    trained: checkpoints.Trained, count: int, judge: Callable[[Tensor, Tensor], dict], budgets: Sequence[int] = BUDGETS
) -> Iterator[tuple[dict, np.ndarray]]:
    """Draw `count` images by each entry, as `bench sample` does without guidance, and judge them.

    Args: trained: a model that predicts velocity. judge: images (N, C, height, width) float in -1..1, labels (N,) ->
        figures of a row.
    Yields: a row of kind "sampler", with CPU ms per image, and the first SHOWN images.
    """
    model = copy.deepcopy(trained.model)
    moe_kernels.replace_moe(model)
    found = entries(budgets=budgets)
    for entry in track(found, "samplers", len(found)):
        drawing = Drawing(
            model, trained.time_scale, entry.sampler, entry.steps, 1.0, "all", "cycle", 0, min(BATCH, count)
        )
        began = time.process_time()
        parts = [drawing.range(first, min(BATCH, count - first)) for first in range(0, count, BATCH)]
        seconds = time.process_time() - began
        images, labels = (torch.cat([torch.from_numpy(list(p.values())[i]) for p in parts]) for i in (0, 1))
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        sampler = SAMPLERS[entry.sampler]
        row = store.row(
            "sampler", sampler=entry.sampler, budget=entry.budget, steps=entry.steps, random=sampler.scores,
            evaluations=sampler.evaluations(entry.steps), count=count, cpu_ms=1e3 * seconds / count,
            **judge(images, labels),
        )  # fmt: skip
        yield row, images[:SHOWN].numpy()
