"""The rule itself: what it must not let through."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from bench.instrument import verify
from tests import error_rule
from tests.error_rule import errors, judge, keeps_the_rule


def compute_with(ours: float, theirs: float):
    """Right up to rounding, but for one element of each contender."""

    def compute(seed: int, how: str) -> dict[str, torch.Tensor]:
        exact = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if how == "oracle":
            return {"out": exact}
        out = exact.float()
        out[7, 3] += ours if how == "native" else theirs
        return {"out": out}

    return compute


@pytest.fixture(autouse=True)
def no_lines_in_the_table(monkeypatch):
    monkeypatch.setattr(error_rule, "TABLE", {})


def test_rounding_is_let_through(seed):
    judge("rule", compute_with(0.0, 0.0), "native", torch.float32, seed)


@pytest.mark.parametrize("theirs", [0.0, torch.inf])
@pytest.mark.parametrize("ours", [1e-4, torch.inf, torch.nan])
def test_one_wrong_element_is_not(ours, theirs, seed):
    with pytest.raises(AssertionError, match="out"):
        judge("rule", compute_with(ours, theirs), "native", torch.float32, seed)


def test_slices_by_themselves_show_what_is_no_number(seed):
    compute = compute_with(torch.nan, 0.0)
    draw = tuple(compute(seed, how) for how in ("native", "eager", "oracle"))
    assert not keeps_the_rule(*errors(lambda t: t.flatten(1), "out", [draw]))


@pytest.mark.parametrize(("theirs", "kept"), [(0.0, False), (1e-9, True)])
def test_a_zero_of_the_oracle_is_one_unless_terms_cancelled_by_chance(theirs, kept):
    exact, ours, torchs = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[1e-9, 1.0]]), torch.ones(1, 2)
    torchs[0, 0] = theirs
    with nullcontext() if kept else pytest.raises(AssertionError, match="not zero"):
        error_rule.compare_exactly(ours, torchs, exact, "rule")


@pytest.mark.parametrize(("units", "kept"), [(1, True), (5, False)])
def test_a_single_number_may_be_a_unit_off_where_a_rival_was_lucky(units, kept):
    exact = torch.ones((), dtype=torch.float64)
    ours = {"aux": 1 + units * torch.tensor(torch.finfo(torch.float32).eps)}
    draw = (ours, {"aux": exact.float()}, {"aux": exact})
    assert keeps_the_rule(*errors(lambda t: t.reshape(1, -1), "aux", [draw])) == kept


@pytest.mark.parametrize(
    ("ours", "theirs", "kept"),
    [
        ([3, 1, 1], [1, 1, 1], True),  # a lucky draw of the rival's
        ([3, 3, 1], [1, 1, 1], False),  # regularly too large
        ([3, 1, 1, 500], [1, 1, 1, 90], True),  # a draw that cancels, for both
        ([1, 1, 500], [1, 1, 1], False),  # garbage in one draw
        ([1, 1, 1], [1, 1, torch.inf], False),
        ([1, 1, torch.nan], [1, 1, 1], False),
    ],
)
def test_what_several_draws_must_show(ours, theirs, kept):
    assert keeps_the_rule(*torch.tensor([ours, theirs], dtype=torch.float64)) == kept


@pytest.mark.parametrize(("value", "right"), [(torch.inf, True), (-torch.inf, False), (torch.nan, False)])
def test_what_float16_cannot_hold_may_be_infinite(value, right, seed):
    def compute(seed, how):
        exact = compute_with(0, 0)(seed, "oracle")["out"]
        exact[7, 3] = 7e4
        out = exact if how == "oracle" else exact.half()
        if how == "native":
            out[7, 3] = value
        return {"out": out}

    with nullcontext() if right else pytest.raises(AssertionError, match="out"):
        judge("rule", compute, "native", torch.float16, seed)


@pytest.mark.parametrize("theirs", [torch.inf, torch.nan])
def test_benchmarks_let_nothing_through_where_plain_torch_overflowed(theirs):
    """bench/instrument/verify.py: everything is below twice infinity."""
    exact = torch.ones(4, 20, dtype=torch.float64)
    found = verify.judge({"y": 7 * exact}, {"y": exact}, {"y": theirs * exact})
    assert found.wrong and found.wrong.startswith("y: error")
    assert verify.judge({"y": exact}, {"y": exact}, {"y": exact}).wrong is None
