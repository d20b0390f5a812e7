"""The correctness rule: e_ours <= 2 e_torch + 1e-30 against the float64 oracle. Red gate, no number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BOUND = 2.0  # times plain torch's error
NARROW = 16  # slices with fewer elements have no error statistics of their own


@dataclass(frozen=True)
class Check:
    """Errors per tensor against the oracle, `ours` and plain `torch`'s; `wrong` says which tensor broke the rule."""

    errors: dict[str, dict[str, float | None]]
    wrong: str | None = None


def judge(
    got: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    slices: bool = True,
    bound: float = BOUND,
) -> Check:
    """Hold every tensor of the oracle against ours and plain torch's of the same name.

    Args:
        got, theirs: tensors of any dtype. oracle: float64.
        slices: also judge the worst index of the first dimension (a token's row, an expert's matrix), and ask for
            exact zeros where the oracle has them. A whole-tensor norm hides one wrong row in thousands.
        bound: how many times plain torch's error is still right; anything but BOUND is for other people's code.
    Raises: KeyError for a tensor that is missing.
    """
    errors, wrong = {}, []
    for name, exact in oracle.items():
        ours, plain = got[name].detach(), theirs[name].detach()  # not copied: beside float64 all sums are of float64
        if ours.shape != exact.shape:
            return Check(errors, f"{name}: got shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
        pairs = [(whole_error(ours, exact), whole_error(plain, exact))]
        if slices:
            pairs.append((slice_error(ours, exact), slice_error(plain, exact)))
        e_ours, e_torch = max(pairs, key=lambda pair: pair[0] / (pair[1] + 1e-30))
        errors[name] = {k: e if math.isfinite(e) else None for k, e in (("ours", e_ours), ("torch", e_torch))}
        if not ours.isfinite().all():
            wrong.append(f"{name} is not finite")
        elif slices and ours[exact == 0].count_nonzero():
            wrong.append(f"{name} is not exactly zero where the oracle is")
        elif not e_ours <= bound * e_torch + 1e-30 < math.inf:  # infinite torch would let everything through
            wrong.append(f"{name}: error {e_ours:.2e}, plain torch {e_torch:.2e}")
    return Check(errors, "; ".join(wrong) or None)


def whole_error(got: Tensor, exact: Tensor) -> float:
    """Return ||got - exact|| / ||exact||; 0 when they are equal."""
    difference = (got - exact).norm()
    return (difference / exact.norm()).item() if difference else 0.0


def slice_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest relative error over the first dimension; narrow slices are held against the mean size too."""
    if exact.ndim < 2 or not exact.numel():
        return whole_error(got, exact)
    got, exact = got.flatten(1), exact.flatten(1)
    norms, errors = exact.norm(dim=1), (got - exact).norm(dim=1)
    if exact.shape[1] < NARROW:
        norms = norms.maximum(norms.square().mean().sqrt())
    return torch.where(errors == 0, 0.0, errors / norms).max().item()
