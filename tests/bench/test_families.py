"""Layers and blocks of other people's models, at small sizes: raced as they are and replaced, and judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.instrument import store
from bench.peers import families

pytest.importorskip("diffusers")
SMALL = {
    "HiDream-I1": {"H": 128, "tokens_per_image": 32},
    "Nucleus-Image": {"H": 512, "I": 48, "E": 4, "tokens_per_image": 32},
}


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    for name, sizes in SMALL.items():
        model = families.MODELS[name]
        monkeypatch.setitem(families.MODELS, name, replace(model, shape=replace(model.shape, **sizes)))


def time(tmp_path, name: str, level: str, *more: str) -> tuple[int, list[dict]]:
    out = tmp_path / "times.jsonl"
    argv = ["--tokens", "32", "--rounds", "2", "--seconds", "0", "--threads", "1", "--out", str(out)]
    code = main(["time", level, "--model", name, *argv, *more])
    return code, store.read(out) if out.exists() else []


@pytest.mark.parametrize("level", ["layer", "block"])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_raced_as_it_is_and_replaced(name, level, tmp_path):
    code, rows = time(tmp_path, name, level, "--modes", "fwd,fwdbwd")
    others = ["original", *families.MODELS[name].variants]
    assert code == 0 and [row["contender"] for row in rows] == ["native", *others] * 2
    for row in rows:
        assert row["routing"] == "own" and not row["reason"] and row["figures"]["time_us_median"] > 0
        assert row["ours"] == (row["contender"] == "native") and row["bound"] == (2 if row["ours"] else 8)
        assert ("diffusers" in row["version"]) != row["ours"]
    errors = [set(row["errors"]) for row in rows]
    assert errors[0] == {"out"} and errors[-1] >= {"dx", "dexperts", "dgate_weight"}


def test_a_block_that_computes_something_else_gets_no_number(monkeypatch, tmp_path):
    """Half of what the routed experts add is missing: the verification sees it, and only of that contender."""

    def halved(module, backend):
        for expert in module.experts:
            expert.w2.weight = torch.nn.Parameter(expert.w2.weight / 2)

    monkeypatch.setattr(families.moe_kernels, "replace_moe", halved)
    code, rows = time(tmp_path, "HiDream-I1", "layer")
    wrong = {row["contender"]: row["wrong"] for row in rows}
    assert code == 1 and wrong["native"].startswith("out: error") and wrong["original"] is None


def test_what_a_model_does_not_have_is_named(tmp_path, capsys):
    for level, more, message in (
        ("experts", (), "--model HiDream-I1: got level 'experts', expected layer or block"),
        ("layer", ("--dtypes", "bf16"), "--model HiDream-I1: got cpu, bf16, expected cpu and fp32"),
        ("layer", ("--backends", "zork"), "--backends: got 'zork', expected some of native"),
        ("layer", ("--tokens", "65"), "--tokens: got 65, expected a multiple of 32, or fewer"),
    ):
        assert time(tmp_path, "HiDream-I1", level, *more)[0] == 2
        assert message in capsys.readouterr().err
