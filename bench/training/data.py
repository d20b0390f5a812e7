"""What is trained on: an npz in memory or a folder of shards on disk, and who gets which sample, when, with what noise.

Everything that is drawn for a sample depends on (seed, its place in the run) alone. So the number of processes changes
no sample, and a run that goes on needs to know its step only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bench.images.digits import Dataset, load_digits, load_npz
from bench.images.sampling.samplers import VELOCITY

ORDER, SAMPLE = 0, 1  # what random numbers are for: the order of an epoch, the noise of a sample
DDPM_STEPS = 1000


class Source(Protocol):
    """Labelled samples (C, side, side) float32, read by index."""

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    digest: str

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return samples (n, C, side, side) float32 and labels (n,) int64."""


def open_source(path: Path | None) -> Source:
    """Open the digits (None), a folder of shards, or an npz as `bench run` takes it, and of that the training part.

    Raises: ValueError naming file and key, what came and what was expected.
    """
    if path is not None and path.is_dir():
        return Shards(path)
    return InMemory(load_digits() if path is None else load_npz(path))


class InMemory:
    """The training part of a data set."""

    def __init__(self, data: Dataset):
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        self.digest, self.data = data.digest(), data

    def __len__(self) -> int:
        return len(self.data.train)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See Source."""
        chosen = torch.as_tensor(indices)
        return self.data.train[chosen], self.data.train_labels[chosen]


class Shards:
    """A folder of latents_*.npy (n, C, side, side), floats, each beside labels_*.npy (n,), integers: mapped, not read.

    A batch is read from the pages it lies in; a rank touches its own samples only.
    Raises: ValueError naming the file, what came and what was expected.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("latents_*.npy"))
        if not paths:
            raise ValueError(f"--data {folder}: expected latents_*.npy and labels_*.npy, got none")
        self.name, self._latents, labels = folder.name, [], []
        digest = hashlib.sha256()
        for path in paths:
            values, numbers = _mapped(path), _mapped(path.with_name(path.name.replace("latents_", "labels_", 1)))
            self._check(path, values, numbers)
            self._latents.append(values)
            labels.append(np.asarray(numbers, dtype=np.int64))
            digest.update(f"{path.name} {values.dtype} {values.shape}".encode() + labels[-1].tobytes())
            digest.update(values[[0, -1]].tobytes())  # and not gigabytes
        self._labels, self._starts = np.concatenate(labels), np.cumsum([0, *map(len, labels)])
        least, most = int(self._labels.min()), int(self._labels.max())
        if least < 0:
            raise ValueError(f"--data {folder}: expected labels of at least 0, got {least}")
        self.shape, self.num_classes, self.digest = self._latents[0].shape[1:], most + 1, digest.hexdigest()[:12]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See Source."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = [self._latents[s][i - self._starts[s]] for s, i in zip(shards, indices, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.float32)), torch.from_numpy(self._labels[indices])

    def _check(self, path: Path, values: np.ndarray, labels: np.ndarray) -> None:
        first = self._latents[0] if self._latents else values
        square = values.ndim == 4 and values.shape[2] == values.shape[3] and not values.shape[2] % 2
        if values.dtype.kind != "f" or not square or not values.size or values.shape[1:] != first.shape[1:]:
            like = f", C and side as in the first file, {first.shape[1:]}" if values is not first else ""
            expected = f"(n, C, side, side) floats with an even side{like}"
            raise ValueError(f"--data {path}: expected {expected}, got {values.dtype} {values.shape}")
        if labels.dtype.kind not in "iu" or labels.shape != values.shape[:1]:
            where = path.name.replace("latents_", "labels_", 1)
            raise ValueError(
                f"--data {path.with_name(where)}: expected {len(values)} integers, got {labels.dtype} {labels.shape}"
            )


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"--data {path}: expected an array (.npy), got: {error}") from None


class Batch(NamedTuple):
    """A rank's part of a step: x0 (n, C, side, side) float32; labels (n,), some dropped; t (n,); noise like x0."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(value.to(device) for value in self))


@dataclass(frozen=True)
class Draws:
    """A run's samples: one epoch after the other, each in an order of its own, cut into batches without a remainder.

    The sample at place p of the run is number p mod N of epoch p // N; step s has the places sB to (s+1)B, of which
    rank r of W takes those from sB + rB/W to sB + (r+1)B/W, rounded down: parts differ by one where W does not
    divide B.
    """

    source: Source
    seed: int
    batch: int
    predicts: str
    label_dropout: float

    def part(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return what `rank` trains on in a step, counted from 0."""
        start = step * self.batch
        places = range(start + rank * self.batch // world, start + (rank + 1) * self.batch // world)
        x0, labels = self.source.read([self._index(place) for place in places])
        drawn = [self._draw(place) for place in places]
        t, noise, dropped = (np.stack(values) for values in zip(*drawn, strict=True))
        labels = torch.where(torch.from_numpy(dropped), self.source.num_classes, labels)
        return Batch(x0, labels, torch.from_numpy(t), torch.from_numpy(noise).to(x0))

    def _index(self, place: int) -> int:
        epoch, number = divmod(place, len(self.source))
        return int(_order(self.seed, epoch, len(self.source))[number])

    def _draw(self, place: int) -> tuple[np.ndarray, np.ndarray, np.bool_]:
        """Draw t (0..1, logit-normal, or 0..999), the noise, and whether the label is dropped."""
        rng = np.random.default_rng([self.seed, SAMPLE, place])
        dropped = np.bool_(rng.random() < self.label_dropout)
        normal, index = rng.standard_normal(), rng.integers(DDPM_STEPS)
        t = 1 / (1 + np.exp(-normal)) if self.predicts == VELOCITY else index
        return np.asarray(t), rng.standard_normal(self.source.shape), dropped


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)
