"""Where experts go: tables against brute force, statistics against known answers, every kind of layer watched."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

import moe_kernels
from bench.images.analysis import findings, statistics
from bench.images.analysis.counts import GROUPS, Counter
from bench.images.analysis.watch import routed_layers, try_bfloat16, watch
from bench.images.sampling.draw import Drawing
from moe_kernels import ExpertChoice, ExpertRace, MoELayer
from reference.moe import ExpertChoiceMoE
from tests.bench.test_sampling import SETTINGS, random_model

L, S, P, E, N = 2, 3, 4, 5, 20


def brute_force(calls: list, guided: bool) -> dict[str, np.ndarray]:
    """Count by loops. calls: (first, step, layer, dense picks (halves, B, P, E), weights like it)."""
    t = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    before = {}
    for first, step, layer, picks, weights in calls:
        halves, B = picks.shape[:2]
        for half, b, p in np.ndindex(halves, min(B, N - first), P):
            image, chosen = first + b, set(np.flatnonzero(picks[half, b, p]))
            t["mass"][layer, step, half, p] += weights[half, b, p].sum()
            for e in chosen:
                t["load"][layer, step, half, p, e] += 1
                for other in chosen:
                    t["pairs"][layer, e, other] += 1
            if half:
                continue
            t["tokens"][step] += layer == 0
            t["degrees"][layer, step, len(chosen)] += 1
            for e in chosen:
                t["images"][image, layer, e] += 1
                t["group_positions"][image % GROUPS, layer, p, e] += 1
                t["group_steps"][image % GROUPS, layer, step, e] += 1
            t["maps"][image, step, p] += len(chosen)
            sets = [before.get((layer, image, p))] if step else []
            for name, other in [("kept", other) for other in sets] + guided * [
                ("overlap", picks[-1, b, p].nonzero()[0])
            ]:
                other = set(other)
                t[name][layer, step] += len(chosen & other) / len(chosen | other) if chosen | other else 1.0
            before[layer, image, p] = chosen
    return t


SHAPES = {
    "load": (L, S, 2, P, E), "mass": (L, S, 2, P), "images": (N, L, E), "group_positions": (GROUPS, L, P, E),
    "group_steps": (GROUPS, L, S, E), "pairs": (L, E, E), "degrees": (L, S, E + 1), "kept": (L, S), "overlap": (L, S),
    "tokens": (S,), "maps": (N, S, P),
}  # fmt: skip


@pytest.mark.parametrize("guided", [False, True])
def test_tables_are_what_loops_count(guided):
    """Picks of 0 to E experts by token; the last batch reaches beyond the images that count."""
    rng = np.random.default_rng(0)
    counter, calls, B = Counter(L, S, N), [], 8
    for first in range(0, N, B):
        counter.begin(first, torch.arange(first, first + B) % 3, guided)
        for step in range(S):
            for layer in (1, 0):
                picks = rng.random((1 + guided, B, P, E)) < 0.4
                weights = picks * rng.random(picks.shape)
                cells = torch.from_numpy(np.flatnonzero(picks))
                counter.take(layer, picks[..., 0].size, E, cells, torch.from_numpy(weights.ravel())[cells])
                calls.append((first, step, layer, picks, weights))
    found = counter.result().arrays()
    for name, expected in brute_force(calls, guided).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)
    assert found["labels"].tolist() == [i % 3 for i in range(N)]
    with pytest.raises(RuntimeError, match="picked more often"):
        counter.take(0, 1, E, cells, cells)


def count(model, guided: bool = True, bf16: bool = False, count: int = 10, **settings) -> dict[str, np.ndarray]:
    job = Drawing(model, 1.0, **{**SETTINGS, "guidance": 1.5 if guided else 1.0, **settings})
    counter = Counter(len(routed_layers(model)), 3, count)
    with watch(model, counter), try_bfloat16(model, counter) if bf16 else watch_nothing():
        for first in range(0, count, job.batch):
            numbers = torch.arange(first, first + job.batch) % 10
            counter.begin(first, numbers, guided)
            job.range(first, min(job.batch, count - first))
    return counter.result().arrays()


def watch_nothing():
    return torch.no_grad()


def test_oracle_and_replaced_model_show_the_same_picks_and_are_left_as_they_were():
    model, seen = random_model(), defaultdict(list)
    hooks = [
        block.moe.gate.register_forward_hook(lambda _, x, out, i=i: seen[i].append(out[1]))
        for i, block in enumerate(model.blocks)
    ]
    plain = count(model)
    for hook in hooks:
        hook.remove()
    ids = torch.stack([torch.stack(seen[i]) for i in range(2)]).view(2, 3, 3, 2, 4, 16, 2)  # layer, batch, step, half
    ids = ids.permute(0, 2, 3, 1, 4, 5, 6).flatten(3, 4)[:, :, :, :10]  # images in a row, those beyond the count off
    expected = torch.nn.functional.one_hot(ids, 4).sum((3, 5))
    assert np.array_equal(plain["load"], expected.numpy())
    replaced = random_model()
    moe_kernels.replace_moe(replaced, backend="eager")
    configs = [block.moe.moe_config for block in replaced.blocks]
    found = count(replaced, bf16=True)
    for name in set(plain) - {"mass", "survived"}:
        assert np.array_equal(plain[name], found[name]), name
    np.testing.assert_allclose(plain["mass"], found["mass"], rtol=1e-5)
    assert all(block.moe.moe_config is config for block, config in zip(replaced.blocks, configs, strict=True))
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for m in (model, replaced) for module in m.modules()
    )
    tried, survived = found["survived"].sum((0, 1))
    assert tried == found["load"][:, :, 0].sum() and 0.8 * tried < survived < tried


@pytest.mark.parametrize("group", [None, 32])
def test_expert_choice_is_counted_alike_in_oracle_and_layer(group):
    torch.manual_seed(0)
    oracle = ExpertChoiceMoE(16, 8, 4, 2.0, group)
    layer = MoELayer(16, 8, 4, 2, activation="gelu", router=ExpertChoice(2.0, group), backend="eager")
    for name, parameter in oracle.named_parameters():
        getattr(layer, name).data.copy_(parameter.data)
    tables, x = [], torch.randn(3, 6, 16, 16)
    for model in (oracle, layer):
        router = getattr(model, "router", None)
        counter = Counter(1, 3, 6)
        with torch.no_grad(), watch(model, counter), try_bfloat16(model, counter):
            counter.begin(0, torch.zeros(6, dtype=torch.int64), False)
            for step in range(3):
                model(x[step])
        assert getattr(model, "router", None) is router
        tables.append(counter.result().arrays())
    for name, expected in tables[0].items():
        np.testing.assert_allclose(tables[1][name], expected, rtol=1e-5, err_msg=name)
    degrees = tables[0]["degrees"].sum((0, 1))
    assert (degrees * np.arange(5)).sum() == 3 * 6 * 16 * 2 and (degrees > 0).sum() > 2
    assert tables[0]["survived"][..., 0].sum() == 3 * 6 * 16 * 2


def test_thresholds_count_what_is_picked_and_nothing_behind():
    """Of a plan of T E rows those that there are; under autocast too, where products are bfloat16."""
    torch.manual_seed(0)
    layer, counter, x = MoELayer(16, 8, 4, 2, router=ExpertRace(2)).eval(), Counter(1, 1, 70), torch.randn(70, 16, 16)
    picked = (x.flatten(0, 1) @ layer.gate_weight.T >= layer.router.threshold).view(70, 16, 4)
    with torch.no_grad(), watch(layer, counter), torch.autocast("cpu", torch.bfloat16):
        counter.begin(0, torch.zeros(70, dtype=torch.int64), False)
        layer(x)
    tables = counter.result()
    assert torch.equal(tables.load[0, 0, 0], picked.sum(0)) and torch.equal(tables.images[:, 0], picked.sum(1))
    rows = picked.flatten(0, 1).long()
    assert torch.equal(tables.pairs[0], rows.T @ rows) and 256 < tables.pairs.max() and rows.sum(1).unique().numel() > 3


def test_a_model_that_routes_nothing_is_named():
    with pytest.raises(ValueError, match="no routed layer in Linear"):
        routed_layers(torch.nn.Linear(2, 2))
    with (
        pytest.raises(ValueError, match="made for 3 layers, but the model has 2"),
        watch(random_model(), Counter(3, 1, 1)),
    ):
        pass


def test_information_of_known_tables():
    same, apart = np.full((6, 4), 5.0), np.eye(4) * 7
    assert statistics.mutual_information(np.stack([same[:4], apart])) == pytest.approx([0, math.log2(4)])
    table = np.array([[30, 10], [10, 50.0]])
    joint = table / 100
    exact = sum(p * math.log2(p / (joint[i].sum() * joint[:, j].sum())) for (i, j), p in np.ndenumerate(joint))
    assert statistics.mutual_information(table) == pytest.approx(exact)
    assert statistics.bias(table) == pytest.approx(1 / (200 * math.log(2)))


def test_correction_and_null_meet_chance_and_leave_what_is_there():
    """Independent picks: plain bits are all bias. Picks that position decides: log2 E, far above the null."""
    rng = np.random.default_rng(1)
    drawn = np.stack([rng.multinomial(40, [0.4, 0.3, 0.2, 0.1], size=8) for _ in range(GROUPS)])
    found = statistics.information_by_group(drawn)
    assert found.plain == pytest.approx(found.null, rel=0.7) and abs(found.corrected) < 0.5 * found.plain
    assert found.p > 0.01 and found.null < found.null_high
    decided = np.zeros((GROUPS, 8, 4))
    decided[:, np.arange(8), np.arange(8) % 4] = 10
    found = statistics.information_by_group(decided)
    assert found.plain == pytest.approx(2) and found.excess > 1.8 and found.p == 1 / (statistics.DRAWS + 1)


@pytest.mark.parametrize("count", [2, 4, GROUPS])
def test_what_permutations_leave_of_an_effect_is_no_chance(count):
    """Groups without noise: all bits are above chance, though with few groups the null holds much of them."""
    table = np.round(1e6 * np.random.default_rng(3).dirichlet(np.full(5, 1.0), 12))
    found = statistics.information_by_group(np.tile(table, (count, 1, 1)))
    assert found.null > found.plain / (2 * count) and found.excess == pytest.approx(found.plain, rel=0.08)


def test_class_is_judged_by_whole_images():
    """Images that differ in what they pick, whatever their class: tokens alone would call it certain."""
    rng = np.random.default_rng(2)
    labels, habits = np.repeat(np.arange(4), 10), rng.dirichlet(np.full(5, 0.5), 40)
    images = np.stack([rng.multinomial(1000, habit) for habit in habits])
    chance = statistics.information_by_image(images, labels)
    assert chance.p > 0.02 and chance.corrected > 20 * statistics.bias(statistics.by_class(images, labels))
    told = statistics.information_by_image(np.stack([rng.multinomial(1000, habits[c]) for c in labels]), labels)
    assert told.p < 0.01 and told.excess > 0.1
    assert statistics.by_class(images, labels)[2] == pytest.approx(images[20:30].sum(0))


def test_load_pairs_and_degrees_of_known_answers():
    load = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [20, 20, 0, 0]])
    assert statistics.max_over_mean(load) == pytest.approx([1, 4, 2])
    assert statistics.entropy(load) == pytest.approx([1, 0, 0.5])
    together = np.array([[6, 6, 0, 0], [6, 6, 0, 0], [0, 0, 6, 6], [0, 0, 6, 6]])  # experts 0, 1 and 2, 3 in pairs
    lift = statistics.pair_lift(together)
    assert lift[0, 1] == lift[2, 3] == pytest.approx(3) and lift[0, 2] == 0 and lift[0, 0] == 1
    assert statistics.pair_lift(np.full((4, 4), 2.0) + 4 * np.eye(4)) == pytest.approx(np.ones((4, 4)))
    assert statistics.gini(np.array([0, 9, 0])) == 0 and statistics.gini(np.array([3, 0, 0, 1])) == pytest.approx(0.75)
    assert statistics.binomial(8, 2.0) @ np.arange(9) == pytest.approx(2) and statistics.binomial(
        8, 2.0
    ).sum() == pytest.approx(1)


def made_tables(position=(0.0, 0.0), early=(0.0, 0.0), late=(0.0, 0.0), klass=0.0, seed=0) -> dict[str, np.ndarray]:
    """48 images of 3 classes, 2 layers, 10 steps, 8 positions, 4 experts: which share of picks is decided by what.

    position, early (expert 0 in the first two steps), late (in the last two): by layer. The rest is drawn evenly.
    """
    rng = np.random.default_rng(seed)
    shape = (2, 10, 48, 8)

    def decided(share: tuple[float, float]) -> np.ndarray:
        return rng.random(shape) < np.array(share)[:, None, None, None]

    expert = np.where(decided(position), np.arange(8) % 4, rng.integers(4, size=shape))
    expert = np.where(decided((klass, klass)), (np.arange(48) % 3)[:, None], expert)
    for steps, share in ((slice(2), early), (slice(8, 10), late)):
        expert[:, steps] = np.where(decided(share), 0, expert)[:, steps]
    counter = Counter(2, 10, 48)
    counter.begin(0, torch.arange(48) % 3, False)
    for step in range(10):
        for layer in range(2):
            ids = torch.from_numpy(expert[layer, step].ravel())
            counter.take(layer, 384, 4, torch.arange(384) * 4 + ids, torch.full((384,), 0.5))
    return counter.result().arrays()


H, F, U = findings.HOLDS, findings.FAILS, findings.UNSURE


@pytest.mark.parametrize(
    "world, verdicts",
    [
        (dict(position=(0.8, 0.2), early=(0.9, 0.5)), [H, H, H, H, H, H, H, H]),
        (dict(position=(0.2, 0.8), late=(0.5, 0.9)), [H, H, H, H, F, F, F, F]),
        (dict(klass=0.8), [F, F, F, F, U, U, U, U]),
        (dict(), [F, F, U, U, U, U, U, U]),
    ],
    ids=["the paper's", "the reverse", "the class alone", "nothing"],
)
def test_findings_say_what_is_built_in_and_what_is_not(world, verdicts):
    found = findings.findings(made_tables(**world))
    assert [f.verdict for f in found] == verdicts
    assert all(f.low < f.value < f.high for f in found)


@pytest.mark.parametrize("count, effect", [(20, 0.0), (20, 0.2), (60, 0.0), (60, 0.05)])
def test_total_variation_of_known_loads(count, effect):
    """Images of unlike habits by label, the same in both loads, and `effect` moved in each of three parts: 20 times."""
    rng, labels = np.random.default_rng(5), np.arange(count) % 10
    found = []
    for _ in range(20):
        gamma = rng.standard_gamma(60 * rng.dirichlet(np.full(8, 20), 10)[labels], (2, count, 8))
        a, b = np.repeat((gamma / gamma.sum(-1, keepdims=True))[:, None], 3, 1)
        a[..., 0] += effect
        a[..., 1] -= effect
        found.append(statistics.total_variation(1000 * a, 700 * b, labels))
    assert sum(f.low <= effect <= f.high for f in found) >= 17, "95 % is 19; of so few, fewer than 17 are 1 in 60"
    assert sum(f.p < 0.05 for f in found) == sum(f.low > 0 for f in found)
    assert sum(f.p < 0.05 for f in found) >= 17 if effect else sum(f.p < 0.05 for f in found) <= 3
    assert all(0 < f.chance < f.value - f.low or f.low == 0 for f in found)


def test_total_variation_wants_two_images_of_a_label():
    with pytest.raises(ValueError, match="labels: got 1 image of label 9, expected at least 2 of each"):
        statistics.total_variation(np.ones((1, 3, 2)), np.ones((1, 3, 2)), np.array([0, 0, 9]))


def test_rows_say_what_was_not_counted():
    tables = made_tables((0.8, 0.5), (0.5, 0.5))
    (first, _), steps = findings.by_layer(tables), findings.by_step(tables)
    assert (
        first["overlap"] is None
        and first["survived_bf16"] is None
        and first["degrees"] is None
        and first["pair"] is None
    )
    assert first["mass"] == pytest.approx(0.5) and 0 < first["kept"] < 1 and first["position_bits"]["plain"] > 0.5
    assert len(steps) == 10 and steps[0]["entropy"][0] < steps[9]["entropy"][0] and steps[0]["unrouted"] == [0, 0]
