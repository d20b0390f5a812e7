"""The contest: workers that survive their libraries, a judge that gives no number to a wrong result, honest tables."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch

from bench import compare, record
from bench.__main__ import main
from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case
from bench.instrument.crew import Crew
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.worker import Worker, WorkerError
from bench.page import report
from bench.peers import contest, libraries, tables
from bench.peers.seat import ContestSeat

DIGITS = Case("layer", "any", MODEL_SHAPES["digits"], "empty_experts", 64, "fp32", "fwd", 1)
THING = """
import ctypes, os, signal, sys, time

class Thing:
    def __init__(self, word):
        print("building")
        os.write(1, b"{not json}")
        self.word = word

    def shout(self, times):
        ctypes.CDLL(None).puts(b"chatter from C")
        print(sys.stdin.read())
        return self.word * times

    def fail(self):
        raise ValueError("two\\nlines")

    def leave(self):
        sys.exit("gone")

    def die(self):
        sys.stderr.write("some words\\nlast words\\n")
        os._exit(3)

    def crash(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def sleep(self):
        time.sleep(60)

    def where(self):
        return os.getcwd(), os.environ["ROOM"]
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "thing.py").write_text(THING)
    with Worker(path=[tmp_path], cwd=tmp_path, env={"ROOM": "here"}) as worker:
        yield worker


def test_answers_survive_chatter_on_stdout_and_reads_from_stdin(worker):
    worker.build("thing:Thing", word="ha")
    assert worker.call("shout", times=2) == "haha" and worker.call("shout", times=3) == "hahaha"


def test_worker_runs_in_the_given_folder_and_environment(worker, tmp_path):
    worker.build("thing:Thing", word="")
    assert worker.call("where") == [str(tmp_path), "here"]


def test_what_a_worker_raises_is_its_answer_and_it_goes_on(worker):
    with pytest.raises(WorkerError, match="ModuleNotFoundError: No module named 'nowhere'"):
        worker.build("nowhere:Thing")
    worker.build("thing:Thing", word="ha")
    with pytest.raises(WorkerError, match="ValueError: two\nlines"):
        worker.call("fail")
    with pytest.raises(WorkerError, match="SystemExit: gone"):
        worker.call("leave")
    with pytest.raises(WorkerError, match="AttributeError"):
        worker.call("nothing")
    assert worker.alive and worker.call("shout", times=1) == "ha"


@pytest.mark.parametrize(
    ("method", "reason"), [("die", "died with exit code 3: last words"), ("crash", "died with signal SIGSEGV")]
)
def test_death_has_a_reason_and_stays(worker, method, reason):
    worker.build("thing:Thing", word="")
    for name in (method, "shout"):
        with pytest.raises(WorkerError, match=reason):
            worker.call(name)
    assert not worker.alive


def test_path_may_win_over_an_editable_installation(tmp_path):
    """As a worktree of another revision must."""
    (tmp_path / "moe_kernels.py").write_text("class Stand:\n    def file(self):\n        return __file__\n")
    with Worker(path=[tmp_path], path_first=True) as worker:
        worker.build("moe_kernels:Stand")
        assert worker.call("file") == str(tmp_path / "moe_kernels.py")


def test_silence_ends_the_worker(worker):
    worker.build("thing:Thing", word="")
    worker.send("sleep")
    with pytest.raises(WorkerError, match=r"no answer in 0\.2 s"):
        worker.receive(0.2)
    assert not worker.alive
    worker.close()


def test_rounds_of_remote_contenders_alternate_and_one_that_falls_leaves_the_others():
    seen, calls = [], {"a": 100, "b": 4, "c": 100}

    def timer(name, count, device):
        seen.append(name())
        calls[name()] -= 1
        if not calls[name()]:
            raise RuntimeError("fell")
        return 0.04, 0.04, name

    runs = {name: lambda name=name: name for name in "abc"}
    samples = measure.interleave(runs, 5, 0.0, timer=timer, min_call_s=0.03)
    assert "".join(seen) == "abc" + "abc" + "cba" + "abc" + "ca" + "ac"
    assert samples["b"].wrong == "raised RuntimeError: fell"
    assert [samples[name].n for name in "ac"] == [5, 5] and not samples["a"].wrong


