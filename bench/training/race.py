"""`torchrun -m bench layouts`: training steps of every layout in turns, in the same processes, each first verified."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from bench.images.checkpoints import Recipe
from bench.instrument import arguments, measure, stats, store
from bench.instrument.progress import say
from bench.instrument.verify import Check, judge
from bench.training import layouts, plain, processes
from bench.training.data import InMemory, Source, open_source
from bench.training.processes import Ranks
from bench.training.trainer import Job, Trainer
from moe_kernels.weights import unstack_dit_moe

MODELS = {  # on the digits, 8 x 8 pixels: the model of the main job, one as wide as DiT-MoE-S
    "digits": {},
    "S": {"hidden_size": 384, "num_heads": 6, "batch": 32},
}
TINY = {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_experts": 4, "batch": 8}
VERIFIED = 3  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", choices=("tiny", "default"), default="default", help="tiny: seconds, for CI")
    add("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)} (default: all)")
    add("--layouts", default=",".join(layouts.LAYOUTS), help="the others are compared with the first (default: all)")
    add("--rounds", type=arguments.count, default=21, help="steps of each layout (default: 21)")
    add("--backend", default="auto", help="one of moe_kernels (default: auto)")
    add("--timeout", type=arguments.positive, default=600, help="seconds to wait for other processes (default: 600)")
    add("--out", type=Path, default=Path("report/layouts.jsonl"), help="row file, added to")


def main(args: argparse.Namespace) -> int:
    """Verify, race, print and keep the rows; returns 1 where a layout is wrong."""
    for option, allowed in (("models", MODELS), ("layouts", layouts.LAYOUTS)):
        for word in getattr(args, option).split(","):
            if word not in allowed:
                raise ValueError(f"--{option}: got {word!r}, expected some of {', '.join(allowed)}")
    with processes.joined("ddp", "cpu", args.timeout) as ranks:
        ranks.expect_same({f"--{name}": str(value) for name, value in vars(args).items()})
        rows = [row for model in args.models.split(",") for row in compete(args, model, ranks)]
        for row in rows if ranks.rank == 0 else ():
            store.append(args.out, row)
            say(line(row))
        if ranks.rank == 0:
            say(f"rows: {args.out}")
    return int(any(row["wrong"] for row in rows))


def compete(args: argparse.Namespace, model: str, ranks: Ranks) -> list[dict]:
    """Return a row for each layout. Collective."""
    source = open_source(None)
    job, contenders = job_of(model, args.size, source), args.layouts.split(",")
    trainers = {}
    for name in contenders:
        sharing = layouts.check(name, None, job.recipe.num_experts, job.recipe.batch, ranks)
        trainers[name] = Trainer(job, source, ranks, name, sharing, args.backend)
    checks = verify(trainers, job, source, ranks)
    racing = {name: trainer for name, trainer in trainers.items() if not checks[name].wrong}
    steps = take_turns(racing, 3 if args.size == "tiny" else args.rounds, ranks)
    quiet, disturbed = quiet_rounds(steps)
    recipe, first = job.recipe, contenders[0]
    sizes = {name: getattr(recipe, name) for name in ("hidden_size", "depth", "num_experts", "batch")}
    rows = []
    for name in contenders:
        figures, speedups = {}, {}
        if name in racing:
            wall = {other: [steps[other][i].wall_s for i in quiet] for other in racing}
            s = stats.summarise(wall[name])
            figures = {"time_us_median": s.median * 1e6, "time_us_p20": s.p20 * 1e6, "time_us_p80": s.p80 * 1e6}
            figures |= {"n": s.n, "disturbed": disturbed, "images_per_s": recipe.batch / s.median}
            figures["cpu_us"] = stats.summarise([step.cpu_s for step in steps[name]]).median * 1e6
            if first in racing and name != first:
                speedups[first] = vars(stats.by_round(wall[first], wall[name]))
        case = f"{model}-{name}-W{ranks.world}-B{recipe.batch}-fp32"
        told = {"case": case, "layout": name, "world": ranks.world, "threads": torch.get_num_threads(), **sizes}
        kept = {"errors": checks[name].errors, "wrong": checks[name].wrong}
        samples = [round(step.wall_s * 1e6, 1) for step in store.thin(steps.get(name, []))]
        rows.append(store.row("layout", **told, figures=figures, speedups=speedups, **kept, samples_us=samples))
    return rows


def job_of(model: str, size: str, source: InMemory) -> Job:
    """Return the job of a model of this module; its rates are those of a run's middle, whatever --rounds."""
    recipe = Recipe.of(source.data, **MODELS[model])
    return Job(replace(recipe, **(TINY if size == "tiny" else {})))


