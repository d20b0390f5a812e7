"""What is chosen by measuring on a GPU: tile sizes, the file that moe_kernels/backends/triton/tiles.py reads.

Every product of a layer runs on its own with each candidate, interleaved, at the very sizes that a layer launches.
With --backends it is triton or cuda for "auto" instead: bench/gpu/prefer.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import moe_kernels
from bench.gpu import prefer
from bench.gpu.device_table import GAIN, known_keys, save, within
from bench.gpu.plan import ROUTING, XL, B, G, S
from bench.instrument import arguments, measure, workloads
from bench.instrument.cases import Case, make_inputs
from bench.instrument.progress import say
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.verify import BOUND, whole_error

PRECISIONS = ("bf16", "fp16", "tf32")  # float32 without tensor cores is no case for tuning
CANDIDATES = (  # m, n, k in bf16 and fp16 (half of it in tf32), group, warps, stages; each with TMA and without
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 4, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 256, 64, 8, 8, 3),
    (256, 128, 64, 8, 8, 3),
    (128, 64, 64, 8, 4, 4),
    (64, 128, 64, 8, 4, 4),
    (64, 256, 64, 8, 8, 3),
    (128, 128, 64, 16, 8, 3),
)
SPECIALIZED = (128, 128, 64, 8, 4, 3), (128, 128, 64, 8, 4, 4)  # some warps only load: where nothing is gathered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSON file, added to; keys that it has are kept")
    parser.add_argument("--backends", action="store_true", help='race our backends for "auto" instead of tiles')
    parser.add_argument("--shapes", default=",".join((S, XL, B, G)), help="comma-separated model shapes")
    parser.add_argument("--tokens", default="8192,65536,512", help="comma-separated")
    parser.add_argument("--dtypes", default="bf16", help=f"some of {', '.join(PRECISIONS)}; of --backends fp32, too")
    parser.add_argument("--minutes", type=arguments.positive, default=9.0, help="after which no further case is begun")


def products() -> dict[str, Callable[[SimpleNamespace], Sequence[Tensor]]]:
    """Return the launches of a layer that have a tile, by name, as functions of what `prepare` returns."""
    from moe_kernels.backends.triton import experts, experts_bwd, sums

    def dact(p: SimpleNamespace) -> Sequence[Tensor]:
        dgate_up, act, partials = experts_bwd.dact(p.dout, p.x, p.plan, p.down_proj, p.gate_up, True)
        return *dgate_up, *act, partials.sum(1)  # how many partial sums there are depends on the tile

    def dweight(left: Any, right: Any, p: SimpleNamespace, weight: Any, gather: tuple[bool, bool]) -> Sequence[Tensor]:
        shapes = [t.shape for t in weight if t is not None]
        gradients, pending = experts_bwd.dweight(left, right, p.plan, shapes, gather)
        sums.sum_in_order(*pending)
        return gradients

    return {
        "up": lambda p: sum(experts.up(p.x, p.plan, p.gate_up_proj, p.down_proj, True), ()),
        "down": lambda p: experts.rows_times(p.act, p.down_proj, p.plan, p.x, k_inner=True),
        "dact": dact,
        "dx": lambda p: experts.rows_times(p.dgate_up, p.gate_up_proj, p.plan, p.x, k_inner=False),
        "dgate_up_proj": lambda p: dweight(p.dgate_up, (p.x, p.x), p, p.gate_up_proj, (False, True)),
        "ddown_proj": lambda p: dweight((p.dout, p.dout), p.act, p, p.down_proj, (True, False)),
    }


def prepare(case: Case) -> SimpleNamespace:
    """Make what the products of a layer read, for the routed experts and the shared one; weights are stacked."""
    from moe_kernels.backends.triton import experts, experts_bwd

    p = make_inputs(case)
    plan = moe_kernels.dispatch(p.topk_ids, p.topk_weights, case.shape.E, "triton")
    q = SimpleNamespace(x=p.x, dout=torch.randn_like(p.x), plan=plan)
    q.gate_up_proj = p.gate_up_proj, p.shared_gate_up_proj, None
    q.down_proj = p.down_proj, p.shared_down_proj, None
    q.act, q.gate_up = experts.up(q.x, plan, q.gate_up_proj, q.down_proj, True)
    q.dgate_up = experts_bwd.dact(q.dout, q.x, plan, q.down_proj, q.gate_up, True)[0]
    return q


def in_float32(p: SimpleNamespace) -> SimpleNamespace:
    """Return the same operands in float32."""
    fields = {name: value for name, value in vars(p).items() if name != "plan"}

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return None if value is None else value.float()

    return SimpleNamespace(plan=p.plan, **{name: wide(value) for name, value in fields.items()})


@contextmanager
def tiled(tile: Any) -> Iterator[list[tuple]]:
    """Let launches use a tile, None for their own; collects what they ask `tiles.choose` for."""
    from moe_kernels.backends.triton import tiles

    asked, choose = [], tiles.choose

    def chosen(*arguments: Any) -> Any:
        asked.append(arguments)
        return tile or choose(*arguments)

    with mock.patch.object(tiles, "choose", chosen):
        yield asked


@dataclass(frozen=True)
class Trial:
    """A product with a tile, as `measure.interleave` sees contenders."""

    tile: Any
    run: Callable[[], Sequence[Tensor]]

    def __call__(self) -> Sequence[Tensor]:
        with tiled(self.tile):
            return self.run()

    def unusable(self) -> str | None:
        """Say why the tile is none: it does not launch, or spills registers."""
        from triton.runtime.jit import JITFunction

        kernels, launch = [], JITFunction.run

        def noting(*args: Any, **options: Any) -> Any:
            kernels.append(launch(*args, **options))
            return kernels[-1]

        try:
            with mock.patch.object(JITFunction, "run", noting):
                self()
        except Exception as error:  # out of shared memory, registers, or the compiler's wits
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        spills = max((getattr(kernel, "n_spills", None) or 0 for kernel in kernels), default=0)
        return f"spills {spills} registers" if spills else None


def tune(
    run: Callable[[], Sequence[Tensor]],
    exact: Sequence[Tensor],
    own: Any,
    candidates: Sequence[Any],
    seconds: float,
    device: str,
    timer: measure.Timer = measure.time_queued,
) -> Any:
    """Return the best tile of a product.

    Args:
        run: the product. exact: its result in float32, which a candidate may miss twice as far as `own` does.
        own: the heuristic's tile, which stays unless another is faster for sure.
        seconds: for all candidates together.
    """
    trials = {str(tuple(tile)): Trial(tile, run) for tile in dict.fromkeys((own, *candidates))}
    usable = {name: trial for name, trial in trials.items() if trial.tile == own or not trial.unusable()}
    allowed = [BOUND * whole_error(t.float(), e) + 1e-30 for t, e in zip(Trial(own, run)(), exact, strict=True)]

    if not all(map(math.isfinite, allowed)):
        raise RuntimeError(f"the heuristic's tile {tuple(own)} failed: errors {allowed}")

    def verify(name: str, result: Sequence[Tensor]) -> str | None:
        errors = [whole_error(t.float(), e) for t, e in zip(result, exact, strict=True)]
        worse = [f"{error:.1e}" for error, most in zip(errors, allowed, strict=True) if not error <= most]
        return f"errors {', '.join(worse)}" if worse else None

    samples = measure.interleave(usable, 9, seconds, verify, device=device, timer=timer)
    return trials[best(samples, str(tuple(own)))].tile


def best(samples: Mapping[str, measure.Samples], own: str) -> str:
    """Return the fastest that is faster than `own` for sure, else `own`."""
    if samples[own].wrong:
        raise RuntimeError(f"the heuristic's tile {own} failed: {samples[own].wrong}")
    ratios = {name: measure.ratio(s, samples[own]) for name, s in samples.items() if not s.wrong and name != own}
    faster = {name: ratio.value for name, ratio in ratios.items() if ratio.low > GAIN}
    return max(faster, key=faster.get, default=own)


def candidates(kernel: str, capability: int, dtype: str) -> list[Any]:
    """Return the tiles that a product is tried with; "dweight" has no descriptors.

    Nothing specialises on sm_90: Triton fails to compile some of it there, and a hang would take the call with it.
    """
    from moe_kernels.backends.triton import tiles

    ways = (False,) if kernel == "dweight" else (True, False)
    sizes = [(*tile, 8 // tile[-2], tma, False) for tile in CANDIDATES for tma in ways]
    if kernel == "rows_times" and capability // 10 != 9:
        sizes += [(*tile, 1, True, True) for tile in SPECIALIZED]
    depth = 2 if dtype == "tf32" else 1
    return [tile._replace(k=tile.k // depth) for tile in starmap(tiles.Tile, sizes)]


def tune_case(case: Case, known: set[str], seconds: float) -> Iterator[tuple[str, Any]]:
    """Yield key and tile of every product of a layer that is not known yet."""
    import triton

    from moe_kernels.backends.triton import tiles

    with workloads.arithmetic(case.dtype), torch.no_grad():
        p = prepare(case)
        for name, run in products().items():
            with tiled(None) as asked:
                run(p)
            kernel, device, precision, rows, n, k = asked[0]
            key = tiles.key(kernel, precision, triton.next_power_of_2(max(rows, 1)), n, k)
            if key in known:
                continue
            own = tiles.choose(kernel, device, precision, rows, n, k)
            try:
                with workloads.arithmetic("fp32"):
                    exact = run(in_float32(p))
                tried = candidates(kernel, device.capability, case.dtype)
                tile = tune(lambda run=run: run(p), exact, own, tried, seconds, case.device)
            except Exception as error:  # the heuristic's tile does not launch, or memory ran out
                say(f"{name}: {key}: not tuned: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
                continue
            say(f"{name}: {key}: {tuple(own)} -> {tuple(tile) if tile != own else 'stays'}")
            known.add(key)
            yield key, tile


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for, the first sizes of all shapes first; ValueError for unknown ones."""
    for option, allowed in (("shapes", MODEL_SHAPES), ("dtypes", PRECISIONS)):
        unknown = [word for word in getattr(args, option).split(",") if word not in allowed]
        if unknown:
            raise ValueError(f"--{option}: got {unknown[0]!r}, expected some of {', '.join(allowed)}")
    settings = product(args.dtypes.split(","), map(int, args.tokens.split(",")), args.shapes.split(","))
    return [
        Case("layer", "triton", MODEL_SHAPES[name], ROUTING, T, dtype, "fwdbwd", device="cuda")
        for dtype, T, name in settings
    ]


def main(args: argparse.Namespace) -> int:
    """Tune on this machine's GPU and add to the file as results come in."""
    if args.backends:
        return prefer.main(args)
    wanted = cases(args)
    device, known = known_keys(args.out)

    def work(case: Case) -> None:
        for key, tile in tune_case(case, known, seconds=1.0):
            save(args.out, device, key, tuple(tile))

    within(args.minutes, {str(case): lambda case=case: work(case) for case in wanted})
    say(f"{len(known)} tiles of {device}: {args.out}")
    return 0
