"""The rows of a long job: kept stage by stage, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from bench.instrument import progress, store

ROOT = store.ROOT


class Ledger:
    """The rows of a run, stage by stage, in a file that no other process writes while this one lives.

    Args:
        settings: what the rows depend on and the user chose. A file with rows of other settings is refused.
        code: what they depend on besides, such as commit and sources. Rows of other code are dropped: they are stale.
        fresh: forget all rows that are there.
    Raises: ValueError for a file that another process works on, and for rows of other settings, naming both values.
    """

    def __init__(self, path: Path, settings: Mapping, code: Mapping | None = None, fresh: bool = False):
        self.path, self.key = path, {**settings, **(code or {})}
        path.parent.mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, os.close, _lock(path))
        try:
            found = [] if fresh else store.recover(path)
        except ValueError as error:
            progress.say(f"starting anew: {error}")
            found = []
        _refuse_other(path, found, settings)
        self.rows = [row for row in found if all(row.get(name) == value for name, value in self.key.items())]
        if len(self.rows) < len(found):
            progress.say(f"{path}: {len(found) - len(self.rows)} rows of another commit or source dropped")
        self._rewrite()

    def complete(self, stage: str) -> list[dict]:
        """Return the stage's rows; [] when it has not finished."""
        rows = [row for row in self.rows if row["stage"] == stage]
        return rows if rows and len(rows) == rows[0]["stage_rows"] else []

    def stage(self, name: str, produce: Callable[[], Iterable[dict]]) -> list[dict]:
        """Return the stage's rows, kept from before or produced now; a stage counts once all its rows are written."""
        rows = self.complete(name)
        if rows:
            return rows
        progress.say(name)
        start = time.monotonic()
        rows = list(produce())
        seconds = round(time.monotonic() - start, 1)
        self.rows = [row for row in self.rows if row["stage"] != name]
        self._rewrite()
        for row in rows:
            row |= {**self.key, "stage": name, "stage_rows": len(rows), "stage_s": seconds}
            store.append(self.path, row)
            self.rows.append(row)
        return rows

    def _rewrite(self) -> None:
        spare = self.path.with_suffix(".tmp")
        spare.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(spare, self.path)


def _lock(path: Path) -> int:
    """Lock rows for this process and return the descriptor that holds the lock; the kernel frees it when we end.

    The lock lies beside the rows, whose file is replaced.
    """
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ValueError(f"{path}: another process is writing it; wait for its end, or choose another --out") from None
    return descriptor


def _refuse_other(path: Path, rows: Sequence[dict], settings: Mapping) -> None:
    for name, value in settings.items():
        others = [row for row in rows if name in row and row[name] != value]
        if others:
            raise ValueError(
                f"{path}: {len(others)} rows there have {name} {others[0][name]!r}, expected {value!r}, as asked for "
                "now; choose another --out, or move the file away"
            )


def source_digest(suffixes: Collection[str] = (".py", ".so")) -> str:
    """Hash the code that rows depend on: the oracle, the product and its sources, the instrument less its report."""
    files = [p for room in ("reference", "csrc", "moe_kernels", "bench") for p in sorted((ROOT / room).rglob("*"))]
    shown = {"report", "page", "pictures", "verified"}
    code = [p for p in files if p.suffix in suffixes and not {p.stem, p.parent.name} & shown]
    return hashlib.sha256(b"".join(p.read_bytes() for p in code)).hexdigest()[:12]
