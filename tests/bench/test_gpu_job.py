"""The job of the GPU command: budgets kept, nothing run twice, the extension built, each backend tested by itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import record
from bench.__main__ import main
from bench.gpu import command, contenders, tables
from bench.gpu.watch import Watch
from bench.instrument import ledger, store
from bench.instrument.cases import Case
from bench.instrument.race import InProcess, race
from bench.instrument.shapes import MODEL_SHAPES
from moe_kernels import BackendInfo
from tests import conftest

TINY = Case("layer", "any", MODEL_SHAPES["digits"], "uniform", 32, "fp32", "fwd")


def test_work_is_begun_while_it_fits():
    now = [0.0]
    budget = command.Budget(100.0, clock=lambda: now[0])

    def work() -> None:
        now[0] += 40.0

    assert budget.spend(work) and budget.spend(work)
    assert not budget.spend(work) and now[0] == 80.0 and budget.left == 20.0


def job(tmp_path, **changes) -> command.Job:
    fields = {
        "out": tmp_path,
        "device": "cpu",
        "size": "tiny",
        "wheel": None,
        "cutlass": None,
        "minutes": 1.0,
        "stage": None,
    }
    return command.Job(argparse.Namespace(**{**fields, **changes}))


def row(**fields) -> dict:
    return store.row("time", **{"race": "r", "contender": "c", "ours": True, "wrong": None, "reason": "x", **fields})


def test_what_the_folder_has_is_not_run_again_and_what_failed_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "line", lambda rows: "")
    ran = []

    def produce(case: Case):
        ran.append(case.mode)
        if case.mode == "bwd":
            raise RuntimeError("out of luck")
        yield row(wrong="error" if case.mode == "fwdbwd" else None)

    cases = [replace(TINY, mode=mode) for mode in ("fwd", "bwd", "fwdbwd")]
    job(tmp_path)._each("bench", cases, produce)
    first = job(tmp_path)
    first._each("bench", cases, produce)
    assert ran == ["fwd", "bwd", "fwdbwd", "bwd", "fwdbwd"]
    assert [r["summary"] for r in first.ledger.rows if r["kind"] == "failure"] == [
        f"{cases[1].id}: RuntimeError: out of luck"
    ]
    assert sum(map(command.bad, first.ledger.rows)) == 2


def test_what_does_not_fit_is_dropped_with_a_note(tmp_path, capsys):
    done = []
    job(tmp_path, minutes=0.0)._each("bench", [TINY], done.append)
    assert not done and f"dropped 1 of 1 cases: bench {TINY.id}" in capsys.readouterr().out


def test_who_takes_the_gpu_down_is_noted_and_left_out(tmp_path, monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first = job(tmp_path)
    first.args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(OSError, match=r"^sonic took the GPU's context down in .*: raised AcceleratorError"):
        down = {"wrong": "raised AcceleratorError", "errors": {"out": {}}}
        rows = [row(raised=1, **down), row(contender="sonic", raised=0, **down), row(raised=2, **down)]
        first._look_after_gpu(TINY, rows)
    assert job(tmp_path)._lost() == {"sonic"}


HANGS = """
import time
from pathlib import Path
from bench.gpu.watch import Watch

watch = Watch(Path({folder!r}))
with watch.over():
    watch.begin(60.0, contender="eager", case="c", source="s")
    watch.begin(0.2, contender="cuda", case="c", source="s")
    time.sleep(60)
