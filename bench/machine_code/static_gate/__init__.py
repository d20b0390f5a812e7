"""The static gate: every Triton and CUDA kernel compiled for GPUs that are not here, and what the machine code says.

A gate for each backend (triton.py, cuda.py): figures of every kernel, absolute rules, the committed figures to compare
with. machine.py reads machine code for both, nvcc.py compiles csrc/cuda. No kernel runs.
"""

from __future__ import annotations

import argparse
import importlib.util

from bench.instrument.progress import say
from bench.machine_code.static_gate import cuda, machine, triton

__all__ = ["GATES", "add_arguments", "cuda", "machine", "main", "triton"]

GATES = {"triton": triton, "cuda": cuda}  # each with check(args) -> what is broken or got worse, and what was done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="compile everything even where the sources are unchanged")
    parser.add_argument("--size", choices=("tiny", "default"), default="default", help="tiny: one model, no budget")
    parser.add_argument(
        "--update", action="store_true", help=f"write results/{triton.FILE.name} and results/{cuda.FILE.name}"
    )
    parser.add_argument("--only", choices=tuple(GATES), help="the kernels of one backend")
    parser.add_argument(
        "-k", metavar="EXPR", default="", help="show kernels whose name matches words with and, or, not"
    )


def main(args: argparse.Namespace) -> int:
    """Check every kernel; return 1 with the lines that say what is broken or got worse."""
    if importlib.util.find_spec("triton") is None:  # its wheel brings nvdisasm, which the other gate needs as well
        raise ValueError("triton: got no such package, expected it installed (pip install .[triton])")
    failures, done = [], []
    for name in [args.only] if args.only else GATES:
        lines, what = GATES[name].check(args)
        failures += lines
        done.append(f"{name}: {what}")
    say("\n".join(["", *failures, *done]))
    return int(bool(failures))
