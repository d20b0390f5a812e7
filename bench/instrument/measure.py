"""The one timer: verify, warm up, interleave, and say on which clock and how quietly the numbers were taken.

On a CPU one thread is compared by the process's CPU time, which other load does not disturb; several threads by the
wall time of the rounds in which they really had the cores. On a GPU by CUDA events around every call, with a cold L2.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from bench.instrument import stats, store

QUIET_SHARE = 0.9  # cpu / (threads x wall) of a round in which the threads had their cores
MIN_QUIET = 5
MAX_ROUNDS = 200
LEAST_ROUNDS = 5  # whose range holds the median in 15 of 16 cases; fewer are no measurement
MIN_CALL_S = 1e-3  # shorter calls are repeated within a round
MIN_EVENTS_S = 1e-4  # on a GPU, whose events resolve half a microsecond
FLUSH_BYTES = 256 << 20  # written and read between calls on a GPU: twice the L2 of the largest (126 MB, B200)
LEAD_CYCLES = 4_000_000  # 2 ms: longer than a CPU takes to issue the layer's forward
LONG_LEAD_CYCLES = 20_000_000  # 10 ms: its forward and backward, which take up to 2 ms
Verify = Callable[[str, Any], str | None]
Timer = Callable[[Callable[[], Any], int, str], tuple[float, float, Any]]


@dataclass
class Samples:
    """The times of one contender, one entry per round, in seconds per call; `wrong` says why there are none."""

    name: str
    threads: int = 1
    device: str = "cpu"
    calls: int = 1
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wrong: str | None = None
    once: str | None = None  # why its first call, cold, is all that was timed
    raised_s: float = 0.0  # when it raised, on the clock of time.monotonic

    def fail(self, error: Exception) -> None:
        """Note that a call raised, whatever it was: that is its answer, and the others go on."""
        self.wrong, self.raised_s = f"raised {type(error).__name__}: {error}", time.monotonic()

    @property
    def n(self) -> int:
        return len(self.wall_s)

    @property
    def clock(self) -> str:
        """cuda (events), cpu (process CPU time, one thread) or wall."""
        if self.device.startswith("cuda"):
            return "cuda"
        return "cpu" if self.threads == 1 else "wall"

    @property
    def cpu_share(self) -> float:
        """Median over rounds of cpu / (threads x wall): 1 when the machine was ours."""
        return stats.summarise([c / (self.threads * w) for c, w in zip(self.cpu_s, self.wall_s, strict=True)]).median

    def quiet_rounds(self) -> list[int]:
        """Return the rounds to judge by: those with enough CPU share on the wall clock, all on the others."""
        rounds = range(self.n)
        if self.clock != "wall":
            return list(rounds)
        return [i for i in rounds if self.cpu_s[i] >= QUIET_SHARE * self.threads * self.wall_s[i]]

    @property
    def disturbed(self) -> bool:
        """True when too few rounds were quiet, so that all of them count and the number is worth less."""
        return len(self.quiet_rounds()) < min(MIN_QUIET, self.n)

    def times(self, rounds: Sequence[int] | None = None) -> list[float]:
        """Return seconds per call on the clock of this device and thread count; by default of the quiet rounds."""
        if rounds is None:
            rounds = range(self.n) if self.disturbed else self.quiet_rounds()
        source = self.cpu_s if self.clock == "cpu" else self.wall_s
        return [source[i] for i in rounds]

    def summary(self) -> stats.Summary:
        """Return median, p20, p80 (seconds) and n; ValueError for a contender that was wrong: it has no number."""
        if self.wrong:
            raise ValueError(f"{self.name} has no number: {self.wrong}")
        return stats.summarise(self.times())

    def figures(self, flops: int = 0, nbytes: int = 0) -> dict[str, Any]:
        """Return the numbers of a row: times in us, how they were taken, and rates where flops or nbytes are given."""
        s = self.summary()
        out = {
            "time_us_median": s.median * 1e6,
            "time_us_p20": s.p20 * 1e6,
            "time_us_p80": s.p80 * 1e6,
            "n": s.n,
            "clock": self.clock,
            "cpu_share": round(self.cpu_share, 3),
            "disturbed": self.disturbed,
        }
        if self.clock == "cuda":
            out |= {"cache": "cold", "issue_us": stats.summarise(self.cpu_s).median * 1e6}
        if flops:
            out["gflops"] = flops / s.median / 1e9
        if nbytes:
            out["gbps"] = nbytes / s.median / 1e9
        return out


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run the body with n of torch's threads; ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"threads: got {n}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_calls(fn: Callable[[], Any], calls: int = 1, device: str = "cpu") -> tuple[float, float, Any]:
    """Call fn `calls` times; return wall and process CPU seconds per call, and the last result."""
    if device.startswith("cuda"):
        return _time_on_gpu(fn, calls, device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        result = fn()
    wall = time.perf_counter() - wall
    return wall / calls, (time.process_time() - cpu) / calls, result


def time_queued(
    fn: Callable[[], Any], calls: int = 1, device: str = "cpu", lead: int = LEAD_CYCLES
) -> tuple[float, float, Any]:
    """Do as `time_calls`, but on a GPU let it start on a call `lead` cycles late: kernels' time, not that of launching.

    So it is inside a model whose CPU runs ahead; a call that waits for the GPU cannot. What the CPU takes per call is
    `issue_us` among the figures.
    """
    return _time_on_gpu(fn, calls, device, lead) if device.startswith("cuda") else time_calls(fn, calls, device)


def _time_on_gpu(fn: Callable[[], Any], calls: int, device: str, lead: int = 0) -> tuple[float, float, Any]:
    """Time each call by itself, with other data in the L2: in a model a layer finds none of its operands there."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize(device)
    cpu = 0.0
    for start, end in events:
        _flush(device)
        if lead:
            torch.cuda._sleep(lead)
        start.record()
        cpu -= time.process_time()
        result = fn()
        cpu += time.process_time()
        end.record()
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls, cpu / calls, result


