"""`python -m bench analyze`: files, the page, what counting costs and leaves as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.images.analysis import cost
from bench.images.analysis.counts import Counter
from bench.instrument import store
from bench.page import experts
from bench.page.render import render
from tests.bench.test_sampling import checkpoints  # noqa: F401


def analyze(ckpt, out, *words: str) -> int:
    given = ["--ckpt", ckpt, "--out", out, "--predicts", "velocity", "--steps", 3, "--batch", 16, "--count", 40, *words]
    return main(["analyze", *map(str, given)])


def test_the_command_writes_tables_rows_and_page(checkpoints, tmp_path, capsys):  # noqa: F811
    assert analyze(checkpoints["pixels"], tmp_path, "--sampler", "rf_heun") == 0
    out = capsys.readouterr().out
    assert "position tells where a token goes: " in out and "MB of tables" in out
    tables = np.load(tmp_path / "counts.npz")
    assert tables["load"].shape == (2, 6, 2, 16, 4), "two evaluations in each step"
    assert tables["load"].sum() == 2 * 6 * 2 * 16 * 40 * 2 and tables["labels"].tolist() == list(range(10)) * 4
    (row,) = store.read(tmp_path / "experts.jsonl")
    assert row["settings"]["sampler"] == "rf_heun" and len(row["layers"]) == 2 and len(row["steps"]) == 6
    assert 0.9 < row["layers"][0]["survived_bf16"] < 1 and row["layers"][0]["overlap"] > 0.3
    page = (tmp_path / "experts.html").read_text()
    assert "Gate mass over the image" in page and page.count("data:image/png") == 2 * (1 + 1 + 4 + 1 + 6)
    assert "nan" not in page and "http" not in page


def test_what_holds_for_the_committed_digits_model(tmp_path):
    """The abstract's claims as tests of direction: docs/experts.md has the figures of 200 images and 50 steps."""
    assert (
        main(["analyze", "--count", "32", "--steps", "6", "--batch", "32", "--guidance", "1", "--out", str(tmp_path)])
        == 0
    )
    (row,) = store.read(tmp_path / "experts.jsonl")
    found = {f["claim"]: f["verdict"] for f in row["findings"]}
    assert found["position tells where a token goes"] == found["so does the sampling step"] == "holds"
    assert found["the class tells less than position"] == "holds" and found["deeper layers spread"] == "does not hold"
    page = (tmp_path / "experts.html").read_text()
    assert page.index("the class tells less than position") < page.index("<h2>Layers</h2>")


def test_few_images_decide_nothing_and_bad_models_stop(checkpoints, tmp_path, capsys):  # noqa: F811
    assert analyze(checkpoints["pixels"], tmp_path, "--count", "2", "--guidance", "1") == 0
    (row,) = store.read(tmp_path / "experts.jsonl")
    assert {f["verdict"] for f in row["findings"]} == {"cannot say"} and row["findings"][0]["low"] is None
    assert row["layers"][0]["overlap"] is None and "too few images" in capsys.readouterr().out
    assert analyze(checkpoints["bad"], tmp_path / "bad") == 1
    assert "image 3 (label 3)" in capsys.readouterr().out
    given = checkpoints["pixels"].read_bytes()
    (tmp_path / "counts.npz").unlink()
    (tmp_path / "counts.npz").hardlink_to(checkpoints["pixels"])
    assert analyze(checkpoints["pixels"], tmp_path) == 2 and checkpoints["pixels"].read_bytes() == given


def test_expert_choice_is_shown_as_experts_per_token():
    """Two experts take position 0 of every image, none position 3: twice the mean there, and nothing."""
    counter = Counter(1, 2, 4)
    counter.begin(0, torch.zeros(4, dtype=torch.int64), False)
    for _ in range(2):
        cells = torch.cat([torch.tensor([0, 1, 2, 5]) + 8 * image for image in range(4)])
        counter.take(0, 16, 2, cells, torch.ones(16))
    arrays = counter.result().arrays()
    found = experts.allocation(arrays)
    assert found["what"] == "experts per token" and found["spread"][0] == pytest.approx(math.sqrt(0.5))
    row = experts.row(arrays, {})
    degrees = row["layers"][0]["degrees"]
    assert (
        degrees["mean"] == 1 and degrees["none"] == 0.25 and degrees["none_by_chance"] == 0.25 and degrees["most"] == 2
    )
    assert "none for 25.0 % of the tokens" in render("experts.html.j2", **experts.view_of(row, arrays))


def test_the_cost_of_counting_is_of_a_run_that_counts(monkeypatch):
    found = cost.counting("digits", 1, 0.05, "eager")
    assert found["wrong"] is None and 0.5 < found["figures"]["cost"] < 20
    monkeypatch.setattr(Counter, "counted", 63)
    assert "expected 4096" in cost.counting("digits", 1, 0.05, "eager")["wrong"], "an image of 64 is lost"
