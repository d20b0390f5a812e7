"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator


def say(text: str) -> None:
    """Print one line at once, without tearing a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def track(items: Iterable, label: str, total: int | None = None, every_s: float = 10.0) -> Iterator:
    """Yield the items, showing how far the loop is: a bar on a terminal, a line every `every_s` seconds elsewhere."""
    if total is None:
        items = list(items)
        total = len(items)
    if sys.stdout.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, file=sys.stdout, leave=False)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > every_s:
            said = time.monotonic()
            print(f"  {label}: {done}/{total}", flush=True)
        yield item
