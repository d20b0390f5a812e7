"""`bench train`: two processes lose what one loses, go on after accidents, and say what is wrong; nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed

from bench.images.checkpoints import Recipe, load_any, predicts
from bench.images.digits import load_digits
from bench.images.sampling.samplers import NOISE, VELOCITY
from bench.training import plain
from bench.training.data import Draws, InMemory, Shards, open_source
from bench.training.log import Log
from bench.training.processes import Ranks, joined
from bench.training.trainer import Job, LossScale, Trainer
from moe_kernels.distributed import checkpoints
from tests.bench import training_jobs
from tests.bench.training_jobs import TINY, write_shards
from tests.contenders import BACKENDS
from tests.error_rule import judge
from tests.product.distributed.workers import Workers
from tests.product.ownership.conftest import SLOW
from tests.trap_cases import DEVICE

ROOT = Path(__file__).resolve().parents[2]
OURS = "native" if "native" in BACKENDS else "eager"
STEPS, BATCH = 4, 5
pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(bool(SLOW) or DEVICE != "cpu" or not distributed.is_gloo_available(), reason="a job for CPUs"),
]


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


@cache
def digits() -> InMemory:
    return InMemory(load_digits())


def job_of(seed: int, **settings) -> Job:
    recipe = Recipe.of(digits().data, **TINY, batch=BATCH, steps=STEPS, warmup=1, learning_rate=1e-3, seed=seed)
    return Job(recipe, clip=1.0, **settings)


def named(table: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("loss", "aux", "norm"), table, strict=True))


def judge_losses(seed: int, parallel: str | None, **settings) -> None:
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    ranks = Ranks(distributed.get_rank() if world > 1 else 0, world)
    parts = world if settings.get("balance") == "rank" else 1

    def computed(seed: int, how: str) -> dict[str, torch.Tensor]:
        job = job_of(seed, **settings)
        if how in ("oracle", "eager", "loop"):
            dtype = torch.float64 if how == "oracle" else torch.float32
            return named(plain.train(job, digits(), STEPS, dtype, parts)[0])
        trainer = Trainer(job, digits(), ranks, parallel, world if (parallel or "").startswith("ep") else 1, OURS)
        rows = [trainer.advance() for _ in range(STEPS)]
        return named(torch.tensor([(row["loss"], row["aux"], row["grad_norm"]) for row in rows]).T)

    judge(f"train_{parallel}", computed, OURS, torch.float32, seed)


@pytest.mark.parametrize("settings", [{"predicts": NOISE}, {"precision": "fp16"}])
def test_one_process_loses_what_the_oracle_loses(settings, seed):
    judge_losses(seed, None, **settings)


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        ("ddp", {}),
        ("fsdp", {"predicts": NOISE}),
        ("ep", {}),
        ("ep-ddp", {"predicts": NOISE}),
        ("ddp", {"balance": "rank"}),
        ("ep", {"precision": "bf16"}),
    ],
)
def test_two_processes_lose_what_one_loses(two, parallel, settings, seed):
    """Batches of five: the ranks' parts are uneven."""
    two.run(judge_losses, parallel=parallel, seed=seed, **settings)


def test_every_sample_comes_once_an_epoch_whoever_draws_it(tmp_path):
    source = Shards(write_shards(tmp_path / "data"))
    draws, N = Draws(source, 3, 7, VELOCITY, 0.5), 40
    order = [draws._index(place) for place in range(2 * N)]
    assert sorted(order[:N]) == sorted(order[N:]) == list(range(N)) and order[:N] != order[N:]
    for step in (0, 5):  # the second runs over the end of an epoch
        whole = draws.part(step)
        parts = [draws.part(step, rank, 3) for rank in range(3)]
        assert [len(part.t) for part in parts] == [2, 2, 3]
        assert all(
            torch.equal(torch.cat(values), one) for values, one in zip(zip(*parts, strict=True), whole, strict=True)
        )
    assert not torch.equal(draws.part(0).noise, draws.part(1).noise)
    dropped = torch.cat([draws.part(step).labels for step in range(20)]) == source.num_classes
    assert 40 < dropped.sum() < 100


def test_shards_are_read_as_they_lie(tmp_path):
    source = Shards(write_shards(tmp_path / "data"))
    assert (len(source), source.shape, source.num_classes) == (40, (2, 4, 4), 3)
    x, labels = source.read([39, 0, 15, 14])
    stored = np.concatenate([np.load(tmp_path / f"data/latents_{i}.npy") for i in range(2)])
    assert torch.equal(x, torch.from_numpy(stored[[39, 0, 15, 14]]).float()) and labels.tolist() == [0, 0, 0, 2]
    assert source.digest != Shards(write_shards(tmp_path / "other", 39)).digest


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        (
            "latents_1",
            np.zeros((25, 3, 4, 4), np.float32),
            r"latents_1.npy: expected .* as in the first file, \(2, 4, 4\)",
        ),
        ("latents_0", np.zeros((15, 2, 4, 4), np.uint8), r"latents_0.npy: expected .*floats.*, got uint8"),
        ("labels_1", np.zeros(24, np.int64), r"labels_1.npy: expected 25 integers, got int64 \(24,\)"),
        ("labels_0", np.full(15, -1), "expected labels of at least 0, got -1"),
        ("labels_0", None, "labels_0.npy: expected an array"),
    ],
)
def test_bad_shards_are_named(name, array, reason, tmp_path):
    folder = write_shards(tmp_path / "data")
    (folder / f"{name}.npy").unlink()
    if array is not None:
        np.save(folder / f"{name}.npy", array)
    with pytest.raises(ValueError, match=reason):
        open_source(folder)


