"""`python -m bench fid A.npz [B.npz] --ref R.npz`: judge samples that anybody's sampler wrote."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.images import fid
from bench.images.fid.extractors import EXTRACTORS, Extractor, extract
from bench.images.fid.paired import LEAST, LINEAR
from bench.images.fid.samples import Samples, open_samples
from bench.instrument.outputs import check_targets
from bench.instrument.progress import say
from bench.instrument.readers import Npz

PAIRED = 0.5  # correlation below which the rows of A and B hardly come from the same noise
SCALE = 100  # ratio of total variances: pixels of 0..255 where 0..1 or -1..1 was meant give 16,000 and more


@dataclass
class Judgement:
    """What the command prints and writes: one estimate per file, and of two files their paired difference."""

    extractor: Extractor
    reference: fid.Moments
    estimates: dict[str, fid.Estimate]
    difference: fid.PairedDifference | None = None
    warnings: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a",
        metavar="A.npz",
        type=Path,
        help="samples: arr_0, uint8 (N, height, width, 3), grey or channels first where that is clear",
    )
    parser.add_argument("b", metavar="B.npz", type=Path, nargs="?", help="as A, row by row from the same noise, label")
    parser.add_argument("--ref", type=Path, help="the data: samples like A, or statistics with mu and sigma")
    parser.add_argument("--features", choices=list(EXTRACTORS), default="inception", help="default: inception")
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file of Inception's weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where Inception runs (default: cpu)")
    margins = ", ".join(f"{name} {make.margin:g}" for name, make in EXTRACTORS.items())
    parser.add_argument(
        "--margin", type=float, help=f"parity: |difference| below this, fixed beforehand (default: {margins})"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.90, help="of the interval; 0.90: two one-sided 5 %% tests"
    )
    parser.add_argument("--json", type=Path, help="write the figures there; never over a file that was given")
    parser.add_argument(
        "--save-stats", type=Path, help="write A's mu and sigma there, for --ref or another tool; as --json"
    )


def main(args: argparse.Namespace) -> int:
    """Print distances, the paired interval and the verdict; returns 1 when that is DIFFERENT."""
    _check(args)
    files = {name: open_samples(path, f"{name}.npz") for name, path in (("A", args.a), ("B", args.b)) if path}
    _check_pair(files)
    make = EXTRACTORS[args.features]
    if args.ref:
        for name, samples in files.items():
            _check_count(samples, make.dimension, f"{name}.npz")
    extractor = make(args.weights, args.device)
    reference = load_reference(args.ref, extractor) if args.ref else None
    features = {name: extract(samples, extractor, f"{name}.npz") for name, samples in files.items()}
    if args.save_stats:
        fid.save_moments(args.save_stats, fid.moments(features["A"], extractor.identity))
        say(f"{args.save_stats}: mu and sigma of {args.a}, {len(features['A'])} samples, {extractor.identity}")
    if reference is None:
        return 0
    judgement = judge(extractor, reference, features, args.margin or extractor.margin, args.confidence)
    paths = {"A": args.a, "B": args.b, "reference": args.ref}
    say(render(judgement, paths))
    if args.json:
        record = to_json(judgement) | {"files": {name: path.name for name, path in paths.items() if path}}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(judgement.difference is not None and judgement.difference.verdict == fid.DIFFERENT)


def load_reference(path: Path, extractor: Extractor) -> fid.Moments:
    """Return the reference's moments: from mu and sigma where their dimension is the extractor's, else from arr_0.

    ADM's reference batches hold both, their statistics being Inception's.
    Raises: ValueError naming --ref, what came and what was expected.
    """
    file = Npz(path, "--ref", "statistics with mu and sigma, or samples in arr_0")
    has_samples, has_moments = "arr_0" in file.keys, {"mu", "sigma"} <= file.keys
    if not (has_samples or has_moments):
        raise ValueError(
            f"{file.where}: expected the keys mu and sigma, or arr_0 with samples, got {sorted(file.keys)}"
        )
    if has_moments and not (has_samples and file.header("mu").shape != (extractor.dimension,)):
        value = fid.load_moments(path, "--ref")
        if len(value.mean) == extractor.dimension and value.extractor in ("", extractor.identity):
            return value
        if not has_samples:
            got = f"{len(value.mean)} dimensions" + f" of {value.extractor}" * bool(value.extractor)
            raise ValueError(f"{file.where}: expected statistics of {extractor.identity}, got {got}")
    samples = open_samples(path, "--ref")
    if samples.count < LEAST:
        raise ValueError(f"--ref {path}: expected at least {LEAST} samples, got {samples.count}")
    return fid.moments(extract(samples, extractor, "--ref"), extractor.identity)


def judge(
    extractor: Extractor, reference: fid.Moments, features: dict[str, np.ndarray], margin: float, level: float
) -> Judgement:
    """Estimate the distance of each set of features (N, D), and of two sets their paired difference."""
    estimates = {name: fid.estimate(x, reference) for name, x in features.items()}
    found = Judgement(extractor, reference, estimates)
    N, D = features["A"].shape
    if N < LINEAR * D:
        found.warnings.append(
            f"{N} samples for {D} dimensions: below {LINEAR} samples per dimension the bias does not follow 1/N, "
            f"and the interval is wider than it need be"
        )
    if reference.count and reference.count < LINEAR * D:
        found.warnings.append(
            f"the reference has {reference.count} samples for {D} dimensions: distances are too large"
        )
    found.warnings += [line for name, x in features.items() if (line := _scale(name, x, reference))]
    if not reference.extractor:
        found.warnings.append("the reference does not say which extractor made it: only its dimension was checked")
    if "B" in estimates:
        found.difference = fid.compare(estimates["A"], estimates["B"], margin, level)
        if found.difference.correlation < PAIRED:
            found.warnings.append(
                f"correlation {found.difference.correlation:.2f}: do rows i of A and of B come from the same noise?"
            )
    return found


def _scale(name: str, features: np.ndarray, reference: fid.Moments) -> str:
    """Return a warning where features vary so unlike the reference's that their images hardly share a pixel scale."""
    varies, expected = features.var(0, ddof=1).sum(), np.trace(reference.cov)
    if expected / SCALE <= varies <= expected * SCALE:
        return ""
    return (
        f"the features of {name} have a total variance of {varies:.3g}, the reference's {expected:.3g}: were the "
        f"pixels of one of them in another scale (0..1 for 0..255)?"
    )


