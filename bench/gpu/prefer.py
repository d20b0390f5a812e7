"""Which of our backends for GPUs "auto" takes, measured: the file that moe_kernels/backends/preferred.py reads.

Token counts and arithmetic (TF32 or not) are no part of a key, so all cases of a key must agree: a backend is written
where it is faster for sure in one of them at least, and the other in none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import product

import torch

import moe_kernels
from bench.gpu.device_table import GAIN, known_keys, save, within
from bench.gpu.plan import ROUTING
from bench.instrument.cases import ROOMS, Case, kernels_on
from bench.instrument.contender import by_name
from bench.instrument.progress import say
from bench.instrument.race import race
from bench.instrument.races import line
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels.backends import base, preferred

LEVELS = ("layer", *ROOMS)
DTYPES = {"bf16": ("bf16",), "fp16": ("fp16",), "fp32": ("fp32", "tf32")}  # what torch calls float32 is both
SECONDS = 1.0  # of each race


def key_of(case: Case) -> str:
    """Return the key of the call that takes the time of a case: of a layer that is moe_mlp."""
    room, s = "moe_mlp" if case.level == "layer" else case.level, case.shape
    dtype = torch.float32 if room == "dispatch" else case.torch_dtype
    widths = {"gating": (s.H, 0), "combine": (s.H, 0), "dispatch": (0, 0)}.get(room, (s.H, s.I))
    return preferred.key(base.Request(room, dtype, case.device, s.E, *widths))


def races(args: argparse.Namespace) -> dict[str, list[Case]]:
    """Return the cases behind every key that the arguments ask for; ValueError for words that are unknown."""
    for option, allowed in (("shapes", MODEL_SHAPES), ("dtypes", DTYPES)):
        unknown = [word for word in getattr(args, option).split(",") if word not in allowed]
        if unknown:
            raise ValueError(f"--{option}: got {unknown[0]!r}, expected some of {', '.join(allowed)}")
    dtypes, tokens = args.dtypes.split(","), [int(T) for T in args.tokens.split(",")]
    found: dict[str, dict[Case, None]] = {}
    for level, dtype, name in product(LEVELS, dtypes, args.shapes.split(",")):
        integers = level == "dispatch"  # no gradient, no dtype
        modes, kinds = (("fwd",), ("fp32",)) if integers else (("fwd", "fwdbwd"), DTYPES[dtype])
        for kind, T, mode in product(kinds, tokens, modes):
            case = Case(level, "any", MODEL_SHAPES[name], ROUTING, T, kind, mode, device="cuda")
            found.setdefault(key_of(case), {})[case] = None
    return {key: list(cases) for key, cases in found.items()}


def decide(cases: Iterable[Case], backends: Sequence[str], seconds: float = SECONDS) -> str | None:
    """Race two backends over the cases of a key; return the one to prefer, None where the intervals do not decide."""
    winners = set()
    for case in cases:
        rows = list(race(case, [by_name(name) for name in backends], 9, seconds))
        for row in rows:
            say(line(row))
        if any(row["wrong"] or row["reason"] for row in rows):  # or memory ran out
            return None
        winners |= {winner(row) for row in rows}
    winners.discard(None)
    return winners.pop() if len(winners) == 1 else None


def winner(row: dict) -> str | None:
    """Return the backend of a row that is faster than all others for sure."""
    sure = bool(row["speedups"]) and all(ratio["low"] > GAIN for ratio in row["speedups"].values())
    return row["contender"] if sure else None


def main(args: argparse.Namespace) -> int:
    """Race on this machine's GPU and add to the file as results come in."""
    wanted, backends = races(args), kernels_on("cuda")
    device, known = known_keys(args.out)
    for info in moe_kernels.backends():
        if info.name in backends and not info.available:
            raise ValueError(f"--backends: got a machine without {info.name} ({info.reason}), expected both")

    def work(key: str) -> None:
        name = decide(wanted[key], backends)
        say(f"{key}: {name or 'undecided'}")
        if name:
            save(args.out, device, key, name)
            known.add(key)

    within(args.minutes, {key: lambda key=key: work(key) for key in wanted if key not in known})
    say(f"{len(known)} preferences of {device}: {args.out}")
    return 0
