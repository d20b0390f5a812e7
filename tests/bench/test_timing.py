"""python -m bench time: what is asked for is raced and kept; what is unknown is named."""

import pytest
import torch

from bench.__main__ import main
from bench.instrument import store


def test_a_step_of_a_shallow_model_is_raced_and_kept(tmp_path, capsys):
    out = tmp_path / "times.jsonl"
    argv = ["train_step", "--shapes", "digits", "--depth", "1", "--tokens", "32", "--threads", "1"]
    assert main(["time", *argv, "--rounds", "3", "--seconds", "0.1", "--out", str(out)]) == 0
    rows = store.read(out)
    assert [row["contender"] for row in rows] == ["native", "grouped", "authors_tp1"]
    for row in rows:
        assert row["kind"] == "time" and row["wrong"] is None and len(row["speedups"]) == 2
        assert row["figures"]["images_per_s"] > 0
        assert "digitsx1-gate-T32" in row["case"] and row["case"].endswith("-fp32-fwdbwd-t1")
    assert "grouped, x" in capsys.readouterr().out


def test_modes_and_dtypes_are_crossed_and_what_cannot_run_is_left_out(tmp_path):
    out = tmp_path / "times.jsonl"
    argv = ["experts", "--shapes", "digits", "--tokens", "32,64", "--dtypes", "fp32,fp16"]
    argv += ["--backends", "native,triton,eager", "--threads", "1", "--rounds", "3", "--seconds", "0"]
    assert main(["time", *argv, "--out", str(out)]) == 0
    rows = store.read(out)
    assert len({row["race"] for row in rows}) == 4
    assert [row["contender"] for row in rows] == ["native", "eager"] * 4 and not any(row["wrong"] for row in rows)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--shapes", "S/3"], "--shapes: got 'S/3', expected some of S/2-8E2A"),
        (["--backends", "cutlass"], "--backends: got 'cutlass', expected some of native"),
        (["--routing", "random"], "--routing: got 'random', expected one of gate, uniform"),
        (["--tokens", "100", "--shapes", "digits"], "expected a DiT-MoE shape and a multiple of 32 tokens"),
    ],
)
def test_bad_arguments_are_named(argv, match, capsys):
    assert main(["time", "sampling_step" if "--tokens" in argv else "layer", *argv]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["time", "layer", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "--backends: nobody of triton, cuda, grouped, authors_tp1 can run layer-any-S2-position_skewed-T1024" in said
    assert said.endswith("-fp32-fwd-cuda: this machine has no CUDA device\n")
