"""The static gate of the Triton kernels.

The backend runs on meta tensors while launches compile instead: exactly the kernels, tiles and specialisations that a
user's call would launch. Registers and memory come from cuobjdump, instructions from nvdisasm; both are in Triton's
wheel. The figures are kept in results/static_gate.json under a hash of sources and compiler: while it holds, nothing is
compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.instrument import store, workloads
from bench.instrument.progress import say
from bench.instrument.shapes import MODEL_SHAPES, MoEShape
from bench.machine_code.static_gate import machine

FILE = store.ROOT / "results" / "static_gate.json"
KERNELS = store.ROOT / "moe_kernels" / "backends" / "triton"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
TENSOR_CORES = ("bf16", "fp16", "tf32")
GEMMS = ("experts_fwd_up", "experts_rows_times", "experts_bwd_dact", "experts_bwd_dweight")
THROUGH_TMA = GEMMS[:3]  # what gradients of weights sum over ends inside of a descriptor's rows
MATRIX = {80: "hmma", 90: "hgmma", 100: "utcmma"}  # the instruction a product must consist of
COUNTED = {
    "hmma": r"\bHMMA\b|\bHMMA\.",
    "hgmma": r"\bHGMMA\b|\bHGMMA\.",
    "utcmma": r"\bUTC\w*MMA",
    "tma": r"\bUTMA(?:LDG|STG)",
    "cp_async": r"\bLDGSTS",
    "local": r"\b(?:LDL|STL)\b|\b(?:LDL|STL)\.",
}
GPUS = {80: ("NVIDIA A100-SXM4-80GB", 108), 90: ("NVIDIA H200", 132), 100: ("NVIDIA B200", 148)}
SETTINGS = (  # sm, shape, tokens, dtypes
    *((90, shape, T, tuple(DTYPES)) for shape in ("S/2-8E2A", "XL/2-8E2A") for T in (512, 8192)),
    *((sm, "S/2-8E2A", 8192, ("bf16", "tf32")) for sm in (80, 100)),
)
TINY = ((90, "digits", 256, ("bf16",)),)  # more tokens than one program of dispatch takes


@dataclass(frozen=True)
class Facts:
    """What is known of a kernel without running it. local counts instructions that touch local memory: spills."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    blocks: int  # at once on a processor, by registers, shared memory and threads
    programs: int  # on a processor, as launched
    instructions: int
    hmma: int
    hgmma: int
    utcmma: int
    tma: int
    cp_async: int
    local: int


# Whether a figure that grows (1) or shrinks (-1) is a breach of the budget. Registers count through `blocks`.
WORSE = {"local": 1, "stack_bytes": 1, "blocks": -1, "hmma": -1, "hgmma": -1, "utcmma": -1, "tma": -1}


