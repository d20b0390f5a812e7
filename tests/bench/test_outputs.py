"""What commands write: nothing over what they were given, no path of this machine in rows, reports and messages."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.instrument import outputs, store
from bench.machine_code import inner_loops


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run", "--data", "/some/home/x.npz"], "python -m bench run --data x.npz"),
        (["run", "--data=/some/home/x.npz"], "python -m bench run --data=x.npz"),
        (["run", "--data", "../../home/x.npz"], "python -m bench run --data x.npz"),
        (["run", "--data", "/some/my files/x y.npz"], "python -m bench run --data 'x y.npz'"),
        (["run", "--out", "{here}/report/a"], "python -m bench run --out report/a"),
        (["peers", "-k", "S2 and not bf16"], "python -m bench peers -k 'S2 and not bf16'"),
        (["time", "layer", "--shapes", "S/2-8E2A"], "python -m bench time layer --shapes S/2-8E2A"),
        (["compare", "main", "HEAD~1"], "python -m bench compare main 'HEAD~1'"),
    ],
)
def test_the_command_of_a_row_can_be_typed_and_holds_no_path(words, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.format(here=tmp_path) for word in words]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", *words])
    assert outputs.command() == command == store.row("run")["command"]
    assert len(shlex.split(command)) == 3 + len(words)


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("ImportError: /home/me/lib/x.so: undefined symbol", "ImportError: x.so: undefined symbol"),
        (
            "raised RuntimeError: bad [/tmp/build/csrc/cpu/a.cpp:12: n > 0]",
            "raised RuntimeError: bad [a.cpp:12: n > 0]",
        ),
        ("File '/usr/lib/python3/x.py', line 3", "File 'x.py', line 3"),
        ("~/data/x.npz and ROOT/csrc/core/error.h", "x.npz and csrc/core/error.h"),
        ("HOME/my files/x.npz", "my files/x.npz"),
        ("images/s at 50 steps, S/2-8E2A, 1/2, https://x.org/a/b, A / B, and/or", None),
    ],
)
def test_rows_hold_no_absolute_path(text, shared):
    text = text.replace("ROOT", str(outputs.ROOT)).replace("HOME", str(Path.home()))
    row = store.row("time", reason=text, nested={"a": [text, 1.5, None]})
    expected = text if shared is None else shared
    assert row["reason"] == expected and row["nested"] == {"a": [expected, 1.5, None]}


def test_the_extension_holds_no_path_of_its_builder():
    data = inner_loops.extension().read_bytes()
    assert b"csrc/" in data
    for folder in (store.ROOT, sys.prefix, sys.base_prefix):
        assert f"{folder}/".encode() not in data


def test_errors_of_the_extension_name_their_place_in_the_sources():
    code = "from moe_kernels import _C; _C.isa_level()"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {code}"], env={"MOE_KERNELS_ISA": "zork"}, capture_output=True, text=True
    )
    assert "[csrc/cpu/levels.cpp: level]" in done.stderr


def test_rows_are_not_added_to_a_file_of_something_else(tmp_path, capsys):
    other = tmp_path / "weights.safetensors"
    other.write_bytes(bytes(8))
    argv = ["--shapes", "digits", "--tokens", "32", "--threads", "1", "--out", str(other)]
    assert main(["time", "gating", *argv, "--rounds", "1", "--seconds", "0", "--backends", "eager"]) == 2
    assert "expected a file of rows (JSON lines) or none" in capsys.readouterr().err
    assert main(["peers", "--peers", "native", "--modes", "fwd", *argv, "--fresh"]) == 2
    assert other.read_bytes() == bytes(8)


def test_compare_and_history_keep_what_they_were_given(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    samples = [100.0 + i % 7 for i in range(60)]
    store.append(rows, store.row("time", case="a", figures={"clock": "cpu"}, wrong=None, samples_us=samples))
    before = rows.read_bytes()
    for option in ("--json", "--markdown", "--html"):
        assert main(["compare", str(rows), str(rows), option, str(rows)]) == 2
        assert f"{option} {rows}: is the file given as BASE" in capsys.readouterr().err
    assert main(["history", str(rows), "--out", str(rows)]) == 2
    assert rows.read_bytes() == before
    target = tmp_path / "out.json"
    assert main(["compare", str(rows), str(rows), "--json", str(target)]) == 0 and json.loads(target.read_text())
