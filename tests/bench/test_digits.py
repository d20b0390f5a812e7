"""The data of the main job, its judge, and the check that samples are no copies."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from bench.images.digits import (
    Dataset,
    features,
    load_digits,
    load_npz,
    nearest_neighbours,
    recognised,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


@pytest.fixture(scope="module")
def judge(digits):
    return train_classifier(digits, epochs=12)


def test_digits_are_scikit_learns_and_split_by_class(digits):
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    ours = torch.cat([digits.images.flatten(1), torch.cat([digits.train_labels, digits.held_labels])[:, None]], 1)
    theirs = np.column_stack([bunch.data / 8 - 1, bunch.target])
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
    counts = [torch.bincount(labels).tolist() for labels in (digits.train_labels, digits.held_labels)]
    assert all(abs(h - 0.2 * (h + t)) < 1 for t, h in zip(*counts, strict=True))
    assert digits.shape == (1, 8, 8) and digits.num_classes == 10


def test_loading_the_digits_does_not_import_scikit_learn():
    code = "import sys, bench.images.digits; bench.images.digits.load_digits(); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_digest_follows_every_value(digits):
    assert digits.digest() == load_digits().digest()
    other = load_digits()
    other.train[5, 0, 3, 3] += 1e-3
    assert other.digest() != digits.digest()


def test_classifier_is_good_on_held_out_digits_and_repeats(digits, judge):
    model, accuracy = judge
    assert accuracy >= 0.97
    assert recognised(model, digits.held, (digits.held_labels + 1) % 10) < 0.02
    short = [train_classifier(digits, epochs=1)[0].head.weight for _ in range(2)]
    assert torch.equal(*short)


def test_features_have_unit_variance_on_the_training_images(digits, judge):
    values = features(judge[0], digits.train)
    assert values.shape == (len(digits.train), 128) and values.dtype == np.float64
    assert values.var(0, ddof=1).sum() == pytest.approx(1, rel=1e-5)


def test_copies_are_told_from_new_digits(digits):
    assert nearest_neighbours(digits.held, digits).none
    copies = nearest_neighbours(digits.train[:100] + 0.01, digits)
    assert not copies.none and copies.share == 1
    mixed = torch.cat([digits.held[:95], digits.train[:5]])
    assert not nearest_neighbours(mixed, digits).none, "5 % of copies must show"


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_of_images_and_of_latents(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    data = load_npz(write(tmp_path / "faces.npz", images=images, labels=labels))
    assert (data.name, data.shape, data.num_classes, len(data.images)) == ("faces", (3, 8, 8), 4, 40)
    assert data.images.min() >= -1 and data.images.max() <= 1
    latents = rng.normal(size=(40, 4, 8, 8))
    data = load_npz(write(tmp_path / "latents.npz", latents=latents, labels=labels))
    assert data.shape == (4, 8, 8) and float(data.images.double().sum()) == pytest.approx(latents.sum(), abs=1e-2)


LABELS = np.arange(40) % 4
IMAGES = np.zeros((40, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (dict(images=IMAGES), "labels"),
        (dict(pictures=IMAGES, labels=LABELS), "images"),
        (dict(images=IMAGES, latents=IMAGES, labels=LABELS), "images"),
        (dict(images=IMAGES.astype(float), labels=LABELS), "uint8"),
        (dict(images=IMAGES[0], labels=LABELS), "uint8"),
        (dict(latents=np.full((40, 4, 8, 8), np.nan), labels=LABELS), "finite"),
        (dict(latents=np.zeros((40, 64)), labels=LABELS), "latents"),
        (dict(images=IMAGES, labels=LABELS[1:]), "40 integers"),
        (dict(images=IMAGES, labels=LABELS.astype(float)), "integers"),
        (dict(images=IMAGES, labels=LABELS - 1), "labels"),
        (dict(images=IMAGES, labels=LABELS * 2), "at least 5"),
        (dict(images=np.zeros((40, 8, 6), np.uint8), labels=LABELS), "8x6"),
        (dict(images=np.zeros((40, 7, 7), np.uint8), labels=LABELS), "even"),
        (dict(images=IMAGES, labels=np.where(LABELS == 3, 10**13, LABELS)), r"labels: .* 0\.\.10000000000000 for 40"),
        (dict(images=IMAGES, labels=np.where(LABELS == 3, 4, LABELS)), r"labels: .* counts \[10, 10, 10, 0, 10\]"),
        (dict(images=IMAGES, labels=np.zeros(40, int)), "two classes or more"),
        (dict(images=IMAGES[:0], labels=LABELS[:0]), "images: expected"),
        (dict(latents=np.zeros((40, 0, 8, 8)), labels=LABELS), r"latents: expected .* got float64 \(40, 0, 8, 8\)"),
        (dict(latents=np.full((40, 4, 8, 8), 1e300), labels=LABELS), "finite in float32"),
        (dict(latents=np.zeros((40, 4, 8, 8), complex), labels=LABELS), "latents: expected .* floats, got complex128"),
    ],
)
def test_bad_npz_is_named(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=rf"(?s)bad\.npz.*{match}"):
        load_npz(write(tmp_path / "bad.npz", **arrays))


@pytest.mark.parametrize("dtype", [np.longdouble, np.float16, ">f4"])
def test_latents_of_any_float_are_taken(tmp_path, dtype):
    latents = np.arange(40 * 4 * 8 * 8).reshape(40, 4, 8, 8) % 7
    data = load_npz(write(tmp_path / "x.npz", latents=latents.astype(dtype), labels=LABELS.astype(">u8")))
    assert data.images.dtype == torch.float32 and float(data.images.sum()) == latents.sum()


def test_grey_channels_first_and_adms_keys_are_taken_and_said(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    grey = images[..., 0]
    for arrays, said, shape in (
        (dict(images=images), "", (3, 8, 8)),
        (
            dict(images=np.moveaxis(images, 3, 1)),
            "images: (40, 3, 8, 8) taken as (N, channels, height, width)",
            (3, 8, 8),
        ),
        (dict(images=grey), "images: (40, 8, 8) taken as grey (N, height, width)", (1, 8, 8)),
        (dict(images=grey[:, None]), "images: (40, 1, 8, 8) taken as grey (N, channels, height, width)", (1, 8, 8)),
        (dict(arr_0=images), "arr_0 taken as images", (3, 8, 8)),
        (dict(images=images // 128), "images: warning: no value above 1, taken as nearly black images", (3, 8, 8)),
    ):
        keys = {"arr_1" if "arr_0" in arrays else "labels": LABELS}
        data = load_npz(write(tmp_path / "x.npz", **arrays, **keys))
        out = capsys.readouterr().out
        assert data.shape == shape and (said in out if said else not out)
        if not said or "taken as (N" in said or "arr_0" in said:
            assert data.digest() == load_npz(write(tmp_path / "x.npz", images=images, labels=LABELS)).digest()
            capsys.readouterr()


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(ValueError, match=r"--data .*x\.npy: expected an npz .*got a single array"):
        load_npz(tmp_path / "x.npy")


def test_truncated_and_missing_npz_are_named(tmp_path):
    path = write(tmp_path / "cut.npz", images=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:300])
    for bad in (path, tmp_path / "none.npz"):
        with pytest.raises(ValueError, match=bad.name):
            load_npz(bad)
