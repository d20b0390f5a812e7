"""Real images for the main job, the classifier that judges samples, and the check that samples are no copies."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.instrument.progress import say
from bench.instrument.readers import Npz, axes_taken, channels_last, image_axes

KEYS = {"arr_0": "images", "arr_1": "labels"}  # what ADM's samplers call them
LEAST = 5  # samples of a class


@dataclass(frozen=True)
class Dataset:
    """Labelled images or latents (N, C, height, width) float32, split into training and held-out parts."""

    name: str
    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor
    num_classes: int

    @property
    def images(self) -> Tensor:
        return torch.cat([self.train, self.held])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, height, width)."""
        return tuple(self.train.shape[1:])

    def digest(self) -> str:
        """Hash the values, labels and split: part of the recipe of whatever is trained on them."""
        parts = (self.train, self.train_labels, self.held, self.held_labels)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:12]


def load_digits() -> Dataset:
    """Load scikit-learn's 1,797 real 8x8 digit scans, values 0..16 mapped to [-1, 1], split 80/20 by class.

    Reads the package's file without importing it: scikit-learn would map a second OpenMP runtime into the process that
    is about to be timed.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise ValueError("the digit images come with scikit-learn: pip install scikit-learn, or pass --data")
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    images = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8) / 8 - 1
    return _split("digits", images, torch.from_numpy(table[:, -1]).long())


def load_npz(path: str | Path) -> Dataset:
    """Load labelled images or latents from an npz.

    Keys: labels (N,) integers >= 0, and either images (N, height, width[, C]) uint8, mapped to [-1, 1], or latents
    (N, C, height, width) float, taken as they are. height = width, even. ADM's arr_0 and arr_1 are images and labels;
    images with one or three channels may have them first. What is taken for something else is said.
    Raises: ValueError naming the file, the key, what came and what was expected.
    """
    file = Npz(path, "--data", "an npz with labels and images (or latents)")
    names = {KEYS.get(key, key): key for key in sorted(file.keys)}
    kinds = {"images", "latents"} & names.keys()
    if len(kinds) != 1 or "labels" not in names:
        raise ValueError(f"{file.where}: expected the keys labels and images (or latents), got {sorted(file.keys)}")
    kind = kinds.pop()
    if names[kind] != kind:
        say(f"{file.where}: {names[kind]} taken as {kind}")
    values = (_images if kind == "images" else _latents)(file, names[kind])
    height, width = values.shape[2:]
    if height != width or height % 2 or height < 4:
        raise ValueError(f"{file.where}: {kind}: expected equal, even height and width >= 4, got {height}x{width}")
    return _split(file.path.stem, values, _labels(file, names["labels"], len(values)))


def _images(file: Npz, key: str) -> Tensor:
    shape, _, dtype = header = file.header(key)
    if dtype != np.uint8 or len(shape) not in (3, 4) or not all(shape):
        raise ValueError(f"{file.where}: {key}: expected (N, height, width[, C]) uint8, got {header}")
    axes = image_axes(shape) or "NHWC"[: len(shape)]
    if taken := axes_taken(shape, axes):
        say(f"{file.where}: {key}: {taken}")
    images = file.read(key)
    if images.max() <= 1:
        say(f"{file.where}: {key}: warning: no value above 1, taken as nearly black images of 0..255")
    return torch.from_numpy(channels_last(images, axes)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _latents(file: Npz, key: str) -> Tensor:
    shape, _, dtype = header = file.header(key)
    if dtype.kind != "f" or len(shape) != 4 or not all(shape):
        raise ValueError(f"{file.where}: {key}: expected (N, C, height, width) floats, got {header}")
    with np.errstate(over="ignore"):
        values = file.read(key).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{file.where}: {key}: expected values that are finite in float32")
    return torch.from_numpy(values)


def _labels(file: Npz, key: str, count: int) -> Tensor:
    header = file.header(key)
    if header.shape != (count,) or header.dtype.kind not in "iu":
        raise ValueError(f"{file.where}: {key}: expected {count} integers, got {header}")
    labels = file.read(key)
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or not 0 < largest < count // LEAST:
        raise ValueError(
            f"{file.where}: {key}: expected 0..classes-1 with two classes or more and at least {LEAST} samples in "
            f"each, got {least}..{largest} for {count} samples"
        )
    counts = np.bincount(labels.astype(np.int64))
    if counts.min() < LEAST:
        raise ValueError(
            f"{file.where}: {key}: expected at least {LEAST} samples in each class, got counts {counts[:20].tolist()}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _split(name: str, images: Tensor, labels: Tensor, held_share: float = 0.2) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        held[order[: round(held_share * len(order))]] = True
    return Dataset(name, images[~held], labels[~held], images[held], labels[held], int(labels.max()) + 1)


class Classifier(nn.Module):
    """Two 3x3 convolutions and one hidden layer of 128 features; those features span the FD-cls space.

    `feature_scale` brings the training images' total feature variance to 1, so that FD-cls is a share of it and one
    absolute margin holds for every data set.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, num_classes)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_classifier(data: Dataset, epochs: int = 40, seed: int = 0) -> tuple[Classifier, float]:
    """Train a classifier on the training part (Adam 1e-3, batch 64).

    Returns: (classifier in eval mode, accuracy on the held-out part). Cost: 8 s for the digits on two cores.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(data.shape[0], data.num_classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(data.train)).split(64):
                loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval()
    model.feature_scale.fill_(float(features(model, data.train).var(0, ddof=1).sum() ** -0.5))
    return model, recognised(model, data.held, data.held_labels)


@torch.no_grad()
def recognised(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the classifier takes for their label."""
    return float((model(images.float()).argmax(1) == labels).double().mean())


@torch.no_grad()
def features(model: Classifier, images: Tensor) -> np.ndarray:
    """Return the classifier's penultimate features (N, 128), scaled by `feature_scale`, float64."""
    return (model.body(images.float()).double() * model.feature_scale).numpy()


@dataclass(frozen=True)
class Copies:
    """Root-mean-square pixel distances to the nearest training image, of samples and of held-out images."""

    sample_median: float
    held_median: float
    share: float

    @property
    def none(self) -> bool:
        return self.share <= 0.02 and self.sample_median >= 0.5 * self.held_median


def nearest_neighbours(samples: Tensor, data: Dataset) -> Copies:
    """Compare sample -> training distances with held-out -> training distances.

    A memorised sample lies nearer to a training image than real held-out images do; `share` is the part of the
    samples nearer than half the held-out median.
    """
    near, held = (_nearest(x, data.train) for x in (samples, data.held))
    share = (near < 0.5 * held.median()).double().mean()
    return Copies(*(float(v) for v in (near.median(), held.median(), share)))


def _nearest(images: Tensor, train: Tensor) -> Tensor:
    distance = torch.cdist(images.flatten(1).double(), train.flatten(1).double()).min(1).values
    return distance / train[0].numel() ** 0.5
