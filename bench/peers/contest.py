"""The contest: `native` against every public MoE implementation for CPUs, each verified before it is timed.

Every contender has a worker process to itself, so that no library's OpenMP, oneDNN or patching disturbs another.
One scheduler interleaves their rounds (A B C, C B A, ...); whoever is not timed blocks on a pipe. This process judges.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.instrument import arguments, measure, store, verify, workloads
from bench.instrument.cases import PRESETS, Case
from bench.instrument.progress import say
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.worker import Worker, WorkerError
from bench.machine_code import inner_loops
from bench.peers import libraries, tables
from bench.peers.libraries import Contender

PEAK = "peak"
SEAT = "bench.peers.seat:Seat"
ROUND_S = 0.03  # of calls, for every contender in every round
# Other people's kernels may trade accuracy for speed (zentorch's fp32 SiLU: 4.1 times plain torch's error): to 8 times
# plain torch's error they are timed, with the error beside the time. Ours stay under verify.BOUND.
FOREIGN_BOUND = 8.0
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


@dataclass
class Runner:
    """A contender in its worker, as `measure.interleave` sees contenders; `reason`: why it cannot run, or how it fell.

    Its result is itself: what it computed stays in the worker until the judge asks.
    """

    worker: Worker | None = None
    reason: str | None = None

    def __call__(self) -> Runner:
        return self

    def ask(self, method: str, **arguments: Any) -> Any:
        return self.noting(self.worker.call, method, **arguments)

    def noting(self, function: Callable, *args: Any, **arguments: Any) -> Any:
        """Call a method of the worker; an error of it is kept as the reason, and raised."""
        try:
            return function(*args, **arguments)
        except WorkerError as error:
            self.reason = str(error)
            raise


def timer(runner: Runner, calls: int, device: str) -> tuple[float, float, Runner]:
    wall, cpu = runner.ask("time", calls=calls)
    return wall, cpu, runner


@dataclass
class Crew:
    """The workers, kept from case to case; another number of threads gets new ones (OpenMP reads it at its start)."""

    threads: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)

    def seat(self, targets: Mapping[str, tuple[str, dict]], threads: int) -> dict[str, Runner]:
        """Build each target (module:callable, arguments) in the worker of its name, all of them at once."""
        if threads != self.threads:
            self.close()
            self.threads = threads
        for name in self.workers.keys() - targets:  # whoever sits this one out needs no memory
            with suppress(WorkerError):
                self.workers[name].build("builtins:object")
        runners = {name: Runner(self._worker(name)) for name in targets}
        for name, (target, keywords) in targets.items():
            runners[name].worker.send("build", target=target, **keywords)
        for runner in runners.values():
            with suppress(WorkerError):
                runner.noting(runner.worker.receive)
        return runners

    def _worker(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            env = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "passive"}
            self.workers[name] = Worker(path=[store.ROOT], env=env)
        return self.workers[name]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compete(
    case: Case, contenders: Sequence[Contender], crew: Crew, folder: Path, rounds: int, seconds: float
) -> list[dict]:
    """Verify and time the contenders at one layer case; return a row of kind "contest" for each, failures included.

    Args:
        case: of any backend. folder: for the results that travel to the judge. rounds, seconds: see
            `measure.interleave`.
    """
    cases = {c.name: replace(case, backend=c.name) for c in contenders}
    reasons = {c.name: c.why_not(cases[c.name]) for c in contenders}
    able = [c.name for c in contenders if not reasons[c.name]]
    targets = {name: (SEAT, {"name": name, "case": cases[name].id}) for name in able}
    runners = crew.seat({PEAK: ("bench.peers.seat:Peak", {"case": case.id}), **targets}, case.threads)
    checks, versions, digests = {}, {}, {}

    def judge(name: str, runner: Runner) -> str | None:
        if name == PEAK:
            return None
        path, known = folder / "result.pt", digests.get(name, "")
        versions[name] = runner.ask("version")
        digests[name] = runner.ask("save", path=str(path), known=known)
        if digests[name] == known:
            return checks[name].wrong
        bound = verify.BOUND if libraries.CONTENDERS[name].ours else FOREIGN_BOUND
        with measure.threads(len(os.sched_getaffinity(0))):  # nobody is timed meanwhile
            checks[name] = workloads.check(cases[name], torch.load(path, mmap=True), bound)
        path.unlink()
        return checks[name].wrong

    racing = {name: runner for name, runner in runners.items() if not runner.reason}
    how = {"threads": case.threads, "timer": timer, "min_call_s": ROUND_S}
    samples = measure.interleave(racing, rounds, seconds, judge, **how) if racing else {}
    return [
        _row(cases[c.name], c, samples, checks.get(c.name), reasons[c.name] or runners[c.name].reason, versions)
        for c in contenders
    ]


def _row(
    case: Case,
    contender: Contender,
    samples: Mapping[str, measure.Samples],
    check: verify.Check | None,
    reason: str | None,
    versions: Mapping[str, str],
) -> dict:
    s, peak = samples.get(contender.name), samples.get(PEAK)
    ours = [samples[c.name] for c in libraries.CONTENDERS.values() if c.ours and c.name in samples]
    timed = not reason and not s.wrong
    figures = s.figures(case.flops, case.bytes) if timed else {}
    if timed and peak and not peak.wrong:
        ratio = measure.ratio(s, peak)  # of a call to one of 1 GFLOP
        figures["peak_gflops"] = 1 / peak.summary().median
        figures["peak_share"] = {key: getattr(ratio, key) * case.flops / 1e9 for key in ("value", "low", "high")}
    return store.row(
        "contest", race=replace(case, backend="any").id, case=case.id, contender=contender.name,
        title=contender.title, ours=contender.ours, library=versions.get(contender.name, ""),
        model=case.shape.name, T=case.T, dtype=case.dtype, mode=case.mode, threads=case.threads, routing=case.routing,
        figures=figures, errors=check.errors if check else {},
        bound=verify.BOUND if contender.ours else FOREIGN_BOUND,
        speedup_of={o.name: asdict(measure.ratio(o, s)) for o in ours if timed and o is not s and not o.wrong},
        reason=reason, wrong=None if reason else s.wrong,
        samples_us=store.thin([round(t * 1e6, 3) for t in s.times()]) if timed else [],
    )  # fmt: skip


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


def heats(contenders: Sequence[Contender], case: Case) -> list[list[Contender]]:
    """Split the contenders so that those who run together fit into memory; ours take part in every heat."""
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
            for heat in heats(contenders, case):
                for row in compete(case, heat, crew, folder, rounds, seconds):
                    rows.setdefault(row["contender"], row)
            say(tables.line(list(rows.values())))
            yield from rows.values()
