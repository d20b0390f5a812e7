"""The contest: `native` against every public MoE implementation for CPUs, each verified before it is timed.

Every contender has a worker process to itself (bench/instrument/crew.py); their rounds are interleaved, A B C, C B A.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bench.instrument import arguments, measure, store
from bench.instrument.cases import PRESETS, Case
from bench.instrument.contender import Contender
from bench.instrument.crew import PEAK, Crew, InWorkers
from bench.instrument.progress import say
from bench.instrument.race import Run, race
from bench.instrument.shapes import MODEL_SHAPES
from bench.machine_code import inner_loops
from bench.peers import libraries, tables

SEAT = "bench.peers.seat:ContestSeat"
# What a worker may need: its own imports, weights with a packed copy, and gradients in training.
PROCESS_BYTES, COPIES, MEMORY_SHARE = 1 << 29, 3, 0.7


@dataclass(frozen=True)
class Size:
    """Cases by (shape, tokens, threads, routing), each in every mode and dtype, and how long to time each.

    inference_only: shapes whose training step would take most of the time.
    """

    settings: tuple[tuple[str, int, int, str], ...]
    rounds: int
    seconds: float
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    contenders: tuple[str, ...] = tuple(libraries.CONTENDERS)
    inference_only: tuple[str, ...] = ()


S, B, XL = "S/2-8E2A", "B/2-8E2A", "XL/2-8E2A"
SKEWED = "position_skewed"
PLAN = (
    *((S, 256, 1, SKEWED), (S, 1024, 1, SKEWED), (S, 4096, 1, SKEWED)),
    *((B, 1024, 1, SKEWED), (XL, 1024, 1, SKEWED), (S, 1024, 2, SKEWED)),
    *((S, 1024, 1, preset) for preset in PRESETS if preset != SKEWED),
)
TORCH_ONLY = tuple(c.name for c in libraries.CONTENDERS.values() if not c.library and c.name != "compiled")
SIZES = {
    "tiny": Size((("digits", 64, 1, "empty_experts"),), 3, 0.2, ("fp32",), TORCH_ONLY),
    "default": Size(PLAN, 5, 5.0, inference_only=(XL,)),
    "full": Size(PLAN, 9, 20.0),
}


def peak_shares(case: Case, name: str, run: Run, samples: Mapping[str, measure.Samples]) -> dict[str, Any]:
    """Return the peak of the same rounds and the share of it that a contender reached, with its interval."""
    peak = samples.get(PEAK)
    if peak is None or peak.wrong:
        return {}
    ratio = measure.ratio(samples[name], peak)  # of a call to one of 1 GFLOP
    share = {key: getattr(ratio, key) * case.flops / 1e9 for key in ("value", "low", "high")}
    return {"peak_gflops": 1 / peak.summary().median, "peak_share": share}


def compete(
    case: Case, contenders: Sequence[Contender], crew: Crew, folder: Path, rounds: int, seconds: float
) -> list[dict]:
    """Race the contenders at one layer case, each in its worker; return their rows, of kind "contest"."""
    workers = InWorkers(crew, SEAT, folder)
    return list(race(case, contenders, rounds, seconds, workers, partial(peak_shares, case), "contest"))


def plan(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for; ValueError when there are none, or too many threads."""
    size, cores = SIZES[args.size], len(os.sched_getaffinity(0))
    settings, skipped = [setting for setting in size.settings if setting[2] <= cores], size.inference_only
    asked = (args.shapes, args.tokens, args.threads, args.routing)
    if any(asked):
        settings, skipped = list(product(*(some or [one] for some, one in zip(asked, settings[0], strict=True)))), ()
    if over := [threads for _, _, threads, _ in settings if threads > cores]:
        raise ValueError(f"--threads: got {over[0]}, expected 1..{cores}, the cores this process may use")
    wanted = store.keyword_filter(args.k)
    cases = [
        Case("layer", "any", MODEL_SHAPES[shape], routing, T, dtype, mode, threads)
        for shape, T, threads, routing in settings
        for mode in args.modes or (("fwd",) if shape in skipped else ("fwd", "fwdbwd"))
        for dtype in args.dtypes or size.dtypes
    ]
    chosen = [case for case in cases if wanted(case.id)]
    if not chosen:
        raise ValueError(f"no case selected by -k {args.k!r} of {len(cases)}; the first is {cases[0].id}")
    return chosen


