"""Real images for the main job, the classifier that judges samples, and the check that samples are no copies."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


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
    (N, C, height, width) float, taken as they are. height = width, even.
    Raises: ValueError naming the file, the key, what came and what was expected.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--data {path}: expected a readable npz file, got: {error}") from None
    kinds = {"images", "latents"} & arrays.keys()
    if len(kinds) != 1 or "labels" not in arrays:
        raise ValueError(f"--data {path}: expected the keys labels and images (or latents), got {sorted(arrays)}")
    kind = kinds.pop()
    values = _images(path, arrays[kind]) if kind == "images" else _latents(path, arrays[kind])
    labels = arrays["labels"]
    if labels.shape != values.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"--data {path}: labels: expected {values.shape[0]} integers, got {labels.shape} {labels.dtype}"
        )
    counts = np.bincount(labels) if len(labels) and labels.min() >= 0 else np.zeros(1, int)
    if counts.min() < 5 or len(counts) < 2:
        raise ValueError(
            f"--data {path}: labels: expected 0..classes-1 with two classes or more and at least 5 samples in each, "
            f"got counts {counts[:20].tolist()}"
        )
    height, width = values.shape[2:]
    if height != width or height % 2 or height < 4:
        raise ValueError(f"--data {path}: {kind}: expected equal, even height and width >= 4, got {height}x{width}")
    return _split(path.stem, values, torch.from_numpy(labels).long())


def _images(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(
            f"--data {path}: images: expected (N, height, width[, C]) uint8, got {array.shape} {array.dtype}"
        )
    array = array[..., None] if array.ndim == 3 else array
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _latents(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f" or array.ndim != 4:
        raise ValueError(
            f"--data {path}: latents: expected (N, C, height, width) floats, got {array.shape} {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"--data {path}: latents: expected finite values")
    return torch.from_numpy(array).float()


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
    sample_min: float
    held_min: float
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
    return Copies(*(float(v) for v in (near.median(), held.median(), near.min(), held.min(), share)))


def _nearest(images: Tensor, train: Tensor) -> Tensor:
    distance = torch.cdist(images.flatten(1).double(), train.flatten(1).double()).min(1).values
    return distance / train[0].numel() ** 0.5