def verify(trainers: dict[str, Trainer], job: Job, source: Source, ranks: Ranks) -> dict[str, Check]:
    """Judge the gradients of the last of some first steps, which depend on all that was done before. Collective."""
    exact, theirs = (
        ({}, {}) if ranks.rank else (_plainly(job, source, dtype) for dtype in (torch.float64, torch.float32))
    )
    checks = {}
    for name, trainer in trainers.items():
        for _ in range(VERIFIED):
            trainer.advance()
        grads = {name: p.grad for name, p in trainer.named.items() if p.grad is not None}
        grads = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
        grads = _by_module(unstack_dit_moe(grads))
        checks[name] = ranks.first(lambda grads=grads: judge(grads, exact, theirs, slices=False))
    return checks


def _plainly(job: Job, source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    _, model = plain.train(job, source, VERIFIED, dtype)
    return _by_module({name: p.grad for name, p in model.named_parameters() if p.requires_grad})


def _by_module(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the gradients of each module: the error of a bias of four numbers is luck."""
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(grads):
        parts.setdefault(name.rpartition(".")[0], []).append(grads[name].flatten())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Step(NamedTuple):
    """wall_s: until every rank has taken it; cpu_s: of all ranks; others: share of the machine that others had."""

    wall_s: float
    cpu_s: float
    others: float


def take_turns(trainers: Mapping[str, Trainer], rounds: int, ranks: Ranks) -> dict[str, list[Step]]:
    """Return the steps of each, A B C, then C B A, and so on. Collective."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in trainers}
    order = list(trainers)
    for done in range(rounds):
        for name in order if done % 2 == 0 else order[::-1]:
            distributed.barrier()
            start, spent, busy = time.perf_counter(), time.process_time(), _busy_s()
            trainers[name].advance()
            spent = time.process_time() - spent
            distributed.barrier()
            found[name].append((time.perf_counter() - start, spent, _busy_s() - busy))
    everyone = ranks.gather(found)
    cores = os.cpu_count() or 1

    def step(wall: float, busy: float, cpu: float) -> Step:
        return Step(wall, cpu, max(0.0, busy - cpu) / (wall * cores))

    return {
        name: [
            step(wall, busy, sum(of[name][i][1] for of in everyone)) for i, (wall, _, busy) in enumerate(found[name])
        ]
        for name in trainers
    }


def quiet_rounds(steps: Mapping[str, list[Step]]) -> tuple[list[int], bool]:
    """Return the rounds in which others left the machine alone; all of them, and True, where those are too few."""
    rounds = list(zip(*steps.values(), strict=True))
    quiet = [i for i, taken in enumerate(rounds) if all(step.others <= 1 - measure.QUIET_SHARE for step in taken)]
    disturbed = len(quiet) < min(measure.MIN_QUIET, len(rounds))
    return (list(range(len(rounds))), True) if disturbed else (quiet, False)


def _busy_s() -> float:
    """Return for how long the machine's processors have worked so far, for whomever; 0 where Linux is not there."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def line(row: dict) -> str:
    """Return what is printed of a row."""
    if row["wrong"]:
        return f"{row['case']}: wrong: {row['wrong']}"
    figures = row["figures"]
    shown = f"{row['case']}: {figures['images_per_s']:.1f} images/s, {figures['cpu_us'] / 1e3:.0f} ms of CPUs a step"
    shown += ", disturbed" * figures["disturbed"]
    for other, r in row["speedups"].items():
        shown += f", {r['value']:.3f}x [{r['low']:.3f}, {r['high']:.3f}] of {other}"
    return shown
