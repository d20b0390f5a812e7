"""What the report draws of training and of the experts' load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.images import pictures


def curve(losses: Sequence[float], width: int = 600, height: int = 160) -> dict:
    """Return SVG paths of the losses and of their running mean over 1/30 of the run."""
    y = np.asarray(losses, dtype=np.float64)
    window = max(1, len(y) // 30)
    smooth = np.convolve(np.pad(y, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid")
    low, high = 0.0, float(max(y.max(), 1e-9))

    def path(values: np.ndarray) -> str:
        xs = np.linspace(0, width, len(values))
        ys = height * (1 - (values - low) / (high - low))
        return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))

    return {"raw": path(y), "smooth": path(smooth), "high": high, "last": float(smooth[-1]), "size": (width, height)}


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
