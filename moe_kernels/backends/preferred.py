"""Which backend "auto" tries first, as data: preferred.json by GPU and shape class. Nothing is timed at run time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from .base import Request

FILE = Path(__file__).with_suffix(".json")


@cache
def table() -> dict[str, dict[str, str]]:
    """Return preferred.json: device name -> `key` -> backend. `python -m bench tune --backends` writes it."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def key(request: Request) -> str:
    """Return the name of a shape class: moe_mlp-bfloat16-E8-H384-I1536. What a room does not know of is 0."""
    dtype = str(request.dtype).removeprefix("torch.")
    return f"{request.room}-{dtype}-E{request.num_experts}-H{request.hidden_size}-I{request.intermediate_size}"


def preferred(request: Request) -> str | None:
    """Return the backend that was faster for such cases on this machine's GPUs; None where nothing is known."""
    return table().get(_gpu(), {}).get(key(request)) if request.device == "cuda" else None


@cache
def _gpu() -> str:
    """Return the name of the GPUs; "" where there is none, or where they differ: no request says which is meant."""
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return names.pop() if len(names) == 1 else ""
