"""Which backends there are, which of them run here, and which one "auto" means for a request."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .base import Backend, Request
from .preferred import preferred

ENVIRONMENT = "MOE_KERNELS_BACKEND"
CLASSES = {  # in the order of "auto": native takes the CPU, triton and cuda NVIDIA GPUs
    "native": "NativeBackend",
    "triton": "TritonBackend",
    "cuda": "CudaBackend",
    "grouped": "GroupedBackend",
    "eager": "EagerBackend",
}
OWN_KERNELS = ("native", "triton", "cuda")
SELECTS = ("TokenChoice", "ExpertChoice", "GroupLimitedChoice", "ExpertRace", "DiffMoE", "ProMoE")


class BackendInfo(NamedTuple):
    """One line of `backends()`: `reason` says why it is not available, `verified` on what hardware it was checked,
    `selects` which routers select with kernels of it; without them selection is plain torch on its device."""

    name: str
    available: bool
    reason: str
    verified: tuple[str, ...]
    selects: tuple[str, ...] = ()


def backends() -> tuple[BackendInfo, ...]:
    """Return what is known about every backend, in the order in which "auto" tries them."""
    verified = json.loads(Path(__file__).parent.with_name("verified.json").read_text())
    return tuple(
        BackendInfo(name, not reason, reason, tuple(verified.get(name, ())), SELECTS if name in OWN_KERNELS else ())
        for name, reason in ((name, _load(name)[1]) for name in CLASSES)
    )


def check_name(name: object) -> None:
    """Check that `name` is "auto" or a backend that is available here.

    Raises: ValueError for an unknown name, RuntimeError with the reason for a backend that cannot run here.
    """
    if name != "auto":
        get(name)


def get(name: object) -> Backend:
    """Return the backend of that name. Raises: see `check_name`."""
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, ('auto', *CLASSES)))}")
    backend, reason = _load(name)
    if backend is None or reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return backend


def choose(name: str, request: Request) -> Backend:
    """Return the backend that computes `request` under `name`.

    "auto" is the one that was measured to be faster for such cases on this GPU (preferred.json) if it is available and
    supports the request, else the first in the order of CLASSES that is and does.
    The environment variable MOE_KERNELS_BACKEND, where set, says what "auto" means.
    Raises: as `get`; RuntimeError with the reason where the named backend does not support the request.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT, "auto")
        if name not in ("auto", *CLASSES):
            raise ValueError(f"{ENVIRONMENT}: got {name!r}, expected one of {', '.join(map(repr, ('auto', *CLASSES)))}")
    return _choose(name, request)


@cache
def _choose(name: str, request: Request) -> Backend:
    if name != "auto":
        backend = get(name)
        reason = backend.supports(request)
        if reason:
            raise RuntimeError(f"backend {name!r} does not support this call ({request.room}): {reason}")
        return backend
    reasons, first = [], preferred(request)
    for candidate in sorted(CLASSES, key=lambda candidate: candidate != first):
        backend, reason = _load(candidate)
        reason = reason or backend.supports(request)
        if not reason:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"no backend supports this call ({request.room}): {'; '.join(reasons)}")


@cache
def _load(name: str) -> tuple[Backend | None, str]:
    try:
        backend = getattr(importlib.import_module(f"{__package__}.{name}"), CLASSES[name])()
    except ImportError as error:
        return None, f"{error}"
    return backend, backend.why_not()