def test_the_loss_scale_skips_and_grows(seed):
    trainer = Trainer(job_of(seed, precision="fp16"), digits(), Ranks(), None, backend=OURS)
    trainer.scale.value = 2.0**100  # gradients of fp16 activations overflow
    before = [p.detach().clone() for p in trainer.trained]
    row = trainer.advance()
    assert row["grad_norm"] is None and trainer.scale.value == 2.0**99 and trainer.step == 1
    assert all(torch.equal(p, was) for p, was in zip(trainer.trained, before, strict=True))
    scale = LossScale(True)
    for _ in range(2000):
        scale.update(True)
    assert (scale.value, scale.good) == (131072.0, 0)


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def struck(accident: str, words: list[str], restarts: int = 0) -> subprocess.CompletedProcess:
    """Run the tiny job under torchrun with an accident of one rank in the sixth step."""
    launch = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {restarts}".split()
    command = [sys.executable, *launch, "-m", "tests.bench.training_jobs", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCIDENT": accident}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_killed_process_is_started_again_and_changes_nothing(two, tmp_path):
    """torchrun starts all again; they go on from the last checkpoint, to the bits of an undisturbed run."""
    words = ["--steps", "7", "--parallel", "ep", "--clip", "1"]
    codes = [code for code, *_ in two.run(training_jobs.train, words=[*words, "--out", str(tmp_path / "calm")])]
    assert codes == [0, 0]
    done = struck("1 killed", [*words, "--resume", "--out", str(tmp_path / "killed")], restarts=1)
    assert done.returncode == 0, done.stderr
    assert "training resumes at step 4 of 7" in done.stdout and "exitcode: -9" in done.stderr
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "calm") and len(rows_of(tmp_path / "calm")) == 7
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("calm", "killed")]
    assert weights[0] == weights[1] and names(tmp_path / "killed") == ["step_00000006", "step_00000007"]
    path = tmp_path / "calm/model.safetensors"
    assert predicts(path) == "velocity" and load_any(path).model.config.num_heads == TINY["num_heads"]


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        ("0 full", ["rank 0 stopped: [Errno 27] File too large"]),
        ("1 hangs", ["rank 0 stopped: another process ended, or was waited for too long: "]),
    ],
)
def test_an_accident_of_one_process_ends_all_with_its_reason(accident, said, tmp_path):
    """Its log cannot be written, or it does not come to a collective; what was saved is named."""
    done = struck(accident, ["--steps", "7", "--parallel", "ep", "--timeout", "8", "--out", str(tmp_path)])
    assert done.returncode == 1 and all(reason in done.stdout for reason in said), (done.stdout, done.stderr)
    assert "step_00000004 is the last checkpoint" in done.stdout and names(tmp_path)[-1] == "step_00000004"


def test_a_full_disk_stops_all_and_keeps_what_was_good(two, tmp_path):
    words = ["--steps", "6", "--parallel", "fsdp", "--out", str(tmp_path), "--resume"]
    (code, out, _), (other, quiet, _) = two.run(training_jobs.train, words=words, trouble="full_disk")
    assert (code, other) == (1, 1) and not quiet
    assert "a checkpoint could not be written" in out and "step_00000002 is the last checkpoint" in out
    assert len(rows_of(tmp_path)) == 4
    (code, out, _), _ = two.run(training_jobs.train, words=words)
    assert code == 0 and "resumes at step 2" in out and [row["step"] for row in rows_of(tmp_path)] == [*range(1, 7)]


@pytest.mark.parametrize(
    ("trouble", "said", "last"),
    [
        ("no_room_for_weights", "weights.tmp.safetensors: Error while serializing: I/O error: File too large", 6),
        ("no_way_to_forget", "[Errno 30] Read-only file system", 2),
    ],
)
def test_what_the_first_rank_cannot_write_or_remove_is_no_bad_input(two, trouble, said, last, tmp_path):
    """Exit code 1, told once; nothing half-written is left, and the same command goes on."""
    words = ["--steps", "6", "--out", str(tmp_path), "--resume"]
    (code, out, _), (other, quiet, _) = two.run(training_jobs.train, words=words, trouble=trouble)
    assert (code, other) == (1, 1) and not quiet
    assert "stopped: rank 0: " in out and said in out and f"step_{last:08d} is the last checkpoint" in out
    assert not [*tmp_path.glob("*.safetensors")]
    assert [code for code, *_ in two.run(training_jobs.train, words=words)] == [0, 0]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("parallel", ["ddp", "ep"])
