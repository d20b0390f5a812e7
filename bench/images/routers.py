"""`python -m bench routers`: one recipe, the same seeds, every rule of the family, side by side."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.images import checkpoints, digits, fid, layers, parity, training
from bench.images.analysis import statistics
from bench.images.analysis.counts import Counter
from bench.images.analysis.watch import watch
from bench.instrument import arguments, measure, store
from bench.instrument.ledger import Ledger, source_digest
from bench.instrument.progress import say
from reference.diffusion import RectifiedFlow

FILE = "routers.jsonl"
Z95 = 1.959964
LAST = 0.1  # share of the steps whose mean is the loss that is shown


@dataclass(frozen=True)
class Size:
    """How much of everything: changes of the recipe, samples and their steps, epochs of the classifier, rounds."""

    recipe: dict = field(default_factory=dict)
    case: parity.Case = field(default_factory=parity.Case)
    epochs: int = 40
    rounds: int = 15


SIZES = {
    "tiny": Size(
        dict(hidden_size=16, depth=1, num_heads=2, steps=4, batch=8, warmup=1), parity.Case(samples=20, steps=2), 1, 2
    ),
    "small": Size(
        dict(hidden_size=64, depth=2, num_heads=2, steps=400, batch=64), parity.Case(samples=1000, steps=10), 40, 9
    ),
    "default": Size(),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=list(SIZES), default="default", help="tiny: seconds; small: minutes a seed; default: an hour"
    )
    parser.add_argument("--routers", help=f"comma-separated, some of {', '.join(layers.ROUTERS)} (default: all)")
    parser.add_argument("--seeds", type=arguments.count, default=1, help="trainings of each rule (default: 1)")
    parser.add_argument("--threads", type=arguments.count, default=1, help="default: 1, whose clock is CPU time")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of rows and checkpoints")


def main(args: argparse.Namespace) -> int:
    """Train and judge each rule, going on where it was interrupted; returns 130 on Ctrl-C."""
    names = args.routers.split(",") if args.routers else list(layers.ROUTERS)
    if unknown := [name for name in names if name not in layers.ROUTERS]:
        raise ValueError(f"--routers: got {unknown[0]!r}, expected some of {', '.join(layers.ROUTERS)}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    key = {"source": source_digest(), "size": args.size, "threads": args.threads}
    ledger = Ledger(store.check_rows_file(args.out / FILE), key)
    job = Job(SIZES[args.size], digits.load_digits(), args.out, args.threads)
    try:
        for seed in range(args.seeds):
            for name in names:
                ledger.stage(f"{name}, seed {seed}", lambda name=name, seed=seed: [job.row(name, seed)])
        ledger.stage(f"time per step: {', '.join(names)}", lambda: job.step_times(names))
    except KeyboardInterrupt:
        say(f"interrupted: {len(ledger.rows)} rows kept in {ledger.path}; the same command goes on")
        return 130
    say(text(ledger.rows))
    say(f"{ledger.path}; python -m bench report {args.out} makes a page of it")
    return 0


class Job:
    """What all trainings share: data, and the classifier that judges."""

    def __init__(self, size: Size, data: digits.Dataset, folder: Path, threads: int):
        self.size, self.data, self.folder, self.threads = size, data, folder, threads
        self._classifier: digits.Classifier | None = None

    @property
    def classifier(self) -> digits.Classifier:
        if self._classifier is None:
            self._classifier = digits.train_classifier(self.data, self.size.epochs)[0]
        return self._classifier

    def trained(self, name: str, seed: int) -> checkpoints.Trained:
        """Train a rule, or take its checkpoint of this recipe out of the folder."""
        recipe = checkpoints.Recipe.of(self.data, **self.size.recipe, seed=seed, router=name)
        path = self.folder / f"router_{name}_{seed}.safetensors"
        if found := checkpoints.load_checkpoint(recipe, path):
            return found
        state = path.with_suffix(".pt")
        trained = training.train(recipe, self.data, state)
        checkpoints.save_checkpoint(path, trained, {})
        state.unlink()
        return trained

    def row(self, name: str, seed: int) -> dict:
        """Return a trained rule's loss, distance with its 95 % interval, recognised samples and loads."""
        trained, case = self.trained(name, seed), self.size.case
        ladder = parity.Ladder(trained.model, self.classifier, self.data.images, case, trained.time_scale)
        counter = Counter(len(trained.model.blocks), case.steps, case.samples)
        counter.begin(0, ladder.labels, guided=case.guidance != 1)
        with watch(trained.model, counter):
            samples = training.sample(
                trained.model, ladder.noise, ladder.labels, case.steps, case.guidance, time_scale=trained.time_scale
            )
        found = fid.estimate(digits.features(self.classifier, samples), ladder.moments)
        fd, half = found.distance - found.bias, Z95 * found.standard_error
        last = trained.losses[-max(1, round(LAST * len(trained.losses))) :]
        return store.row(
            "router", router=name, seed=seed, recipe=dataclasses.asdict(trained.recipe), case=dataclasses.asdict(case),
            loss=float(np.mean(last)), fd=fd, fd_low=fd - half, fd_high=fd + half,
            recognised=digits.recognised(self.classifier, samples, ladder.labels),
            **loads(counter.result().load), parameters=sum(p.numel() for p in trained.model.parameters()),
        )  # fmt: skip

    def step_times(self, names: Sequence[str]) -> Iterator[dict]:
        """Time forward and backward of the loss by our kernels, all rules in turn, on their trained weights."""
        runs = {name: training_step(self.trained(name, 0), self.data) for name in names}
        samples = measure.interleave(runs, self.size.rounds, 0.0, threads=self.threads)
        for name in names:
            ratio = dataclasses.asdict(measure.ratio(samples[name], samples[names[0]]))
            yield store.row("router_time", router=name, against=names[0], figures=samples[name].figures(), faster=ratio)


