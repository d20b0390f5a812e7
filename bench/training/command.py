"""`python -m bench train`, `torchrun -m bench train`: DiT-MoE on your own images or latents, on many processes or one.

A run is a folder: settings.json, log.jsonl, checkpoints/, and in the end model.safetensors, the EMA weights as
`bench sample` and DiT-MoE read them. Samples, noise and the order of an epoch do not depend on the number of processes,
checkpoints not on --parallel: a run may go on with others.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

import moe_kernels
from bench.images.checkpoints import Recipe
from bench.images.sampling.samplers import NOISE, VELOCITY
from bench.instrument import arguments, run_settings
from bench.instrument.ledger import source_digest
from bench.instrument.progress import Pace, say
from bench.training import layouts, processes
from bench.training.data import Source, open_source
from bench.training.log import Log
from bench.training.processes import AgreedError, DiskError, Ranks
from bench.training.trainer import PRECISIONS, Job, Trainer
from moe_kernels.distributed import checkpoints
from reference.checkpoint import save_safetensors
from reference.dit import DiTMoEConfig

GEOMETRY = ("depth", "hidden_size", "num_heads", "patch_size", "num_experts", "top_k")
CHECKPOINTS, WEIGHTS = "checkpoints", "model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, help="npz as `bench run` takes it, or a folder of shards (default: the digits)")
    add("--out", type=Path, default=Path("report/training"), help="folder of the run (default: report/training)")
    add("--resume", action="store_true", help="go on from the latest checkpoint in --out, if there is one")
    add("--model", help="e.g. DiT-MoE-S/2-8E2A (default: the size of the digits' model)")
    add("--predicts", choices=(VELOCITY, NOISE), default=VELOCITY, help="rectified flow (default), or DDPM")
    add("--steps", type=arguments.count, default=Recipe.steps, help=f"default: {Recipe.steps}")
    add("--batch", type=arguments.count, default=Recipe.batch, help=f"of all processes (default: {Recipe.batch})")
    add("--lr", type=arguments.positive, default=Recipe.learning_rate, help=f"default: {Recipe.learning_rate}")
    add("--warmup", type=arguments.count, default=Recipe.warmup, help=f"steps (default: {Recipe.warmup})")
    add("--ema", type=float, default=Recipe.ema, help=f"decay of the average (default: {Recipe.ema})")
    add("--seed", type=int, default=0, help="default: 0")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="of activations (default: fp32)")
    add("--balance", choices=("all", "rank"), default="all", help="tokens of the auxiliary loss (default: all ranks')")
    add("--clip", type=arguments.positive, help="bound of the gradients' norm (default: none)")
    add("--parallel", choices=layouts.LAYOUTS, help="default: ddp under torchrun; ep is beside FSDP2")
    add("--ep", type=arguments.count, help="processes that share a layer's experts (default: all)")
    add("--backend", default="auto", help="one of moe_kernels (default: auto)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--save-every", type=arguments.count, default=50, help="steps (default: 50)")
    add("--keep", type=arguments.count, default=2, help="checkpoints (default: 2)")
    add("--timeout", type=arguments.positive, default=600, help="seconds to wait for other processes (default: 600)")


def main(args: argparse.Namespace) -> int:
    """Train to the end; 1 where a loss is not finite, a disk is full or a process is lost, 130 on Ctrl-C.

    What all ranks know is told by rank 0, what happens to one alone by itself.
    """
    ranks = Ranks(int(os.environ.get("RANK", 0)))
    tell: Callable[[str], None] = say if ranks.rank == 0 else lambda text: None
    moe_kernels.set_nonfinite("propagate")  # all ranks are to hear of NaN, by their loss
    try:
        with processes.joined(args.parallel, args.device, args.timeout) as ranks:
            train(args, ranks)
        return 0
    except AgreedError:
        if ranks.rank:
            return 2
        raise
    except (FloatingPointError, CheckpointException, DiskError) as error:
        tell(f"stopped: {_short(error)}; {_last(args)}")
        return 1
    except OSError as error:
        say(f"rank {ranks.rank} stopped: {error}; {_last(args)}")
        return 1
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        say(f"rank {ranks.rank} stopped: another process ended, or was waited for too long: {error}; {_last(args)}")
        return 1
    except KeyboardInterrupt:
        tell("interrupted: the same command with --resume goes on from the last checkpoint")
        return 130
    finally:
        moe_kernels.set_nonfinite("raise")


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train what the arguments name. Collective; what is wrong raises on all ranks.

    Raises: AgreedError for bad input; FloatingPointError; torch's CheckpointException where a rank could not save;
        DiskError where the first could not write the weights, or remove an old checkpoint.
    """
    trainer = prepare(args, ranks)
    folder, steps = args.out / CHECKPOINTS, trainer.job.recipe.steps
    log = Log(args.out, trainer.step) if ranks.rank == 0 else None
    pace = Pace("steps", steps, trainer.step) if ranks.rank == 0 else None
    try:
        while trainer.step < steps:
            row = trainer.advance()
            if log:
                log.add(row)
                pace.advance(1)
            if trainer.step % args.save_every == 0 or trainer.step == steps:
                trainer.save(folder)
                ranks.first(lambda: _forget(folder, args.keep), DiskError)
    finally:
        if log:
            log.close()
    weights = trainer.gather_ema()
    ranks.first(lambda: _write(args.out / WEIGHTS, weights, trainer.job), DiskError)


