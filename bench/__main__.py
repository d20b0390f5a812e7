"""python -m bench COMMAND: the main job, races, judgements and reports; --help lists the commands."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback

CRASHED = 3  # Python's own 1 means DIFFERENT, wrong or SLOWER here
COMMANDS = {  # name -> module with add_arguments(parser) and main(args) -> exit code, what it does
    "run": ("bench.run", "the main job: train, sample, check and time on real images; writes report/"),
    "train": ("bench.training.command", "train on images or latents of your own, on any number of processes"),
    "layouts": ("bench.training.race", "under torchrun: steps of DDP, FSDP2 and expert parallelism in turns, verified"),
    "sample": ("bench.images.sampling.command", "any checkpoint to files: images or latents, each its own seed"),
    "analyze": (
        "bench.page.experts",
        "where a checkpoint's experts go while it samples: heat maps, statistics, counts",
    ),
    "fid": ("bench.images.fid.command", "judge your own samples: Frechet distances and paired parity of two npz files"),
    "fid-coverage": ("bench.images.fid.coverage", "simulate how often the interval of fid covers the truth"),
    "dmcmc": (
        "bench.images.dmcmc.command",
        "Denoising MCMC against good samplers, at equal evaluations and at equal time",
    ),
    "routers": ("bench.images.routers", "train every rule of the family on the digits by one recipe, side by side"),
    "peers": ("bench.peers.contest", "the contest: native against every public MoE implementation for CPUs"),
    "time": ("bench.timing", "time one level of a model: contenders verified, interleaved, compared"),
    "overhead": ("bench.overhead", "what a call costs beside its kernels: ops, reading replaced modules, LoRA"),
    "gpu": ("bench.gpu.command", "everything for the half hour with a GPU: build, test, bench, e2e, profile"),
    "scaling": ("bench.clusters.cost", "what a training step would cost on 8 to 512 GPUs: computed, not measured"),
    "tune": ("bench.gpu.tune", "choose tile sizes of the Triton kernels on the GPU at hand"),
    "list": ("bench.instrument.cases", "print the ids of the benchmark cases"),
    "compare": ("bench.compare.command", "judge two revisions or row files: SAME, FASTER, SLOWER or UNSURE per case"),
    "report": ("bench.page.report", "render report/ from its rows"),
    "history": ("bench.page.history", "draw each case over the commits of results/"),
    "record": ("bench.record", "keep a run's rows under results/ and what they verify"),
    "static-gate": (
        "bench.machine_code.static_gate",
        "check the machine code of every Triton kernel, compiled for absent GPUs",
    ),
    "env": ("bench.instrument.store", "print machine, ISA, threads, OpenMP runtime, versions, backends"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; bad input prints one line and returns 2."""
    argv = sys.argv[1:] if argv is None else argv
    name = next((word for word in argv if word in COMMANDS), None)
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, description) in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=description, description=description)
        if command == name:
            module = importlib.import_module(COMMANDS[name][0])
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return module.main(args)
    except (ValueError, OSError) as error:
        print(f"python -m bench {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)
