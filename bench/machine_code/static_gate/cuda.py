"""The static gate of csrc/cuda: every source compiled for every architecture that CMake compiles it for.

Registers, stack, spills and static shared memory are what ptxas says, instructions and threads what nvdisasm finds, and
the dynamic shared memory of products comes from the engines' constants. The figures are kept in
results/static_gate_cuda.json, each object's under a hash (nvcc.key): only what changed is compiled again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from bench.instrument import store
from bench.instrument.progress import say, track
from bench.machine_code.static_gate import machine, nvcc, waiting

FILE = store.ROOT / "results" / "static_gate_cuda.json"
TINY = ("sums.cu sm_90",)
COUNTED = {
    "hgmma": r"\bHGMMA\b",
    "hmma": r"\bHMMA\b",
    "utmaldg": r"\bUTMALDG\b",
    "ldgsts": r"\bLDGSTS\b",
    "local": r"\b(?:LDL|STL)\b",
}
MUST = {"product_sm90": ("hgmma", "utmaldg"), "product_sm80": ("hmma",)}  # the instructions a kernel must consist of
DYNAMIC = {  # dynamic shared memory, without the table of tiles that follows it: 4 bytes an expert, and 4
    "product_sm90": "moe::cuda::sm90::Config<{}>::shared_bytes(0)",
    "product_sm80": "moe::cuda::sm80::kStages * moe::cuda::sm80::kStageBytes",
    "product_simt": "0",
}
PEAK_MIB, BUILD_MINUTES = 5 * 1024, 20  # the compiler's memory for an object; all objects on two cores


@dataclass(frozen=True)
class Facts:
    """What is known of a kernel without running it. local counts instructions that touch local memory."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_bytes: int  # of shared memory
    dynamic_bytes: int | None  # of products; where the sizes of a call decide, None
    threads: int  # in a block at most
    blocks: int  # at once on a processor at most, by registers, threads and the shared memory that is known
    instructions: int
    hgmma: int
    hmma: int
    utmaldg: int
    ldgsts: int
    local: int
    waited: int  # machine.waited_for


@dataclass(frozen=True)
class Object:
    """One source compiled for one architecture."""

    hash: str
    seconds: float
    peak_mib: int
    warnings: tuple[str, ...]  # of ptxas: wgmma made sequential, launch bounds or setmaxnreg ignored; of waiting.py
    kernels: dict[str, Facts]


# Whether a figure that grows (1) or shrinks (-1) is a breach of the budget. Registers count through `blocks`.
WORSE = {
    "stack_bytes": 1, "spill_bytes": 1, "local": 1, "waited": 1, "static_bytes": 1, "dynamic_bytes": 1,
    "blocks": -1, "hgmma": -1, "hmma": -1, "utmaldg": -1,
}  # fmt: skip


