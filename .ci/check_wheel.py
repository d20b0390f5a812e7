"""Check the installed distribution: a layer, forward and backward, on `native`. Needs no other file of the repository.

As in the tests, an error may be twice that of `eager` in the same dtype, measured from `eager` in float64.
"""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import moe_kernels
from moe_kernels import _C, MoELayer


def results(layer: MoELayer, x: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output of a copy of the layer, and all gradients."""
    layer, x = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
    layer.backend = backend
    y = layer(x)
    y.backward(x.detach().flip(-1))
    return {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in layer.named_parameters()}


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def check(dtype: torch.dtype) -> None:
    layer = MoELayer(96, 192, num_experts=8, top_k=2, shared_intermediate_size=96, dtype=dtype)
    x = torch.randn(2, 64, 96, dtype=dtype)
    exact = results(layer, x, "eager", torch.float64)
    ours, theirs = results(layer, x, "native", dtype), results(layer, x, "eager", dtype)
    for name in exact:
        e_ours, e_eager = error(ours[name], exact[name]), error(theirs[name], exact[name])
        if not e_ours <= 2 * e_eager:  # NaN, too
            raise SystemExit(
                f"{name}, {dtype}: error {e_ours:.3g}, expected at most twice that of eager, {e_eager:.3g}"
            )


def main() -> None:
    version = metadata.version("dit-moe-kernels")
    if version != moe_kernels.__version__:
        raise SystemExit(f"dit-moe-kernels: version {version}, expected {moe_kernels.__version__}, as the package says")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        check(dtype)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = sorted(file for file in mapped if "omp" in Path(file).name)
    if len(runtimes) > 1:  # two pools of threads fight for the same cores
        raise SystemExit(f"OpenMP: got {', '.join(runtimes)}, expected the one that torch brings")
    where = Path(moe_kernels.__file__).parent
    print(f"dit-moe-kernels {version} in {where}, torch {torch.__version__}: native is right with {_C.isa_level()}")


if __name__ == "__main__":
    main()