def test_a_rank_with_nan_stops_all_and_is_named(two, parallel, tmp_path):
    """The bad sample lies in the second rank's part of the third step."""
    good = Shards(write_shards(tmp_path / "good"))
    bad = Draws(good, 0, BATCH, VELOCITY, 0.1)._index(2 * BATCH + 4)
    words = ["--data", str(write_shards(tmp_path / "data", bad=bad)), "--out", str(tmp_path / "out"), "--steps", "6"]
    answers = two.run(training_jobs.train, words=[*words, "--parallel", parallel])
    assert [code for code, *_ in answers] == [1, 1]
    assert "stopped: step 3: the loss of rank 1 is not finite; " in answers[0][1]
    assert "step_00000002 is the last checkpoint" in answers[0][1] and not answers[1][1]


def refused(two: Workers, reason: str, words: str, **how) -> None:
    answers = two.run(training_jobs.train, words=words.split(), **how)
    assert [code for code, *_ in answers] == [2, 2], answers
    assert reason in answers[0][2] and not answers[1][2]


def test_what_does_not_fit_is_told_by_the_first_rank_and_ends_all(two, tmp_path):
    out = f"--out {tmp_path / 'new'}"
    refused(two, "--lr: got '0.001' on rank 0 and '0.002' on rank 1, expected the same", out, second=["--lr", "2e-3"])
    refused(two, "code: got 'code 0' on rank 0 and 'code 1' on rank 1", out, trouble="other_code")
    data = [
        str(write_shards(tmp_path / "data", 40)),
        str(write_shards(tmp_path / "else", 39)),
        str(tmp_path / "none.npz"),
    ]
    refused(two, "--data: got ", f"{out} --data {data[0]}", second=["--data", data[1]])
    refused(two, "rank 1: --data", f"{out} --data {data[0]}", second=["--data", data[2]])
    refused(two, "--ep: got 3, expected a divisor of the 2 processes", f"{out} --parallel ep --ep 3")
    refused(two, "--ep: got 2 with --parallel fsdp, expected --parallel ep or ep-ddp", f"{out} --parallel fsdp --ep 2")
    refused(two, "--batch: got 1, expected at least one image for each of the 2", f"{out} --batch 1")
    refused(two, "got 'S', expected DiT-MoE-", f"{out} --model S")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_run_is_left_alone(two, tmp_path):
    out = f"--steps 2 --out {tmp_path}"
    assert [code for code, *_ in two.run(training_jobs.train, words=out.split())] == [0, 0]
    refused(two, "holds step_00000002 of a run, expected --resume", out)
    refused(two, "seed 0 there, 1 now", f"{out} --resume --seed 1")
    (tmp_path / "settings.json").unlink()
    refused(two, "expected a checkpoint of this model, got: ", f"{out} --resume --predicts noise")


def one_from_the_other(folder: str, seed: int) -> None:
    """Save as FSDP2 lies, load as experts lie: the EMA is what it was, and so is what else a run remembers."""
    rank, source = Ranks(distributed.get_rank(), 2), digits()
    first = Trainer(job_of(seed, precision="fp16"), source, rank, "fsdp", backend=OURS)
    first.advance()
    path = first.save(Path(folder))
    others = [Trainer(job_of(seed + 1, precision="fp16"), source, rank, kind, 2, OURS) for kind in ("ep", "ep-ddp")]
    for other in others:
        other.load(path)
        assert (other.step, vars(other.scale)) == (1, vars(first.scale)) and first.scale.good == 1
    was, *now = [trainer.gather_ema() for trainer in (first, *others)]
    assert all(was.keys() == ema.keys() for ema in now)
    assert all(torch.equal(ema[name], t) for ema in now for name, t in was.items())


def test_checkpoints_go_from_one_layout_to_another(two, seed, tmp_path):
    two.run(one_from_the_other, folder=str(tmp_path), seed=seed)
    assert checkpoints.latest(tmp_path).name == "step_00000001"


def test_torchruns_environment_is_missing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"--parallel ep: got an environment without RANK, .*MASTER_PORT, expected torchrun"
    ):
        next(joined("ep", "cpu", 1).gen)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="processes: got an environment without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        next(joined(None, "cpu", 1).gen)


def test_the_log_forgets_what_is_done_again_and_lines_cut_off(tmp_path, monkeypatch):
    """TensorBoard's writer is told the same."""
    board = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("bench.training.log.find_spec", lambda name: name == "tensorboard")
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, '{"step": 4, "lo']))
    log = Log(tmp_path, 2)
    log.add({"step": 3, "loss": 2.0, "grad_norm": None})
    log.close()
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    board.SummaryWriter.assert_called_once_with(str(tmp_path / "tensorboard"), purge_step=3)
    assert board.SummaryWriter().add_scalar.mock_calls == [mock.call("loss", 2.0, 3)]