def prepare(args: argparse.Namespace, ranks: Ranks) -> Trainer:
    """Check, on all ranks, what the arguments name, and return a trainer, at its last checkpoint with --resume.

    Raises: AgreedError naming the argument, what came and what was expected.
    """
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name != "data"}
    ranks.expect_same({"code": source_digest((".py",)), "torch": torch.__version__} | given)
    source = ranks.together(lambda: open_source(args.data))
    ranks.expect_same({"--data": source.digest})
    job = ranks.together(lambda: job_of(args, source))
    parallel = args.parallel or ("ddp" if ranks.world > 1 else None)
    sharing = ranks.together(lambda: layouts.check(parallel, args.ep, job.recipe.num_experts, job.recipe.batch, ranks))
    last = ranks.first(lambda: _start(args, job))
    trainer = Trainer(job, source, ranks, parallel, sharing, args.backend)
    if last is not None:
        trainer.load(last)
        if ranks.rank == 0:
            say(f"training resumes at step {trainer.step} of {job.recipe.steps} ({last})")
    return trainer


def job_of(args: argparse.Namespace, source: Source) -> Job:
    """Return the job that the arguments name. Raises: ValueError naming the argument."""
    geometry, qk_norm = {}, False
    if args.model:
        config = DiTMoEConfig.from_name(args.model)
        geometry, qk_norm = {name: getattr(config, name) for name in GEOMETRY}, config.qk_norm
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema: got {args.ema}, expected 0 or more, below 1")
    if args.seed < 0:
        raise ValueError(f"--seed: got {args.seed}, expected 0 or more")
    given = {name: getattr(args, name) for name in ("steps", "batch", "warmup", "ema", "seed")}
    channels, size, _ = source.shape
    recipe = Recipe(
        source.name, source.digest, channels, size, source.num_classes, **geometry, learning_rate=args.lr, **given
    )
    return Job(recipe, args.predicts, qk_norm, args.precision, args.balance, args.clip)


def _start(args: argparse.Namespace, job: Job) -> Path | None:
    """Return the checkpoint to go on from. Raises: ValueError for a folder of something else, or without --resume."""
    folder: Path = args.out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: expected a folder, got a file")
    last = checkpoints.latest(folder / CHECKPOINTS)
    if last is not None and not args.resume:
        raise ValueError(f"--out {folder}: holds {last.name} of a run, expected --resume or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(job)
    run_settings.agree(folder, settings.pop("recipe") | settings)
    return last


def _forget(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last ones."""
    for path in sorted(path for path in folder.glob("step_*") if path.suffix == "")[:-keep]:
        shutil.rmtree(path)


def _write(path: Path, weights: dict[str, torch.Tensor], job: Job) -> None:
    spare = path.with_name("weights.tmp.safetensors")
    try:
        save_safetensors(weights, spare, job.metadata)
        os.replace(spare, path)
    finally:
        spare.unlink(missing_ok=True)
    say(f"{path}: EMA of {job.recipe.steps} steps; python -m bench sample --ckpt {path}")


def _last(args: argparse.Namespace) -> str:
    last = checkpoints.latest(args.out / CHECKPOINTS)
    return f"{last} is the last checkpoint" if last else "there is no checkpoint yet"


def _short(error: BaseException) -> str:
    what = "a checkpoint could not be written: " if isinstance(error, CheckpointException) else ""
    return " ".join(f"{what}{error}".split())[:400]
