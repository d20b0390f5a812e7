"""npz files that anybody wrote: headers checked before data are read, every fault one line that names file and key."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

LOSSY = {".jpg", ".jpeg", ".webp"}
NPY_MAGIC = b"\x93NUMPY"
CHANNELS = (1, 3)  # of an image that needs no further word


class Header(NamedTuple):
    """What stands before an array's data."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}" + " in Fortran order" * self.fortran


class Npz:
    """The arrays of an npz by key; the members may be called `key.npy`, or `key` as tools other than numpy leave them.

    Args: path: the file; argument: what the user calls it; expected: what should have come, for errors.
    Raises: ValueError naming argument, file and key, what came and what was expected; so does every method.
    """

    def __init__(self, path: str | Path, argument: str = "", expected: str = "an npz"):
        self.path, self.where = Path(path), f"{argument} {path}".strip()
        if came := _no_npz(self.path):
            raise ValueError(f"{self.where}: expected {expected}, got {came}")
        with _faults(self.where), zipfile.ZipFile(self.path) as archive:
            names = sorted(archive.namelist(), key=lambda name: name.endswith(".npy"))
        self._members = {name.removesuffix(".npy"): name for name in names}

    @property
    def keys(self) -> set[str]:
        return set(self._members)

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in the file's order."""
        return iter(self._members)

    def header(self, key: str) -> Header:
        """Return an array's header, once the data that it promises are there."""
        with self._open(key) as (_, header):
            return header

    def read(self, key: str) -> np.ndarray:
        """Return a whole array."""
        with self._open(key) as (member, _), _faults(f"{self.where}: {key}"):
            member.seek(0)
            array = np.lib.format.read_array(member, allow_pickle=False)
            _checksum(member)
            return array

    def batches(self, key: str, size: int) -> Iterator[np.ndarray]:
        """Yield the rows of an array in C order, at most `size` at a time."""
        with self._open(key) as (member, header):
            for first in range(0, header.shape[0], size):
                shape = (min(size, header.shape[0] - first), *header.shape[1:])
                with _faults(f"{self.where}: {key}"):
                    data = _exactly(member, _nbytes(header._replace(shape=shape)))
                    if first + size >= header.shape[0]:
                        _checksum(member)
                yield np.frombuffer(data, header.dtype).reshape(shape)

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[zipfile.ZipExtFile, Header]]:
        with zipfile.ZipFile(self.path) as archive:
            with _faults(f"{self.where}: {key}"):
                member = archive.open(self._members[key])
                header = _header(member)
                held = archive.getinfo(self._members[key]).file_size - member.tell()
                if held != _nbytes(header):
                    raise ValueError(f"a header of {header}, {_nbytes(header)} bytes, before {held}")
            with member:
                yield member, header


def image_axes(shape: tuple[int, ...]) -> str:
    """Tell the axes of images by their shape: NHW, NHWC or NCHW; "" for none of them, or where two would do."""
    if len(shape) == 3:
        return "" if shape[2] in CHANNELS else "NHW"
    if len(shape) != 4 or (shape[1] in CHANNELS) == (shape[3] in CHANNELS):
        return ""
    return "NHWC" if shape[3] in CHANNELS else "NCHW"


def channels_last(images: np.ndarray, axes: str) -> np.ndarray:
    """Return images of any `image_axes` as (N, height, width, C)."""
    return images[..., None] if axes == "NHW" else np.moveaxis(images, axes.index("C"), 3)


def axes_taken(shape: tuple[int, ...], axes: str) -> str:
    """Say what images of other axes than (N, height, width, 3) were taken for; "" for those."""
    names = {"N": "N", "H": "height", "W": "width", "C": "channels"}
    grey = axes == "NHW" or shape[axes.index("C")] == 1
    if axes == "NHWC" and not grey:
        return ""
    return f"{shape} taken as {'grey ' * grey}({', '.join(names[axis] for axis in axes)})"


def _no_npz(path: Path) -> str:
    """Say what a path is that is no npz, "" for one that looks like one."""
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() in LOSSY:
        return "a lossy image, and distances move with JPEG's losses: pack uint8 arrays"
    if not path.exists():
        return "nothing: there is no such file"
    with path.open("rb") as file:
        if file.read(len(NPY_MAGIC)) == NPY_MAGIC:
            return "a single array (.npy), which is no npz: np.savez(file, key=array) makes one"
    return "" if zipfile.is_zipfile(path) else "a file that is no npz"


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turn whatever zipfile, zlib and numpy raise at a broken file into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{where}: expected a readable array, got: {reason}") from None


def _header(member: zipfile.ZipExtFile) -> Header:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy format {version}")
    header = Header(*read[version](member))
    if header.dtype.hasobject:
        raise ValueError(f"{header}: Object arrays run code when they are read")
    if min(header.shape, default=0) < 0:
        raise ValueError(f"a header of {header}")
    return header


def _nbytes(header: Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize


def _exactly(member: zipfile.ZipExtFile, count: int) -> bytes:
    data = member.read(count)
    if len(data) < count:
        raise ValueError(f"{count - len(data)} bytes less than the header promises: the file ends before")
    return data


def _checksum(member: zipfile.ZipExtFile) -> None:
    """Read on to the end, which is where zipfile compares the checksum."""
    member.read(1)
