"""`python -m bench dmcmc`: is Denoising MCMC better than a good sampler, at equal evaluations and at equal time?"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.images import digits
from bench.images.analysis.watch import watch
from bench.images.dmcmc import loads, verdicts
from bench.images.dmcmc.arms import CHOICES, Amount, Arm, Samples, run
from bench.images.dmcmc.tiers import Oracle, Trained
from bench.images.sampling.integrators import INTEGRATORS
from bench.instrument import arguments, store
from bench.instrument.ledger import Ledger, source_digest
from bench.instrument.progress import say, track

FILE = "dmcmc.jsonl"
TRACE = 50  # points of the trace of levels
TIERS = "oracle", "trained"
STANDARD = ("heun", "heun_churn", "dpmpp_2m", "unipc")


@dataclass(frozen=True)
class Size:
    """How much of everything; the trained tier has the trajectories STANDARD.

    amounts: of each tier. The features that judge the trained one have 128 dimensions, and verdicts want more effective
    samples than those.
    """

    amounts: Mapping[str, Amount]
    budgets: tuple[int, ...]
    seeds: int
    trajectories: tuple[str, ...] = (*INTEGRATORS, "rk45")
    chains: tuple[str, ...] = ("dpmpp_2m", "heun", "heun_churn")
    choices: tuple[str, ...] = tuple(CHOICES)
    level_steps: int = 4000
    epochs: int = 40

    def arms(self, tier: str) -> list[Arm]:
        """Return the trajectories, the chains as released, and with the first integrator every other choice."""
        alone = [name for name in self.trajectories if tier == "oracle" or name in STANDARD]
        released, *others = self.choices
        return [
            *map(Arm, alone), *(Arm(name, released) for name in self.chains), *(Arm(self.chains[0], c) for c in others),
        ]  # fmt: skip


SIZES = {
    "tiny": Size(
        dict.fromkeys(TIERS, Amount(20, 3, 3, 1)),
        (6,),
        1,
        ("dpmpp_2m", "heun"),
        ("dpmpp_2m", "heun"),
        ("released", "drawn level"),
        100,
        1,
    ),
    "small": Size({"oracle": Amount(60, 10, 5, 4), "trained": Amount(100, 10, 5, 4)}, (5, 10, 20), 3),
    "default": Size(dict.fromkeys(TIERS, Amount(100, 20, 9, 10)), (5, 10, 20, 40), 3),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="default",
        help="tiny: seconds; small: an hour; default: hours",
    )
    parser.add_argument("--tier", choices=(*TIERS, "both"), default="both", help="default: both")
    parser.add_argument(
        "--guidance", type=arguments.positive, default=1.0,
        help="of the trained tier; other than 1 the field is no score and all of it a heuristic (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=arguments.count, default=1, help="default: 1, so that CPU time is what it took"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the rows (default: report)")


def main(args: argparse.Namespace) -> int:
    """Run the grid, going on where it was interrupted; returns 1 when the model gives NaN, 130 on Ctrl-C."""
    torch.set_num_threads(args.threads)
    size, data = SIZES[args.size], digits.load_digits()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"size": args.size, "threads": args.threads, "guidance": args.guidance}
    ledger = Ledger(store.check_rows_file(args.out / FILE), settings, {"source": source_digest()})
    makers: dict[str, Callable[[], Oracle | Trained]] = {
        "oracle": lambda: Oracle(data),
        "trained": lambda: Trained(data, args.out, size.epochs, size.level_steps, args.guidance),
    }
    if args.guidance != 1.0 and args.tier != "oracle":
        say(f"guidance {args.guidance:g}: a guided field is the score of no density; the trained tier is a heuristic")
    try:
        for name in makers if args.tier == "both" else (args.tier,):
            tier(ledger, name, functools.cache(makers[name]), size)
    except FloatingPointError as error:
        say(f"stopped: {error}; {len(ledger.rows)} rows kept in {ledger.path}")
        return 1
    except KeyboardInterrupt:
        say(f"interrupted: {len(ledger.rows)} rows kept in {ledger.path}; the same command goes on")
        return 130
    report(ledger.rows)
    say(f"{ledger.path}; python -m bench report {args.out} makes a page of it")
    return 0


def tier(ledger: Ledger, name: str, make: Callable[[], Oracle | Trained], size: Size) -> None:
    """Run every arm at every budget with every seed, one stage each, small budgets first.

    The tier is made when a stage first needs it.
    """
    amount = size.amounts[name]
    ledger.stage(
        f"{name}: what is sampled",
        lambda: [store.row("dmcmc_tier", tier=name, **make().facts(), amount=asdict(amount), seeds=size.seeds)],
    )
    if name == "trained":
        ledger.stage(f"{name}: load along chains", lambda: along_chains(make(), size.choices, amount))
    jobs = [
        (arm, budget, seed)
        for budget in size.budgets
        for seed in range(size.seeds)
        for arm in size.arms(name)
        if arm.integrator != "rk45" or budget == size.budgets[-1]
    ]
    for arm, budget, seed in track(jobs, name, len(jobs)):
        stage = f"{name}: {arm.title}, {budget}, seed {seed}"
        ledger.stage(stage, lambda arm=arm, budget=budget, seed=seed: measure(make(), arm, budget, amount, seed))


def measure(on: Oracle | Trained, arm: Arm, budget: int, amount: Amount, seed: int) -> Iterator[dict]:
    """Sample by an arm and judge the samples; one row."""
    net = on.model.model if isinstance(on, Trained) else None
    with watch(net, loads.Loads(net)) if net else nullcontext() as seen:
        samples = run(arm, budget, on.problem, amount, seed)
    found = on.judge(samples, bool(arm.choice))
    took = {
        "evaluations": samples.evaluations, "classified": samples.classified,
        "cpu_ms": 1e3 * samples.cpu_s / amount.samples, "wall_ms": 1e3 * samples.seconds / amount.samples,
    }  # fmt: skip
    yield store.row(
        "dmcmc", tier=on.name, arm=arm.title, title=arm.title, integrator=arm.integrator, choice=arm.choice,
        budget=budget, seed=seed, samples=amount.samples, chains=amount.chains if arm.choice else 0,
        distance=on.distance, dimension=on.reference.features.shape[1], split=samples.split,
        sent_twice=samples.sent_twice, trace=trace(samples), loads=seen.summary() if seen else None,
        figures={**took, **found},
    )  # fmt: skip


def along_chains(on: Trained, choices: Sequence[str], amount: Amount) -> Iterator[dict]:
    """Compare the experts' load along chains with that of trajectories; a row for each choice whose chains differ."""
    net, halves = on.model.model, 1 + (on.guidance != 1.0)
    labels = np.arange(amount.chains) % on.problem.classes
    trajectories = loads.count_trajectories(net, on.problem, amount, 0, halves)
    for choice in choices:
        if "least" in CHOICES[choice][1]:  # what is sent down makes no difference to the chains
            continue
        chains = loads.count_chains(net, on.problem, choice, amount, 0, halves)
        yield store.row(
            "dmcmc_load", tier=on.name, choice=choice, chains=amount.chains, steps=len(on.problem.grid),
            ordinary=loads.ORDINARY, **loads.compare(chains, trajectories, labels),
        )  # fmt: skip


def trace(samples: Samples) -> list[list[float]]:
    """Return the 5th, 50th and 95th percentile of the levels sent down, window by window, at most TRACE of them."""
    if samples.sigmas is None:
        return []
    percentiles = np.percentile(samples.sigmas.numpy(), (5, 50, 95), axis=1).T
    return store.thin([[round(float(v), 4) for v in row] for row in percentiles], TRACE)


def report(rows: list[dict]) -> None:
    """Print every arm's figures, and what chains gained or lost."""
    found = verdicts.lines([row for row in rows if row["kind"] == "dmcmc"])
    for line in found:
        f = line.figures
        say(
            f"{line.tier:<8}{line.title:<46}{f['evaluations']:6.2f} evaluations {f['cpu_ms']:8.3f} ms  "
            f"{line.row['distance']} {line.fd:.4f} +- {line.error:.4f}  precision {f['precision']:.2f} "
            f"recall {f['recall']:.2f}  ess {f['ess']:.0f}"
        )
    for name in dict.fromkeys(line.tier for line in found):
        compared = [c for c in verdicts.comparisons(found) if c["line"].tier == name]
        say(f"{name}: {verdicts.sentence(compared)}")
