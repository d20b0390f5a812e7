"""The rows of a long job: kept stage by stage, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from bench.instrument import progress, store

ROOT = store.ROOT


class Ledger:
    """The rows of a run, stage by stage. Rows of another source, model, data or size are dropped at the start."""

    def __init__(self, path: Path, key: dict):
        self.path, self.key = path, key
        try:
            found = store.recover(path)
        except ValueError as error:
            progress.say(f"starting anew: {error}")
            found = []
        self.rows = [row for row in found if all(row.get(name) == value for name, value in key.items())]
        if len(self.rows) < len(found):
            progress.say(f"{path}: {len(found) - len(self.rows)} rows of another source, model or size dropped")
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        spare = self.path.with_suffix(".tmp")
        spare.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(spare, self.path)


def source_digest(suffixes: Collection[str] = (".py", ".so")) -> str:
    """Hash the code that rows depend on: the oracle, the product and its sources, the instrument less its report."""
    files = [p for room in ("reference", "csrc", "moe_kernels", "bench") for p in sorted((ROOT / room).rglob("*"))]
    shown = {"report", "page", "pictures", "verified"}
    code = [p for p in files if p.suffix in suffixes and not {p.stem, p.parent.name} & shown]
    return hashlib.sha256(b"".join(p.read_bytes() for p in code)).hexdigest()[:12]