"""


def test_a_process_that_hangs_is_ended_and_says_where_it_stood(tmp_path):
    code = HANGS.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=store.ROOT, timeout=30, check=False)
    assert done.returncode == 1 and "line 10 in <module>" in (tmp_path / "stacks.log").read_text()
    found = Watch(tmp_path)
    assert found.left_behind() == {"contender": "cuda", "case": "c", "source": "s"} and found.left_behind() is None


def test_who_never_came_back_is_left_out_until_the_sources_change(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "line", lambda rows: "")
    lost = []
    for source, expected in ((None, {"cuda"}), ("another", set())):
        begun = job(tmp_path / str(source))
        with pytest.raises(SystemExit), begun.watch.over():
            begun._begin(TINY)("cuda")
            left = begun.watch.begun.read_text()
            raise SystemExit
        assert not begun.watch.begun.exists(), "what raises is no hang"
        begun.watch.begun.write_text(left)
        if source:
            monkeypatch.setattr(ledger, "source_digest", lambda suffixes, source=source: source)
        lost.append((job(tmp_path / str(source))._lost(), expected))
    assert all(found == expected for found, expected in lost)


def test_everybody_is_announced_before_they_are_built_and_called(tmp_path):
    begun = []
    chosen = contenders.contenders_of(TINY, compiled=False)
    rows = list(race(TINY, chosen, 3, 0.0, InProcess(begun.append)))
    timed = {r["contender"] for r in rows if r["figures"]}
    assert set(begun) == timed and all(begun.count(name) >= 1 + 1 + 3 for name in timed)


def test_bad_arguments_are_named(tmp_path, capsys):
    for option, what in (("wheel", "this project"), ("cutlass", "nvidia-cutlass")):
        assert main(["gpu", "--device", "cpu", "--out", str(tmp_path), f"--{option}", "no.whl"]) == 2
        assert f"--{option}: got no.whl, expected a wheel of {what}" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["gpu", "--out", str(tmp_path)]) == 2
        assert "--device: got cuda, expected cpu" in capsys.readouterr().err


def wheel_in(folder: Path) -> Path:
    wheel = folder / "dit_moe_kernels-0.1.0-cp312.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("_C.so", "_cuda.so", "_checks.py", "layer.py"):
            archive.writestr(f"moe_kernels/{name}", b"whatever")
    return wheel


def test_a_wheel_is_installed_and_its_extensions_put_beside_the_sources(tmp_path, monkeypatch, capsys):
    wheel, commands = wheel_in(tmp_path), []
    monkeypatch.setattr(command.moe_kernels, "backends", lambda: [BackendInfo("cuda", False, "no such luck", ())])
    first = job(tmp_path / "out", wheel=wheel)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(first, "_logged", lambda log, words: commands.append(words) or 0)
    (done,) = first._install()
    assert (done["failed"], done["summary"]) == (False, f"{wheel.name} installed") and str(wheel) in commands[0]
    assert sorted(p.name for p in (tmp_path / "moe_kernels").iterdir()) == ["_C.so", "_cuda.so"] and first._installed()
    assert "without cuda: no such luck" in capsys.readouterr().out
    monkeypatch.setattr(first, "_logged", lambda log, words: 1)
    assert next(first._install())["failed"]


def test_without_a_wheel_the_checkout_is_built_for_cuda(tmp_path, monkeypatch):
    """Offline: CUTLASS comes from a wheel. What fails says why."""
    commands, codes = [], [0, 1]
    first = job(tmp_path)
    first.args.cutlass = tmp_path / "nvidia_cutlass.whl"

    def logged(log: str, words: list[str]) -> int:
        commands.append(words)
        (tmp_path / log).write_text(f"  {command.CMAKE_SAYS}no CUDA compiler; put nvcc\n  12.3 or newer on PATH\n")
        return codes[len(commands) - 1]

    monkeypatch.setattr(first, "_logged", logged)
    (failed,) = first._install()
    assert commands[0][-3:] == ["install", "--no-deps", str(first.args.cutlass)]
    assert "cmake.define.MOE_KERNELS_CUDA=ON" in commands[1] and commands[1][-1] == str(store.ROOT)
    assert failed["failed"] and failed["summary"] == "failed, see build.log: no CUDA compiler; put nvcc"


def test_the_extension_is_built_anew_for_other_sources_and_other_machines(tmp_path, monkeypatch):
    first, here, built = job(tmp_path), [True], []
    first.args.device = "cuda"
    monkeypatch.setattr(
        first, "_install", lambda: iter([built.append(1) or store.row("build", summary="", failed=False)])
    )
    monkeypatch.setattr(first, "_installed", lambda: here[0])
    for digest, present, times in (("a", True, 1), ("a", True, 1), ("a", False, 2), ("b", True, 3)):
        monkeypatch.setattr(ledger, "source_digest", lambda suffixes, digest=digest: digest)
        here[0] = present
        first._build()
        assert len(built) == times


def test_each_backend_is_tested_in_one_run_and_what_wants_the_whole_memory_apart(tmp_path, monkeypatch, capsys):
    """A backend that is missing is named, and the others go on. Failed tests are listed in the row."""
    asked = []
    infos = [BackendInfo("triton", True, "", ()), BackendInfo("cuda", True, "", ())]
    monkeypatch.setattr(command.moe_kernels, "backends", lambda: infos)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)  # all plugins are there
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda pid: range(16))
    first = job(tmp_path, minutes=8.0)
    first.args.device = "cuda"
    first.size = replace(first.size, tests=("dispatch", "gating"))

    test = f"{command.TESTS}/test_dispatch.py::test_a[b c]"

    def logged(log: str, words: list[str], environment: dict[str, str], seconds: float) -> int:
        words = words[len(command.PYTEST) :]
        early = environment.get("MOE_KERNELS_PDL") == "1"
        asked.append(
            (words[words.index("-k") + 1], "early" if early else words[words.index("-m") + 1], round(seconds, -1))
        )
        files = command.plan.EARLY_TESTS if early else ("dispatch", "gating")
        assert words[-len(files) :] == [f"{command.TESTS}/test_{room}.py" for room in files]
        assert environment["MOE_TEST_DEVICE"]
        assert words[:2] == ["--timeout=90", "--timeout-method=thread"] and ("-n" in words) == (asked[-1][1] != "apart")
        failed = len(asked) == 2
        with (tmp_path / log).open("a") as file:
            file.write(f"[gw3] [ 5%] FAILED {test}\n1 failed\n" if failed else "ok\n")
        return int(failed)

    monkeypatch.setattr(first, "_logged", logged)
    first._test()
    assert asked == [
        ("cuda", "not apart", 480 - 320), ("triton", "not apart", 480 - 110), ("cuda", "early", 480 - 50),
        ("cuda", "apart", 480 - 30), ("triton", "apart", 480),
    ]  # fmt: skip
    rows = {r["stage"]: r for r in first.ledger.rows}
    assert rows["test triton"]["failures"] == [test] and rows["test triton"]["failed"]
    assert rows["test cuda apart"]["failures"] == [] and rows["test cuda apart"]["summary"] == "cuda apart: ok"
    infos[1] = BackendInfo("cuda", False, "built without CUDA", ())
    first._test()
    assert asked[5:] == [("triton", "not apart", 480)]
    assert "without cuda: built without CUDA" in capsys.readouterr().out


def test_a_worker_of_the_tests_ends_with_its_gpu(monkeypatch):
    """Its successor runs the rest; in a run of one process there is none, and the others fail by name."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended = []
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    monkeypatch.setattr(os, "_exit", ended.append)
    for worker, synchronize, expected in (("gw1", lambda: None, []), (None, lost, []), ("gw1", lost, [1])):
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        if worker:
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        conftest.pytest_runtest_logfinish()
        assert ended == expected
    monkeypatch.undo()