def _words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, expected some of {', '.join(allowed)}")
        return words

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="print the contenders, and why some cannot run here")
    parser.add_argument("--install", metavar="NAMES", help=f"all, or some of {', '.join(libraries.PACKAGES)}")
    parser.add_argument("--peers", metavar="NAMES", help="comma-separated contenders; default: all")
    parser.add_argument("-k", metavar="EXPR", default="", help="words of the case id with and, or, not, ( )")
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="default",
        help="tiny: seconds; default: 35 to 40 minutes; full: more",
    )
    shapes = list(MODEL_SHAPES)
    for option, parse, what in (
        ("--shapes", _words(shapes), f"some of {', '.join(shapes)}"),
        ("--tokens", arguments.counts, "tokens per call"),
        ("--threads", arguments.counts, "numbers of threads"),
        ("--routing", _words(PRESETS), f"some of {', '.join(PRESETS)}"),
        ("--dtypes", _words(("fp32", "bf16")), "fp32, bf16"),
        ("--modes", _words(("fwd", "fwdbwd")), "fwd, fwdbwd"),
    ):
        parser.add_argument(option, metavar="LIST", type=parse, help=f"comma-separated: {what}")
    parser.add_argument("--rounds", type=arguments.count, help="least number of rounds per case")
    parser.add_argument("--seconds", type=arguments.seconds, help="more rounds are run until a case took so long")
    parser.add_argument(
        "--out", type=Path, default=Path("report/peers.jsonl"), help="row file, added to (default: report/peers.jsonl)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the rows that --out has")


def main(args: argparse.Namespace) -> int:
    """Run the contest and print its table; returns 1 when a contender of ours is wrong, 130 when interrupted."""
    if args.install:
        libraries.install(args.install.split(","))
        say(f"installed under {libraries.FOLDER.name}/: {', '.join(filter(libraries.installed, libraries.PACKAGES))}")
        return 0
    size = SIZES[args.size]
    contenders = libraries.choose(args.peers or ",".join(size.contenders))
    if args.list:
        for c in libraries.choose(args.peers):
            say(f"{c.name:<12} {c.title:<24} {c.why_not() or 'available'}")
        return 0
    cases = plan(args)
    rounds, seconds = args.rounds or size.rounds, size.seconds if args.seconds is None else args.seconds
    if args.fresh:
        store.check_rows_file(args.out).unlink(missing_ok=True)
    store.append(args.out, inner_loops.row())
    rows: list[dict] = []
    try:
        for row in _run(cases, contenders, rounds, seconds):
            store.append(args.out, row)
            rows.append(row)
    except KeyboardInterrupt:
        say(f"interrupted: {len(rows)} rows kept in {args.out}")
        return 130
    say(f"\n{tables.text(rows)}\nrows: {args.out}")
    return int(any(row["wrong"] and row["ours"] for row in rows))


def batches(contenders: Sequence[Contender], case: Case) -> list[list[Contender]]:
    """Split the contenders so that those who run together fit into memory; ours take part in every batch."""
    shape = case.shape
    weights = case.torch_dtype.itemsize * 3 * shape.H * (shape.E * shape.I + shape.Is)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seats = int(MEMORY_SHARE * free / (COPIES * weights + PROCESS_BYTES))
    ours, others = ([c for c in contenders if c.ours is mine] for mine in (True, False))
    size = max(1, seats - len(ours))
    return [[*ours, *others[i : i + size]] for i in range(0, len(others), size)] or [ours]


def _run(cases: Sequence[Case], contenders: Sequence[Contender], rounds: int, seconds: float) -> Iterator[dict]:
    """Yield every row as soon as its case is done; cases with as many threads share the workers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        crew = stack.enter_context(Crew())
        for case in sorted(cases, key=lambda case: case.threads):
            rows: dict[str, dict] = {}
            for batch in batches(contenders, case):
                for row in compete(case, batch, crew, folder, rounds, seconds):
                    rows.setdefault(row["contender"], row)
            say(tables.line(list(rows.values())))
            yield from rows.values()
