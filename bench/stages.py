"""What the main job times: rooms, layer, block, training and sampling steps, every backend against the peers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.instrument import measure
from bench.instrument.cases import BY_SCORES, PEERS, ROOMS, Case, kernels_on
from bench.instrument.contender import by_name
from bench.instrument.race import race
from bench.instrument.shapes import MODEL_SHAPES

DIGITS = MODEL_SHAPES["digits"]
S2 = MODEL_SHAPES["S/2-8E2A"]
LOOP = "authors_tp1"  # the faster of the two ways to run the authors' loop
HOPELESS = 0.1  # of torch's rate in fp32: its bf16 products reach 0.02 with AVX2 alone, 2 with bf16 instructions
FEW_SAMPLES = 100  # for parity in such a dtype
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

    def run(self) -> Iterator[dict]:
        """Yield the rows, of kind "time"; those that cannot run here have none."""
        able = [by_name(name) for name in self.contenders]
        able = [c for c in able if not c.why_not(replace(self.case, backend=c.name))]
        return race(self.case, able, self.min_rounds, self.max_seconds)


def hopeless(roof: Mapping, dtypes: Collection[str]) -> dict[str, str]:
    """Return the dtypes in which what rests on torch's products would take the job from minutes to most of an hour.

    Args: roof: a row of `ceilings`. Returns: dtype -> what is left out therefore, as the report says it.
    """
    rates = {dtype: roof[f"mm_{dtype}"] / 1e9 for dtype in {"fp32", *dtypes}}
    return {
        dtype: f"left out in {dtype}, in which torch's products reach {rate:.2g} GFLOP/s here (fp32: "
        f"{rates['fp32']:.2g}): eager, grouped and other people's code in the experts and the layer, the block, and "
        f"parity of eager, grouped and the deliberate faults; that of our kernels rests on {FEW_SAMPLES} samples"
        for dtype, rate in rates.items()
        if rate < HOPELESS * rates["fp32"]
    }


def plan(size: str, backends: Sequence[str], threads: int, slow: Collection[str] = ()) -> list[Race]:
    """Return the races of a size.

    tiny: the digits' shape, few rounds, one dtype; default: S/2 width, T=1024, steps through two blocks; full: S/2
    width, T=4096, steps through all twelve. slow: dtypes of `hopeless`.
    """
    if size == "tiny":
        return list(_races(DIGITS, DIGITS, 128, ("fp32",), backends, threads, 3, 0.2))
    deep, T = (S2, 4096) if size == "full" else (S2_SHALLOW, 1024)
    seconds = 10.0 if size == "full" else 4.0
    races = _races(S2, deep, T, ("fp32", "bf16"), backends, threads, 15, seconds, slow)
    steps = _step_races(DIGITS, 2048, backends, threads, 15, seconds)
    return [race for race in (*steps, *races) if race.contenders]


def _races(shape, deep, T, dtypes, backends, threads, rounds, seconds, slow=()) -> Iterator[Race]:
    own = [name for name in backends if name in kernels_on("cpu")]
    base = Case("layer", "any", shape, "position_skewed", T, "fp32", "fwd", threads)
    for dtype in dtypes:
        hopeless = dtype in slow
        for room in ROOMS:
            able = own if hopeless and room == "experts" else backends  # the other rooms multiply next to nothing
            yield Race(replace(base, level=room, dtype=dtype), able, rounds, seconds / 3)
        if dtype == dtypes[0]:  # scores are fp32 in every dtype
            for rule in BY_SCORES:
                yield Race(replace(base, level="dispatch", routing=rule), backends, rounds, seconds / 3)
        for mode in ("fwd", "fwdbwd"):
            able = own if hopeless else (*backends, *PEERS)
            yield Race(replace(base, dtype=dtype, mode=mode), able, rounds, seconds)
        able = () if hopeless else (*backends, LOOP)
        yield Race(replace(base, level="block", routing="gate", dtype=dtype), able, rounds, seconds)
    yield from _step_races(deep, min(T, 1024), backends, threads, min(rounds, 9), seconds)


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
