"""The routing plan: which token goes to which expert, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Routed rows grouped by expert, tokens ascending inside an expert, and the way back from a token to its rows.

    All sizes follow from T, K, E or the capacity, never from the values: building a plan does not wait for the device.
    Offsets are exclusive prefix sums: expert e owns the rows expert_offsets[e] to expert_offsets[e + 1].
    Where the number of rows depends on values (thresholds), R is a bound, and the first expert_offsets[E] rows are
    those that there are. The rows behind belong to nobody: no expert computes them, no token sums them, and nothing
    that they hold reaches a result. Their row_token is in [0, T) and their token_rows in [0, R): kernels may load from
    there. The gradient of their row_weight is arbitrary (0 in anomaly mode), and the ops that make such plans drop it.
    The ops check shapes, dtypes and devices of a plan; its contents are checked by `validate` alone.
    """

    row_weight: Tensor  # (R,) float32 (float64 for float64 input), differentiable
    expert_counts: Tensor  # (E,) int32
    expert_offsets: Tensor  # (E+1,) int32
    row_token: Tensor  # (R,) int32: the token of each row
    row_pick: Tensor  # (R,) int32: flat index of the row's weight, t K + k (token choice) or t E + e (expert choice)
    token_row_offsets: Tensor  # (T+1,) int32
    token_rows: Tensor  # (R,) int32: the rows of each token, ascending

    @property
    def num_tokens(self) -> int:
        return self.token_row_offsets.shape[0] - 1

    @property
    def num_experts(self) -> int:
        return self.expert_counts.shape[0]

    @property
    def num_rows(self) -> int:
        return self.row_token.shape[0]

    def owned(self) -> RoutingPlan:
        """Return the plan without the rows behind expert_offsets[E]; the same one if there are none. Reads that number,
        hence waits for the device."""
        end = self.expert_offsets.tolist()[-1]  # a quarter of int(expert_offsets[-1])
        return self.first(end) if 0 <= end < self.num_rows else self

    def first(self, end: int) -> RoutingPlan:
        """Return the plan of the first `end` rows, which are at least those that there are; the same one for all."""
        if end == self.num_rows:
            return self
        rows = "row_weight", "row_token", "row_pick", "token_rows"
        return replace(self, **{name: getattr(self, name)[:end] for name in rows})

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the seven tensors in the order of the fields, as the registered ops take and return them."""
        return (
            self.row_weight,
            self.expert_counts,
            self.expert_offsets,
            self.row_token,
            self.row_pick,
            self.token_row_offsets,
            self.token_rows,
        )

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> RoutingPlan:
        """Build a plan from seven tensors in the order of the fields. Shapes and contents: `validate`."""
        if len(tensors) != len(FIELDS):
            raise ValueError(f"plan: got {len(tensors)} tensors, expected {len(FIELDS)} ({', '.join(FIELDS)})")
        return cls(*tensors)

    def validate(self) -> None:
        """Check shapes, dtypes and contents; raise ValueError naming the field, what it holds and what was expected.

        Reads the contents, hence waits for the device: meant for tests and for plans made by hand.
        """
        self.check_layout()
        if self.owned() is not self:
            return self._validate_bounded()
        E, T, R = self.num_experts, self.num_tokens, self.num_rows
        counts, offsets, row_token = self.expert_counts.long(), self.expert_offsets.long(), self.row_token.long()
        token_offsets = self.token_row_offsets.long()
        _expect("expert_counts", bool((counts >= 0).all()), "counts >= 0", counts)
        _expect("expert_offsets", offsets[0] == 0 and offsets[-1] == R, f"first 0, last {R}", offsets)
        _expect("expert_offsets", torch.equal(offsets.diff(), counts), "differences equal to expert_counts", offsets)
        _expect("row_token", _within(row_token, T), f"tokens in [0, {T})", row_token)
        expert = torch.repeat_interleave(torch.arange(E, device=counts.device), counts)
        ascending = (row_token.diff() >= 0) | (expert.diff() > 0)
        _expect("row_token", bool(ascending.all()), "tokens ascending inside each expert", row_token)
        picks = self.row_pick.long()
        _expect("row_pick", bool((picks >= 0).all()), "picks >= 0", picks)
        _expect("row_pick", picks.unique().numel() == R, "every pick once", picks)
        _expect("row_weight", bool(self.row_weight.isfinite().all()), "finite weights", self.row_weight)
        owner, rows = torch.sort(row_token, stable=True)
        same_rows = torch.equal(self.token_rows.long(), rows)
        _expect("token_rows", same_rows, "each token's rows, ascending", self.token_rows)
        starts = torch.searchsorted(owner, torch.arange(T + 1, device=owner.device))
        _expect("token_row_offsets", torch.equal(token_offsets, starts), "the rows of each token", token_offsets)

    def _validate_bounded(self) -> None:
        """Check the rows that there are as a plan of their own, and that those behind can be loaded from."""
        self.owned().validate()
        _expect(
            "row_token", _within(self.row_token, self.num_tokens), f"tokens in [0, {self.num_tokens})", self.row_token
        )
        _expect("token_rows", _within(self.token_rows, self.num_rows), f"rows in [0, {self.num_rows})", self.token_rows)

    def check_layout(self) -> None:
        """Check shapes, dtypes and devices without reading the contents; raise ValueError naming the field."""
        E, T, R = self.num_experts, self.num_tokens, self.num_rows
        if T < 0:
            raise ValueError("plan.token_row_offsets: got shape (0,), expected (T+1,)")
        lengths = dict(zip(FIELDS, (R, E, E + 1, R, R, T + 1, R), strict=True))
        for name, tensor in zip(FIELDS, self.tensors(), strict=True):
            floating = name == "row_weight"
            dtypes = (torch.float32, torch.float64) if floating else (torch.int32,)
            if tensor.dtype not in dtypes:
                raise ValueError(f"plan.{name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
            if tuple(tensor.shape) != (lengths[name],):
                raise ValueError(f"plan.{name}: got shape {tuple(tensor.shape)}, expected {(lengths[name],)}")
            if tensor.device != self.row_token.device:
                raise ValueError(f"plan.{name}: got device {tensor.device}, expected {self.row_token.device}")


FIELDS = tuple(field.name for field in fields(RoutingPlan))


def _within(values: Tensor, end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())


def _expect(name: str, holds: bool | Tensor, expected: str, got: Tensor) -> None:
    if not holds:
        shown = got.flatten()[:8].tolist()
        raise ValueError(f"plan.{name}: got {shown}{'...' if got.numel() > 8 else ''}, expected {expected}")
