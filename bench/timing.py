"""Time anything of the case list on demand: one level of one model, contenders interleaved and verified first."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from bench import stages
from bench.instrument import arguments, store, workloads
from bench.instrument.cases import BACKENDS, BY_SCORES, DEVICES, DTYPES, LEVELS, MODES, PEERS, Case
from bench.instrument.progress import say
from bench.instrument.races import line
from bench.instrument.shapes import MODEL_SHAPES, ROUTING_PRESETS
from bench.peers import families

ROUTINGS = ("gate", *ROUTING_PRESETS, *BY_SCORES)
STEPS = {"train_step": "fwdbwd", "sampling_step": "fwd"}  # their only mode
DEFAULT = {"cpu": ("native", "grouped", stages.LOOP), "cuda": ("triton", "cuda", "grouped", stages.LOOP)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    levels = [name for names in LEVELS.values() for name in names]
    parser.add_argument("level", choices=levels, help="a room, the layer, a block, or a whole step of the model")
    parser.add_argument("--shapes", default="S/2-8E2A", help="comma-separated model shapes (default: S/2-8E2A)")
    parser.add_argument(
        "--model",
        choices=list(families.MODELS),
        help="instead of --shapes: layer or block of this model, its router included, as its package has it (where "
        "there is none: our stand-in in plain torch) and after replace_moe; on a CPU, fp32 (bf16 of a layer's forward)",
    )
    parser.add_argument("--depth", type=arguments.count, help="blocks of the model in a step (default: all)")
    parser.add_argument(
        "--tokens",
        type=arguments.counts,
        default="1024",
        help="comma-separated; of a step both halves of guidance count",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--backends", help=f"some of {', '.join((*BACKENDS, *PEERS))}")
    parser.add_argument("--dtypes", default="fp32", help="some of fp32, bf16, fp16; on a GPU tf32, too")
    parser.add_argument("--modes", default="fwd", help="some of fwd, bwd, fwdbwd; steps have one of their own")
    parser.add_argument("--routing", default="position_skewed", help=f"{', '.join(ROUTINGS)}")
    threads = {"type": arguments.counts, "default": str(len(os.sched_getaffinity(0)))}
    parser.add_argument("--threads", **threads, help="comma-separated (default: all)")
    parser.add_argument("--rounds", type=arguments.count, default=9, help="least number of rounds")
    parser.add_argument(
        "--seconds", type=arguments.seconds, default=10.0, help="more rounds are run until a race took so long"
    )
    parser.add_argument(
        "--out", type=Path, help="row file, added to (default: report/times.jsonl; with --model report/family.jsonl)"
    )


def races(args: argparse.Namespace) -> Iterator[stages.Race | families.FamilyRace]:
    """Yield the races that the arguments ask for; ValueError names what is unknown."""

    def words(option: str, allowed: object) -> list[str]:
        asked = getattr(args, option).split(",")
        for word in asked:
            if word not in allowed:
                raise ValueError(f"--{option}: got {word!r}, expected some of {', '.join(allowed)}")
        return asked

    if args.model:
        if args.device != "cpu":
            raise ValueError(f"--model {args.model}: got {args.device}, expected cpu")
        dtypes, modes = words("dtypes", ("fp32", families.NARROW)), words("modes", ("fwd", "fwdbwd"))
        who = args.threads, args.backends, args.rounds, args.seconds
        yield from families.races(args.model, args.level, args.tokens, dtypes, modes, *who)
        return
    contenders = words("backends", (*BACKENDS, *PEERS)) if args.backends else DEFAULT[args.device]
    modes = [STEPS[args.level]] if args.level in STEPS else words("modes", MODES)
    routing = "gate" if args.level in (*LEVELS["block"], *STEPS) else args.routing
    allowed = [name for name in ROUTINGS if name not in BY_SCORES or args.level == "dispatch"]
    if routing not in allowed:
        raise ValueError(f"--routing: got {routing!r}, expected one of {', '.join(allowed)}")
    settings = product(words("shapes", MODEL_SHAPES), args.tokens, words("dtypes", DTYPES), modes, args.threads)
    for name, tokens, dtype, mode, threads in settings:
        shape = MODEL_SHAPES[name]
        if args.depth:
            shape = replace(
                shape, name=f"{name}, {args.depth} blocks", model=f"{shape.model}x{args.depth}", depth=args.depth
            )
        case = Case(args.level, "any", shape, routing, tokens, dtype, mode, threads, args.device)
        able = [c for c in contenders if not workloads.why_not(replace(case, backend=c))]
        if not able:
            reason = workloads.why_not(replace(case, backend=contenders[0]))
            raise ValueError(f"--backends: nobody of {', '.join(contenders)} can run {case}: {reason}")
        workloads.expect_model(case)
        yield stages.Race(case, tuple(able), args.rounds, args.seconds)


def main(args: argparse.Namespace) -> int:
    """Race, print and keep the rows; returns 1 when a contender is wrong."""
    rows, out = [], args.out or Path("report", "family.jsonl" if args.model else "times.jsonl")
    for race in list(races(args)):
        for row in race.run():
            store.append(out, row)
            say(line(row))
            rows.append(row)
    say(f"rows: {out}")
    return int(any(row["wrong"] for row in rows))
