"""Progress bars on a terminal, plain lines elsewhere. A machine without tqdm gets plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any


def say(text: str) -> None:
    """Print one line at once, without tearing a progress bar."""
    tqdm = _tqdm()
    if tqdm is None:
        print(text, flush=True)
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def track(items: Iterable, label: str, total: int | None = None, every_s: float = 10.0) -> Iterator:
    """Yield the items, showing how far the loop is: a bar on a terminal, a line every `every_s` seconds elsewhere."""
    if total is None:
        items = list(items)
        total = len(items)
    if sys.stdout.isatty() and (tqdm := _tqdm()):
        yield from tqdm(items, desc=label, total=total, file=sys.stdout, leave=False)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > every_s:
            said = time.monotonic()
            print(f"  {label}: {done}/{total}", flush=True)
        yield item


class Pace:
    """How fast a long loop is, and how long it will take: a line every `every_s` seconds."""

    def __init__(self, unit: str, total: int, done: int = 0, every_s: float = 10.0):
        self.unit, self.total, self.done, self.every_s = unit, total, done, every_s
        self.start = self.said = time.monotonic()
        self.before = done

    def advance(self, count: int) -> None:
        """Count what was done; say so when it is time, and at the end."""
        self.done += count
        now = time.monotonic()
        if now - self.said < self.every_s and self.done < self.total:
            return
        self.said = now
        rate = (self.done - self.before) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        say(f"  {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left:.0f} s left")
