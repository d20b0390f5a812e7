"""Machine code, read for both gates: NVIDIA's tools, instructions counted, what fits on a processor, tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict

THREADS, REGISTERS, BLOCKS = 2048, 65536, 32  # of a processor
MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # its bytes of shared memory; a block takes a KiB for itself
AT_ONCE = 16  # instructions
# A line of nvdisasm: the predicate, the name up to its first dot and from there on, the operands.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z]\w*)([.\w]*)\s*([^;\n]*)", re.MULTILINE)
SUMMARY = ("variants", "registers", "shared KiB", "blocks", "instructions", "tensor-core", "spills")


def run(tool: str, *arguments: str) -> str:
    """Return what cuobjdump or nvdisasm says; both are in Triton's wheel."""
    import triton

    command = (getattr(triton.knobs.nvidia, tool).path, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counts(code: str, patterns: Mapping[str, str]) -> dict[str, int]:
    """Count instructions in a listing of nvdisasm: all of them, and those of each pattern."""
    found = {"instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))}
    return found | {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}


def waited_for(code: str) -> int:
    """Count loads of 16 bytes a thread that one of the next AT_ONCE instructions reads: nothing hides their latency."""
    lines = [(name, rest, operands) for _, name, rest, operands in INSTRUCTION.findall(code)]
    found = 0
    for i, (name, rest, operands) in enumerate(lines):
        if name not in ("LD", "LDG") or ".128" not in rest:
            continue
        first = int(re.match(r"R(\d+)", operands)[1])
        loaded = {f"R{first + word}" for word in range(4)}
        for after, _, reads in lines[i + 1 : i + 1 + AT_ONCE]:
            sources = reads if after.startswith("ST") else reads.partition(",")[2]
            if loaded & set(re.findall(r"\bR\d+\b", sources)):
                found += 1
                break
    return found


def blocks_at_once(sm: int, registers: int, warps: int, shared: int) -> int:
    """Return how many blocks a processor holds at once by registers, shared memory and threads."""
    each_warp = -(-registers * 32 // 256) * 256  # registers come in units of 256 a warp
    return min(BLOCKS, THREADS // (32 * warps), REGISTERS // (max(each_warp, 1) * warps), MEMORY[sm] // (shared + 1024))


def worse(name: str, budget: object, got: object, directions: Mapping[str, int]) -> list[str]:
    """Say which figures of a kernel got worse than the committed ones: those that grew (1), or shrank (-1)."""
    pairs = [(key, getattr(budget, key) or 0, getattr(got, key) or 0) for key in directions]
    return [f"{name}: {key} {was} -> {now}" for key, was, now in pairs if (now - was) * directions[key] > 0]


def table(entries: Mapping[str, object]) -> str:
    """Return one line per kernel, under the names of its figures; - for what is not known."""
    figures = {name: asdict(entry) for name, entry in entries.items()}
    heads = list(next(iter(figures.values()), {}))
    rows = [["kernel", *heads]]
    rows += [[name, *("-" if f[head] is None else str(f[head]) for head in heads)] for name, f in figures.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