def compile_object(source: Path, sm: str, tools: nvcc.Tools, key: str) -> Object:
    """Compile a source for one architecture and read its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        run = nvcc.cubin(source, sm, tools, Path(file.name))
        usage = used(run.log)
        listing = machine.run("nvdisasm", file.name) if usage else ""
    names = {mangled: demangled(mangled) for mangled in usage}
    dynamic = dynamic_bytes(source, sm, tools, names.values())
    kernels, complaints = {}, list(warnings(run.log))
    for mangled, figures in usage.items():
        name, found = short(names[mangled]), sections(listing, mangled)
        kernels[name] = facts(sm, figures, dynamic.get(names[mangled]), found)
        if capability(sm) >= waiting.SINCE:
            complaints += [f"{name}: {fault}" for fault in waiting.faults(found[1])]
    if len(kernels) < len(usage):
        raise ValueError(f"{source.name}: got kernels of the same short name, expected {len(usage)} names")
    return Object(key, run.seconds, run.peak_mib, tuple(complaints), dict(sorted(kernels.items())))


def used(log: str) -> dict[str, dict[str, int]]:
    """Return what ptxas says of each kernel, with the functions that it calls."""
    out = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": re.findall(r"Used (\d+) registers", part),
            "stack_bytes": re.findall(r"(\d+) bytes stack frame", part),
            "spill_bytes": re.findall(r"(\d+) bytes spill (?:stores|loads)", part),
            "static_bytes": re.findall(r"(\d+) bytes smem", part),
        }
        out[part.partition("'")[0]] = {name: sum(map(int, found)) for name, found in numbers.items()}
    return out


def warnings(log: str) -> tuple[str, ...]:
    """Return what ptxas complains about, each once, names demangled."""
    lines = re.findall(r"^ptxas.*(?:warning|Potential Performance Loss).*$", log, re.MULTILINE)
    return tuple(dict.fromkeys(re.sub(r"\b_Z\w+", lambda m: short(demangled(m[0])), line) for line in lines))


def sections(listing: str, mangled: str) -> tuple[str, str]:
    """Return a kernel's attributes and its code from a listing of nvdisasm."""
    found = []
    for kind in (".nv.info", ".text"):
        _, _, rest = listing.partition(f"\n//--------------------- {kind}.{mangled} ")
        found.append(rest.partition("\n//--------------------- ")[0])
    return found[0], found[1]


