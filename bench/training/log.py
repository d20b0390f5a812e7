"""log.jsonl: a row for each step, and the same curves for TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

CURVES = ("loss", "aux", "grad_norm", "learning_rate", "images_per_s")


class Log:
    """The rows of a run that has taken `step` steps; those of later ones, which it will take again, are dropped."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "log.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step]
        spare = self.path.with_suffix(".tmp")
        spare.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(spare, self.path)
        self._board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: dict) -> None:
        """Write a row at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name in CURVES if self._board else ():
            if row.get(name) is not None:
                self._board.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Let TensorBoard write what it still holds."""
        if self._board:
            self._board.close()


def read(path: Path) -> list[dict]:
    """Return the rows of a log, [] where there is none; a line that a crash has cut off, and what follows, are left."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
