"""Choosing tiles: the fastest that is right, for sure faster than the heuristic's, and launches at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.gpu import tune
from bench.instrument.cases import Case
from bench.instrument.measure import Samples
from bench.instrument.shapes import MODEL_SHAPES

pytest.importorskip("triton")
from moe_kernels.backends.triton import tiles

OWN, FAST, WRONG, SPILLING = (tiles.Tile(m, 64, 32, 8, 4, 3, 2) for m in (16, 32, 64, 128))
MILLISECONDS = {OWN: 10.0, FAST: 8.0, WRONG: 1.0, SPILLING: 1.0}


def timer(trial: tune.Trial, calls: int, device: str):
    seconds = MILLISECONDS[trial.tile] / 1e3
    return seconds, seconds, trial()


def run() -> list[torch.Tensor]:
    """A product whose result tells its tile."""
    tile = tiles.choose("up", tiles.CPU, "bf16", 1, 64, 64)
    return [torch.tensor([1.0, 2.0 if tile == WRONG else 1.001])]


def test_the_fastest_right_tile_wins(monkeypatch):
    spills = lambda trial: "spills 8 registers" if trial.tile == SPILLING else None  # noqa: E731
    monkeypatch.setattr(tune.Trial, "unusable", spills)
    exact = [torch.tensor([1.0, 1.0])]
    assert tune.tune(run, exact, OWN, [WRONG, FAST, SPILLING], 0.0, "cpu", timer) == FAST
    assert tune.tune(run, exact, FAST, [OWN, FAST], 0.0, "cpu", timer) == FAST


def test_the_heuristic_stays_unless_another_is_faster_for_sure():
    def samples(*seconds: float) -> Samples:
        return Samples("a", wall_s=list(seconds), cpu_s=list(seconds))

    own = samples(1.0, 1.0, 1.0, 1.0)
    assert tune.best({"own": own, "same": samples(0.99, 0.99, 0.99, 0.99)}, "own") == "own"
    assert tune.best({"own": own, "noisy": samples(0.5, 1.5, 0.5, 1.5)}, "own") == "own"
    assert tune.best({"own": own, "a": samples(*[0.9] * 4), "b": samples(*[0.8] * 4)}, "own") == "b"
    with pytest.raises(RuntimeError, match="heuristic's tile own failed: raised"):
        tune.best({"own": Samples("own", wrong="raised X")}, "own")


@pytest.mark.parametrize("dtype", tune.PRECISIONS)
def test_nothing_specialises_on_sm_90(dtype):
    """Triton 3.6 and 3.9 fail to compile some of it there."""
    tried = {sm: tune.candidates("rows_times", sm, dtype) for sm in (90, 100)}
    assert not any(tile.specialize for tile in tried[90]) and any(tile.specialize for tile in tried[100])
    assert [tile for tile in tried[100] if not tile.specialize] == tried[90]


def test_the_file_is_the_one_that_tiles_reads_and_is_added_to(tmp_path, monkeypatch):
    path, key = tmp_path / "tiles.json", tiles.key("up", "bf16", 2048, 1536, 384)
    tune.save(path, "NVIDIA H200", "dact-bf16-R1-N2-K3", OWN)
    tune.save(path, "NVIDIA H200", key, FAST)
    tune.save(path, "NVIDIA A100", key, OWN)
    assert json.loads(path.read_text())["NVIDIA H200"] == {"dact-bf16-R1-N2-K3": list(OWN), key: list(FAST)}
    monkeypatch.setattr(tiles, "FILE", path)
    caches = (tiles.table, tiles.choose)
    for cache in caches:
        cache.cache_clear()
    try:
        assert tiles.choose("up", tiles.META, "bf16", 2000, 1536, 384) == FAST
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def test_a_machine_without_a_gpu_is_told_so(tmp_path, capsys):
    argv = ["tune", "--out", str(tmp_path / "tiles.json")]
    assert main([*argv, "--shapes", "S/3"]) == 2
    assert "--shapes: got 'S/3', expected some of S/2-8E2A" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(argv) == 2
        assert "got a machine without CUDA, expected a GPU" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="launches kernels: TRITON_INTERPRET=1")
def test_every_product_of_triton_runs_with_another_tile(monkeypatch):
    monkeypatch.setattr(tune, "CANDIDATES", ((64, 64, 32, 2, 4, 1),))
    shape = replace(MODEL_SHAPES["digits"], H=32, I=32, Is=16, E=3)
    case = Case("layer", "triton", shape, "uniform", 16, "fp16", "fwdbwd")
    found = dict(tune.tune_case(case, {"dact-fp16-R16-N32-K32"}, 0.0))
    assert [key.partition("-")[0] for key in found] == ["up", "rows_times", "rows_times", "dweight", "dweight"]