def facts(sm: str, usage: Mapping[str, int], dynamic: int | None, listing: tuple[str, str]) -> Facts:
    """Put a kernel's figures together. Without launch bounds a block may have 1024 threads."""
    attributes, code = listing
    bound = re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(0x[0-9a-f]+)", attributes, re.DOTALL)
    threads = int(bound[1], 16) if bound else 1024
    shared = usage["static_bytes"] + (dynamic or 0)
    blocks = machine.blocks_at_once(capability(sm), usage["registers"], -(-threads // 32), shared)
    counts = machine.counts(code, COUNTED) | {"waited": machine.waited_for(code)}
    return Facts(**usage, dynamic_bytes=dynamic, threads=threads, blocks=blocks, **counts)


def capability(sm: str) -> int:
    return int(re.search(r"\d+", sm)[0])


def dynamic_bytes(source: Path, sm: str, tools: nvcc.Tools, kernels: Iterable[str]) -> dict[str, int]:
    """Return the dynamic shared memory of the kernels (full names) that DYNAMIC knows."""
    known = {}
    for kernel in kernels:
        name, arguments = template(kernel)
        if name.split("::")[-1] in DYNAMIC:
            known[kernel] = DYNAMIC[name.split("::")[-1]].format(arguments)
    values = nvcc.constants(source, sm, tools, list(known.values())) if known else []
    return dict(zip(known, values, strict=True))


@cache
def demangled(name: str) -> str:
    """Return a C++ name as it was written, by the runtime's own demangler."""
    demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    demangle.restype = ctypes.c_char_p
    text = demangle(name.encode(), None, None, ctypes.byref(ctypes.c_int()))
    return text.decode().replace("(anonymous namespace)::", "") if text else name


def template(kernel: str) -> tuple[str, str]:
    """Take a kernel's full name apart: its name with namespaces, and the template's arguments."""
    depth, end = 0, len(kernel)
    for i, char in enumerate(kernel):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            end = i
            break
    name, _, arguments = kernel[:end].removeprefix("void ").partition("<")
    return name, arguments.removesuffix(">").strip()


def short(kernel: str) -> str:
    """Return a kernel's name without namespaces and parameters: product_sm90<RowsTimes<bf16, kInner>, 128>."""
    name, arguments = template(kernel)
    text = f"{name}<{arguments}>" if arguments else name
    text = re.sub(r"\((?:\w+::)*(\w+)\)(\d+)", lambda m: enumerators().get(m[1], {}).get(int(m[2]), m[2]), text)
    return re.sub(r"\b(?:\w+::)+", "", text).replace(" >", ">")


@cache
def enumerators() -> dict[str, dict[int, str]]:
    """Return the names of the enumerations in csrc whose values are counted from 0."""
    texts = [path.read_text() for room in ("core", "cuda") for path in sorted((nvcc.CSRC / room).glob("*.h"))]
    found = re.findall(r"\benum class (\w+)[^{]*\{\s*([\w\s,]+?)\s*\}", "\n".join(texts))
    return {name: dict(enumerate(re.split(r"[\s,]+", values))) for name, values in found}


def breaches(name: str, got: Object) -> list[str]:
    """Return what no object may do, whatever the budget says; name is that of an object."""
    out = [f"{name}: {line}" for line in got.warnings]
    if got.peak_mib > PEAK_MIB:
        out.append(f"{name}: nvcc took {got.peak_mib} MiB, expected at most {PEAK_MIB}")
    for kernel, f in got.kernels.items():
        if f.local or f.stack_bytes or f.spill_bytes:
            out.append(
                f"{name} {kernel}: {f.local} local-memory instructions, {f.stack_bytes} bytes of stack, "
                f"{f.spill_bytes} of spills, expected none"
            )
        must = MUST.get(kernel.partition("<")[0], ())
        for figure in must:
            if not getattr(f, figure):
                out.append(f"{name} {kernel}: no {figure.upper()}, expected the product to use it")
        if must and f.waited:
            out.append(f"{name} {kernel}: {f.waited} loads of 16 bytes that are waited for, expected them ahead of use")
    return out


def changes(name: str, budget: Object | None, got: Object) -> list[str]:
    """Say what of an object got worse than the committed figures, or that they do not belong to it any more."""
    before = budget.kernels if budget else {}
    both = [kernel for kernel in got.kernels if kernel in before]
    out = [line for k in both for line in machine.worse(f"{name} {k}", before[k], got.kernels[k], WORSE)]
    if before != got.kernels:
        out.append(f"{name}: kernels changed: look at the table, then python -m bench static-gate --update")
    elif budget is None or budget.hash != got.hash:
        out.append(f"{name}: same figures of changed sources: python -m bench static-gate --update")
    return out


def stale(known: Mapping[str, Object], keys: Mapping[str, str]) -> list[str]:
    return [name for name, key in keys.items() if name not in known or known[name].hash != key]


def table(entries: Mapping[str, Object]) -> str:
    """Return one line per object: what compiling it cost."""
    rows = [f"{'object':<32}{'kernels':>9}{'seconds':>9}{'peak MiB':>10}"]
    rows += [f"{name:<32}{len(o.kernels):>9}{o.seconds:>9.1f}{o.peak_mib:>10}" for name, o in entries.items()]
    return "\n".join(rows)


def summary(entries: Mapping[str, Object]) -> list[tuple]:
    """Return a row per architecture and kernel: machine.SUMMARY, the worst of all variants."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for name, entry in entries.items():
        for kernel, figures in entry.kernels.items():
            groups.setdefault((name.split()[1], kernel.partition("<")[0]), []).append(figures)
    return [
        (
            *key, len(all_), max(f.registers for f in all_),
            "set at launch" if any(f.dynamic_bytes is None for f in all_)
            else max(f.static_bytes + f.dynamic_bytes for f in all_) // 1024,
            min(f.blocks for f in all_), max(f.instructions for f in all_),
            sum(f.hmma + f.hgmma > 0 for f in all_), sum(f.local + f.stack_bytes + f.spill_bytes > 0 for f in all_),
        )
        for key, all_ in sorted(groups.items())
    ]  # fmt: skip


def load(path: Path | None = None) -> tuple[dict, dict[str, Object]]:
    """Return the versions and the objects of the committed file, empty where there is none."""
    path = path or FILE
    if not path.exists():
        return {}, {}
    data = json.loads(path.read_text())
    entries = {
        name: Object(**{
            **entry, "warnings": tuple(entry["warnings"]),
            "kernels": {kernel: Facts(**figures) for kernel, figures in entry["kernels"].items()},
        })
        for name, entry in data.pop("objects").items()
    }  # fmt: skip
    return data, entries


def save(entries: Mapping[str, Object], versions: Mapping[str, str], path: Path | None = None) -> None:
    blocks = []
    for name, entry in entries.items():
        head = json.dumps({key: value for key, value in asdict(entry).items() if key != "kernels"})
        lines = [f"   {json.dumps(kernel)}: {json.dumps(asdict(f))}" for kernel, f in entry.kernels.items()]
        kernels = "{\n" + ",\n".join(lines) + "}" if lines else "{}"
        blocks.append(f'  {json.dumps(name)}: {head[:-1]}, "kernels": {kernels}}}')
    body = ",\n".join(blocks)
    (path or FILE).write_text(f'{json.dumps(dict(versions))[:-1]}, "objects": {{\n{body}\n}}}}\n')


def check(args: argparse.Namespace) -> tuple[list[str], str]:
    """Compile what changed, show every kernel; return what is broken or got worse, and what was done."""
    versions, known = load()
    tools, tiny = nvcc.find(), args.size == "tiny"
    if not tools.missing:
        versions = {"nvcc": tools.version, "cutlass": tools.cutlass_version}
    sources = {f"{source.name} {sm}": (source, sm) for source, sm in nvcc.objects()}
    wanted = TINY if tiny else tuple(sources)
    compiler = (versions.get("nvcc", ""), versions.get("cutlass", ""))
    keys = {name: nvcc.key(*sources[name], *compiler, (COUNTED, DYNAMIC)) for name in wanted}
    due = stale(known, keys)
    if tools.missing:
        say(f"{tools.missing}: nothing of csrc/cuda compiled, only hashes compared")
        return ([] if tiny else unknown(due, known, keys)), f"{len(keys) - len(due)} of {len(keys)} objects unchanged"
    if tiny or args.all:
        due = list(keys)
    compiled = {name: compile_object(*sources[name], tools, keys[name]) for name in track(due, "nvcc", len(due))}
    entries = {name: compiled.get(name) or known[name] for name in keys}
    show(entries, args.k)
    failures = [line for name, entry in entries.items() for line in breaches(name, entry)]
    minutes = sum(entry.seconds for entry in entries.values()) / 60 / 2
    if minutes > BUILD_MINUTES:
        failures.append(f"csrc/cuda: {minutes:.0f} minutes of nvcc on two cores, expected at most {BUILD_MINUTES}")
    if args.update and not tiny:
        save(entries, versions)
    elif not tiny:
        failures += [line for name in compiled for line in changes(name, known.get(name), compiled[name])]
        failures += gone(known, keys)
    return failures, f"{len(compiled)} objects compiled, {len(entries) - len(compiled)} unchanged"


def unknown(due: Iterable[str], known: Mapping[str, Object], keys: Mapping[str, str]) -> list[str]:
    """Say what cannot be known without a compiler, and what to do about it; the rules hold for what is committed."""
    out = [line for name, entry in known.items() for line in breaches(name, entry)] + gone(known, keys)
    todo = f"{nvcc.HELP}, then python -m bench static-gate --update"
    return out + [f"{name}: differs from what results/{FILE.name} was made of: {todo}" for name in due]


def gone(known: Mapping[str, Object], keys: Mapping[str, str]) -> list[str]:
    return [f"{name}: compiled no more: python -m bench static-gate --update" for name in known if name not in keys]


def show(entries: Mapping[str, Object], expression: str) -> None:
    wanted = store.keyword_filter(expression)
    kernels = {f"{name} {kernel}": f for name, o in entries.items() for kernel, f in o.kernels.items()}
    say(machine.table({name: figures for name, figures in kernels.items() if wanted(name)}))
    say("\n" + table(entries) + "\n")