def _flush(device: str) -> None:
    """Fill the L2 with lines that need not be written back: 50 MB of them would cost the call after it 15 us."""
    buffer, total = _flush_buffer(device)
    buffer.zero_()
    torch.sum(buffer, 0, out=total)


@cache
def _flush_buffer(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(FLUSH_BYTES // 4, device=device), torch.empty((), device=device)


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    min_rounds: int = 15,
    max_seconds: float = 5.0,
    verify: Verify | None = None,
    *,
    threads: int = 1,
    device: str = "cpu",
    precision: float | None = None,
    timer: Timer = time_calls,
    min_call_s: float | None = None,
    begin: Callable[[str], None] = lambda name: None,
    until: float = math.inf,
    hopeless: float = math.inf,
) -> dict[str, Samples]:
    """Time contenders against each other: A B C, then C B A, and so on, so that what disturbs one disturbs all.

    Args:
        contenders: name -> call without arguments. What it returns is verified before the first timed round and after
            the last.
        min_rounds: rounds that are run whatever they cost. max_seconds: more are added until this is spent, up to
            MAX_ROUNDS.
        verify: (name, result) -> None, or what is wrong with the result. A contender that is wrong, or raises, gets
            no number: its Samples.wrong says why. The others go on.
        threads: torch's threads during the calls. device: "cpu" or "cuda".
        precision: stop early once the interval of every contender's ratio to the first is narrower than this.
        timer: (contender, calls, device) -> wall and CPU seconds per call, and the result: where contenders run in
            other processes. min_call_s: shorter calls are repeated within a round (MIN_CALL_S, or MIN_EVENTS_S).
        begin: told the name of a contender before it is called, so that one that never returns is known.
        until: on the clock of time.monotonic; behind it no round is run but the first LEAST_ROUNDS.
        hopeless: a contender whose first call takes more than this many times the CPU time of the least, and whose
            rounds would take more than max_seconds by themselves, is not called again: Samples.once says so.
    Returns:
        Samples per contender, in the given order.
    Raises: ValueError for no contenders, min_rounds < 1 or threads < 1.
    """
    if not contenders or min_rounds < 1:
        raise ValueError(f"contenders, min_rounds: got {len(contenders)} and {min_rounds}, expected at least 1 of each")
    samples = {name: Samples(name, threads, device) for name in contenders}
    if min_call_s is None:
        min_call_s = MIN_EVENTS_S if device.startswith("cuda") else MIN_CALL_S
    with _threads(threads), _no_gc():
        first = {name: _first(samples[name], verify, fn, begin) for name, fn in contenders.items()}
        if hopeless < math.inf:
            _call_once(samples, first, hopeless, max_seconds / min_rounds)
        racing = {name: fn for name, fn in contenders.items() if not (samples[name].wrong or samples[name].once)}
        for name, fn in racing.items():
            begin(name)
            _set_calls(samples[name], fn, timer, min_call_s)
        still = {name: fn for name, fn in racing.items() if not samples[name].wrong}
        results = _race(still, samples, min_rounds, max_seconds, precision, timer, begin, until)
    for name, result in results.items():
        _verify(samples[name], verify, result)
    return samples


def _first(
    s: Samples, verify: Verify | None, fn: Callable[[], Any], begin: Callable[[str], None]
) -> tuple[float, float]:
    """Call a contender for the first time, in this process, and verify what it returns; return wall and CPU seconds."""
    begin(s.name)
    try:
        wall, cpu, result = time_calls(fn)
    except Exception as error:
        s.fail(error)
        return math.inf, math.inf
    _verify(s, verify, result)
    return wall, cpu


def _call_once(
    samples: Mapping[str, Samples], first: Mapping[str, tuple[float, float]], times: float, round_s: float
) -> None:
    """Keep the first call of those that are right and that many times slower than the fastest of them.

    By CPU time, which other programs do not stretch.
    """
    right = {name: (wall, max(cpu, 1e-9)) for name, (wall, cpu) in first.items() if not samples[name].wrong}
    fastest, least = min(((name, cpu) for name, (_, cpu) in right.items()), key=lambda item: item[1], default=("", 0.0))
    for name, (wall, cpu) in right.items():
        if wall > round_s and cpu > times * least:
            s = samples[name]
            s.wall_s, s.cpu_s = [wall], [cpu]
            s.once = f"called once: {wall:.3g} s, {cpu / least:.3g} times the CPU time of {fastest}"


def _set_calls(s: Samples, fn: Callable[[], Any], timer: Timer, min_call_s: float) -> None:
    """Choose how often to call fn in a round so that the clock's own cost does not show; it warms up fn, too."""
    try:
        wall, _, _ = timer(fn, 1, s.device)
        if wall < MIN_CALL_S:
            wall, _, _ = timer(fn, 10, s.device)
        s.calls = max(1, min(1000, math.ceil(min_call_s / max(wall, 1e-9))))
    except Exception as error:
        s.fail(error)


def _race(
    racing: Mapping[str, Callable[[], Any]],
    samples: Mapping[str, Samples],
    min_rounds: int,
    max_seconds: float,
    precision: float | None,
    timer: Timer,
    begin: Callable[[str], None],
    until: float,
) -> dict[str, Any]:
    """Run the rounds; return the last result of every contender that raised nothing."""
    results: dict[str, Any] = {}
    start, order = time.monotonic(), list(racing)
    for done in range(MAX_ROUNDS if racing else 0):
        now = time.monotonic()
        if done >= min_rounds and (
            now - start > max_seconds or (done % 10 == 0 and _precise(samples, order, precision))
        ):
            break
        if done >= LEAST_ROUNDS and now > until:
            break
        for name in order if done % 2 == 0 else order[::-1]:
            s = samples[name]
            begin(name)
            try:
                wall, cpu, results[name] = timer(racing[name], s.calls, s.device)
            except Exception as error:
                s.fail(error)
                continue
            s.wall_s.append(wall)
            s.cpu_s.append(cpu)
        order = [name for name in order if not samples[name].wrong]
    return {name: results[name] for name in order} if results else {}


def _precise(samples: Mapping[str, Samples], order: Sequence[str], precision: float | None) -> bool:
    if precision is None or len(order) < 2:
        return False
    intervals = [ratio(samples[name], samples[order[0]]) for name in order[1:]]
    return all(i.high - i.low < precision * i.value for i in intervals)


def _verify(s: Samples, verify: Verify | None, result: Any) -> None:
    try:
        s.wrong = verify(s.name, result) if verify else None
    except Exception as error:
        s.fail(error)


_threads = threads  # interleave's argument hides the name


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ratio(a: Samples, b: Samples) -> stats.Ratio:
    """Return how many times faster a is than b (median b / median a), with a bootstrap interval over paired rounds.

    Raises: ValueError when one of them was wrong, or they were not interleaved with each other.
    """
    for s in (a, b):
        s.summary()
    if a.n != b.n or (a.threads, a.clock) != (b.threads, b.clock):
        raise ValueError(
            f"{a.name}, {b.name}: got {a.n} rounds on {a.threads} x {a.clock} and {b.n} on {b.threads} x {b.clock}, "
            "expected rounds of one interleaved race"
        )
    rounds = sorted(set(a.quiet_rounds()) & set(b.quiet_rounds()))
    if len(rounds) < min(MIN_QUIET, a.n):
        rounds = list(range(a.n))
    return stats.ratio(b.times(rounds), a.times(rounds), paired=True)


def ceilings(n_threads: int = 1, seconds: float = 0.2) -> dict[str, float | None]:
    """Measure what this CPU can do, in this run: the floors that every number is shown against.

    Returns:
        fma_fp32_gflops, fma_bf16_gflops: register-only multiply-add loops of the extension, None without it;
        mm_fp32_gflops, mm_bf16_gflops: torch.mm of 1024 x 1024; copy_gbps: read and write of 64 MiB.
    """
    out = {f"fma_{dtype}_gflops": peak_gflops(dtype, n_threads, seconds) for dtype in _PEAK_DTYPES}
    size = 1024
    tasks: dict[str, Callable[[], Any]] = {}
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, size, size).to(dtype)
        tasks[f"mm_{short}_gflops"] = lambda a=a, b=b: a @ b
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    tasks["copy_gbps"] = lambda: target.copy_(source)
    work = {"copy_gbps": 2 * source.nbytes}
    for name, s in interleave(tasks, 5, seconds * len(tasks), threads=n_threads).items():
        out[name] = work.get(name, 2 * size**3) / s.summary().median / 1e9
    return out


_PEAK_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def peak_gflops(dtype: str, n_threads: int = 1, seconds: float = 0.2) -> float | None:
    """Return GFLOP/s of the extension's register-only loop; None without the extension, or of a dtype without one."""
    measure = getattr(store.extension(), "peak_gflops", None)
    return float(measure(_PEAK_DTYPES[dtype], n_threads, seconds)) if measure and dtype in _PEAK_DTYPES else None
