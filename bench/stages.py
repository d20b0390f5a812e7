"""What the main job times: rooms, layer, block, training and sampling steps, every backend against the peers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.instrument import measure, workloads
from bench.instrument.cases import EXPERT_CHOICE, PEERS, ROOMS, Case, kernels_on
from bench.instrument.shapes import MODEL_SHAPES

DIGITS = MODEL_SHAPES["digits"]
S2 = MODEL_SHAPES["S/2-8E2A"]
LOOP = "authors_tp1"  # the faster of the two ways to run the authors' loop
HOPELESS = 0.1  # of torch's rate in fp32: its bf16 products reach 0.02 with AVX2 alone, 2 with bf16 instructions
FEW_SAMPLES = 100  # for parity in such a dtype
S2_SHALLOW = replace(S2, name="S/2 width in 2 blocks", model="S2x2", depth=2)


@dataclass(frozen=True)
class Race:
    """Cases that differ in nothing but the backend, and how long to time them."""

    name: str
    cases: tuple[Case, ...]
    min_rounds: int
    max_seconds: float


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


def plan(
    size: str, backends: Sequence[str], threads: int, sampling_steps: int, slow: Collection[str] = ()
) -> list[tuple[Race, dict]]:
    """Return the races of a size with what the report says about each.

    tiny: the digits' shape, few rounds, one dtype; default: S/2 width, T=1024, steps through two blocks; full: S/2
    width, T=4096, steps through all twelve. slow: dtypes of `hopeless`.
    """
    if size == "tiny":
        return list(_races(DIGITS, DIGITS, 128, ("fp32",), backends, threads, 3, 0.2, sampling_steps))
    deep, T = (S2, 4096) if size == "full" else (S2_SHALLOW, 1024)
    seconds = 10.0 if size == "full" else 4.0
    races = _races(S2, deep, T, ("fp32", "bf16"), backends, threads, 15, seconds, sampling_steps, slow)
    steps = _step_races(DIGITS, 2048, backends, threads, 15, seconds, sampling_steps)
    return [(race, facts) for race, facts in (*steps, *races) if race.cases]


def _races(
    shape, deep, T, dtypes, backends, threads, rounds, seconds, sampling_steps, slow=()
) -> Iterator[tuple[Race, dict]]:
    own = [name for name in backends if name in kernels_on("cpu")]
    base = Case("layer", "native", shape, "position_skewed", T, "fp32", "fwd", threads)
    for dtype in dtypes:
        hopeless = dtype in slow
        for room in ROOMS:
            able = own if hopeless and room == "experts" else backends  # the other rooms multiply next to nothing
            yield race_of(replace(base, level=room, dtype=dtype), able, rounds, seconds / 3)
        if dtype == dtypes[0]:  # scores are fp32 in every dtype
            yield race_of(replace(base, level="dispatch", routing=EXPERT_CHOICE), backends, rounds, seconds / 3)
        for mode in ("fwd", "fwdbwd"):
            able = own if hopeless else (*backends, *PEERS)
            yield race_of(replace(base, dtype=dtype, mode=mode), able, rounds, seconds)
        able = () if hopeless else (*backends, LOOP)
        yield race_of(replace(base, level="block", routing="gate", dtype=dtype), able, rounds, seconds)
    yield from _step_races(deep, min(T, 1024), backends, threads, min(rounds, 9), seconds, sampling_steps)


def _step_races(shape, T, backends, threads, rounds, seconds, sampling_steps) -> Iterator[tuple[Race, dict]]:
    for level, mode in (("train_step", "fwdbwd"), ("sampling_step", "fwd")):
        case = Case(level, "native", shape, "gate", T, "fp32", mode, threads)
        yield race_of(case, (*backends, LOOP), rounds, seconds, sampling_steps)


def race_of(case: Case, contenders: Sequence[str], rounds: int, seconds: float, steps: int = 0) -> tuple[Race, dict]:
    shape, name = case.shape, replace(case, backend="any").id
    images = case.T // shape.tokens_per_image
    threads = f"{case.threads} thread{'s' * (case.threads > 1)}" if case.device == "cpu" else "GPU"
    what = f"{shape.name}, T={case.T}, {case.routing.replace('_', '-')} routing, {threads}"
    facts = {
        "race": name, "level": case.level, "mode": case.mode, "dtype": case.dtype, "T": case.T, "threads": case.threads,
        "model": shape.name, "routing": case.routing, "what": what, "rate_unit": "", "per_call": 0.0,
    }  # fmt: skip
    if case.level == "train_step":
        facts |= {"what": f"{what}, {images} images a step", "rate_unit": "steps/s", "per_call": 1.0}
    elif case.level == "sampling_step":
        facts |= {
            "what": f"{what}, {images // 2} images with guidance", "rate_unit": f"images/s at {steps} steps",
            "per_call": images / 2 / steps,
        }  # fmt: skip
    return Race(name, tuple(replace(case, backend=c) for c in contenders), rounds, seconds), facts


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


def run(race: Race, facts: dict) -> Iterator[dict]:
    """Time one race; yields its rows of kind "time" with the report's facts and the rate of steps or images."""
    for row in workloads.race(race.cases, race.min_rounds, race.max_seconds):
        backend = row["case"].split("-")[1]
        rate = 0.0 if row["wrong"] else facts["per_call"] / row["figures"]["time_us_median"] * 1e6
        yield {**row, **facts, "backend": backend, "rate": rate}
