"""Does the paired interval cover? Simulated samplers whose true difference is known in closed form.

A draws independent features; B changes them: all of them a little (smooth), or a few of them far (flips, as when a
token's picks change), or both. Flips are independent, so their number is Poisson with the mean given. The column
`plain` is the control: the uncorrected difference +- z standard errors of in-sample influences.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from bench.images.fid.distance import Moments, frechet_distance, moments, transport
from bench.images.fid.paired import compare, estimate
from bench.instrument import arguments
from bench.instrument.outputs import check_targets
from bench.instrument.progress import say

LEVELS = (0.95, 0.90)


@dataclass(frozen=True)
class Change:
    """How B differs from A: b = scale a + shift + noise, then `flips` of the N rows (on average) are replaced.

    A flipped row becomes another draw moved by `far` in every feature, or, with `radius`, moves that far in a
    direction of its own.
    """

    name: str
    scale: float = 1.0
    shift: float = 0.0
    noise: float = 0.0
    flips: float = 0.0
    far: float = 0.0
    radius: float = 0.0
    heavy: bool = False

    def apply(self, rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
        """Return B's rows for A's (N, D)."""
        N, D = a.shape
        b = self.scale * a + self.shift + self.noise * rng.normal(size=a.shape)
        flipped = rng.random(N) < self.flips / N
        if self.radius:
            direction = rng.normal(size=(flipped.sum(), D))
            b[flipped] += self.radius * direction / np.linalg.norm(direction, axis=1)[:, None]
        else:
            b[flipped] = self.draw(rng, flipped.sum(), D) + self.far
        return b

    def draw(self, rng: np.random.Generator, N: int, D: int) -> np.ndarray:
        """Draw rows of mean 0 and covariance 1: normal, or exponential with a heavy tail."""
        return rng.exponential(size=(N, D)) - 1 if self.heavy else rng.normal(size=(N, D))

    def moments(self, N: int, D: int) -> Moments:
        """Return the true moments of B."""
        p = self.flips / N
        spread = self.scale**2 + self.noise**2
        if self.radius:
            return Moments(np.full(D, self.shift), np.eye(D) * (spread + p * self.radius**2 / D), 0)
        mean = (1 - p) * self.shift + p * self.far
        cov = np.eye(D) * ((1 - p) * spread + p) + p * (1 - p) * (self.far - self.shift) ** 2 * np.ones((D, D))
        return Moments(np.full(D, mean), cov, 0)


SMOOTH = (
    Change("smooth 2 %", scale=1.02, shift=0.02, noise=0.05),
    Change("smooth 10 %", scale=1.1, shift=0.1, noise=0.25),
    Change("smooth 2 %, heavy tails", scale=1.02, shift=0.02, noise=0.05, heavy=True),
)
FLIPS = tuple(
    change
    for flips in (3, 5, 10)
    for change in (
        Change(f"{flips} flips, far (3 sd)", flips=flips, far=3),
        Change(f"{flips} flips, near (1 sd)", flips=flips, far=1),
        Change(f"{flips} flips, redrawn in place", flips=flips),
        Change(f"{flips} flips, own directions (4 sd)", flips=flips, radius=4),
        Change(f"{flips} flips, near, heavy tails", flips=flips, far=1, heavy=True),
        Change(f"{flips} flips, near, on 3 % noise", flips=flips, far=1, noise=0.03),
    )
)
SHAPES = ((500, 6), (500, 32), (2000, 16), (100, 64), (60, 64), (500, 128))  # (N, D)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=arguments.count, default=2000, help="per setting (default: 2000)")
    parser.add_argument("--shapes", help="N x D, comma-separated, as 500x6,500x32 (default: six)")
    parser.add_argument("-k", dest="pick", default="", help="only changes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Print a row per setting; returns 0. All six shapes take an hour on one core, 500x6 two minutes."""
    check_targets({"--json": args.json}, {})
    shapes = _shapes(args.shapes) if args.shapes else SHAPES
    rows, start = [], time.monotonic()
    titles = ("cover 95 (truth below, above)", "cover 90", "width", "plain 95")
    say(f"{'change':36}{'N':>6}{'D':>5} {titles[0]:>31}{titles[1]:>10}{titles[2]:>7}{titles[3]:>10}")
    changes = [change for change in (*SMOOTH, *FLIPS) if args.pick in change.name]
    for size, change in product(shapes, changes):
        row = simulate(change, *size, args.repetitions)
        rows.append(row)
        missed = f"({row['below_95']:.1%}, {row['above_95']:.1%})"
        say(
            f"{row['change']:36}{row['N']:6}{row['D']:5} {row['cover_95']:>15.1%} {missed:>15}"
            f"{row['cover_90']:10.1%}{row['width']:7.2f}{row['plain_95']:10.1%}"
        )
    if not rows:
        raise ValueError(f"-k: no change contains {args.pick!r}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    say(f"{len(rows)} settings, {args.repetitions} repetitions each, {time.monotonic() - start:.0f} s")
    return 0


def simulate(change: Change, N: int, D: int, repetitions: int, seed: int = 0) -> dict:
    """Return the coverage of the interval and of the plain one for a change of N rows of D features.

    Returns: change, N, D, repetitions; cover_95, cover_90; below_95, above_95: how often the truth lies on either
    side of the interval; width: median width at 95 % over that of a normal interval with the true spread; bias:
    mean error of the difference over its spread; plain_95: coverage of the control.
    """
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(D, D)) * np.linspace(1.5, 0.3, D) * (6 / D) ** 0.5
    reference = Moments(rng.normal(size=D) * 0.3, factor @ factor.T, 0)
    standard = Moments(np.zeros(D), np.eye(D), 0)
    truth = frechet_distance(change.moments(N, D), reference) - frechet_distance(standard, reference)
    ends, found, plain = [], [], []
    for _ in range(repetitions):
        a = change.draw(rng, N, D)
        b = change.apply(rng, a)
        pair = estimate(a, reference), estimate(b, reference)
        results = [compare(*pair, margin=1.0, level=level) for level in LEVELS]
        ends.append([(r.low, r.high) for r in results])
        found.append(results[0].difference)
        plain.append(_plain(a, b, reference))
    low, high = np.array(ends).transpose(2, 1, 0)
    spread = float(np.std(found)) or 1.0
    width = np.median(high[0] - low[0]) / (2 * ndtri((1 + LEVELS[0]) / 2) * spread)
    covered = ((low <= truth) & (truth <= high)).mean(1)
    difference, error = np.array(plain).T
    return {
        "change": change.name, "N": N, "D": D, "repetitions": repetitions, "truth": truth,
        "cover_95": float(covered[0]), "cover_90": float(covered[1]),
        "below_95": float((truth < low[0]).mean()), "above_95": float((truth > high[0]).mean()),
        "width": float(width), "bias": float((np.mean(found) - truth) / spread),
        "plain_95": float((np.abs(difference - truth) <= ndtri(0.975) * error).mean()),
    }  # fmt: skip


def _plain(a: np.ndarray, b: np.ndarray, reference: Moments) -> tuple[float, float]:
    """Return the uncorrected difference and the standard error of the in-sample influences."""
    whole_a, whole_b = (transport(moments(x), reference) for x in (a, b))
    delta = whole_b.influence(b) - whole_a.influence(a)
    return whole_b.distance - whole_a.distance, float(delta.std(ddof=1) / np.sqrt(len(a)))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        shapes = tuple((int(n), int(d)) for n, d in (word.split("x") for word in text.split(",")))
    except ValueError:
        raise ValueError(f"--shapes: expected N x D, as 500x6,500x32, got {text!r}") from None
    if any(n < 20 or d < 1 for n, d in shapes):
        raise ValueError(f"--shapes: expected N >= 20 and D >= 1, got {text!r}")
    return shapes
