"""The static gate of the Triton kernels: what it compiles and refuses; the committed figures keep the rules."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from bench.__main__ import main
from bench.machine_code.static_gate import machine
from bench.machine_code.static_gate import triton as gate

pytest.importorskip("triton")
COMMAND = ["static-gate", "--only", "triton"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOOD = gate.Facts(128, 0, 98304, 4, 2, 2, 1000, hmma=0, hgmma=8, utcmma=0, tma=6, cp_async=12, local=0)
NAME = "sm90-S2-T8192-bf16-experts_fwd_up.0"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (NAME, {"local": 3}, "3 local-memory instructions"),
        (NAME, {"stack_bytes": 16}, "16 bytes of stack"),
        (NAME, {"hgmma": 0}, "no HGMMA"),
        (NAME.replace("sm90", "sm80"), {"hmma": 0}, "no HMMA"),
        (NAME, {"tma": 0}, "no TMA"),
        (NAME, {"blocks": 1}, "2 programs a processor, expected at most the 1 that run at once"),
        (NAME.replace("sm90", "sm80"), {"hmma": 8, "tma": 0}, None),
        (NAME.replace("fwd_up", "bwd_dweight"), {"tma": 0}, None),
        (NAME.replace("sm90", "sm100"), {}, "no UTCMMA"),
        (NAME, {}, None),
        (NAME.replace("bf16", "fp32"), {"hgmma": 0}, None),
        (NAME.replace("experts_fwd_up", "combine_fwd"), {"hgmma": 0}, None),
    ],
)
def test_absolute_rules(name, changes, said):
    found = gate.breaches(name, dataclasses.replace(GOOD, **changes))
    assert (said is None and not found) or (len(found) == 1 and found[0].startswith(name) and said in found[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"blocks": 1}, "blocks 2 -> 1"), ({"hgmma": 4}, "hgmma 8 -> 4"), ({"local": 1}, "local 0 -> 1")],
)
def test_what_got_worse_is_said(changes, said):
    assert machine.worse(NAME, GOOD, dataclasses.replace(GOOD, **changes), gate.WORSE) == [f"{NAME}: {said}"]
    assert not machine.worse(NAME, dataclasses.replace(GOOD, **changes), GOOD, gate.WORSE), "better is no breach"


def test_committed_figures_cover_every_kernel_and_keep_the_rules():
    """That they belong to these sources is for CI's `bench static-gate`, which compiles where they do not."""
    _, kernels = gate.load()
    names = {name.split("-")[4].partition(".")[0] for name in kernels}
    assert names >= {*gate.GEMMS, "gating_fwd", "gating_bwd", "dispatch_count", "dispatch_place"}
    assert names >= {"combine_fwd", "combine_bwd", "ordered_sum"}
    assert {name.split("-")[0] for name in kernels} == {"sm80", "sm90", "sm100"}
    assert {name.split("-")[3] for name in kernels} == set(gate.DTYPES)
    assert not [line for name, facts in kernels.items() for line in gate.breaches(name, facts)]


def test_a_breach_fails_and_unchanged_sources_are_not_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "FILE", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "compile_all", lambda settings: pytest.fail("compiled"))
    gate.save({NAME: GOOD}, gate.FILE)
    monkeypatch.setattr(gate.load, "__defaults__", (gate.FILE,))
    assert main(COMMAND) == 0 and "1 kernels unchanged" in capsys.readouterr().out
    gate.save({NAME: dataclasses.replace(GOOD, local=7)}, gate.FILE)
    assert main(COMMAND) == 1 and "7 local-memory instructions" in capsys.readouterr().out


def test_changed_figures_fail_until_they_are_committed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "FILE", tmp_path / "gate.json")
    monkeypatch.setattr(gate.load, "__defaults__", (gate.FILE,))
    monkeypatch.setattr(gate.save, "__defaults__", (gate.FILE,))
    gate.save({NAME: GOOD})
    slower = dataclasses.replace(GOOD, blocks=1, programs=1)
    monkeypatch.setattr(gate, "compile_all", lambda settings: iter([(NAME, slower)]))
    assert main([*COMMAND, "--all"]) == 1
    assert f"{NAME}: blocks 2 -> 1" in capsys.readouterr().out
    assert main([*COMMAND, "--update"]) == 0 and main(COMMAND) == 0


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compiles_what_a_call_launches():
    entries = dict(gate.compile_all(gate.TINY))
    kernels = {name.split("-")[4].partition(".")[0] for name in entries}
    assert kernels == {name.split("-")[4].partition(".")[0] for name in gate.load()[1]}
    up = entries["sm90-digits-T256-bf16-experts_fwd_up.0"]
    assert up.hgmma and up.registers > 32 and up.shared_bytes > 1024 and up.instructions > 100


def test_interpreting_processes_are_told_why_they_cannot_compile():
    code = "from bench.machine_code.static_gate import triton\nwith triton.compiling(90): pass"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert "TRITON_INTERPRET: got 1" in done.stderr
