"""The correctness rule: e_ours <= 2 e_torch + 1e-30 against the float64 oracle, per tensor and over its slices.

A slice is a token of (T, H), a row of (R, H), an expert of (E, 2I, H): an index of the first dimension. A whole-tensor
norm hides one wrong row in thousands, or the garbage gradient of an expert that got one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.instrument.verify import BOUND, NARROW

Compute = Callable[[int, str], dict[str, Tensor]]
DRAWS, OUTLIER = (5, 15, 60), 8
TABLE: dict[tuple[str, str, str, float], Verdict] = {}


@dataclass(order=True)
class Verdict:
    ratio: float
    e_ours: float
    e_torch: float
    tensor: str


def judge(op: str, compute: Compute, backend: str, dtype: torch.dtype, seed: int, scale: float = 1.0) -> None:
    """Compare `backend` with the oracle and with plain torch in its dtype; put the worst tensor in the table.

    `compute(seed, how)` returns tensors by name, `how` being a backend, "oracle" (float64) or "loop" (plain torch, the
    rival of `eager`; `eager` is the rival of every other backend). Integers are compared exactly, and so are zeros of
    the oracle that plain torch finds, too: where neither does, terms cancelled by chance.

    One draw of a rounding error can be lucky for the rival. So a breach is confirmed: over DRAWS draws, the first among
    them, the medians must keep the rule, and our worst error may be OUTLIER times the rival's worst. An error regularly
    too large still fails, and so does garbage in one draw. Means would not do: where few tokens cancel, one draw may
    err a hundred times as much as the others, either way. Nor would a look after every draw, which forgives too much.
    """
    rival = "loop" if backend == "eager" else "eager"
    draws = []

    def draw() -> None:
        oracle, theirs = compute(seed + len(draws), "oracle"), compute(seed + len(draws), rival)
        with threads(2):
            ours = compute(seed + len(draws), backend)
        assert ours.keys() == oracle.keys() == theirs.keys()
        for name in oracle:
            clamp_what_overflows(name, ours, theirs, oracle)
        draws.append((ours, theirs, oracle))

    draw()
    for name, exact in draws[0][2].items():
        where = f"{op} {name} [{backend}, {dtype}, scale {scale:g}, seed {seed}]"
        compare_exactly(*(tensors[name] for tensors in draws[0]), where)
        for kind, view in views_of(name, exact).items():
            n, (ours, theirs) = 1, errors(view, name, draws[:1])
            for n in () if keeps_the_rule(ours, theirs) else DRAWS:
                while len(draws) < n:
                    draw()
                ours, theirs = errors(view, name, draws[:n])
                if keeps_the_rule(ours, theirs):
                    break
            e_ours, e_torch = float(ours.quantile(0.5)), float(theirs.quantile(0.5))
            assert keeps_the_rule(ours, theirs), (
                f"{where}{kind}: {e_ours:.3g} against {e_torch:.3g}, at worst {ours.max():.3g} against "
                f"{theirs.max():.3g} ({n} draws)"
            )
            verdict = Verdict(e_ours / (e_torch + 1e-30), e_ours, e_torch, name + kind)
            key = (op, backend, str(dtype).removeprefix("torch."), scale)
            TABLE[key] = max(TABLE.get(key, verdict), verdict)


def clamp_what_overflows(name: str, ours: dict, theirs: dict, oracle: dict) -> None:
    """Let infinity count as the dtype's largest number where the oracle is out of its range (float16 gradients)."""
    if not ours[name].is_floating_point():
        return
    most = torch.finfo(ours[name].dtype).max
    beyond = oracle[name].abs() > 0.99 * most
    if beyond.any():
        for tensors in (ours, theirs, oracle):
            tensors[name] = torch.where(beyond, tensors[name].clamp(-most, most), tensors[name])


def compare_exactly(ours: Tensor, theirs: Tensor, exact: Tensor, where: str) -> None:
    assert ours.shape == exact.shape, f"{where}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.is_floating_point():
        assert torch.equal(ours.long(), exact.long()), where
        return
    assert ours.dtype == theirs.dtype, f"{where}: dtype {ours.dtype}, expected {theirs.dtype}"
    assert not ours[(exact == 0) & (theirs == 0)].count_nonzero(), f"{where}: not zero where the oracle and torch are"


def views_of(name: str, exact: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return how to see a tensor as (slices, elements): whole, and sliced where its first dimension means something."""
    if not exact.is_floating_point():
        return {}
    sliced = exact.ndim > 1 and not name.startswith("dshared_")
    return {"": lambda t: t.reshape(1, -1)} | ({" slices": lambda t: t.flatten(1)} if sliced else {})


def keeps_the_rule(ours: Tensor, theirs: Tensor) -> bool:
    """Judge errors of as many draws: see `judge`. NaN keeps nothing, nor does what a rival's infinity would excuse."""
    median = ours.quantile(0.5) <= BOUND * theirs.quantile(0.5) + 1e-30
    worst = ours.max() <= OUTLIER * theirs.max() + 1e-30
    return bool(median and worst and theirs.max() < math.inf)


def errors(view, name: str, draws: list[tuple[dict[str, Tensor], ...]]) -> Tensor:
    """Return our errors and torch's, (2, draws): max over slices i of ||got_i - exact_i|| / ||exact_i||.

    A narrow slice is measured against the root mean square of all of them where that is larger: a scalar may cancel. In
    float64 the oracle itself rounds: torch's error counts as at least 1e-12. A single number's error counts as at least
    half a unit in the last place: only luck rounds better.
    """
    slices = [view(oracle[name]) for _, _, oracle in draws]
    norms = [exact.norm(dim=1) for exact in slices]
    if slices[0].shape[1] < NARROW:
        typical = torch.cat(norms).square().mean().sqrt()
        norms = [norm.maximum(typical) for norm in norms]

    def error(which: int, tensors: dict[str, Tensor], exact: Tensor, norm: Tensor) -> float:
        difference = (view(tensors[name]).detach().double() - exact).norm(dim=1)
        relative = torch.where(difference == 0, 0.0, difference / norm)
        least = least_error(tensors[name]) if which == 1 else 0.0
        worst = float(relative.max()) if len(relative) else 0.0
        return worst if worst != worst else max(worst, least)  # Python's max() would lose NaN

    found = [
        [error(which, draw[which], exact, norm) for draw, exact, norm in zip(draws, slices, norms, strict=True)]
        for which in (0, 1)
    ]
    return torch.tensor(found, dtype=torch.float64)


def least_error(theirs: Tensor) -> float:
    if theirs.dtype == torch.float64:
        return 1e-12
    return torch.finfo(theirs.dtype).eps / 2 if theirs.numel() == 1 else 0.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Ours is tested with two threads; the rest of a test is faster with the one that conftest.py sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table_lines() -> list[str]:
    """Return the table e_ours / e_torch: a line per op, backend and dtype, a column per input scale."""
    scales = sorted({key[3] for key in TABLE})
    lines = [f"{'op':<10} {'backend':<8} {'dtype':<9}" + "".join(f" {f'scale {s:g}':<37}" for s in scales)]
    for op, backend, dtype in sorted({key[:3] for key in TABLE}):
        verdicts = [TABLE.get((op, backend, dtype, scale)) for scale in scales]
        cells = [f"{v.e_ours:.1e}/{v.e_torch:.1e}={v.ratio:.2f} {v.tensor}" if v else "-" for v in verdicts]
        lines.append(f"{op:<10} {backend:<8} {dtype:<9}" + "".join(f" {cell:<37}" for cell in cells))
    return lines
