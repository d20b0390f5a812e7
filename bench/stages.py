"""What the main job times: rooms, layer, block, training and sampling steps, every backend against the peers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.instrument import measure
from bench.instrument.cases import BY_SCORES, PEERS, ROOMS, Case
from bench.instrument.contender import by_name
from bench.instrument.race import race, untried
from bench.instrument.shapes import MODEL_SHAPES

DIGITS = MODEL_SHAPES["digits"]
S2 = MODEL_SHAPES["S/2-8E2A"]
LOOP = "authors_tp1"  # the faster of the two ways to run the authors' loop
HOPELESS = 10.0  # times the fastest's first call: torch's bf16 products with AVX2 alone take 40 times those in fp32
PRODUCTS = ("experts", "layer", "block", "train_step", "sampling_step")  # the other levels multiply next to nothing
PARTS = dict.fromkeys(ROOMS, 2) | {"experts": 3, "layer": 8, "block": 7, "train_step": 10, "sampling_step": 8}
S2_SHALLOW = replace(S2, name="S/2 width in 2 blocks", model="S2x2", depth=2)


@dataclass(frozen=True)
class Race:
    """A case of any backend, who is timed at it, and for how long."""

    case: Case
    contenders: tuple[str, ...]
    min_rounds: int
    max_seconds: float

    @property
    def name(self) -> str:
        return self.case.id

    @property
    def part(self) -> float:
        """How long it takes beside the others."""
        return PARTS[self.case.level] * (3 if self.case.mode == "fwdbwd" else 1)

    def run(self, until: float = math.inf, rows: Sequence[dict] | None = None) -> Iterator[dict]:
        """Yield the rows, of kind "time"; those that cannot run here have none.

        Args:
            until: see `measure.interleave`. rows: of races before this one. With them a contender that is hopeless is
                called once, and in later races of its dtype not at all: its row says why.
        """
        able = [by_name(name) for name in self.contenders]
        able = [c for c in able if not c.why_not(replace(self.case, backend=c.name))]
        known = hopeless(rows or (), self.case)
        limits = {"until": until, "hopeless": math.inf if rows is None else HOPELESS}
        yield from race(
            self.case, [c for c in able if c.name not in known], self.min_rounds, self.max_seconds, **limits
        )
        yield from (untried(self.case, c, known[c.name]) for c in able if c.name in known)


def hopeless(rows: Sequence[dict], case: Case) -> dict[str, str]:
    """Return who was called only once in the dtype of a case that rests on products, and why."""
    once = [row for row in rows if row["kind"] == "time" and row.get("once") and row["dtype"] == case.dtype]
    if case.level not in PRODUCTS:
        return {}
    return {row["contender"]: f"hopeless in {case.dtype}: {row['level']} {row['mode']} {row['once']}" for row in once}


def plan(size: str, backends: Sequence[str], threads: int) -> list[Race]:
    """Return the races of a size.

    tiny: the digits' shape, few rounds, one dtype; default: S/2 width, T=1024, steps through two blocks; full: S/2
    width, T=4096, steps through all twelve.
    """
    if size == "tiny":
        tiny = DIGITS, 128
        return [*_races(*tiny, ("fp32",), backends, threads, 3, 0.2), *_step_races(*tiny, backends, threads, 3, 0.2)]
    deep, T = (S2, 4096) if size == "full" else (S2_SHALLOW, 1024)
    seconds = 10.0 if size == "full" else 4.0
    steps = _step_races(DIGITS, 2048, backends, threads, 15, seconds)
    deeper = _step_races(deep, min(T, 1024), backends, threads, 9, seconds)
    races = _races(S2, T, ("fp32", "bf16"), backends, threads, 15, seconds)
    return [*steps, *deeper, *sorted(races, key=lambda race: race.case.level in ROOMS)]  # what time cuts are the last


def _races(shape, T, dtypes, backends, threads, rounds, seconds) -> Iterator[Race]:
    base = Case("layer", "any", shape, "position_skewed", T, "fp32", "fwd", threads)
    for dtype in dtypes:
        for room in ROOMS:
            yield Race(replace(base, level=room, dtype=dtype), backends, rounds, seconds / 3)
        if dtype == dtypes[0]:  # scores are fp32 in every dtype
            for rule in BY_SCORES:
                yield Race(replace(base, level="dispatch", routing=rule), backends, rounds, seconds / 3)
        for mode in ("fwd", "fwdbwd"):
            yield Race(replace(base, dtype=dtype, mode=mode), (*backends, *PEERS), rounds, seconds)
        yield Race(replace(base, level="block", routing="gate", dtype=dtype), (*backends, LOOP), rounds, seconds)


def _step_races(shape, T, backends, threads, rounds, seconds) -> Iterator[Race]:
    for level, mode in (("train_step", "fwdbwd"), ("sampling_step", "fwd")):
        case = Case(level, "any", shape, "gate", T, "fp32", mode, threads)
        yield Race(case, (*backends, LOOP), rounds, seconds)


def ceilings(size: str, threads: int) -> dict:
    """Measure what this CPU reaches in this run: the roof over the rooms.

    Returns: device, threads; FLOP/s by dtype of register-only multiply-adds ("loop" in `peak`) or, without the
        extension, of torch.mm; copy in bytes read and written per second; mm_fp32 and mm_bf16 in FLOP/s.
    """
    found = measure.ceilings(threads, 0.05 if size == "tiny" else 0.3)
    loop = found["fma_fp32_gflops"] is not None
    peaks = {dtype: 1e9 * found[f"{'fma' if loop else 'mm'}_{dtype}_gflops"] for dtype in ("fp32", "bf16")}
    products = {f"mm_{dtype}": 1e9 * found[f"mm_{dtype}_gflops"] for dtype in ("fp32", "bf16")}
    where = {"device": "cpu", "threads": threads, "peak": "loop" if loop else "mm"}
    return {**where, **peaks, "copy": 1e9 * found["copy_gbps"], **products}