def render(judgement: Judgement, paths: dict[str, Path | None]) -> str:
    """Lay a judgement out as lines of text; N and the bias stand beside every distance."""
    name, reference = judgement.extractor.distance, judgement.reference
    count = f"{reference.count} samples, whose own bias stays in" if reference.count else "of unknown size"
    lines = [f"{name} to {paths['reference']} ({count}), features {judgement.extractor.identity}"]
    for key, e in judgement.estimates.items():
        lines.append(
            f"{key}  {name} {e.distance:.6g} at N = {len(e.influence)}, {e.distance - e.bias:.6g} without the bias of "
            f"{e.bias:+.3g} that N brings (standard error {e.standard_error:.2g})  {paths[key]}"
        )
    d = judgement.difference
    if d is not None:
        lines += [
            f"B - A, paired, without bias: {d.difference:+.3g} [{d.low:+.3g}, {d.high:+.3g}] at {d.level:.0%} "
            f"confidence, margin +-{d.margin:g}: {d.verdict}",
            f"carried by {d.effective:.0f} of {d.count} pairs, correlation {d.correlation:.4f}; flips so rare that "
            f"none is among them (up to 3 in {d.count}) could add +-{d.unseen:.2g}, which the interval leaves out",
        ]
    return "\n".join([*lines, *(f"warning: {line}" for line in judgement.warnings)])


def to_json(judgement: Judgement) -> dict:
    """Return a judgement as plain values."""
    return {
        "distance": judgement.extractor.distance,
        "features": judgement.extractor.identity,
        "dimension": judgement.extractor.dimension,
        "reference_count": judgement.reference.count,
        "samples": {
            key: {"fd": e.distance, "bias": e.bias, "standard_error": e.standard_error, "count": len(e.influence)}
            for key, e in judgement.estimates.items()
        },
        "difference": dataclasses.asdict(judgement.difference) if judgement.difference else None,
        "warnings": judgement.warnings,
    }


def _check(args: argparse.Namespace) -> None:
    if not (args.ref or args.save_stats):
        raise ValueError("--ref: expected samples or statistics of the data; only --save-stats works without")
    if args.b and not args.ref:
        raise ValueError("--ref: B.npz was given, expected the data that A and B are measured against")
    if args.margin is not None and not 0 < args.margin < np.inf:
        raise ValueError(f"--margin: expected a positive number, got {args.margin}")
    if not 0.5 < args.confidence < 1:
        raise ValueError(f"--confidence: expected a number between 0.5 and 1, as 0.90, got {args.confidence}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, expected a GPU that torch can use")
    given = {"A.npz": args.a, "B.npz": args.b, "--ref": args.ref, "--weights": args.weights}
    check_targets({"--json": args.json, "--save-stats": args.save_stats}, given)


def _check_pair(files: dict[str, Samples]) -> None:
    if len(files) < 2:
        return
    a, b = files["A"], files["B"]
    if a.count != b.count:
        raise ValueError(f"B.npz {b.path}: expected {a.count} samples, each paired with A's row, got {b.count}")
    if a.labels is not None and b.labels is not None and not np.array_equal(a.labels, b.labels):
        raise ValueError(f"B.npz {b.path}: arr_1: expected A's labels, as row i of both is one noise and label")


def _check_count(samples: Samples, dimension: int, argument: str) -> None:
    least = max(LEAST, dimension // 2)
    if samples.count < least:
        raise ValueError(
            f"{argument} {samples.path}: {samples.count} samples for {dimension} dimensions, expected at least {least}"
        )
