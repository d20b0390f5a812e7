"""Rows survive the way to the file and back, and nothing doubtful comes back unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.__main__ import main
from bench.instrument import race, store
from bench.instrument.cases import Case
from bench.instrument.contender import by_name
from bench.instrument.shapes import MODEL_SHAPES

CASE = Case("layer", "eager", MODEL_SHAPES["digits"], "uniform", 32, "fp32", "fwd")
TIMED = set(race.row("time", CASE, by_name("eager"), {}, {"reason": "r", "wrong": None}, None, {}, ""))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sub" / "rows.jsonl"


def test_row_carries_its_provenance_and_comes_back_unchanged(path):
    row = store.row("time", case="a-b", figures={"time_us_median": 1.5, "gflops": None})
    store.append(path, row)
    store.append(path, store.row("parity", backend="native", verdict="PARITY"))
    back = store.read(path)
    assert back[0] == row and [r["kind"] for r in back] == ["time", "parity"]
    assert set(store.REQUIRED) <= back[0].keys()
    assert back[0]["machine"]["cpu"] and back[0]["versions"]["torch"] and back[0]["command"]
    assert (back[0]["commit"] is None) or len(back[0]["commit"]) == 40


def test_a_row_has_no_nan_and_does_not_overwrite_its_provenance(path):
    with pytest.raises(ValueError):
        store.append(path, store.row("time", figures={"gflops": float("nan")}))
    assert not path.exists()
    with pytest.raises(ValueError, match="commit, which every row already has"):
        store.row("time", commit="abc")
    with pytest.raises(ValueError, match="kind: got 'Time!'"):
        store.row("Time!")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "ki', r"rows.jsonl:1: expected one JSON object, got a broken or truncated line"),
        ('{"schema": 99, "kind": "time"}\n', r":1: got schema version 99, expected 1 or 2"),
        ('{"kind": "time"}\n', r":1: expected a row with a schema version"),
        ("[1, 2]\n", r":1: expected a row with a schema version"),
        ('{"schema": 1, "kind": "time"}\n', r":1: expected the fields date, commit"),
        ("", "expected rows .* got an empty file"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_line(path, content, message):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        store.read(path)


RESULTS = sorted((store.ROOT / "results").glob("*.jsonl"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_rows_of_schema_1_are_read_as_those_of_today(file):
    """They had three forms; what a row of today says of its case is what the id says."""
    for row in store.read(file):
        assert row["schema"] == 2
        if row["kind"] not in ("time", "contest"):
            continue
        assert TIMED <= row.keys() and not {"backend", "library", "speedup_of"} & row.keys()
        words = row["case"].split("-")
        assert row["contender"] == words[1] and row["race"].split("-")[:8] == [words[0], "any", *words[2:]]
        assert (row["level"], f"T{row['T']}", row["dtype"], row["mode"]) == (
            words[0],
            words[4].split("_")[0],
            *words[5:7],
        )
        assert bool(row["figures"]) != bool(row["wrong"] or row["reason"])


def test_ratios_of_the_contest_turn_round_with_their_schema():
    (file,) = [path for path in RESULTS if path.stem.endswith("6f539b63ab_peers")]
    old = [json.loads(line) for line in file.read_text().splitlines()]
    ratios = [
        (row["speedup_of"][name]["value"], new["speedups"][name])
        for row, new in zip(old, store.read(file), strict=True)
        for name in row.get("speedup_of", ())
    ]
    assert len(ratios) > 100
    for value, turned in ratios:
        assert turned["low"] <= turned["value"] == 1 / value <= turned["high"]


def test_a_missing_file_is_an_error_to_read_and_a_fresh_start_to_recover(path):
    with pytest.raises(ValueError, match="got none"):
        store.read(path)
    assert store.recover(path) == []
    with pytest.raises(ValueError, match="got a directory"):
        store.read(path.parent.parent)


def test_an_interrupted_run_keeps_its_whole_rows_and_goes_on(path):
    store.append(path, store.row("time", case="first"))
    with path.open("a") as file:
        file.write('{"schema": 1, "case": "half')
    assert [r["case"] for r in store.recover(path)] == ["first"]
    store.append(path, store.row("time", case="second"))
    assert [r["case"] for r in store.read(path)] == ["first", "second"]


def test_thinning_keeps_order_ends_and_the_cap():
    assert store.thin([1.0, 2.0]) == [1.0, 2.0]
    thinned = store.thin(list(range(1001)), 100)
    assert len(thinned) == 100 and thinned == sorted(thinned) and thinned[0] == 0 and thinned[-1] >= 990


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("", ["experts-native-bf16", "experts-eager-fp32", "gating-native-fp32"]),
        ("experts and not BF16", ["experts-eager-fp32"]),
        ("gating or (native and bf16)", ["experts-native-bf16", "gating-native-fp32"]),
        ("not (experts or gating)", []),
    ],
)
def test_keyword_filter_speaks_like_pytest(expression, chosen):
    ids = ["experts-native-bf16", "experts-eager-fp32", "gating-native-fp32"]
    assert list(filter(store.keyword_filter(expression), ids)) == chosen


@pytest.mark.parametrize("expression", ["and", "experts and", "(experts", "experts gating", "not"])
def test_keyword_filter_refuses_what_it_cannot_read(expression):
    with pytest.raises(ValueError, match="-k: got"):
        store.keyword_filter(expression)


def test_env_prints_machine_backends_and_the_one_openmp_runtime():
    """In a fresh process: other tests load packages that bring their own runtime."""
    command = [sys.executable, "-m", "bench", "env"]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert len(facts["openmp"]) <= 1 and facts["machine"]["isa"]
    assert len(facts["machine"]["caches_kib"]) == 3 and min(facts["machine"]["caches_kib"]) > 0
    assert {"native", "grouped", "eager"} <= {info["name"] for info in facts["backends"]}
    assert "eager    available" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_two_openmp_runtimes_are_told_apart(tmp_path, monkeypatch):
    """A second, renamed libgomp in the process shows."""
    code = (
        "import ctypes, shutil, torch; from bench.instrument import store\n"
        "own = store.openmp_runtimes(); assert own, 'no OpenMP'\n"
        f"copy = shutil.copy(own[0], {str(tmp_path / 'libgomp-other.so.1')!r}); ctypes.CDLL(copy)\n"
        "print(len(store.openmp_runtimes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=store.ROOT)
    assert done.stdout.strip() == "2"


def test_a_crash_has_an_exit_code_of_its_own():
    """1 is an answer: DIFFERENT, wrong, SLOWER."""
    code = (
        "import runpy, sys; from bench.instrument import cases\n"
        "cases.main = lambda args: 1 / 0; sys.argv = ['bench', 'list']\n"
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=store.ROOT)
    assert done.returncode == 3 and "ZeroDivisionError" in done.stderr


def test_command_line_of_unknown_words_ends_with_usage():
    for argv in ([], ["zork"], ["list", "--zork"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
