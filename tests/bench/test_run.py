"""The main job at a size smaller than tiny: end to end, interrupted and resumed, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import record, run, stages
from bench.__main__ import main
from bench.images import fid, parity
from bench.images.sampling import contest
from bench.instrument import ledger, progress, store

RACES = 2


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """Everything happens, each thing briefly."""
    with pytest.MonkeyPatch.context() as patch:
        case = parity.Case(samples=20, steps=2, margin=0.05, probe_tokens=48)
        recipe = dict(hidden_size=32, depth=1, num_heads=2, steps=20, batch=8, warmup=2)
        patch.setitem(run.SIZES, "tiny", run.Size(case, ("fp32",), epochs=1, recipe=recipe))
        plan = stages.plan
        patch.setattr(ledger, "source_digest", lambda: "frozen")  # nobody's edit may fail these tests
        patch.setattr(store, "commit", lambda: {"commit": "frozen", "dirty": False})
        patch.setattr(stages, "ceilings", functools.cache(stages.ceilings))  # seconds, the same for every run
        patch.setattr(stages, "plan", lambda *args: plan(*args)[4 : 4 + RACES])
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, exit code) of a finished run."""
    folder = tmp_path_factory.mktemp("run") / "report"
    return folder, job(folder)


def job(folder, *arguments) -> int:
    return main(["run", "--size", "tiny", "--threads", "1", "--out", str(folder), *arguments])


def rows_of(folder) -> list[dict]:
    return store.read(folder / "rows.jsonl")