class Planted(ContestSeat):
    """Contenders with faults, told apart by name; runs in the workers."""

    def __init__(self, name: str, case: str):
        if name == "authors_tp2":
            raise RuntimeError("refuses this CPU")
        super().__init__(name, case)
        self.name = name
        if name == "authors_tp1":
            named = self.work.named
            self.work.named = lambda result: {key: 1.001 * tensor for key, tensor in named(result).items()}

    def time(self, calls: int) -> tuple[float, float]:
        if self.name == "sorted_loop":
            os._exit(7)
        return super().time(calls)


@pytest.fixture
def compete(tmp_path):
    with Crew() as crew:

        def race(names, case=DIGITS, rounds=3):
            contenders = [libraries.CONTENDERS[name] for name in names]
            rows = contest.compete(case, contenders, crew, tmp_path, rounds, 0.0)
            return {row["contender"]: row for row in rows}

        yield race


def test_wrong_refusing_and_dying_contenders_get_no_number_and_the_others_do(compete, monkeypatch):
    monkeypatch.setattr(contest, "SEAT", f"{__name__}:Planted")
    rows = compete(("authors_tp1", "authors_tp2", "sorted_loop", "grouped", "onednn"))
    assert re.match(r"out: error 1\.0\de-03, plain torch", rows["authors_tp1"]["wrong"])
    assert rows["authors_tp1"]["errors"]["out"]["ours"] > 9e-4, "the error is shown all the same"
    assert rows["authors_tp2"]["reason"] == "RuntimeError: refuses this CPU"
    assert rows["sorted_loop"]["reason"] == "died with exit code 7"
    for name in ("authors_tp1", "authors_tp2", "sorted_loop"):
        assert not rows[name]["figures"] and not rows[name]["samples_us"]
    assert all(rows[name]["figures"]["n"] == 3 for name in ("grouped", "onednn"))
    text = tables.text(list(rows.values()))
    assert "wrong: out: error" in text and "sorted_loop: died with exit code 7 (1 case)" in text


