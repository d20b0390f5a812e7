"""npz files of samples in ADM's format, read batch by batch: 50,000 images of 256 x 256 are 10 GB."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.instrument.progress import say
from bench.instrument.readers import Npz, axes_taken, channels_last, image_axes

EXPECTED = "an npz with arr_0, uint8 (N, height, width, 3)"


@dataclass(frozen=True)
class Samples:
    """Images in `arr_0` of an npz; labels are those of `arr_1`, where ADM's conditional samplers put them.

    shape: (N, height, width, 3), whatever the file's axes are; grey images have three equal channels.
    """

    file: Npz
    axes: str
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def count(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield the images in order, (n, height, width, 3) uint8, n <= size."""
        for images in self.file.batches("arr_0", size):
            yield np.broadcast_to(channels_last(images, self.axes), (len(images), *self.shape[1:]))


def open_samples(path: Path, argument: str) -> Samples:
    """Check a file of samples by its header, and say so where its images are not (N, height, width, 3).

    Args: path: the npz; argument: named in errors, as the user knows it.
    Raises: ValueError naming argument, file and key, what came and what was expected.
    """
    file = Npz(path, argument, EXPECTED)
    if "arr_0" not in file.keys:
        raise ValueError(f"{file.where}: expected {EXPECTED}, got the keys {sorted(file.keys)}")
    header = file.header("arr_0")
    shape, axes = header.shape, image_axes(header.shape)
    if header.dtype != np.uint8 or not axes or header.fortran or not all(shape):
        either = ", whose channels may be first or last" * (len(shape) == 4 and {shape[1], shape[3]} <= {1, 3})
        raise ValueError(f"{file.where}: arr_0: expected {EXPECTED}, got {header}{either}")
    if taken := axes_taken(shape, axes):
        say(f"{file.where}: arr_0: {taken}")
    labels = file.read("arr_1") if "arr_1" in file.keys else None
    height, width = (shape[axes.index(axis)] for axis in "HW")
    return Samples(file, axes, (shape[0], height, width, 3), labels)
