"""The main job: a DiT-MoE on real images, trained, sampled, checked and timed, oracle and backends side by side.

Every stage writes rows; an interrupted run keeps them, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import moe_kernels
from bench import stages
from bench.images import checkpoints, climbs, digits, expert_load, fid, layers, parity, pictures, training
from bench.images.analysis.counts import Counter
from bench.images.analysis.watch import watch
from bench.images.sampling.contest import compete, entries
from bench.instrument import arguments, cases, ledger, outputs, progress, shapes, store
from bench.instrument.budget import Budget
from bench.machine_code import inner_loops
from bench.page import experts, report, samplers

SAMPLED = 200  # images of each sampler
PARTS = {"figures": 25, "samplers": 25, "parity fp32": 65, "parity bf16": 45}  # seconds on two cores of Zen 5
OUTSIDE = ("start", "inner loops", "training")  # of the budget
THRESHOLDS = {"classifier": 0.97, "guided": 0.95, "plain": 0.85}


@dataclass(frozen=True)
class Size:
    """How much of everything: the parity case and its dtypes, classifier epochs, recipe changes, minutes."""

    parity: parity.Case
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    epochs: int = 40
    recipe: dict = field(default_factory=dict)
    minutes: float = 10.0


SIZES = {
    "tiny": Size(
        parity.Case(samples=60, steps=4, margin=0.02, probe_tokens=192), epochs=6,
        recipe=dict(hidden_size=32, depth=2, num_heads=2, steps=60, batch=32, warmup=5),
    ),
    "default": Size(parity.Case()),
    "full": Size(parity.Case(samples=2000, steps=25, margin=0.0005), minutes=120.0),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=list(SIZES), default="default", help="tiny: a minute; default: ten; full: up to two hours"
    )
    parser.add_argument(
        "--minutes",
        type=arguments.positive,
        help="how long it may take, without the training of a model (default: 10; of size full 120); what does not fit "
        "is measured in fewer rounds or samples, or left out, as the report says",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="npz with labels and images (uint8, grey and channels first taken where clear; ADM's arr_0, arr_1) or "
        "latents (float); default: digits",
    )
    parser.add_argument(
        "--router",
        choices=list(layers.ROUTERS),
        default="token_choice",
        help="rule by which the model that is trained routes (default: DiT-MoE's token choice); --ckpt has its own",
    )
    parser.add_argument("--ckpt", type=Path, help="DiT-MoE checkpoint to sample instead of training one")
    parser.add_argument("--backends", help="comma-separated; default: all that are available")
    parser.add_argument("--threads", type=arguments.count, help="default: the cores this process may use")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        help="folder of rows and report, none of whose files may be --data or --ckpt (default: report)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget earlier rows and checkpoints: train and measure anew"
    )


def main(args: argparse.Namespace) -> int:
    """Run the main job; returns 1 when a backend is DIFFERENT or wrong, or a deliberate fault is not; 130 on Ctrl-C."""
    start = time.monotonic()
    job = Job(args)
    try:
        with terminable():
            job.run()
    except KeyboardInterrupt:
        how = "run again without --fresh" if args.fresh else "the same command goes on"
        progress.say(f"interrupted: {len(job.ledger.rows)} rows kept in {job.ledger.path}; {how}")
        return 130
    page = report.write(args.out)
    progress.say(f"\n{report.headline(job.ledger.rows)}\n{page} ({time.monotonic() - start:.0f} s)")
    return job.exit_code()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt like Ctrl-C, so that `timeout` and job schedulers lose nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def choose_backends(names: str | None) -> list[str]:
    """Return the asked for backends, by default all that this CPU has; ValueError names what is unknown or absent."""
    infos = {info.name: info for info in moe_kernels.backends() if info.name in cases.backends_on("cpu")}
    asked = [name for name in infos if infos[name].available] if names is None else names.split(",")
    for name in asked:
        if name not in infos:
            raise ValueError(f"--backends: got {name!r}, expected some of {', '.join(infos)}")
        if not infos[name].available:
            raise ValueError(f"--backends: {name} is not available: {infos[name].reason}")
    return asked


def scaled(count: int, factor: float, least: int) -> int:
    """Shrink a count for images of more tokens than the digits, but not below `least` or the count itself."""
    return max(min(count, least), int(count * min(1.0, factor)))


class Job:
    """One run: data, classifier, model and ladder are made when a stage first needs them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.size, self.folder = args, SIZES[args.size], args.out
        given = {"--data": args.data, "--ckpt": args.ckpt}
        outputs.check_folder("--out", self.folder, given)
        outputs.keep_given("MOE_BENCH_ROUTING", shapes.routing_trace(), given)
        self.threads = args.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        self.backends = choose_backends(args.backends)
        self.data = digits.load_npz(args.data) if args.data else digits.load_digits()
        tokens = (self.data.shape[1] // 2) ** 2
        self.case = dataclasses.replace(self.size.parity, samples=scaled(self.size.parity.samples, 16 / tokens, 100))
        changes = self.size.recipe
        batch = scaled(changes.get("batch", checkpoints.Recipe.batch), 16 / tokens, 8)
        self.recipe = checkpoints.Recipe.of(self.data, **{**changes, "batch": batch, "router": args.router})
        self.foreign = checkpoints.load_foreign(args.ckpt, self.data) if args.ckpt else None
        identity = f"{self.foreign.identity}-{self.data.digest()}" if self.foreign else self.recipe.hash
        self.folder.mkdir(parents=True, exist_ok=True)
        self.minutes = args.minutes or self.size.minutes
        settings = {"identity": identity, "size": args.size, "threads": self.threads, "minutes": self.minutes}
        code = {"commit": store.commit()["commit"], "source": ledger.source_digest()}
        self.ledger = ledger.Ledger(self.folder / "rows.jsonl", settings, code, args.fresh)
        if args.fresh:  # behind the lock: nothing of a run that still goes on is forgotten
            for name in ("pictures.npz", experts.TABLES, samplers.STRIPS, "training.pt", "model.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
        if not self.ledger.rows:
            (self.folder / "pictures.npz").unlink(missing_ok=True)

    @cached_property
    def classifier(self) -> tuple[digits.Classifier, float]:
        return digits.train_classifier(self.data, self.size.epochs)

    @cached_property
    def trained(self) -> checkpoints.Trained:
        """Take the given checkpoint, one of this recipe (this folder's, then the committed one), or train."""
        if self.foreign:
            return self.foreign
        own, state = self.folder / "model.safetensors", self.folder / "training.pt"
        found = checkpoints.load_checkpoint(self.recipe, own)
        if not found and not self.args.fresh and not state.exists():
            found = checkpoints.load_checkpoint(self.recipe, checkpoints.ASSET)
        if found:
            progress.say(
                f"  recipe {self.recipe.hash} unchanged: {found.origin} is used, not trained again (--fresh does)"
            )
            return found
        found = training.train(self.recipe, self.data, state)
        checkpoints.save_checkpoint(own, found, {})
        state.unlink()
        return found

    @cached_property
    def ladder(self) -> parity.Ladder:
        trained = self.trained
        return parity.Ladder(trained.model, self.classifier[0], self.data.images, self.case, trained.time_scale)

    def run(self) -> None:
        infos = [info._asdict() for info in moe_kernels.backends()]
        self.ledger.stage(
            "start", lambda: [store.row("run", data=self.data.name, backends=infos, case=vars(self.case))]
        )
        self.ledger.stage("inner loops", lambda: [inner_loops.row()])
        self.ledger.stage("training", self._training)
        races = stages.plan(self.args.size, self.backends, self.threads)
        self.budget = self._budget(races)
        self.ledger.stage("ceilings", lambda: [store.row("ceilings", **stages.ceilings(self.args.size, self.threads))])
        for dtype in self.size.dtypes:
            self._images(dtype)
        self._within("samplers", self._samplers)
        for race in progress.track(races, "timing", len(races)):
            self._within(f"time {race.name}", lambda until, race=race: race.run(until, self.ledger.rows))

    def _budget(self, races: list[stages.Race]) -> Budget:
        """Share the minutes among what is to come; what an earlier run kept has taken its time."""
        parts = {name: PARTS[name] for name in ("figures", "samplers", *(f"parity {d}" for d in self.size.dtypes))}
        spent = {row["stage"]: row["stage_s"] for row in self.ledger.rows if row["stage"] not in OUTSIDE}
        return Budget(60 * self.minutes, parts | {f"time {r.name}": r.part for r in races}, sum(spent.values()))

    def _within(self, stage: str, produce: Callable[[float], Iterable[dict]], fits: bool = True) -> None:
        """Run a stage that is told when it has to end, or, where no time is left, write down that it was left out."""
        until, fits = self.budget.begin(stage), fits and self.budget.left > 0
        self.ledger.stage(stage, lambda: produce(until) if fits else [self.budget.left_out(stage)])

    def _images(self, dtype: str) -> None:
        """Draw in one dtype as many samples as time allows, through everybody; in the first judge the oracle's, too."""
        ladder, first = self.ladder, dtype == self.size.dtypes[0]
        draws = 1 + len(self.backends) + (1.5 if first else 0)  # without guidance it is half a draw
        seconds = self.budget.share(f"parity {dtype}", *(["figures"] if first else []))
        (pace,) = self.ledger.stage(f"pace: {dtype}", lambda: [climbs.pace(ladder, dtype, seconds, draws)])
        count = pace["samples"]
        if first:
            self._within("figures", lambda until: self._figures(count), count > 0)
        until = self.budget.begin(f"parity {dtype}")
        climbs.Climbs(ladder, dtype, count, self.budget, until, self._picture).run(self.ledger, self.backends)

    def exit_code(self) -> int:
        wrong = [r for r in self.ledger.rows if r["kind"] == "parity" and r["verdict"] == fid.DIFFERENT]
        blind = [r for r in self.ledger.rows if r["kind"] == "control" and r["verdict"] != fid.DIFFERENT]
        for row in wrong:
            progress.say(f"{row['backend']} {row['dtype']} is DIFFERENT: failed {', '.join(row['failed'])}")
        faults = [r for r in self.ledger.rows if r["kind"] == "time" and r["wrong"] and r["ours"]]
        for row in faults:
            progress.say(f"{row['case']} is wrong: {row['wrong']}")
        for row in blind:
            progress.say(f"the ladder is blind: {row['control']} ({row['dtype']}) came out {row['verdict']}")
        return int(bool(wrong or blind or faults))

    def _training(self) -> list[dict]:
        trained = self.trained
        parameters = sum(p.numel() for p in trained.model.parameters())
        config = trained.model.config
        text = (
            f"DiT-MoE of {config.depth} blocks, width {config.hidden_size}, {config.num_experts} experts, "
            f"top-{config.top_k}, {config.router.replace('_', ' ')} ({parameters / 1e6:.1f} M parameters), on "
            f"{len(self.data.train):,} images of {self.data.name!r}: "
        )
        if trained.losses:
            text += f"{len(trained.losses)} steps of rectified flow with the oracle in {trained.seconds:.0f} s, "
        text += "in this run." if trained.origin == "trained" else f"taken from {trained.origin}."
        recipe = dataclasses.asdict(trained.recipe) if trained.recipe else None
        losses = store.thin([round(x, 4) for x in trained.losses], 600)
        fields = dict(origin=trained.origin, recipe=recipe, steps=len(trained.losses), seconds=trained.seconds)
        return [store.row("training", text=text, losses=losses, **fields)]

    def _figures(self, count: int) -> list[dict]:
        """Judge samples of the oracle with and without guidance, look for copies, count where gates send tokens."""
        trained, case, ladder = self.trained, self.case, self.ladder
        model, accuracy = self.classifier
        inner = (case.steps // 4, case.steps // 2, 3 * case.steps // 4)
        labels = ladder.labels[:count]
        counter = Counter(len(trained.model.blocks), case.steps, count)
        counter.begin(0, labels, guided=True)
        by_token = trained.model.config.router == "token_choice"
        traced = expert_load.trace_picks(trained.model, inner, guided=True) if by_token else nullcontext()
        with watch(trained.model, counter), traced as trace:
            guided = self._sample(count, case.guidance)
        plain = self._sample(count, 1.0)
        copies = digits.nearest_neighbours(torch.cat([guided, plain]), self.data)
        if self.args.size != "tiny" and by_token:
            ids, weights = (torch.cat(parts) for parts in zip(*trace, strict=True))
            shapes.save_routing(ids, weights, trained.model.config.num_experts)
        self._picture("real images", self.data.held, self.data.held_labels)
        self._picture("oracle, no guidance", plain, labels)
        tables = counter.result().arrays()
        self._keep(counts=tables["load"][:, :, 0])
        np.savez_compressed(self.folder / experts.TABLES, **tables)
        sampled = dict(sampler="rf_euler", steps=case.steps, guidance=case.guidance, count=count)
        found = experts.row(tables, sampled | {"checkpoint": trained.identity})
        fid.save_moments(self.folder / "moments_data.npz", ladder.moments)
        fid.save_moments(self.folder / "moments_oracle.npz", fid.moments(digits.features(model, guided)))
        fd = {
            name: fid.frechet_distance(fid.moments(digits.features(model, images)), ladder.moments)
            for name, images in (("fd_guided", guided), ("fd_plain", plain), ("fd_held", self.data.held))
        }
        came = {
            "classifier": accuracy,
            "guided": digits.recognised(model, guided, labels),
            "plain": digits.recognised(model, plain, labels),
        }
        if trained.origin == "trained":
            checkpoints.save_checkpoint(self.folder / "model.safetensors", trained, {**came, **fd})
        thresholds = {name: (value, THRESHOLDS[name]) for name, value in came.items()}
        for name, (value, least) in thresholds.items():
            progress.say(f"  {name}: {value:.1%} ({'at least' if value >= least else 'missed'} {least:.0%})")
        shown = dict(guidance=case.guidance, steps=case.steps, copies=vars(copies), no_copies=copies.none)
        load = store.row("load", layers=experts.load(found))
        return [store.row("figures", thresholds=thresholds, **shown, **fd), load, found]

    def _samplers(self, until: float) -> list[dict]:
        """Let every sampler draw from the same noise, while there is time; judge what `bench sample` would write."""
        model, moments = self.classifier[0], self.ladder.moments

        def distance(images: Tensor) -> float:
            return fid.frechet_distance(fid.moments(digits.features(model, images)), moments)

        count = min(self.case.samples, SAMPLED)
        held = self.data.held[:count]
        floor = {"held": len(held), "fd_held": distance(held)}
        judged = compete(
            self.trained, count,
            lambda x, y: {"fd": distance(x), "recognised": digits.recognised(model, x, y), **floor},
        )  # fmt: skip
        found = []
        for pair in judged:
            found.append(pair)
            if self.budget.clock() > until:
                break
        np.savez_compressed(self.folder / samplers.STRIPS, **{samplers.key(row): strip for row, strip in found})
        rows, settings = [row for row, _ in found], len(entries())
        progress.say(f"  nearest to the data: {samplers.sentence(rows)}")
        if len(rows) < settings:
            rows.append(self.budget.left_out(f"{settings - len(rows)} of {settings} settings of samplers"))
        return rows

    def _picture(self, name: str, images: Tensor, labels: Tensor) -> None:
        """Keep a sheet of five images in each of up to ten classes, or of the first fifty."""
        picks = [torch.nonzero(labels == label).flatten()[:5] for label in range(min(10, self.data.num_classes))]
        whole = all(len(pick) == 5 for pick in picks)
        order = torch.stack(picks, 1).flatten() if whole else torch.arange(min(50, len(images)))
        self._keep(**{name: pictures.grid(images[order].float().numpy(), len(picks))})

    def _keep(self, **arrays: np.ndarray) -> None:
        path = self.folder / "pictures.npz"
        np.savez_compressed(path.with_suffix(".tmp.npz"), **{**report.load_pictures(path), **arrays})
        os.replace(path.with_suffix(".tmp.npz"), path)

    def _sample(self, count: int, guidance: float) -> Tensor:
        noise, labels, trained = self.ladder.noise[:count], self.ladder.labels[:count], self.trained
        return training.sample(trained.model, noise, labels, self.case.steps, guidance, time_scale=trained.time_scale)
