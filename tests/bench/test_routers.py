"""Every rule of the family in the main job: trained, kept, judged by the ladder, compared side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from bench.__main__ import main
from bench.images import checkpoints, digits, layers, parity, routers, training
from bench.instrument import ledger, store
from bench.page import report
from reference.family import RULES

RECIPE = dict(hidden_size=16, depth=1, num_heads=2, steps=3, batch=8, warmup=1)
CASE = parity.Case(samples=20, steps=2, margin=0.05, probe_tokens=96)
OTHERS = [name for name in layers.ROUTERS if name != "token_choice"]


@cache
def data() -> digits.Dataset:
    return digits.load_digits()


@cache
def classifier() -> digits.Classifier:
    return digits.train_classifier(data(), 1)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers")

    @cache
    def of(name: str) -> checkpoints.Trained:
        recipe = checkpoints.Recipe.of(data(), **RECIPE, router=name)
        found = training.train(recipe, data(), folder / f"{name}.pt")
        for key, average in found.model.named_buffers():
            if "threshold" in key:  # begins at 0, where everything is taken
                average /= 1 - 0.95 ** RECIPE["steps"]
        checkpoints.save_checkpoint(folder / f"{name}.safetensors", found, {})
        return found

    of.folder = folder
    return of


def test_the_oracle_and_the_product_know_the_same_rules():
    assert list(RULES) == list(layers.ROUTERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_rule_climbs_the_ladder_and_its_faults_fall(name, trained):
    ladder = parity.Ladder(trained(name).model, classifier(), data().images, CASE, 1.0)
    base = ladder.baseline(torch.float32)
    assert sum(len(x) for _, x, _ in base.probes) > 0
    ours = ladder.replaced(base.model, "native")
    assert ladder.plans(ours, base)["plans"] == ladder.layers(ours, base)["layers"] == parity.PASS
    assert torch.equal(ladder.draw(ours)[1], base.routing)
    if name == "expert_race":  # the distances cost most of the time, and are the same code for all
        assert not ladder.climb(ours, base)[0]["failed"]
    for sabotage in ladder.sabotages.values():
        broken = sabotage(ladder.replaced(base.model, "eager"))
        assert ladder.layers(broken, base)["layers"] == parity.FAIL, sabotage


def test_a_router_that_picks_otherwise_fails_the_first_rung(trained):
    ladder = parity.Ladder(trained("expert_race").model, classifier(), data().images, CASE, 1.0)
    base = ladder.baseline(torch.float32)
    broken = ladder.replaced(base.model, "eager")
    broken.blocks[0].moe.router.threshold += 0.05
    assert ladder.plans(broken, base)["plans"] == parity.FAIL


@pytest.mark.parametrize("name", ["diffmoe", "promoe"])
def test_checkpoints_remember_the_router(name, trained):
    model = trained(name).model
    path = trained.folder / f"{name}.safetensors"
    again = checkpoints.load_any(path).model
    assert again.config == model.config and again.config.router == name
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.half().float()), key
    recipe = checkpoints.Recipe.of(data(), **RECIPE, router=name)
    assert checkpoints.load_checkpoint(recipe, path) and not checkpoints.load_checkpoint(
        replace(recipe, router="expert_race"), path
    )


def test_recipes_of_token_choice_keep_their_hashes():
    """Weights that were trained before there were other rules are those of the same recipe."""
    metadata = checkpoints.read_metadata(checkpoints.ASSET)
    recipe = json.loads(metadata["recipe"])
    assert "router" not in recipe and checkpoints.Recipe(**recipe).hash == metadata["recipe_hash"]


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr(routers, "source_digest", lambda: "frozen")  # nobody's edit may fail these tests
    monkeypatch.setattr(ledger.progress, "say", lambda text: None)


def compare(folder, *more: str) -> int:
    return main(["routers", "--size", "tiny", "--out", str(folder), *more])


def test_rules_are_compared_and_the_comparison_goes_on(tmp_path, monkeypatch, frozen, capsys):
    train, names = training.train, "token_choice,expert_race"

    def interrupted(recipe, *rest):
        if recipe.router == "expert_race":
            raise KeyboardInterrupt
        return train(recipe, *rest)

    monkeypatch.setattr(training, "train", interrupted)
    assert compare(tmp_path, "--routers", names) == 130
    first = store.read(tmp_path / routers.FILE)
    monkeypatch.setattr(training, "train", train)
    assert compare(tmp_path, "--routers", names) == 0
    rows = store.read(tmp_path / routers.FILE)
    assert rows[: len(first)] == first and [row["router"] for row in rows] == names.split(",") * 2
    for row in rows[:2]:
        assert row["kind"] == "router" and row["fd_low"] < row["fd"] < row["fd_high"] and row["loss"] > 0
        assert 0 < row["entropy"] <= 1 <= row["max_over_mean"] and 0 <= row["idle"] < 1
    assert "expert race" in capsys.readouterr().out
    page = report.write(tmp_path).read_text()
    assert (
        "<h2>Routers</h2>" in page and "expert race" in page and "expert race" in (tmp_path / "report.md").read_text()
    )
    assert page.count('class="axis" title="seed 0: FD-cls') == 2
    assert compare(tmp_path, "--routers", "zork") == 2
    assert "--routers: got 'zork', expected some of token_choice" in capsys.readouterr().err


def test_loads_of_equal_and_of_one_sided_shares():
    equal = routers.loads(torch.full((1, 2, 2, 4), 3))
    assert equal == {"entropy": pytest.approx(1), "max_over_mean": 1.0, "idle": 0.0}
    one = routers.loads(torch.tensor([5, 0, 0, 0]).expand(1, 2, 2, 4))
    assert one == {"entropy": 0.0, "max_over_mean": 4.0, "idle": 0.75}
