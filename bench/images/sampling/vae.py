"""Latents to pixels by a VAE of the library diffusers, from a folder on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.images.sampling.draw import to_uint8

AT_ONCE = 8  # images that the decoder holds: its activations outgrow the model's


class Decoder:
    """AutoencoderKL of a local folder: pixels = decode(latents / scaling_factor + shift_factor), of its config.json.

    Args: folder: as `save_pretrained` writes it; channels: of the latents to come.
    Raises: ValueError naming --vae, without diffusers, or for a folder of something else or of other latents.
    """

    def __init__(self, folder: Path, channels: int, device: str = "cpu"):
        if not (folder / "config.json").is_file():
            raise ValueError(f"--vae {folder}: expected a folder with config.json and the weights of an AutoencoderKL")
        if importlib.util.find_spec("diffusers") is None:
            raise ValueError("--vae: expected the package diffusers: pip install 'dit-moe-kernels[diffusers]'")
        from diffusers import AutoencoderKL

        try:
            self.vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).to(device).eval()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"--vae {folder}: expected a readable AutoencoderKL, got: {reason}") from None
        config = self.vae.config
        if config.latent_channels != channels:
            raise ValueError(
                f"--vae {folder}: decodes latents of {config.latent_channels} channels, but the model's have {channels}"
            )
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0

    @property
    def identity(self) -> str:
        """A hash of the weights and the scaling."""
        weights = b"".join(value.cpu().numpy().tobytes() for value in self.vae.state_dict().values())
        return hashlib.sha256(weights + f"{self.scale} {self.shift}".encode()).hexdigest()[:12]

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> np.ndarray:
        """Decode (n, C, h, w) to (n, height, width, 3) uint8."""
        parts = latents.to(self.vae.dtype).split(AT_ONCE)
        return np.concatenate([to_uint8(self.vae.decode(z / self.scale + self.shift).sample) for z in parts])
