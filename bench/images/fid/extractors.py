"""Images -> features: Inception-v3 for what is published as FID, a digits classifier, pixels.

Only Inception's distance may be called FID. A further extractor is a class with these members and a line in EXTRACTORS.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import nn

from bench.images import digits
from bench.images.fid.samples import Samples
from bench.instrument.progress import track

BATCH = 64


class Extractor(Protocol):
    """What `extract` needs: (n, height, width, 3) uint8 -> (n, dimension) float64.

    identity: recorded in statistics files, so that features of different weights are not compared. margin: the
    default for parity, an absolute number on this distance's scale.
    """

    distance: str
    identity: str
    dimension: int
    margin: float

    def check(self, shape: tuple[int, int, int, int]) -> str:
        """Return what is wrong with images of this shape, '' when nothing is."""

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class Inception:
    """Inception-v3's 2048 pooled features with TensorFlow's weights and resizing, by torch-fidelity."""

    distance, dimension, margin = "FID", 2048, 0.05

    def __init__(self, weights: Path | None, device: str):
        module = _inception_module()
        if weights is None:
            raise ValueError(
                f"--weights: expected the file of Inception's weights, got none; nothing is downloaded here: "
                f"{module.URL_INCEPTION_V3}"
            )
        if not weights.is_file():
            raise ValueError(f"--weights {weights}: expected the file of Inception's weights, there is no such file")
        try:
            torch.load(weights, weights_only=True)  # torch-fidelity itself would unpickle whatever stands there
            self.model = module.FeatureExtractorInceptionV3(
                "inception", [str(self.dimension)], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # pickle, zip, key and shape errors alike: not these weights
            line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(
                f"--weights {weights}: expected torch-fidelity's state dict of Inception-v3, got: {line}"
            ) from None
        self.model.to(device)
        self.device = device
        self.identity = f"inception-v3-{self.dimension}-{_digest(weights.read_bytes())}"

    def check(self, shape: tuple[int, int, int, int]) -> str:
        return ""

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(self.device)
        return self.model(pixels)[0].double().cpu().numpy()


class Digits:
    """The main job's classifier of digits, trained anew in ten seconds, on one thread so that it is always the same."""

    distance, dimension, margin = "FD-cls", 128, 0.001

    def __init__(self, weights: Path | None, device: str):
        _no_weights(weights, "digits")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.model, _ = digits.train_classifier(digits.load_digits())
        finally:
            torch.set_num_threads(threads)
        state = b"".join(value.numpy().tobytes() for value in self.model.state_dict().values())
        self.identity = f"digits-{self.dimension}-{_digest(state)}"

    def check(self, shape: tuple[int, int, int, int]) -> str:
        return "" if shape[1:3] == (8, 8) else f"8 x 8 pixels for the digits classifier, got {shape[1]} x {shape[2]}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        grey = torch.from_numpy(images.mean(-1, dtype=np.float32))[:, None] / 127.5 - 1
        return digits.features(self.model, grey)


class Pixels:
    """Mean colours of 8 x 8 cells, scaled to [-1, 1] and by 192^-1/2: no weights, no semantics, for a first look."""

    distance, dimension, margin = "FD-pixels", 192, 0.001
    identity = "pixels-192"

    def __init__(self, weights: Path | None, device: str):
        _no_weights(weights, "pixels")

    def check(self, shape: tuple[int, int, int, int]) -> str:
        return "" if min(shape[1:3]) >= 8 else f"at least 8 x 8 pixels, got {shape[1]} x {shape[2]}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).double() / 127.5 - 1
        cells = nn.functional.adaptive_avg_pool2d(pixels, 8)
        return cells.flatten(1).numpy() * self.dimension**-0.5


EXTRACTORS: dict[str, Callable[[Path | None, str], Extractor]] = {
    "inception": Inception,
    "digits": Digits,
    "pixels": Pixels,
}


def extract(samples: Samples, extractor: Extractor, argument: str) -> np.ndarray:
    """Return the features (N, D) float64 of all images.

    Raises: ValueError naming the argument when the extractor cannot take images of this size.
    """
    wrong = extractor.check(samples.shape)
    if wrong:
        raise ValueError(f"{argument} {samples.path}: expected {wrong}")
    batches = track(samples.batches(BATCH), samples.path.name, -(-samples.count // BATCH))
    return np.concatenate([extractor(batch) for batch in batches])


def _inception_module() -> ModuleType:
    """Import torch-fidelity's Inception without the package around it.

    The package imports torchvision, which does not load beside a torch of another build (CUDA's beside the CPU's
    from PyPI: "operator torchvision::nms does not exist") and which Inception does not use.
    """
    name = "torch_fidelity"
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError("--features inception: needs torch-fidelity, which is not installed: pip install .[fid]")
    whole = sys.modules.get(name)
    sys.modules[name] = whole or importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3")
    finally:
        if whole is None:
            del sys.modules[name]


def _no_weights(weights: Path | None, name: str) -> None:
    if weights is not None:
        raise ValueError(f"--weights {weights}: only --features inception takes weights, got --features {name}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
