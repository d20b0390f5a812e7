"""`python -m bench sample --ckpt FILE`: images or latents of any DiT-MoE, as files that `bench fid` and ADM read.

Noise and label of image i depend on the seed and on i alone. Its last bits depend on --batch and --threads as well,
because torch's products sum in another order then. Under torchrun the processes share the ranges; the result is the
same file, byte for byte, as that of one process with as many threads.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch

import moe_kernels
from bench.images import checkpoints
from bench.images.sampling.draw import PIXELS, Drawing
from bench.images.sampling.ranges import Ranges
from bench.images.sampling.samplers import NOISE, SAMPLERS, VELOCITY, choose
from bench.images.sampling.vae import Decoder
from bench.instrument import arguments
from bench.instrument.ledger import source_digest
from bench.instrument.outputs import check_folder
from bench.instrument.progress import Pace, say

ORACLE = "reference"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LABELS = ("random", "cycle")
CHANNELS = {VELOCITY: "all", NOISE: "first3"}  # what the authors guide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", type=Path, default=checkpoints.ASSET, help="DiT-MoE checkpoint (default: the digits' own)")
    add("--out", type=Path, default=Path("report/samples"), help="folder of a run (default: report/samples)")
    add("--count", type=arguments.count, default=64, help="images (default: 64)")
    add("--batch", type=arguments.count, default=64, help="images per forward (default: 64)")
    add("--predicts", choices=(VELOCITY, NOISE), help="what the model was trained on, where its file does not say so")
    add("--sampler", choices=list(SAMPLERS), help="default: rf_euler for velocity, ddpm for noise")
    add("--steps", type=arguments.count, help="default: the sampler's own, as DiT-MoE's authors sample; else 20")
    add("--labels", default="random", help="random, cycle, or numbers with commas, taken in turns (default: random)")
    add("--guidance", type=float, default=1.0, help="classifier-free; 1: without (default), with half the work")
    add(
        "--guided-channels", choices=("all", "first3"),
        help="first3 as DiT's samplers, all as those of rectified flow (default: by what the model predicts)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="default: 0")
    add("--backend", default="auto", help=f"one of moe_kernels, auto (default), or {ORACLE}: the oracle itself")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the model; what is integrated stays fp32 or wider")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=arguments.count, help="on a CPU, in each process (default: torch's own number)")
    add("--vae", type=Path, help="folder of an AutoencoderKL of diffusers that turns latents into pixels")


def main(args: argparse.Namespace) -> int:
    """Sample what is missing in --out and join it; 1 for a model whose output is not finite, 130 on Ctrl-C."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    check_folder("--out", args.out, {"--ckpt": args.ckpt})
    drawing, settings = prepare(args)
    ranges = Ranges(args.out, settings)
    todo = ranges.missing(rank, world)
    total = sum(count for _, count in todo)
    if rank == 0 and ranges.done():
        say(f"{ranges.done()} of {args.count} images are there")
    pace = Pace("images", total)
    try:
        for first, count in todo:
            ranges.write(first, drawing.range(first, count))
            pace.advance(count)
    except FloatingPointError as error:
        say(f"stopped: {error}; {ranges.done()} images kept in {args.out}")
        return 1
    except KeyboardInterrupt:
        say(f"interrupted: {ranges.done()} of {args.count} images kept in {args.out}; the same command goes on")
        return 130
    if ranges.join():
        say(f"{ranges.result}: {args.count} {'latents' if _latents(drawing) else 'images'}; grid.png beside it")
    return 0


def prepare(args: argparse.Namespace) -> tuple[Drawing, dict]:
    """Load what the arguments name; return what draws, and the settings that tell runs apart.

    Raises: ValueError naming the argument, what came and what was expected.
    """
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: got {args.seed}, expected 0..{2**32 - 1}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, expected a GPU that torch can use")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else "cpu"
    predicts = _predicts(args)
    sampler, steps = choose(args.sampler, predicts, args.steps)
    trained = checkpoints.load_any(args.ckpt, DTYPES[args.dtype])
    config = trained.model.config
    model = trained.model.to(device)
    if args.backend != ORACLE:
        moe_kernels.replace_moe(model, backend=args.backend)
    drawing = Drawing(
        model, trained.time_scale, sampler, steps, args.guidance, args.guided_channels or CHANNELS[predicts],
        parse_labels(args.labels, config.num_classes), args.seed, min(args.batch, args.count), predicts,
        device,
        Decoder(args.vae, config.in_channels, device) if args.vae else None,
    )  # fmt: skip
    heuristic = args.guidance != 1.0 and SAMPLERS[sampler].scores
    if heuristic:
        say(f"--guidance {args.guidance:g}: a guided field is no score, and {sampler} needs one: a heuristic")
    settings = {
        "source": source_digest(), "torch": torch.__version__, "config": asdict(config),
        "checkpoint": trained.identity, "predicts": predicts, "time_scale": trained.time_scale,
        **{name: getattr(drawing, name) for name in ("sampler", "steps", "guidance", "channels", "labels", "seed")},
        "count": args.count, "batch": drawing.batch, "backend": args.backend, "dtype": args.dtype,
        "device": args.device, "threads": torch.get_num_threads() if args.device == "cpu" else None,
        "vae": drawing.decode.identity if drawing.decode else None, "heuristic": heuristic,
    }  # fmt: skip
    return drawing, settings


def parse_labels(text: str, num_classes: int) -> str | list[int]:
    """Return a rule of LABELS, or a list of labels in 0..num_classes, the last being "no label"."""
    if text in LABELS:
        return text
    try:
        labels = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels: got {text!r}, expected {', '.join(LABELS)} or numbers with commas") from None
    wrong = [value for value in labels if not 0 <= value <= num_classes]
    if wrong:
        raise ValueError(f"--labels: got {wrong[0]}, expected 0..{num_classes - 1}, or {num_classes} for no label")
    return labels


def _predicts(args: argparse.Namespace) -> str:
    """Return what the checkpoint predicts, by its metadata or --predicts; ValueError where they differ or both lack."""
    found = checkpoints.predicts(args.ckpt)
    if found is None and args.predicts is None:
        raise ValueError(
            f"--predicts: {args.ckpt} does not say what it was trained on, expected {VELOCITY} (rectified flow, as the "
            f"public XL and G) or {NOISE} (DDPM, as the public S and B)"
        )
    if None not in (found, args.predicts) and found != args.predicts:
        raise ValueError(f"--predicts: got {args.predicts}, but {args.ckpt} says that it was trained on {found}")
    return found or args.predicts


def _latents(drawing: Drawing) -> bool:
    return drawing.decode is None and drawing.model.config.in_channels not in PIXELS
