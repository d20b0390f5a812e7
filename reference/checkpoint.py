"""Checkpoint files: read every container in which DiT-MoE weights are found, write safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

CONTAINERS = ("ema", "model", "module")  # in the order of preference


def load_state_dict(path: str | Path, trusted: bool = False) -> dict[str, Tensor]:
    """Read a state dict onto the CPU without executing code from the file.

    Understood: safetensors (by suffix); torch.save of a bare state dict, or of a dict that holds one as "ema", "model"
    or "module" next to optimizer state and an argparse.Namespace.

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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated, no checkpoint, or not readable without trusted=True: {reason}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: got {_describe(content)}, expected a state dict, bare or under one of {CONTAINERS}")
    return dict(content)


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
    """Write a state dict as safetensors; tensors may live on any device and share storage."""
    from safetensors.torch import save_file

    save_file({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, path, metadata)


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
