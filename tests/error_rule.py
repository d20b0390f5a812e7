"""The correctness rule: e_ours <= 2 e_torch + 1e-30 against the float64 oracle, per tensor and over its slices.

A slice is a token of (T, H), a row of (R, H), an expert of (E, 2I, H): an index of the first dimension. A whole-tensor
norm hides one wrong row in thousands, or the garbage gradient of an expert that got one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Compute = Callable[[int, str], dict[str, Tensor]]
NARROW = 16  # slices with fewer elements have no error statistics of their own
DRAWS = 16
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
    rival of `eager`; `eager` is the rival of every other backend). Integers and exact zeros are compared exactly.

    One draw of a rounding error can be lucky for the rival. So a breach is confirmed: the root mean squares over up to
    DRAWS draws, the first among them, must keep the rule. Garbage, or an error regularly too large, still fails.
    """
    rival = "loop" if backend == "eager" else "eager"
    draws = []

    def draw() -> None:
        oracle, theirs = compute(seed + len(draws), "oracle"), compute(seed + len(draws), rival)
        with threads(2):
            ours = compute(seed + len(draws), backend)
        assert ours.keys() == oracle.keys() == theirs.keys()
        draws.append((ours, theirs, oracle))

    draw()
    for name, exact in draws[0][2].items():
        where = f"{op} {name} [{backend}, {dtype}, scale {scale:g}, seed {seed}]"
        compare_exactly(*(tensors[name] for tensors in draws[0]), where)
        for kind, error in errors_of(name, exact).items():
            n, e_ours, e_torch = 1, *mean_errors(error, name, draws[:1], dtype)
            while e_ours > 2 * e_torch + 1e-30 and n < DRAWS:
                n += 1
                if n > len(draws):
                    draw()
                e_ours, e_torch = mean_errors(error, name, draws[:n], dtype)
            assert e_ours <= 2 * e_torch + 1e-30, (
                f"{where}{kind}: e_ours {e_ours:.3g}, e_torch {e_torch:.3g} ({n} draws)"
            )
            verdict = Verdict(e_ours / (e_torch + 1e-30), e_ours, e_torch, name + kind)
            key = (op, backend, str(dtype).removeprefix("torch."), scale)
            TABLE[key] = max(TABLE.get(key, verdict), verdict)


def compare_exactly(ours: Tensor, theirs: Tensor, exact: Tensor, where: str) -> None:
    assert ours.shape == exact.shape, f"{where}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.is_floating_point():
        assert torch.equal(ours.long(), exact.long()), where
        return
    assert ours.dtype == theirs.dtype, f"{where}: dtype {ours.dtype}, expected {theirs.dtype}"
    assert not ours[exact == 0].count_nonzero(), f"{where}: not exactly zero where the oracle is"


def errors_of(name: str, exact: Tensor) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Integers have no error; the rows of a shared weight or of a plain scalar are no slices."""
    if not exact.is_floating_point():
        return {}
    sliced = exact.ndim > 1 and exact.numel() and not name.startswith("dshared_")
    return {"": whole_error} | ({" slices": slice_error} if sliced else {})


def mean_errors(error, name: str, draws: list, dtype: torch.dtype) -> tuple[float, float]:
    """Return the root mean squares of our error and of torch's, floored in float64, where the oracle itself rounds."""
    pairs = [(error(ours[name], exact[name]), error(theirs[name], exact[name])) for ours, theirs, exact in draws]
    e_ours, e_torch = ((sum(e * e for e in column) / len(draws)) ** 0.5 for column in zip(*pairs, strict=True))
    return e_ours, max(e_torch, 1e-12 if dtype == torch.float64 else 0.0)


def whole_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, and 0 where both are zero."""
    error = (got.double() - exact).norm()
    return 0.0 if error == 0 else (error / exact.norm()).item()


def slice_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest ||got_i - exact_i|| / ||exact_i|| over the first dimension.

    Narrow slices are measured against the root mean square of all slices where that is larger: a scalar may cancel.
    """
    got, exact = got.double().flatten(1), exact.flatten(1)
    norms = exact.norm(dim=1)
    if exact.shape[1] < NARROW:
        norms = norms.maximum(norms.square().mean().sqrt())
    errors = (got - exact).norm(dim=1)
    return torch.where(errors == 0, 0.0, errors / norms).max().item()


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
