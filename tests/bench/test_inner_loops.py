"""Instructions of the inner loops: exact on a listing written by hand; on the extension a gate against spills."""

from __future__ import annotations

import copy
import json

import pytest

from bench import compare
from bench.__main__ import main
from bench.instrument import store
from bench.machine_code import inner_loops
from bench.page import report

LISTING = """
lib.so:     file format elf64-x86-64

Disassembly of section .text:

0000000000001000 <outer@@Base>:
    1000:\tvmovaps %zmm30,%zmm3
    1006:\tcall   2000 <other@plt>
    100b:\tnopl   0x0(%rax)
    1010:\tvmovups (%rcx),%zmm0
    1016:\tvmovdqu16 0x40(%rcx),%zmm1
    101c:\tprefetcht0 0x400(%rsp)
    1023:\tlea    0x8(%rsp),%rdi
    1028:\tvbroadcastss 0x10(%rsp,%rax,4),%zmm2        # a local array, not a slot
    1030:\tvfmadd231ps %zmm0,%zmm2,%zmm3
    1036:\tvfmadd231ps %zmm1,%zmm2,%zmm4
    103c:\tvfmadd231ps (%rdi){1to16},%zmm0,%zmm5
    1042:\tvfmadd231ps 0x4(%rdi){1to16},%zmm1,%zmm6
    1048:\tvmovaps 0x40(%rsp),%zmm7
    1050:\tvfmadd231ps -0x80(%rbp),%zmm1,%zmm7
    1058:\tvmovaps %zmm7,0x40(%rsp)
    1060:\tvmovups %zmm7,0x20(%rbp){%k1}
    1068:\tvfmadd213ps 0xf5f4a(%rip),%zmm1,%zmm2        # ff000 <table@@Base+0x40>
    1070:\tmov    0x18(%rsp),%rdx
    1075:\tadd    $0x4,%rax
    1079:\tcmp    %rax,%rdx
    107c:\tjne    1010 <outer@@Base+0x10>
    107e:\tadd    $0x1,%rbx
    1082:\tjl     1000 <outer@@Base>
    1084:\tret
"""
COUNTED = {
    "kind": "vfmadd zmm", "rows": 3, "fma": 6, "loads": 8, "prefetches": 1, "stores": 2, "spills": 4,
    "instructions": 18, "times": 1,
}  # fmt: skip
TILE = """
    {0}0:\tprefetcht0 0x40(%rcx)
    {0}1:\tvpbroadcastd (%rax),%zmm0
    {0}2:\tvdpbf16ps (%rcx),%zmm0,%zmm3
    {0}3:\tvdpbf16ps 0x40(%rcx),%zmm0,%zmm4
    {0}4:\tvpbroadcastd (%rax,%rdx,1),%zmm0
    {0}5:\tvdpbf16ps (%rcx),%zmm0,%zmm5
    {0}6:\tvdpbf16ps 0x40(%rcx),%zmm0,%zmm6
    {0}7:\tjne    {0}0 <f+0x10>
"""


def test_a_loop_in_a_nest_is_counted_exactly():
    assert inner_loops.count(LISTING) == [COUNTED]


def test_equal_loops_are_counted_together_and_the_widest_comes_first():
    twice = TILE.format("a") + TILE.format("b")
    small = {"kind": "vdpbf16ps zmm", "rows": 2, "fma": 4, "loads": 6, "prefetches": 1, "stores": 0, "spills": 0}
    small |= {"instructions": 8, "times": 2}
    loops = inner_loops.count(twice + LISTING)
    assert loops == inner_loops.count(LISTING + twice) == [COUNTED, small]
    assert [inner_loops.tile(loop) for loop in loops] == ["3x2 vfmadd zmm", "2x2 vdpbf16ps zmm"]
    assert inner_loops.widest([*loops, {**small, "fma": 2}]) == loops


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("vpbroadcastd (%rax,%rdx,1),%zmm0", "je     a6 <f+0x16>", "a branch inside: not every step runs everything"),
        ("vpbroadcastd (%rax,%rdx,1),%zmm0", "call   *0x8(%rax)", "a call inside"),
        ("jne    a0", "jne    ff", "a jump forwards"),
        ("jne    a0", "jne    b0", "a jump out of the listing"),
        ("jne    a0 <f+0x10>", "jmp    *%rax", "an indirect jump"),
        ("prefetcht0 0x40(%rcx)", "nop", "no prefetch: not the micro-kernel"),
        ("%zmm0,%zmm6", "%zmm0,%zmm5", "three accumulators"),
        ("vpbroadcastd (%rax,%rdx,1),%zmm0", "vpbroadcastd (%rax,%rdx,1),%zmm6", "one of four is written anew"),
    ],
)
def test_other_loops_are_left_out(old, new, why):
    listing = TILE.format("a").replace(old, new)
    assert inner_loops.count(TILE.format("a")) and listing != TILE.format("a")
    with pytest.raises(RuntimeError, match="no loop of the micro-kernel"):
        inner_loops.count(listing)


def test_multiply_and_add_apart_are_a_pair():
    listing = TILE.format("a").replace("vdpbf16ps", "addps").replace("zmm", "xmm")
    (loop,) = inner_loops.count(listing)
    assert inner_loops.tile(loop) == "2x2 mulps, addps xmm" and loop["fma"] == 4


