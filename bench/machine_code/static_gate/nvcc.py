"""The CUDA sources as csrc/cuda/CMakeLists.txt compiles them: architectures, flags, headers, nvcc, CUTLASS.

An object is one source for one architecture, "sums.cu sm_90"; its key hashes all that its machine code follows from.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench.instrument import store

CSRC = store.ROOT / "csrc"
SOURCES = CSRC / "cuda"
LISTS = SOURCES / "CMakeLists.txt"
RELEASE = ("-O3", "-DNDEBUG")  # what CMake adds for a release build
MEASURED = (  # a small process in between: Linux counts what its parent held into a child's peak, and torch is large
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)
HELP = "put nvcc 12.3 or newer on PATH and pip install --no-deps -c constraints.txt nvidia-cutlass"


@dataclass(frozen=True)
class Tools:
    """A compiler and headers, or why there are none."""

    nvcc: str = ""
    version: str = ""
    cutlass: str = ""
    cutlass_version: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Run:
    """What nvcc said, and what it cost: time, and the memory of its largest process."""

    log: str
    seconds: float
    peak_mib: int


def find() -> Tools:
    """Look for nvcc and the CUTLASS headers where CMake does."""
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        return Tools(missing="no nvcc on PATH")
    spec = importlib.util.find_spec("cutlass_library")
    headers = Path(spec.submodule_search_locations[0]) / "source" / "include" if spec else Path("-")
    if not (headers / "cute" / "arch" / "mma_sm90_gmma.hpp").exists():
        return Tools(missing="no CUTLASS headers (package nvidia-cutlass)")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return Tools(nvcc, re.search(r"\bV([\d.]+)", said)[1], str(headers), metadata.version("nvidia-cutlass"))


def objects() -> list[tuple[Path, str]]:
    """Return every source with every architecture that it gets machine code for (PTX for later ones is not counted).

    Raises: ValueError where CMakeLists.txt does not say it in the words that are understood here.
    """
    calls = re.findall(r"\bfor_architectures\((\$\S+)\s+([^)]*)\)", LISTS.read_text())
    patterns = [(re.sub(r"\$\{CMAKE_CURRENT_SOURCE_DIR\}/", "", name), what) for name, what in calls]
    out = []
    for source in sorted(SOURCES.glob("*.cu")):
        mine = [what for name, what in patterns if fnmatch.fnmatch(source.name, re.sub(r"\$\{\w+\}", "*", name))]
        found = re.findall(r"\bcode=(sm_\w+)", mine[-1]) if mine else []
        if not found:
            raise ValueError(f"{LISTS.name}: got no for_architectures(... code=sm_..) for {source.name}, expected one")
        out += [(source, sm) for sm in found]
    return out


def flags() -> list[str]:
    """Return the flags of all sources, the architecture and the headers' path left out.

    Raises: ValueError as objects.
    """
    text = LISTS.read_text()
    standard, own = re.search(r"\bCMAKE_CUDA_STANDARD (\d+)", text), re.search(r"\bset\(flags ([^)]*)\)", text)
    if not standard or not own:
        raise ValueError(f"{LISTS.name}: got no CMAKE_CUDA_STANDARD or no set(flags ...), expected both")
    return [f"-std=c++{standard[1]}", *RELEASE, *own[1].split()]


def included(source: Path) -> list[Path]:
    """Return the project's headers that a source includes, and those that they include; not csrc/tests, for CPUs."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            if header.exists() and CSRC / "tests" not in header.parents and header not in found:
                found[header] = None
                waiting.append(header)
    return sorted(found)


def key(source: Path, sm: str, version: str, cutlass_version: str, counted: object) -> str:
    """Return the hash of what an object's figures depend on: source, headers, flags, compiler, what is counted."""
    digest = hashlib.sha256(repr((sm, flags(), version, cutlass_version, counted)).encode())
    for path in (source, *included(source)):
        digest.update(os.path.relpath(path, SOURCES).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cubin(source: Path, sm: str, tools: Tools, out: Path) -> Run:
    """Compile a source for one architecture; ptxas says what it used."""
    return compile_(source, tools, ["-cubin", *architecture(sm), "-Xptxas=-v", "-o", str(out)])


def constants(source: Path, sm: str, tools: Tools, expressions: Sequence[str]) -> list[int]:
    """Evaluate constant expressions of C++ behind the headers that a source includes."""
    lines = [line for line in source.read_text().splitlines() if re.match(r'\s*#\s*include\s+"', line)]
    lines += [f'extern "C" __device__ int constant_{i} = {text};' for i, text in enumerate(expressions)]
    with tempfile.TemporaryDirectory() as folder:
        probe, ptx = Path(folder) / "probe.cu", Path(folder) / "probe.ptx"
        probe.write_text("\n".join(lines) + "\n")
        compile_(probe, tools, ["-ptx", *architecture(sm, code=False), f"-I{source.parent}", "-o", str(ptx)])
        values = dict(re.findall(r"\bconstant_(\d+)(?: = (-?\d+))?;", ptx.read_text()))  # 0 is not written
    return [int(values[str(i)] or 0) for i in range(len(expressions))]


def architecture(sm: str, code: bool = True) -> list[str]:
    virtual = sm.replace("sm_", "compute_")
    return [f"-gencode=arch={virtual},code={sm}"] if code else [f"-arch={virtual}"]


def compile_(source: Path, tools: Tools, options: Sequence[str]) -> Run:
    """Run nvcc.

    Raises: ValueError with the first lines that nvcc wrote where it fails.
    """
    command = [tools.nvcc, *flags(), "-isystem", tools.cutlass, *options, str(source)]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-S", "-c", MEASURED, *command], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line or "fatal" in line] or lines
        raise ValueError(f"{source.name}: nvcc exits with {done.returncode}: " + "; ".join(errors[:3]))
    return Run(done.stderr, round(time.monotonic() - start, 1), int(done.stdout.splitlines()[-1]) // 1024)