def test_end_to_end(done):
    folder, code = done
    assert code == 0
    rows = rows_of(folder)
    kinds = [row["kind"] for row in rows]
    backends = run.choose_backends(None)
    assert [r["backend"] for r in rows if r["kind"] == "parity"] == backends
    assert all(r["verdict"] in (fid.PARITY, fid.UNSURE) for r in rows if r["kind"] == "parity")
    assert [r["control"] for r in rows if r["kind"] == "control"] == list(parity.SABOTAGES)
    assert kinds.count("inner_loops") == kinds.count("training") == kinds.count("figures") == kinds.count("load") == 1
    assert kinds.count("experts") == 1 and "Position × expert" in (folder / "experts.html").read_text()
    assert (
        kinds.count("sampler") == len(contest.entries())
        and 'href="samplers.html"' in (folder / "index.html").read_text()
    )
    assert "Nearest to the data with 5 evaluations" in (folder / "samplers.html").read_text()
    assert 'href="experts.html"' in (folder / "index.html").read_text()
    assert kinds.count("ceilings") == 1 and kinds.index("ceilings") < kinds.index("time")
    assert len({r["race"] for r in rows if r["kind"] == "time"}) == RACES
    assert {"index.html", "report.md", "rows.jsonl", "pictures.npz", "model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "training.pt").exists()


def test_second_run_keeps_every_row(done, capsys):
    folder, _ = done
    before = (folder / "rows.jsonl").read_text()
    assert job(folder) == 0
    assert (folder / "rows.jsonl").read_text() == before
    assert "control" not in capsys.readouterr().out, "a kept stage is not run again"


@pytest.mark.parametrize("signalled", [False, True], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_run_keeps_its_rows_and_resumes(tmp_path, monkeypatch, capsys, signalled):
    climb, climbed = parity.Ladder.climb, []

    def interrupted(self, *args):
        climbed.append(1)
        if len(climbed) == 2:
            if signalled:
                signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt
        return climb(self, *args)

    monkeypatch.setattr(parity.Ladder, "climb", interrupted)
    assert job(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().out
    kept = rows_of(tmp_path)
    assert sum(r["kind"] == "parity" for r in kept) == 1
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"schema": 1, "kind": "par')
    assert job(tmp_path) == 0
    rows = rows_of(tmp_path)
    assert rows[: len(kept)] == kept
    assert len(climbed) == 2 + len(run.choose_backends(None)) - 1 + len(parity.SABOTAGES)


def test_a_stage_without_all_its_rows_is_run_again(tmp_path):
    first = ledger.Ledger(tmp_path / "rows.jsonl", {"size": "tiny"})
    first.stage("two", lambda: [store.row("time", n=1), store.row("time", n=2)])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text(lines[0])
    again = ledger.Ledger(tmp_path / "rows.jsonl", {"size": "tiny"})
    assert [r["n"] for r in again.stage("two", lambda: [store.row("time", n=3)])] == [3]
    assert [r["n"] for r in rows_of(tmp_path)] == [3]


SETTINGS, CODE = {"identity": "c", "size": "d", "threads": 1}, {"commit": "a", "source": "b"}


@pytest.mark.parametrize("field", CODE)
def test_rows_of_other_code_are_dropped(tmp_path, field, capsys):
    path = tmp_path / "rows.jsonl"
    store.append(path, {**store.row("run"), **SETTINGS, **CODE, field: "other", "stage": "start", "stage_rows": 1})
    assert not ledger.Ledger(path, SETTINGS, CODE).rows and "dropped" in capsys.readouterr().out


@pytest.mark.parametrize("field", SETTINGS)
def test_rows_of_other_settings_are_kept_and_the_run_refused(tmp_path, field):
    path = tmp_path / "rows.jsonl"
    ledger.Ledger(path, SETTINGS, CODE).stage("one", lambda: [store.row("time")])
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"rows.jsonl: 1 rows there have {field} .*, expected 'other'.*--out"):
        ledger.Ledger(path, {**SETTINGS, field: "other"}, {**CODE, "source": "later"})
    assert path.read_text() == before


OTHER_PROCESS = """
import sys
from pathlib import Path
from bench.instrument.ledger import Ledger

rows = Ledger(Path(sys.argv[1]), {})
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_the_same_rows_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = [sys.executable, "-c", OTHER_PROCESS, str(path)]
    with subprocess.Popen(words, cwd=store.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=r"rows\.jsonl: another process is writing it"):
            ledger.Ledger(path, {})
    ledger.Ledger(path, {}).stage("one", lambda: [store.row("time")])
    assert len(store.read(path)) == 1, "the lock went with the process"


def test_unreadable_rows_are_no_end(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"schema": 0}\n')
    assert ledger.Ledger(tmp_path / "rows.jsonl", {}).rows == []
    assert "rows.jsonl:1" in capsys.readouterr().out


def test_a_different_backend_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    replaced = parity.replaced

    def broken(model, backend):
        model = replaced(model, backend)
        return parity.SABOTAGES["dropped shared expert"](model) if backend == "grouped" else model

    monkeypatch.setattr(parity, "replaced", broken)
    assert job(tmp_path, "--backends", "grouped") == 1
    assert "grouped fp32 is DIFFERENT: failed layers" in capsys.readouterr().out


def test_a_blind_ladder_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "SABOTAGES", {"nothing wrong": lambda model: model})
    assert job(tmp_path, "--backends", "eager") == 1
    assert "the ladder is blind: nothing wrong" in capsys.readouterr().out


def test_own_latents_and_own_checkpoint(done, tmp_path):
    rng = np.random.default_rng(0)
    data, weights = tmp_path / "mine.npz", done[0] / "model.safetensors"
    np.savez(data, latents=rng.normal(size=(60, 4, 8, 8)), labels=np.arange(60) % 3)
    assert job(tmp_path / "trained", "--data", str(data), "--backends", "eager") == 0
    assert job(tmp_path / "given", "--ckpt", str(weights), "--backends", "eager") == 0
    origins = [
        next(r["origin"] for r in rows_of(tmp_path / d) if r["kind"] == "training") for d in ("trained", "given")
    ]
    assert origins == ["trained", "checkpoint model.safetensors"]


def test_what_was_given_is_never_written_over_nor_forgotten(tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    data, weights = tmp_path / "mine.npz", folder / "model.safetensors"
    np.savez(data, latents=np.zeros((60, 4, 8, 8)), labels=np.arange(60) % 3)
    weights.write_bytes(b"weights")
    (folder / "pictures.npz").hardlink_to(data)
    before = data.read_bytes()
    for given in (["--data", str(data)], ["--ckpt", str(weights)]):
        assert job(folder, *given, "--fresh") == 2
        assert "which is never written over" in capsys.readouterr().err
    assert job(data, "--data", str(data)) == 2 and "expected a folder, got a file" in capsys.readouterr().err
    assert data.read_bytes() == before and weights.read_bytes() == b"weights"


def test_a_recorded_run_holds_no_path_of_this_machine(tmp_path, monkeypatch):
    home = tmp_path / "home of me"
    home.mkdir()
    rng = np.random.default_rng(0)
    np.savez(home / "my x.npz", latents=rng.normal(size=(60, 4, 8, 8)), labels=np.arange(60) % 3)
    monkeypatch.setattr(store, "commit", lambda: {"commit": "c0ffee" * 6, "dirty": False})
    argv = ["run", "--data", str(home / "my x.npz"), "--out", str(tmp_path / "report"), "--size", "tiny"]
    monkeypatch.setattr("sys.argv", ["/somewhere/bench/__main__.py", *argv])
    assert main([*argv, "--threads", "1", "--backends", "eager"]) == 0
    for folder in ("results", "moe_kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "moe_kernels/verified.json").write_text("{}")
    kept = record.record(tmp_path / "report", tmp_path)
    report = tmp_path / "report"
    for path in (kept, report / "rows.jsonl", report / "index.html", report / "report.md"):
        assert str(tmp_path) not in path.read_text() and home.name not in path.read_text(), path.name
    assert rows_of(report)[0]["command"] == "python -m bench run --data 'my x.npz' --out report --size tiny"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--data", "{tmp}/none.npz"], "none.npz"),
        (["--data", "{tmp}/bad.npz"], "expected the keys"),
        (["--ckpt", "{tmp}/none.pt"], "none.pt"),
        (["--ckpt", "{tmp}/bad.pt"], "bad.pt"),
        (["--backends", "eager,cuda9"], "'cuda9'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, match, capsys):
    np.savez(tmp_path / "bad.npz", pixels=np.zeros(3))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "bad.pt")
    assert job(tmp_path / "out", *(a.format(tmp=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert match in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_fresh_forgets_rows_and_checkpoints(done, tmp_path):
    for path in done[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    job(tmp_path, "--fresh")
    before, after = rows_of(done[0]), rows_of(tmp_path)
    assert len(before) == len(after) and before[0] != after[0]


def test_parity_rows_are_plain_json(done):
    for line in (done[0] / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "parity":
            assert {"backend", "dtype", "verdict", "dfd", "low", "high", "margin", "commit", "machine"} <= row.keys()


def test_large_images_get_fewer_samples_and_smaller_batches():
    assert run.scaled(500, 1 / 16, 100) == 100 and run.scaled(500, 1.0, 100) == 500
    assert run.scaled(500, 4.0, 100) == 500 and run.scaled(60, 1 / 16, 100) == 60


def test_kept_rows_have_taken_their_time(done, monkeypatch):
    begun = []
    budget = run.Budget
    monkeypatch.setattr(run, "Budget", lambda *args: begun.append(args) or budget(*args))
    assert job(done[0]) == 0
    (minutes, parts, spent), stages_s = begun[0], {row["stage"]: row["stage_s"] for row in rows_of(done[0])}
    assert minutes == 600 and 0 < spent <= sum(stages_s.values()) - stages_s["training"] + 1e-9
    assert {"figures", "samplers", "parity fp32"} < parts.keys() and len(parts) == 3 + RACES


def test_default_size_asks_for_what_the_readme_promises():
    size = run.SIZES["default"]
    assert size.recipe == {} and size.minutes == 10 and size.dtypes == ("fp32", "bf16")
    assert dataclasses.asdict(size.parity)["margin"] <= 0.001 and size.parity.samples >= 500
    assert run.THRESHOLDS == {"classifier": 0.97, "guided": 0.95, "plain": 0.85}


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    assert list(progress.track(range(3), "work", every_s=0)) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == ["  work: 0/3", "  work: 1/3", "  work: 2/3"]