def test_what_a_library_refuses_on_this_cpu_is_a_reason_before_anything_runs(compete, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    rows = compete(("native", "onednn"), replace(DIGITS, dtype="bf16"), 1)
    assert rows["native"]["figures"] and not rows["onednn"]["figures"]
    assert rows["onednn"]["reason"].startswith("oneDNN packs no bf16 weights for this CPU")
    fp32 = replace(DIGITS, backend="onednn")
    assert libraries.CONTENDERS["onednn"].why_not(fp32) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "native,nobody"], "--peers: got 'nobody', expected some of native, native_packed"),
        (["--install", "nobody"], "--install: got 'nobody', expected all or some of transformers"),
        (["-k", "T17"], "no case selected by -k 'T17' of 38"),
        (["--threads", "4096"], "--threads: got 4096, expected 1"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    if argv[0] == "-k" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the two-thread cases are not planned on one core")
    assert main(["peers", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--shapes", "nobody"], ["--dtypes", "fp8"], ["--modes", "bwd"], ["--tokens", "0"]])
def test_unknown_values_stop_the_parser(argv, capsys):
    with pytest.raises(SystemExit):
        main(["peers", *argv])
    assert "expected" in capsys.readouterr().err


def test_settings_given_by_hand_replace_the_plan():
    import argparse

    parser = argparse.ArgumentParser()
    contest.add_arguments(parser)
    cases = contest.plan(parser.parse_args(["--shapes", "B/2-8E2A", "--tokens", "32,64", "--dtypes", "bf16"]))
    assert {(c.shape.H, c.T, c.dtype, c.threads) for c in cases} == {(768, 32, "bf16", 1), (768, 64, "bf16", 1)}
    assert {c.mode for c in cases} == {"fwd", "fwdbwd"}
    cases = contest.plan(parser.parse_args(["--routing", "zipf,uniform", "--modes", "fwd"]))
    assert {(c.routing, c.T, c.dtype) for c in cases} == {
        (r, 256, d) for r in ("zipf", "uniform") for d in ("fp32", "bf16")
    }


def test_what_is_not_installed_is_listed_with_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    assert main(["peers", "--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"native +native +available", out)
    assert "not installed: python -m bench peers --install zentorch" in out
    (tmp_path / "zentorch").mkdir()
    (tmp_path / "zentorch" / "pins.txt").write_text("zentorch==0.1")
    assert not libraries.installed("zentorch"), "another version than the pinned one"


def test_batches_fit_into_memory_and_ours_are_in_each(monkeypatch):
    contenders = libraries.choose("native,native_packed,authors_tp1,sorted_loop,grouped,onednn")
    case = Case("layer", "native", MODEL_SHAPES["XL/2-8E2A"], "uniform", 256, "fp32", "fwd", 1)
    monkeypatch.setattr(contest.os, "sysconf", lambda name: 4096 if "SIZE" in name else (16 << 30) // 4096)
    batches = [[c.name for c in batch] for batch in contest.batches(contenders, case)]
    ours = ["native", "native_packed"]
    assert batches == [[*ours, "authors_tp1", "sorted_loop", "grouped"], [*ours, "onednn"]]
    small = Case("layer", "native", MODEL_SHAPES["digits"], "uniform", 256, "fp32", "fwd", 1)
    assert len(contest.batches(contenders, small)) == 1 and len(contest.batches(contenders[:2], case)) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("contest") / "peers.jsonl"
    assert main(["peers", "--size", "tiny", "--out", str(out)]) == 0
    return out


def test_tiny_contest_runs_end_to_end(tiny):
    loops, *rows = store.read(tiny)
    assert loops["kind"] == "inner_loops" and (loops["loops"] or loops["reason"])
    assert {row["kind"] for row in rows} == {"contest"} and len({row["race"] for row in rows}) == 2
    by_name = {(row["contender"], row["mode"]): row for row in rows}
    for name in ("native", "authors_tp1", "authors_tp2", "sorted_loop", "grouped"):
        for mode in ("fwd", "fwdbwd"):
            row = by_name[name, mode]
            assert row["wrong"] is None and row["reason"] is None and row["figures"]["n"] >= 3
            assert row["case"] == f"layer-{name}-" + row["race"].split("-", 2)[2]
            assert row["figures"]["clock"] == "cpu" and len(row["samples_us"]) >= 3
            assert 0 < row["figures"]["peak_share"]["low"] <= row["figures"]["peak_share"]["value"] < 1
            assert row["version"] and row["level"] == "layer" and row["device"] == "cpu"
            for ratio in row["speedups"].values():
                assert ratio["low"] <= ratio["high"]
    others = {name for name, mode in by_name if mode == "fwd" and by_name[name, mode]["figures"]} - {"native"}
    assert set(by_name["native", "fwd"]["speedups"]) == others and by_name["native", "fwd"]["bound"] == 2
    assert by_name["grouped", "fwd"]["bound"] == 8
    assert by_name["onednn", "fwdbwd"]["reason"] == "inference only"


def test_contest_rows_can_be_compared_recorded_and_reported(tiny, tmp_path):
    rows = store.read(tiny)
    verdicts = compare.compare(rows, rows)
    assert verdicts.counts["SAME"] + verdicts.counts["UNSURE"] == 12 and "inference only" in verdicts.to_markdown()
    page = report.write(tiny.parent).read_text()
    assert "<h2>Peers" in page and "oneDNN packed" in page and "ours / best peer" in page
    assert "| digits empty_experts T=64 fp32 fwd t1 |" in (tiny.parent / "report.md").read_text()
    (tmp_path / "results").mkdir()
    clean = [{**row, "dirty": False, "commit": "c0ffee" * 6} for row in rows]
    for name, changes in (("clean", {}), ("dirty", {"dirty": True}), ("wrong", {"wrong": "out"})):
        (tmp_path / name).mkdir()
        for row in clean:
            store.append(tmp_path / name / "peers.jsonl", {**row, **(changes if row["kind"] == "contest" else {})})
    assert record.record_rows(tmp_path / "clean" / "peers.jsonl", tmp_path).name.endswith("_c0ffeec0ff_peers.jsonl")
    for name in ("dirty", "wrong"):
        with pytest.raises(ValueError, match="expected"):
            record.record_rows(tmp_path / name / "peers.jsonl", tmp_path)


def test_best_peer_errors_and_charts_are_computed_from_the_rows():
    def row(contender, T, share, **changes):
        figures = {"time_us_median": 1 / share, "peak_share": {"value": share}, "disturbed": False}
        ratio = {"value": 0.5, "low": 1 / 2.1, "high": 1 / 1.9}
        base = {
            "contender": contender, "title": contender.upper(), "ours": contender == "native", "race": f"T{T}",
            "routing": "uniform", "model": "S", "T": T, "dtype": "fp32", "mode": "fwd", "threads": 1,
            "figures": figures, "reason": None, "wrong": None,
            "speedups": {} if contender == "native" else {"native": ratio},
            "errors": {"out": {"ours": 3e-7, "torch": 1e-7}}, "version": "x 1",
        }  # fmt: skip
        return {**base, **changes}

    rows = [row(name, T, share) for T in (256, 1024) for name, share in (("native", 0.9), ("a", 0.6), ("b", 0.61))]
    rows.append(row("c", 256, 0.8, figures={}, reason="crashed"))
    view = tables.view(rows)
    assert [cell["text"] for cell in view["rows"][0]["cells"]] == ["90.0", "60.0", "61.0", "-"]
    assert view["rows"][0]["lead"] == "2.000 [1.900, 2.100] native / b" and view["failures"] == ["c: crashed (1 case)"]
    assert "a 3," in view["errors"]
    (chart,) = view["charts"]
    assert [line["title"] for line in chart["lines"]] == ["NATIVE", "B", "A"]
    labels = [line["label"] for line in chart["lines"]]
    assert labels[2] - labels[1] >= 14 and chart["lines"][0]["points"] == [(0.0, 23.0), (300.0, 23.0)]
    again = tables.view([*rows, row("a", 256, 0.7)])
    assert again["rows"][0]["cells"][1]["text"] == "70.0", "of a case that ran twice the last row counts"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["authors_tp1", "authors_tp2", "sorted_loop", "grouped", "onednn"])
def test_torch_adapters_are_right_with_experts_without_tokens(name, dtype):
    for mode in libraries.CONTENDERS[name].modes:
        check_in_process(name, dtype, mode)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_compiled_loop_is_right_with_experts_without_tokens(mode):
    check_in_process("compiled", "fp32", mode)


def check_in_process(name, dtype, mode):
    case, contender = Case("layer", name, DIGITS.shape, DIGITS.routing, 64, dtype, mode, 1), libraries.CONTENDERS[name]
    if reason := contender.why_not(case):
        pytest.skip(reason)
    work = contender.build(case)
    assert workloads.check(case, work.named(work.run())).wrong is None


@pytest.mark.parametrize("library", list(libraries.PACKAGES))
def test_library_adapters_are_right_where_installed(library, compete):
    if not libraries.installed(library):
        pytest.skip(f"python -m bench peers --install {library}")
    names = [c.name for c in libraries.CONTENDERS.values() if c.library == library]
    for dtype, mode in (("fp32", "fwd"), ("bf16", "fwd"), ("fp32", "fwdbwd")):
        case = Case("layer", "any", DIGITS.shape, DIGITS.routing, 64, dtype, mode, 1)
        for name, row in compete(names, case, 1).items():
            able = not libraries.CONTENDERS[name].why_not(Case.from_id(row["case"]))
            assert row["wrong"] is None and bool(row["figures"]) == able, row["reason"]
            assert not able or row["version"].partition(" ")[0] not in ("torch", "dit-moe-kernels")
