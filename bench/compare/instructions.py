"""Instructions that the kernels execute: counts do not wobble, so a pull request can be held to them.

AVX2 and portable kernels run under callgrind (valgrind knows no AVX-512), linked to the library that the revision's
build left behind; of the AVX-512 ones the disassembly's inner loops are counted (bench/machine_code/inner_loops.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from bench.compare.revisions import Checkout
from bench.instrument import store
from bench.machine_code import inner_loops

SOURCE = Path(__file__).with_suffix(".cpp")
LEVELS, DTYPES = ("avx2", "portable"), ("fp32", "bf16")
COUNTED = "moe::moe_mlp_*"  # forward and backward, without the making of inputs


def rows(checkout: Checkout) -> list[dict]:
    """Return the revision's rows of kinds "inner_loops" and "instructions"; without counts they say the reason."""
    extension = next(checkout.site.glob("moe_kernels/_C*.so"), None)
    counts, reason = {}, None
    try:
        counts = count(checkout)
    except RuntimeError as error:
        reason = str(error)
    found = [store.row("instructions", counts=counts, reason=reason, wrong=None)]
    if extension:
        found.append(inner_loops.row(extension))
    return [row | {"commit": checkout.commit, "dirty": False} for row in found]


def count(checkout: Checkout) -> dict[str, int]:
    """Return instructions of one fused layer, forward and backward, by level and dtype, as "layer avx2 fp32".

    Raises: RuntimeError without valgrind or a C++ compiler, or when this source does not fit the revision's kernels.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    library = next(checkout.tree.glob("build/cp*/libmoe_native.a"), None)
    for name, found in (("valgrind", shutil.which("valgrind")), ("a C++ compiler", compiler)):
        if found is None:
            raise RuntimeError(f"{name} is not installed")
    if library is None:
        raise RuntimeError("the build left no libmoe_native.a")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "layer"
        include = f"-I{checkout.tree / 'csrc'}"
        _run([compiler, "-std=c++17", "-O1", "-fopenmp", include, str(SOURCE), str(library), "-o", str(binary)])
        return {f"layer {level} {dtype}": _collected(binary, level, dtype) for level, dtype in product(LEVELS, DTYPES)}


def _collected(binary: Path, level: str, dtype: str) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={COUNTED}"]
    said = _run([*command, str(binary), dtype], {"MOE_KERNELS_ISA": level, "OMP_NUM_THREADS": "1"})
    found = re.search(r"Collected : (\d+)", said)
    if not found or not int(found[1]):
        raise RuntimeError(f"callgrind counted nothing in {COUNTED}")
    return int(found[1])


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((line for line in lines if "error:" in line), lines[-1])
        raise RuntimeError(f"{Path(command[0]).name} failed: {why.rpartition('error: ')[2][:200]}")
    return done.stderr