def source_hash() -> str:
    """Return the hash of what the figures depend on: kernels, tiles, what is compiled and counted, Triton's version."""
    import triton

    digest = hashlib.sha256(repr((triton.__version__, SETTINGS, COUNTED)).encode())
    for path in (*sorted(KERNELS.glob("*.py")), *sorted(KERNELS.glob("*.json"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compile_all(settings: Sequence[tuple]) -> Iterator[tuple[str, Facts]]:
    """Compile what each setting launches, on all cores; yield name, as sm90-S2-T512-bf16-combine_fwd.0, and facts."""
    each = [(sm, shape, T, dtype) for sm, shape, T, dtypes in settings for dtype in dtypes]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for compiled in pool.map(compile_one, each):
            yield from compiled


def compile_one(setting: tuple[int, str, int, str]) -> list[tuple[str, Facts]]:
    """Compile what one model of a size launches in one dtype, for one architecture."""
    sm, shape, T, dtype = setting
    seen: dict[str, int] = {}
    out = []
    with compiling(sm) as kernels:
        launch_all(MODEL_SHAPES[shape], T, dtype)
    for kernel, programs in kernels:
        number = seen[kernel.name] = seen.get(kernel.name, -1) + 1
        name = f"sm{sm}-{MODEL_SHAPES[shape].model}-T{T}-{dtype}-{kernel.name}.{number}"
        out.append((name, facts(kernel, sm, -(-programs // GPUS[sm][1]))))
    return out


@contextmanager
def compiling(sm: int) -> Iterator[list[tuple[Any, int]]]:
    """Let launches compile for that architecture without running; collect each kernel and its most programs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from moe_kernels.backends.triton import launching, tiles

    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: got 1, expected it unset: interpreted kernels cannot be compiled")
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", sm, 32)
    driver.get_current_device.return_value = f"sm_{sm}"
    driver.get_current_stream.return_value = 0
    kernels, programs, launch = {}, {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel
        programs[kernel.hash] = max(programs.get(kernel.hash, 0), prod(grid))
        return kernel

    name, processors = GPUS[sm]
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launching, "DIRECT", False),
        mock.patch.object(tiles, "META", tiles.Device(name, sm, processors)),
    ):
        found: list[tuple[Any, int]] = []
        yield found
        found += [(kernel, programs[key]) for key, kernel in kernels.items()]


def launch_all(shape: MoEShape, T: int, dtype: str) -> None:
    """Call every room and the layer, forward and backward, on tensors without storage."""
    from moe_kernels.backends.triton import TritonBackend
    from moe_kernels.weights import MoEWeights

    def new(*sizes: int, dtype: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    backend, halves = TritonBackend(), 2 if shape.activation == "swiglu" else 1
    H, I, Is, E, K, f32 = shape.H, shape.I, shape.Is, shape.E, shape.K, torch.float32
    weights = MoEWeights(new(E, halves * I, H), new(E, H, I), new(halves * Is, H), new(H, Is))
    with workloads.arithmetic(dtype):
        x, gate_weight = new(T, H), new(E, H)
        topk_weights, topk_ids, probs = backend.gating(x, gate_weight, K)
        backend.gating_bwd(new(T, K, dtype=f32), new(T, E, dtype=f32), x, gate_weight, topk_ids, probs)
        plan = backend.dispatch(topk_ids, topk_weights, E)
        backend.dispatch_bwd(plan.row_weight, plan.row_pick, T * K)
        backend.dispatch_expert_choice(probs, max(1, K * shape.tokens_per_image // E), shape.tokens_per_image)
        backend.dispatch_mask(probs, new(T, E, dtype=torch.bool), T * K)
        backend.select_top(probs.view(1, T * E, 1), T * K)
        backend.select_top(probs.view(1, T, E), new(1, E, dtype=torch.int32))
        backend.select_experts(probs, K, E // 2, max(K, 1) // 2 + 1)
        for save in (False, True):
            _, gate_up, shared_gate_up = backend.moe_mlp(x, plan, weights, shape.activation, save)
        backend.moe_mlp_bwd(x, x, plan, weights, gate_up, shared_gate_up, shape.activation)
        memory = [new(E, *matrix) for matrix in ((I, H), (H, I), (Is, H), (H, Is))]
        indexed = MoEWeights(*memory, new(halves * (E + 1), dtype=torch.int32), new(E + 1, dtype=torch.int32))
        for save in (False, True):
            backend.moe_mlp(x, plan, indexed, shape.activation, save)
        backend.moe_mlp_bwd(x, x, plan, indexed, gate_up, shared_gate_up, shape.activation)
        L = min(T, shape.tokens_per_image)
        images, vector = x.view(T // L, L, H), new(T // L, H)
        *_, moments = backend.modulated_gating(images, vector, vector, gate_weight, K, 1e-6, x.dtype)
        backend.modulated_gating_bwd(
            x, topk_weights, None, images, vector, vector, gate_weight, topk_ids, probs, moments, x.dtype
        )
        backend.gated_moe_mlp(x, plan, weights, shape.activation, True, x, vector)
        backend.gated_residual_bwd(x, x, vector)
        routed = MoEWeights(*weights[:2])
        y_rows, gate_up = backend.experts(x, plan, routed, shape.activation, True)
        backend.experts_bwd(y_rows, x, plan, gate_up, routed, shape.activation)
        backend.combine(y_rows, plan, x)
        backend.combine_bwd(x, y_rows, plan)


def facts(kernel: Any, sm: int, programs: int) -> Facts:
    """Read a compiled kernel's machine code; programs: that a processor gets."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = machine.run("cuobjdump", "-res-usage", file.name)
        code = machine.run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    blocks = machine.blocks_at_once(sm, registers, warps, shared)
    return Facts(registers, stack, shared, warps, blocks, programs, **machine.counts(code, COUNTED))


def breaches(name: str, got: Facts) -> list[str]:
    """Return what no kernel may do, whatever the budget says."""
    sm, _, _, dtype, kernel = name.split("-")
    kernel = kernel.partition(".")[0]
    out = []
    if got.local or got.stack_bytes:
        out.append(f"{name}: {got.local} local-memory instructions, {got.stack_bytes} bytes of stack, expected none")
    matrix = MATRIX[int(sm[2:])]
    if kernel in GEMMS and dtype in TENSOR_CORES and not getattr(got, matrix):
        out.append(f"{name}: no {matrix.upper()}, expected the product on tensor cores")
    if kernel in GEMMS and got.programs > got.blocks:
        out.append(f"{name}: {got.programs} programs a processor, expected at most the {got.blocks} that run at once")
    if kernel in THROUGH_TMA and dtype in TENSOR_CORES and int(sm[2:]) >= 90 and not got.tma:
        out.append(f"{name}: no TMA, expected the weights through it")
    return out


def summary(entries: dict[str, Facts]) -> list[tuple]:
    """Return a row per architecture and kernel: machine.SUMMARY, the worst of all variants."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for name, entry in entries.items():
        sm, *_, kernel = name.split("-")
        groups.setdefault((sm.replace("sm", "sm_"), kernel.partition(".")[0]), []).append(entry)
    return [
        (
            *key, len(all_), max(f.registers for f in all_), max(f.shared_bytes for f in all_) // 1024,
            min(f.blocks for f in all_), max(f.instructions for f in all_),
            sum(f.hmma + f.hgmma + f.utcmma > 0 for f in all_), sum(f.local + f.stack_bytes > 0 for f in all_),
        )
        for key, all_ in groups.items()
    ]  # fmt: skip


def load(path: Path = FILE) -> tuple[str, dict[str, Facts]]:
    """Return the hash and the kernels of the committed file, empty where there is none."""
    if not path.exists():
        return "", {}
    data = json.loads(path.read_text())
    return data["hash"], {name: Facts(**entry) for name, entry in data["kernels"].items()}


def save(entries: dict[str, Facts], path: Path = FILE) -> None:
    import triton

    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in entries.items())
    path.write_text(f'{{"hash": "{source_hash()}", "triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')


def check(args: argparse.Namespace) -> tuple[list[str], str]:
    """Show every kernel; return what is broken or got worse, and what was done."""
    known_hash, budget = ("", {}) if args.update else load()
    tiny = args.size == "tiny"
    fresh = tiny or args.all or args.update or known_hash != source_hash()
    entries = dict(compile_all(TINY if tiny else SETTINGS)) if fresh else budget
    wanted = store.keyword_filter(args.k)
    say(machine.table({name: entry for name, entry in entries.items() if wanted(name)}))
    failures = [line for name, entry in entries.items() for line in breaches(name, entry)]
    if fresh and not tiny and not args.update:
        both = [name for name in entries if name in budget]
        failures += [line for name in both for line in machine.worse(name, budget[name], entries[name], WORSE)]
        if entries != budget:
            failures.append("kernels changed: look at the table, then python -m bench static-gate --update")
    if args.update:
        save(entries)
    return failures, f"{len(entries)} kernels {'compiled' if fresh else 'unchanged since the last compilation'}"
