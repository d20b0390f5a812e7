"""Ranges of samples as files: each written in one piece, by any number of processes; a run goes on from them."""

from __future__ import annotations

import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.images import pictures
from bench.instrument.readers import Npz
from bench.instrument.run_settings import FILE, agree

GRID = 64  # images of the sheet, at most
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member, so that equal samples are equal files


class Ranges:
    """A folder of a run: settings.json, ranges/, and in the end samples.npz and grid.png.

    Args: folder: made if need be; settings: whatever the samples depend on, values of JSON, among them count and batch.
    Raises: ValueError naming the settings in which the folder's files differ, what they are and what was asked for.
    """

    def __init__(self, folder: Path, settings: Mapping):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.count, self.size = settings["count"], settings["batch"]
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder}: expected a folder, got a file")
        (folder / "ranges").mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._agree()

    @property
    def result(self) -> Path:
        return self.folder / "samples.npz"

    def missing(self, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """Return (first, count) of the ranges that are not there yet, every world-th from the rank-th on."""
        if self.result.exists():
            return []
        starts = range(0, self.count, self.size)[rank::world]
        return [(first, self._length(first)) for first in starts if not self._path(first).exists()]

    def done(self) -> int:
        """Return how many images are there."""
        if self.result.exists():
            return self.count
        starts = range(0, self.count, self.size)
        return sum(self._length(first) for first in starts if self._path(first).exists())

    def write(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a range: an interruption leaves none of it, or all."""
        spare = self.folder / "ranges" / f"{first}.{os.getpid()}.tmp"
        with spare.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        with self._locked():  # another process of the same command may have joined all ranges meanwhile
            if self.result.exists():
                spare.unlink(missing_ok=True)  # `join` sweeps
            else:
                os.replace(spare, self._path(first))

    def join(self) -> bool:
        """Join all ranges to samples.npz and draw grid.png; False when some are missing. Reads a range at a time.

        Of several processes that call this when theirs are done, the last one finds them all.
        """
        with self._locked():
            if self.done() < self.count:
                return False
            if not self.result.exists():
                self._draw_grid()
                self._write_result()
                for first in range(0, self.count, self.size):
                    self._path(first).unlink()
            for spare in (self.folder / "ranges").glob("*.tmp"):  # of killed processes, or of one too late to matter
                spare.unlink()
        return True

    def _write_result(self) -> None:
        spare = self.folder / "samples.tmp"
        with zipfile.ZipFile(spare, "w") as archive:
            for key in self._read(0):
                with archive.open(zipfile.ZipInfo(f"{key}.npy", EPOCH), "w", force_zip64=True) as member:
                    for first in range(0, self.count, self.size):
                        values = np.ascontiguousarray(self._read(first)[key])
                        if first == 0:
                            header = np.lib.format.header_data_from_array_1_0(values)
                            header["shape"] = (self.count, *values.shape[1:])
                            np.lib.format.write_array_header_1_0(member, header)
                        member.write(values.data)
        os.replace(spare, self.result)

    def _draw_grid(self) -> None:
        found, least = [], min(GRID, self.count)
        for first in range(0, least, self.size):
            found.append(next(iter(self._read(first).values())))
        values = np.concatenate(found)[:least]
        if values.dtype == np.uint8:
            values = np.moveaxis(values, 3, 1) / 127.5 - 1
        sheet = pictures.grid(values, round(least**0.5))
        (self.folder / "grid.png").write_bytes(pictures.png(sheet))

    def _read(self, first: int) -> dict[str, np.ndarray]:
        file = Npz(self._path(first), "--out")
        return {key: file.read(key) for key in file}

    def _path(self, first: int) -> Path:
        return self.folder / "ranges" / f"{first:09d}.npz"

    def _length(self, first: int) -> int:
        return min(self.size, self.count - first)

    def _agree(self) -> None:
        if self.result.exists() and not (self.folder / FILE).exists():
            raise ValueError(f"--out {self.folder}: samples.npz is there without {FILE}, expected neither")
        agree(self.folder, self.settings)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes of the run out; the lock dies with its process."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
