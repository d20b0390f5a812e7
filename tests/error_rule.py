"""The correctness rule: e_ours <= 2 e_torch + 1e-30 against the float64 oracle, per tensor and over its slices.

A slice is an index of the first dimension: a token of (T, H), a row of (R, H), an expert of (E, 2I, H). A whole-tensor norm
hides one wrong row in thousands, or the garbage gradient of an expert that got one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Compute = Callable[[int, str], Tensors]
NARROW = 16  # slices with fewer elements have no error statistics of their own
REDRAWS = 12
TABLE: dict[tuple[str, str, str, float], Verdict] = {}


@dataclass(order=True)
class Verdict:
    ratio: float
    e_ours: float
    e_torch: float
    tensor: str


def judge(op: str, compute: Compute, backend: str, dtype: torch.dtype, seed: int, scale: float = 1.0) -> None:
    """Compare `backend` with the oracle and with plain torch in the same dtype; add the worst tensor to the table.

    `compute(seed, how)` returns tensors by name, `how` being a backend, "oracle" (float64) or "loop" (plain torch, the
    rival of `eager`; `eager` is the rival of every other backend). One draw of the rival's rounding error can be luckily
    small where a tensor has few elements, so a breach is confirmed against the largest of REDRAWS draws.
    """
    rival = "loop" if backend == "eager" else "eager"
    oracle, theirs = compute(seed, "oracle"), compute(seed, rival)
    with threads(2):
        ours = compute(seed, backend)
    assert ours.keys() == oracle.keys()
    redraws: list[tuple[Tensors, Tensors]] = []
    floor = 1e-12 if dtype == torch.float64 else 0.0  # the oracle itself rounds in float64
    for name, exact in oracle.items():
        where = f"{op} {name} [{backend}, {dtype}, scale {scale}, seed {seed}]"
        got = ours[name]
        assert got.shape == exact.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        if not exact.is_floating_point():
            assert torch.equal(got.long(), exact.long()), where
            continue
        assert got.dtype == theirs[name].dtype, f"{where}: dtype {got.dtype}, expected {theirs[name].dtype}"
        assert not got[exact == 0].count_nonzero(), f"{where}: not exactly zero where the oracle is"
        for kind, error in (("", whole_error), (" slices", slice_error)):
            e_ours, e_torch = error(got, exact), max(error(theirs[name], exact), floor)
            while e_ours > 2 * e_torch + 1e-30 and len(redraws) < REDRAWS:
                again = seed + len(redraws) + 1
                redraws.append((compute(again, rival), compute(again, "oracle")))
                e_torch = max(e_torch, *(error(t[name], o[name]) for t, o in redraws))
            assert e_ours <= 2 * e_torch + 1e-30, f"{where}{kind}: e_ours {e_ours:.3g}, e_torch {e_torch:.3g}"
            verdict = Verdict(e_ours / (e_torch + 1e-30), e_ours, e_torch, name + kind)
            key = (op, backend, str(dtype).removeprefix("torch."), scale)
            TABLE[key] = max(TABLE.get(key, verdict), verdict)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Ours is tested with two threads; the rest of a test is faster with the one that conftest.py sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def whole_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||."""
    return _relative(got.double() - exact, exact).item()


def slice_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest ||got_i - exact_i|| / ||exact_i|| over the first dimension.

    Narrow slices are measured against the root mean square of all slices where that is larger: a scalar may cancel.
    """
    if exact.ndim < 2 or exact.numel() == 0:
        return whole_error(got, exact)
    got, exact = got.double().flatten(1), exact.flatten(1)
    norms = exact.norm(dim=1)
    if exact.shape[1] < NARROW:
        norms = norms.maximum(norms.square().mean().sqrt())
    errors = (got - exact).norm(dim=1)
    return torch.where(errors == 0, 0.0, errors / norms).max().item()


def _relative(difference: Tensor, exact: Tensor) -> Tensor:
    error = difference.norm()
    return error if error == 0 else error / exact.norm()


def table_lines() -> list[str]:
    """Return the table e_ours / e_torch: a line per op, backend and dtype, a column per input scale, worst tensor shown."""
    scales = sorted({key[3] for key in TABLE})
    lines = [f"{'op':<12}{'backend':<9}{'dtype':<10}" + "".join(f"{f'scale {s:g}':<38}" for s in scales)]
    for op, backend, dtype in sorted({key[:3] for key in TABLE}):
        cells = []
        for scale in scales:
            v = TABLE.get((op, backend, dtype, scale))
            cells.append(f"{v.e_ours:.1e}/{v.e_torch:.1e}={v.ratio:.2f} {v.tensor}" if v else "-")
        lines.append(f"{op:<12}{backend:<9}{dtype:<10}" + "".join(f"{cell:<38}" for cell in cells))
    return lines
