"""What the report draws of training and of the experts' load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.images import pictures


def line(values: Sequence[float], size: tuple[float, float], top: float) -> list[str]:
    """Return points of SVG: values from left to right in a picture (width, height), from 0 at the bottom to `top`."""
    xs = np.linspace(0, size[0], len(values))
    return [f"{x:.1f},{size[1] * (1 - value / top):.1f}" for x, value in zip(xs, values, strict=True)]


def band(
    low: Sequence[float], middle: Sequence[float], high: Sequence[float], size: tuple[float, float], top: float
) -> dict:
    """Return the points of a line, and of what spreads about it, as the pages' polyline and polygon."""
    below, along, above = (line(values, size, top) for values in (low, middle, high))
    return {"line": " ".join(along), "spread": " ".join([*above, *reversed(below)])}


def curve(losses: Sequence[float], size: tuple[int, int] = (600, 160)) -> dict:
    """Return SVG paths of the losses and of their running mean over 1/30 of the run."""
    y = np.asarray(losses, dtype=np.float64)
    window = max(1, len(y) // 30)
    smooth = np.convolve(np.pad(y, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid")
    high = float(max(y.max(), 1e-9))
    raw, mean = ("M" + "L".join(line(values, size, high)) for values in (y, smooth))
    return {"raw": raw, "smooth": mean, "high": high, "last": float(smooth[-1]), "size": size}


def load_maps(counts: np.ndarray) -> list[dict]:
    """Paint, per layer, each expert's load over positions (one small map each) and over timesteps (experts x steps)."""
    experts = counts.shape[-1]
    side = round(counts.shape[2] ** 0.5)
    maps = []
    for layer, count in enumerate(counts.astype(np.float64)):
        position = count.sum(0) * experts / np.maximum(count.sum((0, 2)), 1)[:, None]
        timestep = count.sum(1) * experts / np.maximum(count.sum((1, 2)), 1)[:, None]
        maps.append(
            {
                "layer": layer,
                "position": [
                    pictures.data_uri(pictures.load_map(position[:, e].reshape(side, side))) for e in range(experts)
                ],
                "timestep": pictures.data_uri(pictures.load_map(timestep.T)),
            }
        )
    return maps
