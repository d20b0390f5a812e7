"""From noise to samples: by_time as a model was trained, by_sigma for anything that denoises (denoiser.Denoiser)."""

from reference.samplers.by_sigma import (
    Churn,
    dpmpp_2m,
    euler,
    euler_maruyama,
    geometric_sigmas,
    heun,
    karras_sigmas,
    probability_flow,
    reverse_diffusion,
    unipc,
)
from reference.samplers.by_time import ddim, ddpm, rf_euler, rf_heun

__all__ = [
    "Churn",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_maruyama",
    "geometric_sigmas",
    "heun",
    "karras_sigmas",
    "probability_flow",
    "reverse_diffusion",
    "rf_euler",
    "rf_heun",
    "unipc",
]
