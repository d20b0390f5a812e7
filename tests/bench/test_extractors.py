"""Images -> features: each extractor's shape, identity and errors; Inception's architecture with random weights."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.images.fid import extractors
from bench.images.fid.extractors import Digits, Inception, Pixels, extract
from bench.images.fid.samples import open_samples
from bench.instrument.progress import say

STUB = """
import torch
from torch_fidelity.helpers import SIZE
URL_INCEPTION_V3 = "https://example.org/weights.pth"
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.fc = torch.nn.Linear(3, SIZE)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (self.fc(x.float().mean((2, 3))),)
"""


def images(count: int = 5, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    """A package named torch_fidelity whose __init__ fails as the real one does without a fitting torchvision."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (package / "helpers.py").write_text("SIZE = 2048")
    (package / "feature_extractor_inceptionv3.py").write_text(STUB)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = tmp_path / "weights.pth"
    torch.save(torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2048)}).state_dict(), weights)
    yield weights
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


def test_inception_runs_without_torchvision(stub):
    extractor = Inception(stub, "cpu")
    features = extractor(images())
    state = torch.load(stub)
    expected = images().mean((1, 2)) @ state["fc.weight"].double().numpy().T + state["fc.bias"].double().numpy()
    assert features.dtype == np.float64 and np.allclose(features, expected, rtol=1e-4, atol=1e-3)
    assert "torch_fidelity" not in sys.modules, "whoever imports it later must get the whole package"


def test_identity_is_that_of_the_weights(stub, tmp_path):
    first = Inception(stub, "cpu").identity
    other = tmp_path / "other.pth"
    torch.save({key: value + 1 for key, value in torch.load(stub).items()}, other)
    assert first == Inception(stub, "cpu").identity != Inception(other, "cpu").identity


class Evil:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_bad_weights_are_named(stub, tmp_path, capfd):
    text, pickled, shapes = (tmp_path / name for name in ("text.pth", "evil.pth", "shapes.pth"))
    text.write_text("weights")
    torch.save({"fc.weight": Evil()}, pickled)
    torch.save({"fc.weight": torch.zeros(2, 2)}, shapes)
    for path in (text, pickled, shapes):
        with pytest.raises(
            ValueError, match=rf"--weights .*{path.name}: expected torch-fidelity's state dict"
        ) as error:
            Inception(path, "cpu")
        assert "\n" not in str(error.value)
    assert "ran" not in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"--weights .*none\.pth.*no such file"):
        Inception(tmp_path / "none.pth", "cpu")
    with pytest.raises(ValueError, match=r"--weights: expected the file.*nothing is downloaded.*https://"):
        Inception(None, "cpu")


def test_missing_torch_fidelity_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torch-fidelity, which is not installed: pip install \.\[fid\]"):
        Inception(Path("any"), "cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_real_architecture_with_random_weights(tmp_path):
    """The published weights cannot be had offline: this shows the path, not the figures."""
    blank = type(
        "Blank", (extractors._inception_module().FeatureExtractorInceptionV3,), {"load_state_dict": say_nothing}
    )
    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    net = blank("inception", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(net.state_dict(), tmp_path / "random.pth")
    features = Inception(tmp_path / "random.pth", "cpu")(images(3, 32))
    assert features.shape == (3, 2048) and np.isfinite(features).all() and features.std(0).max() > 0


def say_nothing(module: torch.nn.Module, state: dict) -> None:
    assert not state
    say("random weights stay")


def test_pixels_are_scaled_cell_means():
    extractor = Pixels(None, "cpu")
    plain = np.full((2, 24, 16, 3), 255, np.uint8)
    plain[1] = 0
    features = extractor(plain)
    assert np.allclose(features, np.array([[1], [-1]]) * 192**-0.5) and features.shape == (2, 192)
    assert extractor.check((1, 4, 8, 3)) and not extractor.check((1, 8, 8, 3))


@pytest.fixture(scope="module")
def digits() -> Digits:
    with pytest.MonkeyPatch.context() as patch:
        train = extractors.digits.train_classifier
        patch.setattr(extractors.digits, "train_classifier", lambda data: train(data, epochs=1))
        return Digits(None, "cpu")


def test_digits_are_the_main_jobs_features(digits):
    """The data's own grey levels, as uint8, give the features that the parity ladder has."""
    data = extractors.digits.load_digits()
    grey = ((data.held[:50] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    expected = extractors.digits.features(digits.model, data.held[:50])
    assert np.abs(digits(grey) - expected).max() < 0.01 * np.abs(expected).max()
    assert "8 x 8" in digits.check((5, 16, 16, 3)) and digits.identity.startswith("digits-128-")


@pytest.mark.parametrize("make", [Digits, Pixels])
def test_weights_belong_to_inception_only(make):
    with pytest.raises(ValueError, match="--weights"):
        make(Path("weights.pth"), "cpu")


def test_batches_are_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "BATCH", 3)
    array = images(10, 8)
    samples = open_samples(saved(tmp_path / "a.npz", arr_0=array), "A.npz")
    assert np.array_equal(np.concatenate(list(samples.batches(4))), array)
    assert np.array_equal(extract(samples, Pixels(None, "cpu"), "A.npz"), Pixels(None, "cpu")(array))


def test_compressed_files_are_read_and_cut_ones_named(tmp_path):
    array = images(4, 8)
    np.savez_compressed(tmp_path / "small.npz", arr_0=array)
    assert np.array_equal(next(open_samples(tmp_path / "small.npz", "A.npz").batches(9)), array)
    cut = tmp_path / "cut.npz"
    header = saved(tmp_path / "a.npz", arr_0=array)
    with zipfile.ZipFile(header) as full, zipfile.ZipFile(cut, "w") as short:
        short.writestr("arr_0.npy", full.read("arr_0.npy")[:-1])
    with pytest.raises(ValueError, match=r"cut\.npz: arr_0: .* 768 bytes, before 767"):
        list(open_samples(cut, "A.npz").batches(9))
