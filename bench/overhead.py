"""What a call costs beside its kernels: the ops, reading a replaced model's modules, LoRA on its experts, counting."""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from bench.gpu import issuing
from bench.images.analysis.cost import counting
from bench.instrument import arguments, measure, stats, store
from bench.instrument.cases import kernels_on
from bench.instrument.progress import say
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.verify import Check, judge
from moe_kernels.adapters.families.dit_moe import read
from reference.moe import SparseMoeBlock

EXPERTS = (8, 64)
NARROW = 16, 16, 8, 2  # H, I, E, K
STACKED = 3072  # experts of a layer of MAGI-2, 12 heads of 256
YARDSTICK = "torch.add"  # of two numbers: what an operator costs at least, on this machine, now
COUNTED = {"tiny": {"digits": 1}, "default": {"digits": 4, "S/2-8E2A": 2}}  # models, and how many of their blocks
TARGETS = ["gate_proj", "up_proj", "down_proj"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("tiny", "default"), default="default", help="tiny: seconds, for CI")
    parser.add_argument("--shape", choices=list(MODEL_SHAPES), default="S/2-8E2A", help="of the block with adapters")
    parser.add_argument("--tokens", type=arguments.counts, default="256,1024,4096", help="comma-separated")
    parser.add_argument("--rank", type=arguments.count, default=16, help="of the adapters, on every expert")
    parser.add_argument("--seconds", type=arguments.seconds, default=20.0, help="for each race")
    parser.add_argument("--out", type=Path, default=Path("report/overhead.jsonl"), help="row file, added to")


