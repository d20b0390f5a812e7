"""The floor of a room or a layer: what its kernels must compute and move at least, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from bench.instrument.cases import Case

Work = tuple[int, int]  # FLOPs of matrix products, bytes read and written once


def kernels(case: Case) -> list[Work]:
    """Return the work of each kernel of a case, [] for a block or a step: their floor has too many parts.

    Operands that a kernel reads more than once count once; index lists of the plan count for dispatch only.
    """
    rooms = {"gating": _gating, "dispatch": _dispatch, "experts": _experts, "combine": _combine, "layer": _layer}
    if case.level not in rooms:
        return []
    passes = {"fwd": (False,), "bwd": (True,), "fwdbwd": (False, True)}[case.mode]
    return [work for backward in passes for work in rooms[case.level](case, backward)]


def floor_s(case: Case, flops: float, bytes_per_s: float) -> float | None:
    """Return the sum over the kernels of max(compute, traffic) in seconds, None where `kernels` knows none."""
    return sum(max(f / flops, b / bytes_per_s) for f, b in kernels(case)) or None


def _gating(case: Case, backward: bool) -> Iterator[Work]:
    s, T, size = case.shape, case.T, case.torch_dtype.itemsize
    tokens, weight, probs = size * T * s.H, size * s.E * s.H, 4 * T * s.E
    products, picks = 2 * T * s.H * s.E, 8 * case.rows
    yield (2 * products, 2 * (tokens + weight) + probs + picks) if backward else (products, tokens + weight + probs)


def _dispatch(case: Case, backward: bool) -> Iterator[Work]:
    if not backward:
        yield 0, 8 * case.rows + 4 * (4 * case.rows + case.T + 2 * case.shape.E + 2)


def _experts(case: Case, backward: bool, shared: int = 0) -> Iterator[Work]:
    """Up, down; backwards dact, the two weight gradients, dx_rows. `shared`: the width of the shared expert, or 0."""
    s, T, R, size = case.shape, case.T, case.rows, case.torch_dtype.itemsize
    parts = 2 if s.activation == "swiglu" else 1
    inner, weight = R * s.I + T * shared, (s.E * s.I + shared) * s.H  # elements of act, and of down_proj
    tokens, rows = T * s.H, (R + (T if shared else 0)) * s.H
    product = 2 * inner * s.H
    if not backward:
        kept = parts * inner if case.mode != "fwd" else 0
        yield parts * product, size * (tokens + parts * weight + inner + kept)
        yield product, size * (inner + weight + rows)
        return
    # A room's gradients come in by row, the layer's by token.
    dout = tokens if case.level == "layer" else rows
    yield product, size * (dout + weight + (2 * parts + 1) * inner)
    yield parts * product, size * (parts * inner + tokens + parts * weight)
    yield product, size * (dout + inner + weight)
    yield parts * product, size * (parts * inner + parts * weight + rows)
    if case.level == "experts":
        yield 0, size * (rows + tokens)


def _combine(case: Case, backward: bool) -> Iterator[Work]:
    H, T, R, size = case.shape.H, case.T, case.rows, case.torch_dtype.itemsize
    yield (0, size * H * (T + 2 * R)) if backward and case.level == "combine" else (0, size * H * (R + 2 * T))


def _layer(case: Case, backward: bool) -> Iterator[Work]:
    yield from _dispatch(case, backward)
    yield from _experts(case, backward, case.shape.Is)
    yield from _combine(case, backward)
