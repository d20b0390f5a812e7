"""What is measured on a GPU once and then read as data by moe_kernels: JSON files by device name and key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.gpu.command import Budget
from bench.instrument.progress import say

GAIN = 1.02  # something else replaces the default where the whole interval of the ratio lies above this


def known_keys(path: Path) -> tuple[str, set[str]]:
    """Return the name of this machine's GPU and the keys that a file has for it; ValueError where there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("device: got a machine without CUDA, expected a GPU: what is fastest is measured on it")
    device = torch.cuda.get_device_name()
    return device, set(json.loads(path.read_text()).get(device, ())) if path.exists() else set()


def save(path: Path, device: str, key: str, found: Any) -> None:
    """Add an entry to a file, one line per key."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(device, {})[key] = found
    blocks = []
    for name, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entries.items()))
        blocks.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def within(minutes: float, works: Mapping[str, Callable[[], object]]) -> None:
    """Do pieces of work by name until the time is spent; say what was dropped."""
    budget, names = Budget(60 * minutes), list(works)
    for at, name in enumerate(names):
        say(name)
        if not budget.spend(works[name]):
            say(f"out of time, dropped {', '.join(names[at:])}")
            return
