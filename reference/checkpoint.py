"""Checkpoint files: read every container in which DiT-MoE weights are found, write safetensors."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

CONTAINERS = ("ema", "model_ema", "model", "module", "state_dict")  # in the order of preference
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def load_state_dict(path: str | Path, trusted: bool = False) -> dict[str, Tensor]:
    """Read a state dict onto the CPU without executing code from the file.

    Understood: safetensors (by suffix); torch.save of a bare state dict, or of a dict that holds one, not empty, under
    a name of CONTAINERS next to optimizer state and an argparse.Namespace. A prefix of PREFIXES that all keys have is
    stripped, and a warning says so.

    Args:
        path: the file.
        trusted: unpickle without restriction, which runs code that the file may contain.
    Returns:
        parameter name -> tensor, dtypes as stored.
    Raises:
        ValueError: naming the file, when it is truncated, not a checkpoint, or needs trusted=True.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with path.open("rb"):  # a missing or unreadable file is an OSError in every format
        pass
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, trusted)
    except ImportError:
        raise
    except Exception as error:  # truncated files raise anything from EOFError to KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: truncated, no checkpoint, or not readable without trusted=True: {reason}") from error
    if isinstance(content, dict):
        held = (content[key] for key in CONTAINERS if isinstance(content.get(key), dict) and content[key])
        content = next(held, content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: got {_describe(content)}, expected a state dict, bare or under one of {CONTAINERS}")
    return _without_prefixes(content, path)


def _without_prefixes(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stripped = ""
    while found := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), ""):
        stripped += found
        state = {key.removeprefix(found): value for key, value in state.items()}
    if stripped:
        warnings.warn(f"{path}: stripped {stripped!r} off every key", stacklevel=3)
    return dict(state)


def load_checkpoint(model: nn.Module, path: str | Path, trusted: bool = False) -> None:
    """Load a checkpoint file into model, strictly.

    Raises:
        ValueError: as load_state_dict; or naming the missing, unexpected or misshapen keys (another layout or size).
    """
    state = load_state_dict(path, trusted)
    check_layout(model, state, source=str(path))
    model.load_state_dict(state)


def check_layout(model: nn.Module, state: dict[str, Tensor], source: str = "state_dict") -> None:
    """Raise ValueError, naming keys, unless state has exactly the keys and shapes of model's state dict."""
    expected = model.state_dict()
    misshapen = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [f"{k} {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}" for k in misshapen],
    }
    found = [f"{len(keys)} {kind}: {_head(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source}: got another layout than {type(model).__name__} expects; " + "; ".join(found))


def save_safetensors(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors; tensors may live on any device and share storage.

    Raises: OSError naming the file where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    copies = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pickle(path: Path, trusted: bool) -> object:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=not trusted)


def _head(keys: list[str], limit: int = 4) -> str:
    return ", ".join(keys[:limit]) + (f", ... {len(keys) - limit} more" if len(keys) > limit else "")


def _describe(content: object) -> str:
    kind = type(content).__name__
    return f"a {kind} with keys {_head([str(key) for key in content])}" if isinstance(content, dict) else f"a {kind}"
