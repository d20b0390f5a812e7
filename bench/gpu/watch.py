"""Who is at work on the GPU, known even after a kernel that never ends: such a process can only be ended from outside.

Before every call a file says whose it is. Without the next one in time faulthandler, whose thread needs no lock of
Python's, writes where the process stands and ends it. What the file says then is what the next run finds.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Watch:
    """Files of a folder: begun.json, and stacks.log of processes that were ended."""

    def __init__(self, folder: Path):
        self.begun, self.stacks = folder / "begun.json", folder / "stacks.log"

    def left_behind(self) -> dict | None:
        """Return what was begun and neither ended nor raised, and forget it."""
        if not self.begun.exists():
            return None
        found = json.loads(self.begun.read_text())
        self.begun.unlink()
        return found

    @contextmanager
    def over(self) -> Iterator[None]:
        """Watch a piece of work: whatever raises, Ctrl-C too, is no hang."""
        with self.stacks.open("a") as self._log:
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                self.begun.unlink(missing_ok=True)

    def begin(self, patience_s: float, **what: str) -> None:
        """Note what begins, and end the process unless the next comes within that time."""
        self.begun.write_text(json.dumps(what))
        faulthandler.dump_traceback_later(patience_s, exit=True, file=self._log)