def test_failed_tests_are_found_in_a_log_that_was_cut_off():
    output = """[gw0] [  1%] PASSED tests/test_a.py::test_x[FAILED - not]
[gw11] [ 99%] FAILED tests/test_a.py::test_y[several tiles per expert-S/2]{space}
[gw1] [ 99%] ERROR tests/test_a.py::test_z
FAILED tests/test_a.py::test_y[several tiles per expert-S/2] - AssertionError: FAILED tests/nothing
"""
    found = command.failed_tests(output.format(space=" "))  # pytest-xdist writes one
    assert found == ["tests/test_a.py::test_y[several tiles per expert-S/2]", "tests/test_a.py::test_z"]


def test_tests_that_ask_for_the_free_memory_stand_apart():
    source = (store.ROOT / command.TESTS / "test_gpu_backends.py").read_text()
    functions = source.split("\n\n\n")
    asking = [text for text in functions if "mem_get_info" in text]
    assert len(asking) == 2 and all("@pytest.mark.apart" in text for text in asking)


def test_what_runs_out_of_time_is_stopped_with_all_that_it_started(tmp_path):
    first = job(tmp_path, minutes=0.05)
    code = "import subprocess as s, time; print(s.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    assert first._logged("a.log", [sys.executable, "-c", code]) == 124
    pid, *rest = (tmp_path / "a.log").read_text().splitlines()
    assert rest == ["", "stopped: out of time"]
    stat, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # killed, not yet gone
        assert time.monotonic() < end
        time.sleep(0.02)


def test_recorded_rows_name_the_commit_whose_sources_they_were_made_from(tmp_path, monkeypatch):
    source = ledger.source_digest(command.SOURCES)
    for folder in ("results", "moe_kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "moe_kernels" / "verified.json").write_text("{}")
    commit = {"commit": "0123456789abcdef", "dirty": False}
    monkeypatch.setattr(store, "commit", lambda: commit)
    for found in (source, "another"):
        timed = {"level": "layer", "contender": "cuda", "dtype": "bf16", "figures": {"n": 1}}
        store.append(tmp_path / record.GPU_ROWS, row(source=found, stage="bench x", **timed))
    target = record.record_gpu(tmp_path, tmp_path)
    (kept,) = store.read(target)
    (seen,) = json.loads((tmp_path / "moe_kernels" / "verified.json").read_text())["cuda"]
    assert seen.endswith(f"{kept['date'][:10]}: bf16")
    assert target.name.endswith("_0123456789_gpu.jsonl") and kept["source"] == source
    store.append(tmp_path / record.GPU_ROWS, row(source=source, stage="bench y", level="layer", wrong="out: error"))
    with pytest.raises(ValueError, match="bench y failed or is wrong"):
        record.record_gpu(tmp_path, tmp_path)
    commit["dirty"] = True
    with pytest.raises(ValueError, match="got a dirty tree or no commit"):
        record.record_gpu(tmp_path, tmp_path)