def calling(backend: str, seconds: float) -> dict:
    """Return a row: microseconds of a layer so narrow that its kernels take next to nothing."""
    layer = moe_kernels.MoELayer(*NARROW, shared_intermediate_size=NARROW[1], backend=backend)
    x = torch.randn(16, NARROW[0], requires_grad=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    calls = {
        "forward": forward,
        "forward_backward": lambda: torch.autograd.grad(layer(x).sum(), (x, *layer.parameters())),
        YARDSTICK: _operator(),
    }
    samples = measure.interleave(calls, 15, seconds)
    eager, exact = (copy.deepcopy(layer) for _ in range(2))
    eager.backend = exact.backend = "eager"
    check = judge(*({"y": m(v).detach()} for m, v in ((layer, x), (exact.double(), x.double()), (eager, x))))
    case = f"layer-{backend}-E{NARROW[2]}"
    return store.row("calling", case=case, figures=_times(samples, check.wrong), errors=check.errors, wrong=check.wrong)


def two_stacks(num_experts: int, seconds: float) -> dict:
    """Return a row: microseconds, and functions called, of a narrow fused layer whose gate and up are two stacks; and
    of the same where all its matrices are taken apart first."""
    H, I = NARROW[:2]
    x, ids = torch.randn(16, H), torch.arange(32).view(16, 2) % num_experts
    plan = moe_kernels.dispatch(ids, torch.full((16, 2), 0.5), num_experts, backend="native")
    gate, up, down = (torch.randn(num_experts, *shape) for shape in ((I, H), (I, H), (H, I)))

    def in_turn() -> Tensor:
        pairs = zip(gate.unbind(), up.unbind(), strict=True)
        return moe_kernels.moe_mlp(x, plan, [m for pair in pairs for m in pair], down.unbind(), backend="native")

    calls = {
        "forward": lambda: moe_kernels.moe_mlp(x, plan, [gate, up], down, backend="native"),
        "in_turn": in_turn,
        YARDSTICK: _operator(),
    }
    samples = measure.interleave(calls, 15, seconds)
    wrong = None if torch.equal(calls["forward"](), in_turn()) else "two stacks: got other bits than in turn"
    counts = {f"{name}_calls": issuing.counted(calls[name], lambda: 0)["calls"] for name in ("forward", "in_turn")}
    case = f"two_stacks-native-E{num_experts}"
    return store.row("calling", case=case, figures=_times(samples, wrong) | ({} if wrong else counts), wrong=wrong)


def _times(samples: Mapping[str, measure.Samples], wrong: str | None) -> dict[str, float]:
    """Return microseconds by name; what is wrong has none."""
    return {} if wrong else {f"{name}_us": s.summary().median * 1e6 for name, s in samples.items()}


def _operator() -> Callable[[], Tensor]:
    a, b = torch.ones(1), torch.ones(1)
    return lambda: torch.add(a, b)


def reading(num_experts: int, seconds: float) -> dict:
    """Return a row: microseconds to read the modules of a block with a shared expert, and of an operator of torch."""
    block = SparseMoeBlock(32, 64, num_experts, 2, 64)
    moe_kernels.replace_moe(block, backend="native")
    calls = {"read": lambda: read(block, block.moe_config), YARDSTICK: _operator()}
    samples = measure.interleave(calls, 15, seconds)
    down = read(block, block.moe_config).experts.down
    own = all(got is expert.down_proj.weight for got, expert in zip(down, block.experts, strict=True))
    wrong = None if own else "down_proj: got other tensors than the modules hold"
    return store.row("reading_modules", case=f"E{num_experts}", figures=_times(samples, wrong), wrong=wrong)


def adapting(shape_name: str, tokens: int, rank: int, seconds: float) -> dict:
    """Return a row: forward, backward and AdamW of a replaced block with LoRA on all its experts, against without.

    What is timed has first given the outputs and the adapters' gradients that the plain block gives, by the error rule.
    """
    shape = MODEL_SHAPES[shape_name]
    torch.manual_seed(0)
    plain = SparseMoeBlock(shape.H, shape.I, shape.E, shape.K, shape.Is)
    adapted = _with_lora(copy.deepcopy(plain), rank)
    x = torch.randn(1, tokens, shape.H)
    check = _check(adapted, x)
    blocks = {"lora": adapted, "weights": plain}
    for block in blocks.values():
        moe_kernels.replace_moe(block, backend="native")
    figures: dict[str, Any] = {}
    if not check.wrong:
        samples = measure.interleave({name: _step(block, x) for name, block in blocks.items()}, 9, seconds)
        ratio = stats.by_round(samples["lora"].times(), samples["weights"].times())
        figures = _times(samples, None) | {"cost": ratio.value, "cost_low": ratio.low, "cost_high": ratio.high}
    case = f"{shape.model}-T{tokens}-r{rank}-fp32-t1"
    return store.row("lora", case=case, figures=figures, errors=check.errors, wrong=check.wrong)


def _with_lora(block: nn.Module, rank: int) -> nn.Module:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    return peft.inject_adapter_in_model(config, block)


def _check(block: nn.Module, x: Tensor) -> Check:
    """Hold the block after replace_moe against itself before, in float32 and in float64, by the error rule."""
    replaced, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    moe_kernels.replace_moe(replaced, backend="native")
    got, theirs, oracle = (_results(b, x.to(next(b.parameters()).dtype)) for b in (replaced, block, exact))
    return judge(got, oracle, theirs, slices=False)


def _results(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = block(x)
    names, parameters = zip(*((n, p) for n, p in block.named_parameters() if "lora" in n), strict=True)
    gradients = torch.autograd.grad(y.square().mean(), parameters)
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def _step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=1e-6, fused=True)
    x = x.clone().requires_grad_()  # there are layers before this one

    def step() -> None:
        block(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(args: argparse.Namespace) -> int:
    """Measure, print and keep the rows; returns 1 where a result is wrong."""
    if args.size == "tiny":
        args.shape, args.tokens, args.seconds = "digits", [64], 0.2
    rows = []
    with measure.threads(1):
        rows.append(calling("native", min(args.seconds, 5.0)))
        rows.append(two_stacks(STACKED, min(args.seconds, 5.0)))
        for backend in kernels_on("cuda"):
            if why := issuing.why_not(backend):
                say(f"issuing {backend}: {why}")
            else:
                rows.append(issuing.row(backend, _operator(), min(args.seconds, 5.0)))
        for num_experts in EXPERTS:
            rows.append(reading(num_experts, min(args.seconds, 5.0)))
        for tokens in args.tokens:
            rows.append(adapting(args.shape, tokens, args.rank, args.seconds))
        for model, depth in COUNTED[args.size].items():
            rows.append(counting(model, depth, args.seconds))
    for row in rows:
        store.append(args.out, row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items())
        say(f"{row['kind']} {row['case']}: {row['wrong'] or shown}")
    say(f"rows: {args.out}")
    return int(any(row["wrong"] for row in rows))
