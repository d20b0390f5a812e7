"""Pixels: PNG files made of numpy arrays, and data URIs of them that open offline."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """Encode (height, width, 1 | 3 | 4) uint8 as a lossless PNG: grey, RGB or RGBA."""
    height, width, channels = pixels.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * channels)], axis=1)

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay images (N, C, height, width) with values in [-1, 1] out in rows of `columns`, one transparent pixel apart.

    One channel is shown as ink on paper (1 is black), three as RGB; of latents the first three, each scaled to its own
    range. Returns: RGBA (height, width, 4) uint8.
    """
    images = np.asarray(images, dtype=np.float64)
    N, C, height, width = images.shape
    if C > 3:
        images = images[:, :3]
        low, high = (f(images, axis=(0, 2, 3), keepdims=True) for f in (np.min, np.max))
        images = 2 * (images - low) / (high - low + 1e-12) - 1
    values = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    values = np.repeat(255 - values, 3, axis=1) if C == 1 else values[:, [0, 1, min(C, 3) - 1]]
    sheet = np.zeros((-(-N // columns) * (height + 1) - 1, columns * (width + 1) - 1, 4), np.uint8)
    for i, image in enumerate(values):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = np.dstack([*image, np.full_like(image[0], 255)])
    return sheet


def load_map(share: np.ndarray) -> np.ndarray:
    """Paint relative loads (height, width), 1 being fair: blue below, orange above, clear at 1, full at 0 and 2.

    Returns: RGBA uint8 that reads on a light and on a dark page alike.
    """
    strength = np.clip(np.abs(share - 1), 0, 1)
    colour = np.where((share > 1)[..., None], (226, 122, 20), (38, 108, 214))
    return np.dstack([colour, 255 * strength]).astype(np.uint8)