@pytest.fixture(scope="module")
def installed() -> dict:
    row = inner_loops.row()
    if row["reason"]:
        pytest.skip(row["reason"])
    return row


@pytest.mark.parametrize(
    ("kind", "fma", "loads"),
    [("vfmadd zmm", 28, 16), ("vdpbf16ps zmm", 28, 16), ("vfmadd ymm", 48, 32)],
    ids=["14x2 fp32", "14x2 bf16", "6x2 avx2, four steps"],
)
def test_full_tiles_neither_store_nor_spill(installed, kind, fma, loads):
    """Gate: each step loads two vectors of B and an item of A per row, and nothing else goes through memory."""
    full = [loop for loop in inner_loops.widest(installed["loops"]) if loop["kind"] == kind]
    assert full and {loop["fma"] for loop in full} == {fma}
    assert {(loop["loads"], loop["stores"], loop["spills"]) for loop in full} == {(loads, 0, 0)}


def test_row_is_the_same_again_and_plain_json(installed):
    assert inner_loops.row()["loops"] == installed["loops"] == json.loads(json.dumps(installed))["loops"]
    assert installed["kind"] == "inner_loops" and installed["wrong"] is None


def test_what_cannot_be_counted_has_a_reason_without_a_path(monkeypatch, tmp_path):
    foreign = tmp_path / "not_elf.so"
    foreign.write_text("x")
    if inner_loops.shutil.which("objdump"):
        monkeypatch.setattr(inner_loops, "extension", lambda: foreign)
        row = inner_loops.row()
        assert row["reason"].startswith("objdump failed: ") and str(tmp_path) not in row["reason"]
    monkeypatch.setattr(inner_loops.shutil, "which", lambda name: None)
    row = inner_loops.row()
    assert row["reason"] == "objdump (binutils) is not installed" and row["loops"] == []


def rows(loops: list[dict], reason: str | None = None) -> list[dict]:
    """One timed case, always the same, and the loops."""
    samples = [100.0 + i % 7 for i in range(60)]
    timed = store.row("time", case="same", figures={"clock": "cpu"}, wrong=None, samples_us=samples)
    return [store.row("inner_loops", compiler="GCC 1", loops=loops, reason=reason, wrong=None), timed]


def spilling() -> dict:
    return {**copy.deepcopy(COUNTED), "spills": 5}


@pytest.mark.parametrize(
    ("head", "codes"),  # exit codes for slower, different, any
    [
        (rows([COUNTED]), (0, 0, 0)),
        (rows([spilling()]), (1, 1, 1)),
        (rows([]), (0, 1, 1)),
        (rows([], "no objdump"), (0, 0, 1)),
        (rows([])[1:], (0, 0, 0)),
        (rows([spilling()]) + rows([COUNTED]), (0, 0, 0)),
    ],
    ids=["same", "spills", "gone", "not counted", "older file", "the last row counts"],
)
def test_compare_fails_on_changed_loops_on_demand(tmp_path, head, codes):
    for name, side in (("base", rows([COUNTED])), ("head", head)):
        for row in side:
            store.append(tmp_path / f"{name}.jsonl", row)
    paths = [str(tmp_path / "base.jsonl"), str(tmp_path / "head.jsonl")]
    assert main(["compare", *paths]) == 0
    assert tuple(main(["compare", *paths, "--fail-on", what]) for what in ("slower", "different", "any")) == codes


def test_compare_names_the_tile_and_its_counts():
    extra = {**COUNTED, "kind": "vfmadd ymm"}
    verdicts = compare.compare(rows([COUNTED]), rows([spilling(), extra]))
    assert verdicts.headline == "1 SAME of 1 cases (1 fixed figure WORSE, inner loops changed)"
    counts = "6 fma, 8 loads, 1 prefetches, 2 stores, {} spills, 18 instructions, 1 times"
    assert verdicts.to_json()["inner_loops"] == [
        f"3x2 vfmadd zmm: {counts.format(4)} -> {counts.format(5)}",
        f"3x2 vfmadd ymm: none -> {counts.format(4)}",
    ]
    assert "\n- inner loops changed: 3x2 vfmadd zmm: 6 fma" in verdicts.to_markdown()
    verdicts = compare.compare(rows([COUNTED]), rows([], "no objdump"))
    assert "left out: `inner loops`: head: no objdump" in verdicts.to_markdown()


def test_report_shows_the_widest_tiles_or_the_reason(tmp_path):
    narrow = {**COUNTED, "rows": 2, "fma": 4}
    for name, loops, reason in (("counted", [COUNTED, narrow], None), ("not", [], "no <objdump>")):
        for row in rows(loops, reason)[:1]:
            store.append(tmp_path / name / "rows.jsonl", row)
        report.write(tmp_path / name)
    page, text = ((tmp_path / "counted" / name).read_text() for name in ("index.html", "report.md"))
    assert "<h2>Inner loops" in page and "3x2 vfmadd zmm" in page and "2x2" not in page and "GCC 1" in page
    assert "| 3x2 vfmadd zmm | 6 | 8 | 1 | 2 | 4 | 18 | 1 |" in text
    assert "Not counted: no &lt;objdump&gt;" in (tmp_path / "not" / "index.html").read_text()
    assert "Inner loops not counted: no <objdump>." in (tmp_path / "not" / "report.md").read_text()
