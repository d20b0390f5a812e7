"""Layers and blocks of other people's models, at small sizes: raced as they are and replaced, and judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.instrument import store
from bench.page import report
from bench.peers import families

SMALL = {
    "HiDream-I1": {"H": 128, "tokens_per_image": 32},
    "Nucleus-Image": {"H": 512, "I": 48, "E": 4, "tokens_per_image": 32},
}
STANDINS = [name for name, model in families.MODELS.items() if model.package == "torch"]


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    narrow = {"H": 48, "I": 24, "Is": 24, "E": 6, "tokens_per_image": 16}
    for name, model in dict(families.MODELS).items():
        sizes = SMALL.get(name) or narrow | {"Is": narrow["Is"] * (model.shape.Is > 0)}
        monkeypatch.setitem(families.MODELS, name, replace(model, shape=replace(model.shape, **sizes)))


def time(tmp_path, name: str, level: str, *more: str) -> tuple[int, list[dict]]:
    out = tmp_path / "times.jsonl"
    argv = ["--tokens", "32", "--rounds", "2", "--seconds", "0", "--threads", "1", "--out", str(out)]
    code = main(["time", level, "--model", name, *argv, *more])
    return code, store.read(out) if out.exists() else []


@pytest.mark.parametrize("level", ["layer", "block"])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_raced_as_it_is_and_replaced(name, level, tmp_path):
    pytest.importorskip("diffusers")
    code, rows = time(tmp_path, name, level, "--modes", "fwd,fwdbwd")
    others = ["original", *families.MODELS[name].variants]
    assert code == 0 and [row["contender"] for row in rows] == ["native", *others] * 2
    for row in rows:
        assert row["routing"] == "own" and not row["reason"] and row["figures"]["time_us_median"] > 0
        assert row["ours"] == (row["contender"] == "native") and row["bound"] == (2 if row["ours"] else 8)
        assert ("diffusers" in row["version"]) != row["ours"]
    errors = [set(row["errors"]) for row in rows]
    assert errors[0] == {"out"} and errors[-1] >= {"dx", "dexperts", "dgate_weight"}


@pytest.mark.parametrize("name", STANDINS)
def test_a_model_without_a_package_is_raced_against_its_structure(name, tmp_path):
    code, rows = time(tmp_path, name, "layer", "--modes", "fwd,fwdbwd")
    assert code == 0 and [row["contender"] for row in rows] == ["native", "original"] * 2
    assert all(row["figures"]["time_us_median"] > 0 for row in rows)
    assert rows[1]["title"] == "its structure in plain torch" and rows[1]["version"].startswith("torch ")
    assert set(rows[0]["errors"]) == {"out"} and set(rows[2]["errors"]) >= {"dx", "dexperts"}


@pytest.mark.parametrize("name", [name for name, model in families.MODELS.items() if model.own_picks])
def test_in_bfloat16_experts_are_judged_on_the_picks_of_the_original(name, tmp_path):
    if families.MODELS[name].package != "torch":
        pytest.importorskip("diffusers")
    code, rows = time(tmp_path, name, "layer", "--modes", "fwd", "--dtypes", "bf16")
    assert code == 0 and all(row["dtype"] == "bf16" and row["figures"]["time_us_median"] > 0 for row in rows)
    # The router's scores, too, are rounded to 16 bits: float64 picks otherwise, and would be off by whole experts.
    assert all(max(row["errors"]["out"].values()) < 0.03 for row in rows)


def test_thresholds_let_experts_take_as_many_as_in_training():
    shape = families.MODELS["DiffMoE-L-E8"].shape
    module, x = families.MODELS["DiffMoE-L-E8"].parts["layer"].make(shape).eval(), torch.randn(4096, shape.H)
    taken = (module.capacity_predictor(x).sigmoid() > module.expert_threshold).float().mean(0)
    share = shape.K / shape.E
    sigma = (share * (1 - share) * (1 / len(x) + 1 / families.CALIBRATION)) ** 0.5
    assert ((taken - share).abs() < 6 * sigma).all()


def test_the_report_says_how_ours_do(tmp_path):
    time(tmp_path, "DSMoE-S-E48", "layer", "--modes", "fwd,fwdbwd")
    (tmp_path / "times.jsonl").rename(tmp_path / "family.jsonl")
    page, text = report.write(tmp_path).read_text(), (tmp_path / "report.md").read_text()
    for shown in (page, text):
        assert "ours are faster than the fastest code of their own in" in shown and "of 2 cases" in shown
        assert "its structure in plain torch" in shown and "parity" not in shown.split("Other people")[0]


def test_a_block_that_computes_something_else_gets_no_number(monkeypatch, tmp_path):
    """Half of what the routed experts add is missing: the verification sees it, and only of that contender."""
    pytest.importorskip("diffusers")

    def halved(module, backend):
        for expert in module.experts:
            expert.w2.weight = torch.nn.Parameter(expert.w2.weight / 2)

    monkeypatch.setattr(families.moe_kernels, "replace_moe", halved)
    code, rows = time(tmp_path, "HiDream-I1", "layer")
    wrong = {row["contender"]: row["wrong"] for row in rows}
    assert code == 1 and wrong["native"].startswith("out: error") and wrong["original"] is None


def test_what_a_model_does_not_have_is_named(tmp_path, capsys):
    pytest.importorskip("diffusers")
    for level, more, message in (
        ("experts", (), "--model HiDream-I1: got level 'experts', expected layer or block"),
        ("layer", ("--device", "cuda"), "--model HiDream-I1: got cuda, expected cpu"),
        ("layer", ("--dtypes", "fp16"), "--dtypes: got 'fp16', expected some of fp32, bf16"),
        ("layer", ("--dtypes", "bf16", "--modes", "fwdbwd"), "--dtypes: got bf16 for layer fwdbwd, expected layer"),
        ("block", ("--dtypes", "bf16", "--modes", "fwd"), "--dtypes: got bf16 for block fwd, expected layer"),
        ("layer", ("--backends", "zork"), "--backends: got 'zork', expected some of native"),
        ("layer", ("--tokens", "65"), "--tokens: got 65, expected a multiple of 32, or fewer"),
    ):
        assert time(tmp_path, "HiDream-I1", level, *more)[0] == 2
        assert message in capsys.readouterr().err
    assert time(tmp_path, "DiffMoE-L-E8", "layer", "--dtypes", "bf16", "--modes", "fwd")[0] == 2
    assert (
        "--dtypes: got bf16, expected fp32: of equal scores DiffMoE-L-E8 and ours pick others"
        in capsys.readouterr().err
    )
