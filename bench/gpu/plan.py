"""What is measured on a GPU, most important first: the time may run out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bench.instrument.cases import BY_SCORES, ROOMS, Case
from bench.instrument.shapes import MODEL_SHAPES, MoEShape

ROUTING = "position_skewed"  # what DiT-MoE learns
S, B, XL, G = "S/2-8E2A", "B/2-8E2A", "XL/2-8E2A", "G/2-8E2A"
# 2.1 billion parameters. All 28 blocks with AdamW leave no memory of 80 GB for activations and a graph's gradients.
XL_HALF = replace(MODEL_SHAPES[XL], name="XL/2-8E2A, 14 blocks", model="XL2x14", depth=14)


@dataclass(frozen=True)
class Size:
    """How much of everything.

    layers: (shape, tokens) of the layer. rooms: of the rooms. models: (shape, tokens of a call) of whole steps.
    side: of the matrices of the GEMM ceiling. compiled: (shape, tokens) that torch.compile's contenders get, in bf16.
    tests: files, the rooms first, run with -k for each backend: on the GPU, or Triton's interpreted on a CPU.
    """

    layers: tuple[tuple[str, int], ...]
    rooms: tuple[tuple[str, int], ...]
    models: dict[str, tuple[tuple[str | MoEShape, int], ...]]
    dtypes: tuple[str, ...]
    side: int
    rounds: int
    seconds: float
    tests: tuple[str, ...]
    compiled: tuple[tuple[str, int], ...] = ()
    profiled: tuple[tuple[str, int], ...] = ()


TEST_ENVIRONMENT = {"cuda": {"MOE_TEST_DEVICE": "cuda"}, "cpu": {"TRITON_INTERPRET": "1"}}
TESTS = (
    *("gpu_backends", "dispatch", "gating", "combine", "experts", "moe_mlp", "adaln", "layer", "determinism"),
    *("triton", "replace_moe", "routing_properties", "errors", "compile", "packing"),
)
EARLY_TESTS = ("gpu_backends", "moe_mlp", "adaln", "layer", "determinism")  # once more with MOE_KERNELS_PDL=1
SIZES = {
    "tiny": Size(
        layers=(("digits", 64),),
        rooms=(("digits", 64),),
        models={"sampling_step": (("digits", 32),), "train_step": (("digits", 32),)},
        dtypes=("bf16", "fp32"),
        side=256,
        rounds=3,
        seconds=0.1,
        tests=("dispatch",),
        profiled=(("digits", 64),),
    ),
    "default": Size(
        layers=tuple(product((S, XL, B, G), (8192, 65536))),
        rooms=((S, 8192), (XL, 8192)),
        models={
            "sampling_step": ((S, 16384), (XL, 16384), (S, 512), (XL, 512)),
            "train_step": ((S, 16384), (XL_HALF, 4096)),
        },
        dtypes=("bf16", "fp16", "tf32", "fp32"),
        side=8192,
        rounds=9,
        seconds=2.0,
        tests=TESTS,
        compiled=((S, 8192), (XL, 8192)),
        profiled=((XL, 8192), (S, 8192)),
    ),
}


def layers_and_rooms(size: Size, device: str) -> tuple[list[Case], list[Case]]:
    """Return the cases of the stage "bench": layers and rooms in the first dtype, layers in the others."""
    first, *rest = size.dtypes
    return [*_layers(size, device, [first]), *_rooms(size, device, first)], list(_layers(size, device, rest))


def _layers(size: Size, device: str, dtypes: Sequence[str]) -> Iterator[Case]:
    for dtype, (name, T), mode in product(dtypes, size.layers, ("fwd", "fwdbwd")):
        yield _case("layer", name, T, dtype, mode, device)


def _rooms(size: Size, device: str, dtype: str) -> Iterator[Case]:
    for (name, T), room, mode in product(size.rooms, ROOMS, ("fwd", "bwd")):
        if room != "dispatch":
            yield _case(room, name, T, dtype, mode, device)
        elif mode == "fwd":  # integers: no gradient, no dtype
            case = _case(room, name, T, "fp32", mode, device)
            yield from (case, *(replace(case, routing=rule) for rule in BY_SCORES))


def compiled(size: Size, device: str) -> list[Case]:
    """Return the cases that are worth a minute of torch.compile."""
    return [_case("layer", *setting, "bf16", mode, device) for setting in size.compiled for mode in ("fwd", "fwdbwd")]


def whole_models(size: Size, device: str) -> list[Case]:
    """Return the cases of the stage "e2e", sampling and training in turn."""
    modes = {"sampling_step": "fwd", "train_step": "fwdbwd"}
    longest = max(map(len, size.models.values()))
    settings = [(level, s[i]) for i in range(longest) for level, s in size.models.items() if i < len(s)]
    cases = [_case(level, *setting, "bf16", modes[level], device) for level, setting in settings]
    return [replace(case, routing="gate") for case in cases]


def profiled(size: Size, device: str) -> list[Case]:
    """Return the cases of the stage "profile"."""
    return [_case("layer", *setting, "bf16", "fwdbwd", device) for setting in size.profiled]


def _case(level: str, shape: str | MoEShape, T: int, dtype: str, mode: str, device: str) -> Case:
    shape = MODEL_SHAPES[shape] if isinstance(shape, str) else shape
    return Case(level, "any", shape, ROUTING, T, dtype, mode, device=device)
