"""The one case list of tests, benchmarks and reports: level x backend x shape x routing x dtype x mode x threads.

experts-native-S2-uniform-T4096_H384_I1536_Is768_E8_K2-bf16-fwd-t1 on one thread of a CPU; -cuda at the end on a GPU
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.instrument.shapes import MODEL_SHAPES, ROUTING_PRESETS, MoEShape, recorded_routing
from bench.instrument.store import keyword_filter

ROOMS = ("gating", "dispatch", "experts", "combine")
LEVELS = {"op": ROOMS, "layer": ("layer",), "block": ("block",), "step": ("train_step", "sampling_step")}
BACKENDS = ("native", "triton", "cuda", "grouped", "eager")
# Kernels of our own and their device: interpreted or on fibers, those for GPUs run on a CPU in tests, not for speed.
ONLY_ON = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}
DEVICES = ("cpu", "cuda")
PEERS = ("sorted_loop", "authors_tp1", "authors_tp2")  # their path: inference for fwd, training for bwd and fwdbwd
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "tf32": torch.float32,  # on a GPU: products of float32 in TF32 (bench/instrument/workloads.py, arithmetic)
}
MODES = ("fwd", "bwd", "fwdbwd")
PRESETS = tuple(name for name in ROUTING_PRESETS if name != "real")
EXPERT_CHOICE = "expert_choice"  # routing of "dispatch" alone: experts take tokens, image by image
RACE, GROUP_LIMITED = "race", "group_limited"  # likewise: all scores race; tokens take experts of their best groups
BY_SCORES = (EXPERT_CHOICE, RACE, GROUP_LIMITED)  # what "dispatch" does here begins with a pass over (T, E) scores
OWN = "own"  # routing of a family's model: its router is a part of what is timed (bench/peers/families.py)
LOGIT_MARGIN = 1e-3
_ID = re.compile(
    r"(?P<level>\w+)-(?P<backend>\w+)-(?P<model>\w+)-(?P<routing>\w+)-T(?P<T>\d+)_(?P<sizes>\w+)"
    r"-(?P<dtype>\w+)-(?P<mode>\w+)-(?:t(?P<threads>\d+)|(?P<device>cuda))"
)


@dataclass(frozen=True)
class Case:
    """One thing to time. T counts tokens of one call; `routing` is a preset, or "gate" where the model's own gate
    routes, or one of BY_SCORES where "dispatch" picks scores, or "own" for a layer or block of another family's model,
    its router included.

    level: a room, "layer" (dispatch + fused layer on given picks), "block" (adaLN, attention, gate, layer),
        "train_step" (rectified-flow loss, backward, AdamW) or "sampling_step" (velocity with guidance, both halves in
        the batch).
    """

    level: str
    backend: str
    shape: MoEShape
    routing: str
    T: int
    dtype: str
    mode: str
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        return self.id

    @property
    def id(self) -> str:
        what = f"{self.level}-{self.backend}-{self.shape.model}-{self.routing}-T{self.T}_{self.shape}"
        return f"{what}-{self.dtype}-{self.mode}-{f't{self.threads}' if self.device == 'cpu' else self.device}"

    @classmethod
    def from_id(cls, text: str) -> Case:
        """Return the case of an id, its shape among MODEL_SHAPES; ValueError names what does not fit."""
        match = _ID.fullmatch(text)
        if match is None:
            raise ValueError(
                f"case id: got {text!r}, expected level-backend-model-routing-T.._H.._I..-dtype-mode-t.. (or -cuda)"
            )
        fields = match.groupdict()
        for name, allowed in (("dtype", DTYPES), ("mode", MODES), ("level", sum(LEVELS.values(), ()))):
            if fields[name] not in allowed:
                raise ValueError(f"case id {text!r}: got {name} {fields[name]!r}, expected one of {', '.join(allowed)}")
        sizes, model = fields.pop("sizes"), fields.pop("model")
        shapes = [s for s in MODEL_SHAPES.values() if (s.model, str(s)) == (model, sizes)]
        if not shapes:
            raise ValueError(f"case id {text!r}: got shape {model} {sizes}, expected one of {', '.join(MODEL_SHAPES)}")
        fields |= {"T": int(fields["T"]), "threads": int(fields["threads"] or 1), "device": fields["device"] or "cpu"}
        return cls(shape=shapes[0], **fields)

    @property
    def rows(self) -> int:
        return self.T * self.shape.K

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        """Multiply-adds times two. Backward counts twice the forward: one product for each of the two operands."""
        return {"fwd": 1, "bwd": 2, "fwdbwd": 3}[self.mode] * self._forward_flops(self.level)

    def _forward_flops(self, level: str) -> int:
        s, T, R = self.shape, self.T, self.rows
        matrices = 3 if s.activation == "swiglu" else 2
        if level == "gating":
            return 2 * T * s.H * s.E
        if level == "dispatch":
            return 0
        if level == "experts":
            return 2 * matrices * R * s.H * s.I
        if level == "combine":
            return 2 * R * s.H
        if level == "layer":
            return self._forward_flops("experts") + self._forward_flops("combine") + 2 * matrices * T * s.H * s.Is
        if level == "block":
            attention = 8 * T * s.H**2 + 4 * T * s.tokens_per_image * s.H
            modulation = 12 * T // s.tokens_per_image * s.H**2
            return self._forward_flops("layer") + self._forward_flops("gating") + attention + modulation
        return s.depth * self._forward_flops("block")  # embeddings and the last layer are below 1 %

    @property
    def bytes(self) -> int:
        """Compulsory traffic: forward reads inputs and writes outputs once; backward reads inputs and output
        gradients and writes input gradients. Intermediates and saved activations are not in it."""
        inputs, outputs = self._io_bytes(self.level)
        return {"fwd": inputs + outputs, "bwd": 2 * inputs + outputs, "fwdbwd": 3 * inputs + 2 * outputs}[self.mode]

    def _io_bytes(self, level: str) -> tuple[int, int]:
        s, T, R, size = self.shape, self.T, self.rows, self.torch_dtype.itemsize
        tokens, picks = size * T * s.H, 8 * R
        matrices = 3 if s.activation == "swiglu" else 2
        weights = size * matrices * s.E * s.H * s.I
        if level == "gating":
            return tokens + size * s.E * s.H, 4 * T * s.E + picks
        if level == "dispatch":
            return 4 * T * s.E if self.routing in BY_SCORES else picks, 4 * (4 * R + T + 2 * s.E + 2)
        if level == "experts":
            return tokens + weights, size * R * s.H
        if level == "combine":
            return size * R * s.H + picks + tokens, tokens
        layer = tokens + picks + weights + size * matrices * s.H * s.Is
        if level == "layer":
            return layer, tokens
        block = layer + size * (10 * s.H**2 + s.E * s.H)
        return (block, tokens) if level == "block" else (s.depth * block, s.depth * tokens)


def backends_on(device: str) -> tuple[str, ...]:
    """Return the backends whose speed on a device, "cpu" or "cuda", means something."""
    return tuple(name for name in BACKENDS if ONLY_ON.get(name, device) == device)


def kernels_on(device: str) -> tuple[str, ...]:
    """Return the backends with kernels of our own for a device."""
    return tuple(name for name, where in ONLY_ON.items() if where == device)


def make_inputs(case: Case, seed: int = 0, dtype: torch.dtype | None = None) -> SimpleNamespace:
    """Draw everything a layer case needs, never zeros: on the CPU, whatever the device of the case.

    Args:
        case: gives shape, T, device and routing preset ("gate", BY_SCORES: the scores of a softmax gate on x).
        seed: same seed, same numbers, in every dtype up to rounding.
        dtype: of x and the weights; the case's own by default.
    Returns:
        x (T, H), gate_weight (E, H), gate_up_proj (E, 2I, H), down_proj (E, H, I), shared_gate_up_proj (2Is, H) and
        shared_down_proj (H, Is) or None, topk_ids (T, K) int32, topk_weights (T, K) float32 (float64 for float64), and
        likewise affinities (T, E) for BY_SCORES, else None.
        Tokens whose router logits nearly tie are replaced, so that every precision picks the same experts.
    Raises: ValueError for an unknown routing preset, or one of BY_SCORES where "dispatch" is not what is timed.
    """
    dtype = dtype or case.torch_dtype
    if case.device == "cpu":
        return _inputs(case, seed, dtype)
    drawn = vars(_drawn_for_gpu(replace(case, backend="", mode="fwd"), seed))
    wide = torch.promote_types(dtype, torch.float32)
    own = {"topk_ids": torch.int32, "topk_weights": wide, "affinities": wide}
    return SimpleNamespace(
        **{name: None if t is None else t.to(case.device, own.get(name, dtype), copy=True) for name, t in drawn.items()}
    )


@lru_cache(maxsize=1)
def _drawn_for_gpu(case: Case, seed: int) -> SimpleNamespace:
    """Keep the numbers for the next contender: drawing them takes a CPU longer than a GPU needs for the race."""
    return _inputs(case, seed, case.torch_dtype)


def _inputs(case: Case, seed: int, dtype: torch.dtype) -> SimpleNamespace:
    s, T = case.shape, case.T
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(case.torch_dtype).to(dtype)

    def weight(*shape: int) -> Tensor:
        return draw(*shape, scale=shape[-1] ** -0.5)

    parts = 2 if s.activation == "swiglu" else 1
    x, gate_weight = draw(T, s.H, scale=1.0), weight(s.E, s.H)
    x = _without_near_ties(x, gate_weight)
    probs = None
    if case.routing == "gate" or (case.routing in BY_SCORES and case.level == "dispatch"):
        probs = (x.double() @ gate_weight.double().T).softmax(-1)
        topk_weights, topk_ids = probs.topk(s.K)
    elif case.routing in ROUTING_PRESETS:
        topk_ids, topk_weights = ROUTING_PRESETS[case.routing](T, s.E, s.K, generator)
    else:
        expected = f"'gate', {', '.join(BY_SCORES)} (dispatch only) or one of {', '.join(ROUTING_PRESETS)}"
        raise ValueError(f"routing: got {case.routing!r}, expected {expected}")
    wide = torch.promote_types(dtype, torch.float32)
    return SimpleNamespace(
        x=x,
        gate_weight=gate_weight,
        gate_up_proj=weight(s.E, parts * s.I, s.H),
        down_proj=weight(s.E, s.H, s.I),
        shared_gate_up_proj=weight(parts * s.Is, s.H) if s.Is else None,
        shared_down_proj=weight(s.H, s.Is) if s.Is else None,
        topk_ids=topk_ids.int(),
        topk_weights=topk_weights.to(wide),
        affinities=probs.to(wide) if case.routing in BY_SCORES else None,
    )


def _without_near_ties(x: Tensor, gate_weight: Tensor) -> Tensor:
    logits = (x.double() @ gate_weight.double().T).sort(dim=-1).values
    clear = (
        logits.diff(dim=-1).amin(dim=-1) > LOGIT_MARGIN if logits.shape[1] > 1 else torch.ones(len(x), dtype=torch.bool)
    )
    keep = clear.nonzero().flatten()
    if not len(keep):
        return x
    return torch.where(clear[:, None], x, x[keep[torch.arange(len(x)) % len(keep)]])


SIZES: dict[str, dict] = {  # models and tokens per call, presets of the layer level, thread counts
    "tiny": {"models": {"digits": 64}, "routings": ("uniform", "empty_experts"), "threads": (1,)},
    "small": {"models": {"S/2-8E2A": 1024, "S/2-16E2A": 1024}, "routings": PRESETS, "threads": (1,)},
    "full": {
        "models": {
            "S/2-8E2A": 4096,
            "S/2-16E2A": 4096,
            "B/2-8E2A": 4096,
            "L/2-8E2A": 2048,
            "XL/2-8E2A": 2048,
            "HiDream-I1": 1024,
            "DSMoE-S-E48": 4096,
        },
        "routings": PRESETS,
        "threads": (1, 0),
    },
    "batches": {
        "models": {"S/2-8E2A": (16, 256, 1024, 4096), "DSMoE-S-E48": (16, 256, 1024, 4096)},
        "routings": ("uniform",),
        "threads": (1,),
    },
}


def all_cases(size: str | None = None) -> tuple[Case, ...]:
    """Return the CPU cases of a size: tiny (seconds), small (minutes), full, or batches, small ones to large, of wide
    and of narrow experts; by default MOE_BENCH_SIZE, or tiny."""
    size = size or os.environ.get("MOE_BENCH_SIZE", "tiny")
    if size not in SIZES:
        raise ValueError(f"MOE_BENCH_SIZE: got {size!r}, expected one of {', '.join(SIZES)}")
    plan = SIZES[size]
    threads = sorted({n or len(os.sched_getaffinity(0)) for n in plan["threads"]})
    cases = []
    models = [
        (name, T)
        for name, tokens in plan["models"].items()
        for T in (tokens if isinstance(tokens, tuple) else (tokens,))
    ]
    for (name, T), n in product(models, threads):
        base = Case("layer", "native", MODEL_SHAPES[name], "uniform", T, "fp32", "fwd", n)
        cases += [*_room_cases(base), *_layer_cases(base, plan["routings"]), *_model_cases(base)]
    return tuple(cases)


def _room_cases(base: Case) -> Iterator[Case]:
    for room, backend in product(ROOMS, backends_on("cpu")):
        if room == "dispatch":  # integers: no dtype, no gradient worth timing
            for routing in (base.routing, *BY_SCORES):
                yield replace(base, level=room, backend=backend, routing=routing)
            continue
        for dtype, mode in product(("fp32", "bf16"), ("fwd", "bwd")):
            yield replace(base, level=room, backend=backend, dtype=dtype, mode=mode)


def _layer_cases(base: Case, routings: tuple[str, ...]) -> Iterator[Case]:
    if recorded_routing() == (base.shape.E, base.shape.K):
        routings = (*routings, "real")
    contenders = (*backends_on("cpu"), *PEERS)
    for routing, dtype, mode, backend in product(routings, ("fp32", "bf16"), ("fwd", "fwdbwd"), contenders):
        yield replace(base, backend=backend, routing=routing, dtype=dtype, mode=mode)


def _model_cases(base: Case) -> Iterator[Case]:
    """Block and steps, of the models the oracle has; a whole model of more than S's size is no CPU benchmark."""
    if not base.shape.num_heads or base.T % (2 * base.shape.tokens_per_image):
        return
    base, contenders = replace(base, routing="gate"), (*backends_on("cpu"), *PEERS)
    for dtype, mode, backend in product(("fp32", "bf16"), ("fwd", "fwdbwd"), contenders):
        yield replace(base, level="block", backend=backend, dtype=dtype, mode=mode)
    if base.shape.H <= MODEL_SHAPES["S/2-8E2A"].H:
        for backend, (level, mode) in product(contenders, (("train_step", "fwdbwd"), ("sampling_step", "fwd"))):
            yield replace(base, level=level, backend=backend, mode=mode)


