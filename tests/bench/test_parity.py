"""The ladder: every backend climbs it, every sabotaged model falls, and each rung sees what it is there to see."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.images import parity
from bench.images.checkpoints import Recipe
from bench.images.digits import Dataset, load_digits, train_classifier
from bench.images.expert_load import trace_picks
from bench.images.parity import DTYPES, SABOTAGES, Case, Ladder, replaced
from reference.dit import DiTMoE
from tests.contenders import each_backend
from tests.trap_cases import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the ladder of the main job stands on the CPU")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


@pytest.fixture(scope="module")
def ladder(digits) -> Ladder:
    """A ladder on a small model with nothing zero in it: adaLN-Zero would hide the MoE."""
    torch.manual_seed(0)
    model = DiTMoE(Recipe.of(digits, hidden_size=32, depth=2, num_heads=2).config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    classifier, _ = train_classifier(digits, epochs=2)
    return Ladder(model, classifier, digits.images, Case(samples=40, steps=3, margin=0.05, probe_tokens=96), 1.0)


@pytest.fixture(scope="module", params=DTYPES)
def baseline(ladder, request) -> parity.Baseline:
    return ladder.baseline(DTYPES[request.param])


@each_backend
def test_backends_are_at_parity(ladder, baseline, backend):
    if backend in ("triton", "cuda"):
        pytest.skip("ten minutes where GPU kernels run on a CPU: there rooms and layers are judged by themselves")
    record, samples = ladder.climb(replaced(baseline.model, backend), baseline)
    assert record["verdict"] == "PARITY", record
    assert record["failed"] == [] and record["cosine"] > 0.99
    assert samples.shape == (40, 1, 8, 8)


@pytest.mark.parametrize(("name", "rung"), [*zip(SABOTAGES, ("plans", "layers", "layers"), strict=True)])
def test_sabotaged_models_fail(ladder, baseline, name, rung):
    record, _ = ladder.climb(SABOTAGES[name](replaced(baseline.model, "eager")), baseline)
    assert record["verdict"] == "DIFFERENT" and rung in record["failed"], record


def test_few_samples_are_the_first_of_all(ladder, baseline):
    few = baseline.first(20)
    record, samples = ladder.climb(replaced(baseline.model, "eager"), few)
    assert record["verdict"] == "PARITY" and record["count"] == 20, record
    assert samples.shape == (20, 1, 8, 8) and torch.equal(few.samples, baseline.samples[:20])
    drawn = ladder.baseline(baseline.dtype, 20)
    assert drawn.samples.shape == (20, 1, 8, 8) and drawn.routing.shape == few.routing.shape
    assert 0 < ladder.pace(baseline.dtype) < 60


def test_gross_faults_show_in_the_distance_itself(ladder, baseline):
    record, _ = ladder.climb(SABOTAGES["dropped shared expert"](replaced(baseline.model, "eager")), baseline)
    assert "dfd" in record["failed"] and record["dfd_verdict"] == "DIFFERENT"
    assert record["cosine"] < 0.99 and record["flipped_samples"] > 0.9


def test_a_wrong_pick_fails_the_plans(ladder, baseline):
    model = replaced(baseline.model, "eager")
    weight = model.blocks[1].moe.gate.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    assert ladder.plans(model, baseline)["plans"] == "fail"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [slice(None), 2], ids=["everywhere", "one row"])
def test_what_is_no_number_has_the_worst_ratio(rows, value):
    exact = torch.ones(5, 3, dtype=torch.float64)
    ours, theirs = exact + 1e-7, exact + 1e-7
    ours[rows] = value
    for judged in (parity.ratio, parity.rows_ratio):
        assert judged(exact + 1e-7, theirs, exact) == 1
        assert judged(ours, theirs, exact) == judged(theirs, ours, exact) == judged(ours, ours, exact) > 2


@pytest.mark.parametrize("value", [torch.nan, 0.5])
def test_weights_that_are_wrong_fail_the_plans(ladder, baseline, monkeypatch, value):
    right, model = parity.plan_of, replaced(baseline.model, "eager")

    def wrong(layer, x):
        plan = right(layer, x)
        if layer in [block.moe for block in model.blocks]:
            plan.row_weight[3] = value
        return plan

    assert ladder.plans(model, baseline)["plans"] == "pass"
    monkeypatch.setattr(parity, "plan_of", wrong)
    assert ladder.plans(model, baseline)["plans"] == "fail"


def test_experts_that_compute_no_numbers_fail_the_layers(ladder, baseline):
    model = replaced(baseline.model, "eager")
    with torch.no_grad():
        for expert in model.blocks[0].moe.experts:
            expert.down_proj.weight[3] = torch.nan
    record = ladder.layers(model, baseline)
    assert record["layers"] == "fail"
    assert min(record[name] for name in ("e_ours", "outputs_ratio", "experts_ratio")) == parity.NO_NUMBER


def test_near_ties_are_left_out(ladder):
    block = copy.deepcopy(ladder.model.blocks[0].moe)
    gate = block.gate.weight.data = torch.zeros(8, 32, dtype=torch.float64)
    gate[:4, :4] = torch.eye(4)
    x = torch.zeros(3, 1, 32)
    x[:, 0, :4] = torch.tensor([[3.0, 2, 1, 0], [3, 2, 2 + 1e-7, 0], [3, 2, 0, 0]])
    assert parity.clear_images(block, x, {}).tolist() == [True, False, True]


def test_recording_changes_nothing_and_leaves_no_hooks(ladder):
    def plain():
        return parity.sample(ladder.model, ladder.noise[:4], ladder.labels[:4], 2, 1.5)

    before = plain()
    with ladder.recording(ladder.model) as masks:
        assert torch.equal(plain(), before)
    plain()
    assert len(masks) == 4 and all(int(mask).bit_count() == 2 for mask in torch.stack(masks).flatten())


def test_a_trace_is_the_conditional_picks_of_the_calls_asked_for(ladder):
    with trace_picks(ladder.model, (1,), guided=True) as trace:
        parity.sample(ladder.model, ladder.noise[:4], ladder.labels[:4], 2, 1.5)
    assert [ids.shape for ids, _ in trace] == [weights.shape for _, weights in trace] == [(64, 2), (64, 2)]
