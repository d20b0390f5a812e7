"""Sample a model and count where its tokens go."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from bench.images.analysis.counts import Counter, Tables
from bench.images.analysis.watch import routed_layers, try_bfloat16, watch
from bench.images.sampling.draw import Drawing
from bench.images.sampling.samplers import SAMPLERS
from bench.instrument.progress import Pace


def analyse(drawing: Drawing, count: int, bf16_batches: int = 1) -> tuple[Tables, np.ndarray]:
    """Draw `count` images as `bench sample` draws them, counting; the first batches are routed in bfloat16, too.

    Returns: the tables, and the first images (at most 16) as Drawing.range gives them.
    """
    model, sampler = drawing.model, SAMPLERS[drawing.sampler]
    counter = Counter(len(routed_layers(model)), sampler.evaluations(drawing.steps), count)
    pace, seen = Pace("images", count), []
    with watch(model, counter):
        for number, first in enumerate(range(0, count, drawing.batch)):
            counter.begin(first, drawing.labels_of(first), drawing.guidance != 1.0)
            size = min(drawing.batch, count - first)
            with ExitStack() as stack:
                if number < bf16_batches:
                    stack.enter_context(try_bfloat16(model, counter))
                images = next(iter(drawing.range(first, size).values()))
            if first < 16:
                seen.append(images[: 16 - first])
            pace.advance(size)
    return counter.result(), np.concatenate(seen)
