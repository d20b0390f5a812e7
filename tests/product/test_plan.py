"""RoutingPlan: one data structure all rooms share; what validate() refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_kernels import RoutingPlan, dispatch

IDS = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2]], dtype=torch.int32)
FIELDS = [field.name for field in dataclasses.fields(RoutingPlan)]


@pytest.fixture
def plan() -> RoutingPlan:
    return dispatch(IDS, torch.arange(8.0).view(4, 2) / 8, 5, backend="eager")


def test_a_plan_by_hand(plan):
    assert plan.expert_counts.tolist() == [3, 0, 3, 2, 0]
    assert plan.expert_offsets.tolist() == [0, 3, 3, 6, 8, 8]
    assert plan.row_token.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert plan.row_pick.tolist() == [1, 2, 6, 0, 5, 7, 3, 4]
    assert plan.row_weight.tolist() == [i / 8 for i in (1, 2, 6, 0, 5, 7, 3, 4)]
    assert plan.token_row_offsets.tolist() == [0, 2, 4, 6, 8]
    assert plan.token_rows.tolist() == [0, 3, 1, 6, 4, 7, 2, 5]
    assert (plan.num_tokens, plan.num_experts, plan.num_rows) == (4, 5, 8)
    plan.validate()


def test_tensors_round_trip(plan):
    assert FIELDS == "row_weight expert_counts expert_offsets row_token row_pick token_row_offsets token_rows".split()
    again = RoutingPlan.from_tensors(plan.tensors())
    assert all(getattr(again, name) is getattr(plan, name) for name in FIELDS)
    with pytest.raises(ValueError, match="6 tensors, expected 7"):
        RoutingPlan.from_tensors(plan.tensors()[:6])


def test_frozen(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.row_token = plan.row_pick


CORRUPTIONS = {
    "expert_counts": [[3, 0, 3, 2, 1], [3, 0, 3, 3, -1], [3, 1, 2, 2, 0]],
    "expert_offsets": [[1, 3, 3, 6, 8, 8], [0, 3, 2, 6, 8, 8], [0, 3, 3, 6, 8, 9], [0, 3, 3, 6, 8]],
    "row_token": [
        [0, 1, 4, 0, 2, 3, 1, 2],
        [-1, 1, 3, 0, 2, 3, 1, 2],
        [1, 0, 3, 0, 2, 3, 1, 2],
        [0, 1, 2, 0, 2, 3, 1, 2],
    ],
    "row_pick": [[1, 1, 6, 0, 5, 7, 3, 4], [-1, 2, 6, 0, 5, 7, 3, 4]],
    "token_row_offsets": [[0, 2, 4, 6, 9], [0, 4, 2, 6, 8], [0, 1, 4, 6, 8], [1, 2, 4, 6, 8], [0]],
    "token_rows": [[3, 0, 1, 6, 4, 7, 2, 5], [0, 3, 1, 6, 4, 7, 2, 8], [0, 3, 1, 6, 4, 7, 2, 2], [0, 3, 1, 6, 4, 7, 2]],
}


@pytest.mark.parametrize(("field", "values"), [(f, v) for f, rows in CORRUPTIONS.items() for v in rows])
def test_validate_names_what_is_wrong(field, values, plan):
    bad = dataclasses.replace(plan, **{field: torch.tensor(values, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"plan\.\w+: got .*expected"):
        bad.validate()


@pytest.mark.parametrize(("field", "dtype"), [("row_token", torch.int64), ("row_weight", torch.bfloat16)])
def test_validate_refuses_dtypes(field, dtype, plan):
    bad = dataclasses.replace(plan, **{field: getattr(plan, field).to(dtype)})
    with pytest.raises(ValueError, match=rf"plan\.{field}: got {dtype}, expected"):
        bad.validate()


def test_validate_refuses_weights_that_are_not_finite(plan):
    with pytest.raises(ValueError, match="row_weight"):
        dataclasses.replace(plan, row_weight=plan.row_weight * float("inf")).validate()
