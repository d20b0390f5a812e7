"""npz files of samples in ADM's format, read batch by batch: 50,000 images of 256 x 256 are 10 GB."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXPECTED = "an npz with arr_0, uint8 (N, height, width, 3)"
LOSSY = {".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Samples:
    """Images in `arr_0` of an npz; labels are those of `arr_1`, where ADM's conditional samplers put them."""

    path: Path
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    @property
    def count(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield the images in order, (n, height, width, 3) uint8, n <= size."""
        height, width = self.shape[1:3]
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _header(member)
            for first in range(0, self.count, size):
                n = min(size, self.count - first)
                data = member.read(n * height * width * 3)
                if len(data) < n * height * width * 3:
                    raise ValueError(f"{self.path}: arr_0: expected {self.count} images, the file ends before")
                yield np.frombuffer(data, np.uint8).reshape(n, height, width, 3)


def open_samples(path: Path, argument: str) -> Samples:
    """Check a file of samples by its header.

    Args: path: the npz; argument: named in errors, as the user knows it.
    Raises: ValueError naming the argument, the file, what came and what was expected.
    """
    keys = npz_keys(path, argument)
    if "arr_0" not in keys:
        raise ValueError(f"{argument} {path}: expected {EXPECTED}, got the keys {sorted(keys)}")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        try:
            shape, fortran, dtype = _header(member)
        except ValueError as error:
            raise ValueError(f"{argument} {path}: arr_0: expected a numpy array, got: {error}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not all(shape):
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"{argument} {path}: expected {EXPECTED}, got {dtype} {shape}{order}")
    labels = None
    if "arr_1" in keys:
        with np.load(path, allow_pickle=False) as file:
            labels = file["arr_1"]
    return Samples(path, shape, labels)


def npz_keys(path: Path, argument: str) -> set[str]:
    """Return the names of the arrays in an npz; whatever else the path is, is named in the error."""
    if path.suffix.lower() in LOSSY or path.is_dir():
        kind = "a folder" if path.is_dir() else "a lossy image"
        raise ValueError(
            f"{argument} {path}: expected {EXPECTED}, got {kind}; distances move with JPEG's losses: pack uint8 arrays"
        )
    if not path.exists():
        raise ValueError(f"{argument} {path}: expected {EXPECTED}, there is no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{argument} {path}: expected {EXPECTED}, got a file that is no npz")
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _header(member: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy format {version}")
    return read[version](member)
