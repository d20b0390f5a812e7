"""What the backends for GPUs ask torch about the devices of this machine."""

from __future__ import annotations

from functools import cache

import torch


@cache
def unfit_devices(least: tuple[int, int]) -> str | None:
    """Say why no device here is an NVIDIA GPU of compute capability `least` or more, None where one is.

    Asked where a tensor is on a GPU already: to look at a device makes CUDA ready, after which a process must not fork.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__}, expected one for CUDA"
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if any(capability >= least for capability in found):
        return None
    return f"compute capability {', '.join(map(_dotted, found)) or 'of no device'}, expected at least {_dotted(least)}"


def tf32_allowed() -> bool:
    """Say whether products of float32 on a GPU may run in TF32.

    Whichever of torch's switches said so: reading the older `allow_tf32` raises where a newer one was set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