def select(cases: tuple[Case, ...], expression: str = "", level: str = "", backend: str = "") -> tuple[Case, ...]:
    """Filter by words of the id ("experts and not bf16"), a level or room, a backend; ValueError if none is left."""
    wanted = keyword_filter(expression)
    levels = LEVELS.get(level, (level,))
    chosen = tuple(
        c for c in cases if wanted(c.id) and (not level or c.level in levels) and (not backend or c.backend == backend)
    )
    if not chosen:
        asked = {"-k": expression, "--level": level, "--backend": backend}
        raise ValueError(
            f"no case selected by {', '.join(f'{k} {v!r}' for k, v in asked.items() if v)} of {len(cases)} cases"
        )
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", metavar="EXPR", default="", help="words of the id with and, or, not, ( )")
    parser.add_argument(
        "--level",
        default="",
        choices=list(dict.fromkeys([*LEVELS, *sum(LEVELS.values(), ())])),
        help="one level or room",
    )
    parser.add_argument("--backend", default="", choices=[*backends_on("cpu"), *PEERS], help="one backend or peer")
    parser.add_argument("--size", choices=list(SIZES), help="default: MOE_BENCH_SIZE, or tiny")


def main(args: argparse.Namespace) -> int:
    """Print the ids of the selected cases, one per line."""
    for case in select(all_cases(args.size), args.k, args.level, args.backend):
        print(case.id)
    return 0