def training_step(trained: checkpoints.Trained, data: digits.Dataset) -> Callable[[], Any]:
    """Return one step's loss and gradients of a trained model whose layers are ours, on a batch of its recipe."""
    replaced = parity.replaced if trained.recipe.router == "token_choice" else layers.replaced
    model = replaced(trained.model, "auto").train()
    net, batch = training.TimeScaled(model, trained.time_scale), slice(trained.recipe.batch)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[Tensor | None, ...]:
        torch.manual_seed(0)
        loss = RectifiedFlow.loss(net, data.train[batch], data.train_labels[batch])
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return run


def loads(load: Tensor) -> dict[str, float]:
    """Return what counted picks (layers, steps, halves, E) say, means over layers.

    Returns: entropy, of the experts' shares over that of equal ones; max_over_mean, of the busiest expert; idle, the
        share of experts without any; balanced means 1, 1 and 0.
    """
    counts = load.sum((1, 2)).numpy()
    return {
        "entropy": float(statistics.entropy(counts).mean()),
        "max_over_mean": float(statistics.max_over_mean(counts).mean()),
        "idle": float((counts == 0).mean()),
    }


HEAD = ("router", "seeds", "loss", "FD-cls, 95 %", "recognised", "entropy", "max / mean", "forward + backward, ms")


def table(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """Return a line of cells (HEAD) for each rule; of several seeds the mean, and intervals from the least to the
    largest limit."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        if row["kind"] == "router":
            by_name.setdefault(row["router"], []).append(row)
    times = {row["router"]: row["figures"]["time_us_median"] / 1e3 for row in rows if row["kind"] == "router_time"}

    def line(name: str, of: list[dict]) -> tuple[str, ...]:
        keys = "loss", "fd", "recognised", "entropy", "max_over_mean"
        mean = {key: float(np.mean([row[key] for row in of])) for key in keys}
        low, high = min(row["fd_low"] for row in of), max(row["fd_high"] for row in of)
        return (
            name.replace("_", " "), str(len(of)), f"{mean['loss']:.3f}", f"{mean['fd']:.4f} [{low:.4f}, {high:.4f}]",
            f"{mean['recognised']:.1%}", f"{mean['entropy']:.3f}", f"{mean['max_over_mean']:.2f}",
            f"{times[name]:.1f}" if name in times else "",
        )  # fmt: skip

    return [line(name, of) for name, of in by_name.items()]


def text(rows: Sequence[dict]) -> str:
    """Return the table as lines of text."""
    lines = [HEAD, *table(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
