"""Choosing between our backends for GPUs: the intervals decide, cases of a key agree, nobody wrong is preferred."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.gpu import device_table, prefer
from bench.instrument import workloads
from bench.instrument.cases import Case, kernels_on
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels import BackendInfo
from moe_kernels.backends import preferred, registry

OURS = kernels_on("cuda")
TINY = Case("layer", "any", MODEL_SHAPES["digits"], "uniform", 32, "fp32", "fwdbwd")
SMALL = replace(TINY, T=64)
DRAW = (0.97, 1.05)


def rows(case: Case, low: float, high: float, wrong: str | None = None) -> list[dict]:
    """What a race of both yields where cuda is `low` to `high` times faster than triton."""
    intervals = {"triton": (1 / high, 1 / low), "cuda": (low, high)}
    return [
        {
            "case": replace(case, backend=name).id,
            "contender": name,
            "reason": None,
            "wrong": wrong if name == "cuda" else None,
            "figures": {"time_us_median": 1.0, "disturbed": False},
            "speedups": {other: {"low": l, "high": h, "value": (l + h) / 2} for other in OURS if other != name},
        }
        for name, (l, h) in intervals.items()
    ]


@pytest.fixture
def race(monkeypatch):
    """Let races end as given by the number of tokens: (low, high) or the reason why not."""
    ends = {}

    def fake(case, contenders, min_rounds, max_seconds):
        end = ends[case.T]
        assert [c.name for c in contenders] == list(OURS)
        if isinstance(end, str):
            return [row | {"reason": end, "figures": {}, "speedups": {}} for row in rows(case, *DRAW)]
        return rows(case, *end)

    monkeypatch.setattr(prefer, "race", fake)
    return ends


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.1, 1.3), (1.2, 1.4), "cuda"),
        ((0.7, 0.9), (0.8, 0.95), "triton"),
        ((1.1, 1.3), DRAW, "cuda"),
        (DRAW, DRAW, None),
        ((1.01, 1.3), DRAW, None),
        ((1.1, 1.3), (0.7, 0.9), None),
        ((1.1, 1.3), (1.1, 1.3, "out: error"), None),
        ((1.1, 1.3), "OutOfMemoryError: CUDA out of memory", None),
    ],
)
def test_the_intervals_of_all_cases_decide(first, second, expected, race):
    race |= {32: first, 64: second}
    assert prefer.decide([TINY, SMALL], OURS) == expected


def test_a_backend_that_cannot_run_a_case_leaves_it_undecided(monkeypatch):
    absent = {"reason": "not built", "figures": {}, "speedups": {}}
    found = rows(TINY, 1.1, 1.3)
    monkeypatch.setattr(prefer, "race", lambda case, *how: [found[0], found[1] | absent])
    assert prefer.decide([TINY], OURS) is None


def test_real_races_are_understood():
    """On a CPU, between two backends that are here."""
    assert prefer.decide([TINY], ("grouped", "eager"), 0.0) in ("grouped", "eager", None)


@pytest.mark.parametrize("level", prefer.LEVELS)
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_keys_are_those_that_calls_ask_for(level, mode, monkeypatch):
    """And in the forward and the backward the same."""
    if level == "dispatch" and mode != "fwd":
        pytest.skip("integers have no gradient")
    asked, choose = set(), registry._choose
    monkeypatch.setattr(registry, "_choose", lambda name, case: asked.add(preferred.key(case)) or choose(name, case))
    case = replace(TINY, level=level, mode=mode, backend="eager", dtype="bf16" if level != "dispatch" else "fp32")
    work = workloads.build(case)
    asked.clear()
    work.run()
    assert prefer.key_of(case) in asked


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"shapes": "S/2-8E2A,XL/2-8E2A", "tokens": "512,64", "dtypes": "bf16,fp32", **changes})


def test_a_key_has_all_cases_that_its_calls_cannot_tell_apart():
    found = prefer.races(arguments())
    cases = found["moe_mlp-float32-E8-H384-I1536"]
    assert {(c.dtype, c.T, c.mode) for c in cases} == {
        (dtype, T, mode) for dtype in ("fp32", "tf32") for T in (512, 64) for mode in ("fwd", "fwdbwd")
    }
    assert len(found["dispatch-float32-E8-H0-I0"]) == 4  # shapes and tokens
    assert {c.device for cases in found.values() for c in cases} == {"cuda"}
    assert next(iter(found)).startswith("moe_mlp-bfloat16")
    with pytest.raises(ValueError, match="--dtypes: got 'tf32', expected some of bf16, fp16, fp32"):
        prefer.races(arguments(dtypes="tf32"))


def test_the_file_is_what_the_registry_reads_and_what_it_has_is_kept(tmp_path, race, monkeypatch, capsys):
    path = tmp_path / "preferred.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H200")
    monkeypatch.setattr(prefer.moe_kernels, "backends", lambda: [BackendInfo(name, True, "", ()) for name in OURS])
    device_table.save(path, "NVIDIA H200", "moe_mlp-bfloat16-E8-H384-I1536", "triton")
    race |= {512: (1.1, 1.3), 64: DRAW}
    argv = ["tune", "--backends", "--out", str(path), "--tokens", "512,64", "--shapes", "S/2-8E2A,XL/2-8E2A"]
    assert main(argv) == 0
    found = json.loads(path.read_text())["NVIDIA H200"]
    assert found.pop("moe_mlp-bfloat16-E8-H384-I1536") == "triton" and set(found.values()) == {"cuda"}
    assert {"moe_mlp-bfloat16-E8-H1152-I4608", "gating-bfloat16-E8-H384-I0", "dispatch-float32-E8-H0-I0"} <= set(found)
    monkeypatch.setattr(prefer, "race", None)
    assert main(argv) == 0 and "9 preferences of NVIDIA H200" in capsys.readouterr().out
    monkeypatch.setattr(prefer.moe_kernels, "backends", lambda: [BackendInfo("cuda", False, "built without CUDA", ())])
    assert main(argv) == 2
    assert "--backends: got a machine without cuda (built without CUDA), expected both" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path, capsys):
    assert main(["tune", "--backends", "--out", str(tmp_path / "preferred.json")]) == 2
    assert "got a machine without CUDA, expected a GPU" in capsys.readouterr().err
