"""Instructions per step of the GEMM micro-kernel's loops, from the disassembly: unlike times, they do not wobble.

A loop here is a conditional jump backwards over instructions none of which is another jump, a call or a return: it is
innermost, and each of its instructions runs once per step. Kept are those that multiply and accumulate in at least four
vector registers and prefetch, or do it UNROLLED times, which in this project the micro-kernel alone does
(csrc/cpu/micro.h); steps that are unrolled are counted together. All levels are in
the file, whatever this CPU runs; identical loops are counted together (fp32 at avx512 and avx512bf16, for one).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.instrument import store

PANEL = 2  # vectors across a tile, as NR in csrc/cpu/micro.h
LEAST = 4  # accumulators; a tile of one row has two, as have other loops
UNROLLED = 48  # multiply-adds of a loop that does without prefetches, four steps of 6 x 2: no other loop has as many
FIGURES = ("fma", "loads", "prefetches", "stores", "spills", "instructions")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$", re.MULTILINE)
BRANCH = re.compile(r"(?:bnd |notrack )?(?:(j(?!mp)\w+)\s+([0-9a-f]+)\b|j|call|ret|loop|ud2)")
MULTIPLY_ADD = re.compile(r"(vfmadd)(?:132|213|231)ps |(vdpbf16ps) |(addps) ")  # addps: after mulps, at level portable
ACCUMULATES = re.compile(r"vfmadd231ps |vdpbf16ps |addps ")  # in the other forms the register written is a factor
WRITTEN = re.compile(r"%([xyz]mm)(\d+)(?:\{[^}]*\})*$")
STORE = re.compile(r"\)(?:\{[^}]*\})?$")
STACK = re.compile(r"\(%rsp\)|-0x[0-9a-f]+\(%rbp\)")


def row(path: Path | None = None) -> dict:
    """Return the row of kind "inner_loops" of an extension (the installed one); without counts it says the reason."""
    loops, compiler, reason = [], None, None
    try:
        path = path or extension()
        compiler = _compiler(path)
        loops = count(disassemble(path))
    except RuntimeError as error:
        reason = str(error)
    return store.row("inner_loops", compiler=compiler, loops=loops, reason=reason, wrong=None)


def extension() -> Path:
    """Return the compiled extension's file; RuntimeError where it is not built."""
    module = store.extension()
    if module is None:
        raise RuntimeError("the extension cannot be imported: it is not built for this Python")
    return Path(module.__file__)


def disassemble(path: Path) -> str:
    """Return binutils' listing of a library; RuntimeError where objdump is missing or fails."""
    if shutil.which("objdump") is None:
        raise RuntimeError("objdump (binutils) is not installed")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition(": ")[2]  # without the path
        raise RuntimeError(f"objdump failed: {why or f'exit code {done.returncode}'}")
    return done.stdout


def count(listing: str) -> list[dict]:
    """Count every micro-kernel loop in a listing of objdump (AT&T syntax).

    Returns: unique loops, most FMAs first: `kind` (instruction and width), `rows` of the tile, `fma`, `loads`,
        `prefetches`, `stores`, `spills`, `instructions` per step, and `times`, how often the same is in the file.
    Raises: RuntimeError when there is none: another compiler may lay loops out otherwise.
    """
    found = Counter(key for body in straight_loops(listing) if (key := _figures(body)))
    if not found:
        raise RuntimeError("no loop of the micro-kernel was recognised in the disassembly")
    return [
        {"kind": kind, "rows": figures[0] // PANEL, **dict(zip(FIGURES, figures, strict=True)), "times": times}
        for (kind, *figures), times in sorted(found.items(), key=lambda item: (-item[0][1], item[0]))
    ]


def straight_loops(listing: str) -> Iterator[list[str]]:
    """Yield the instructions of every innermost loop without branches, from its head to the jump back to it."""
    code = [(int(m[1], 16), re.split(r"\s+[#<]", m[2])[0].strip()) for m in LINE.finditer(listing)]
    position = {address: i for i, (address, _) in enumerate(code)}
    last_branch = -1
    for i, (_, text) in enumerate(code):
        if branch := BRANCH.match(text):
            head = position.get(int(branch[2], 16)) if branch[1] else None
            if head is not None and last_branch < head <= i:
                yield [text for _, text in code[head : i + 1]]
            last_branch = i


def _figures(body: Sequence[str]) -> tuple | None:
    """Return (kind, *FIGURES) of a loop, None for one that is not the micro-kernel's."""
    sums = [(m, text) for text in body if (m := MULTIPLY_ADD.match(text))]
    prefetches = sum(text.startswith("prefetch") for text in body)
    others = {_written(text) for text in body if not ACCUMULATES.match(text)}
    if len({_written(text) for _, text in sums} - others) < LEAST or not (prefetches or len(sums) >= UNROLLED):
        return None
    kinds = Counter(f"{m[1] or m[2] or 'mulps, addps'} {WRITTEN.search(text)[1]}" for m, text in sums)
    memory = [text for text in body if "(" in text and not text.startswith(("prefetch", "lea", "nop"))]
    vector = [text for text in memory if "mm" in text.partition(" ")[2]]
    stores = sum(bool(STORE.search(text)) for text in vector)
    spills = sum(bool(STACK.search(text)) for text in memory)
    return kinds.most_common(1)[0][0], len(sums), len(vector) - stores, prefetches, stores, spills, len(body)


def _written(text: str) -> str | None:
    match = WRITTEN.search(text)
    return match and match[2]


def _compiler(path: Path) -> str | None:
    """Return what the library's comment section says of its compilers, which decide about the loops."""
    found = re.findall(rb"(GCC): \([^)\0]*\) ([\d.]+)|(clang) version ([\d.]+)", path.read_bytes())
    return ", ".join(sorted({b" ".join(filter(None, words)).decode() for words in found})) or None


def widest(loops: Sequence[dict]) -> list[dict]:
    """Keep of each kind the loops with the most FMAs."""
    most = defaultdict(int)
    for loop in loops:
        most[loop["kind"]] = max(most[loop["kind"]], loop["fma"])
    return [loop for loop in loops if loop["fma"] == most[loop["kind"]]]


def tile(loop: dict) -> str:
    """Name a loop by its tile, as "14x2 vdpbf16ps zmm"."""
    return f"{loop['rows']}x{PANEL} {loop['kind']}"


def changes(base: dict, head: dict) -> list[str]:
    """Say for every tile whose loops differ between two rows what they were and what they are."""
    sides = [defaultdict(list), defaultdict(list)]
    for side, loops in zip(sides, (base["loops"], head["loops"]), strict=True):
        for loop in loops:
            side[tile(loop)].append(", ".join(f"{loop[name]} {name}" for name in (*FIGURES, "times")))
    was, now = sides
    return [
        f"{name}: {' and '.join(was.get(name, ['none']))} -> {' and '.join(now.get(name, ['none']))}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
