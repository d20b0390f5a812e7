"""Comparing row files: the right verdicts, nothing hidden, and clear errors instead of empty tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import compare, store
from bench.__main__ import main

RNG = np.random.default_rng(0)


def timed(case: str, factor: float = 1.0, machine: dict | None = None, **fields) -> dict:
    samples = [] if fields.get("wrong") else list(100 * factor * np.exp(0.01 * RNG.standard_normal(60)))
    row = store.row("time", case=case, figures={"clock": "cpu"}, wrong=None, samples_us=samples)
    row["machine"] = {**row["machine"], **(machine or {})}
    return {**row, **fields}


@pytest.fixture
def files(tmp_path):
    def write(base: list[dict], head: list[dict]) -> list[str]:
        paths = []
        for name, rows in (("base", base), ("head", head)):
            paths.append(str(tmp_path / f"{name}.jsonl"))
            for row in rows:
                store.append(paths[-1], row)
        return paths

    return write


BASE = [timed("slow"), timed("fast"), timed("same"), timed("gone")]
HEAD = [timed("slow", 1.2), timed("fast", 0.8), timed("same"), timed("fresh")]


def test_every_row_gets_its_verdict_and_the_headline_counts_them(files, tmp_path, capsys):
    target = tmp_path / "out.json"
    assert main(["compare", *files(BASE, HEAD), "--json", str(target)]) == 0
    out = json.loads(target.read_text())
    assert {r["case"]: r["verdict"] for r in out["rows"]} == {"slow": "SLOWER", "fast": "FASTER", "same": "SAME"}
    assert out["counts"] == {"SAME": 1, "FASTER": 1, "SLOWER": 1, "UNSURE": 0}
    assert (out["new"], out["removed"]) == (["fresh"], ["gone"])
    assert out["headline"] == "1 SLOWER, 1 FASTER, 1 SAME of 3 cases (1 new, 1 removed)"
    slow = next(r for r in out["rows"] if r["case"] == "slow")
    assert slow["speedup"]["value"] == pytest.approx(1 / 1.2, rel=0.02) and slow["speedup"]["n"] == 60
    text = capsys.readouterr().out
    assert text.startswith(f"**{out['headline']}**")
    assert "| SLOWER | `slow` | 0.8" in text and "new: `fresh`" in text and "removed: `gone`" in text
    assert text.index("`slow`") < text.index("<details>") < text.index("`same`")


@pytest.mark.parametrize(
    ("head", "codes"),  # exit codes for slower, different, any
    [
        ([timed("same")], (0, 0, 0)),
        ([timed("same", 1.2)], (1, 1, 1)),
        ([timed("same", 0.8)], (0, 1, 1)),
        ([timed("same"), timed("fresh")], (0, 0, 1)),
        ([timed("same", wrong="out: error 1")], (1, 1, 1)),
    ],
)
def test_exit_code_on_demand(files, head, codes):
    paths = files([timed("same")], head)
    assert main(["compare", *paths]) == 0
    assert tuple(main(["compare", *paths, "--fail-on", what]) for what in ("slower", "different", "any")) == codes


def test_a_case_that_became_wrong_is_broken_not_fast():
    report = compare.compare([timed("a"), timed("b")], [timed("a", wrong="dx: error 0.3"), timed("b")])
    assert report.headline == "1 BROKEN, 1 SAME of 2 cases"
    assert "BROKEN `a`: dx: error 0.3" in report.to_markdown()


def test_k_selects_and_selecting_nothing_is_an_error(files, capsys):
    paths = files(BASE, HEAD)
    assert main(["compare", *paths, "-k", "slow or fast"]) == 0
    assert "of 2 cases" in capsys.readouterr().out
    assert main(["compare", *paths, "-k", "zork"]) == 2
    assert "'zork' selects none" in capsys.readouterr().err


def test_partial_comparisons_say_what_is_left_out_and_show_the_rest():
    disturbed = timed("d", figures={"clock": "cpu", "disturbed": True, "cpu_share": 0.5})
    base = [timed("a"), timed("b", machine={"cpu": "old"}), timed("c"), timed("d"), timed("e", wrong="always")]
    head = [timed("a"), timed("b"), timed("c", figures={"clock": "wall"}), disturbed, timed("e")]
    report = compare.compare(base, head)
    assert [v.case for v in report.verdicts] == ["a"]
    assert sorted(report.skipped) == ["b", "c", "d", "e"]
    assert "cpu old" in report.skipped["b"] and "clock" in report.skipped["c"]
    assert "0.5 of their cores" in report.skipped["d"] and "always" in report.skipped["e"]
    assert "left out: `b`" in report.to_markdown()


def test_nothing_comparable_is_an_error_that_says_why(files, capsys):
    assert main(["compare", *files([timed("a")], [timed("a", machine={"isa": "avx2"})])]) == 2
    assert "head on avx2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 cases in base, 1 others in head"):
        compare.compare([timed("a")], [timed("b")])
    with pytest.raises(ValueError, match="no rows of kind 'time'"):
        compare.compare([store.row("parity")], [store.row("parity")])


def test_files_that_cannot_be_read_are_errors(files, tmp_path, capsys):
    base, _ = files([timed("a")], [timed("a")])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"schema": 1, "kind"')
    for head in (str(broken), str(tmp_path / "none.jsonl")):
        assert main(["compare", base, head]) == 2
        assert head.rsplit("/", 1)[1] in capsys.readouterr().err


def test_a_machine_that_slowed_down_is_not_a_slower_kernel():
    """The peers of the same race moved as much: their code did not change, so the machine did."""
    ids = [f"layer-{who}-S2-fwd" for who in ("native", "authors_tp1", "sorted_loop")]
    base = [timed(case) for case in ids]
    report = compare.compare(base, [timed(case, 1.2) for case in ids])
    assert report.counts["UNSURE"] == 3 and not report.fails("different")
    report = compare.compare(base, [timed(ids[0], 1.2), timed(ids[1]), timed(ids[2])])
    assert {v.case: v.verdict for v in report.verdicts} == dict(zip(ids, ("SLOWER", "SAME", "SAME"), strict=True))
    other = [timed("layer-authors_tp1-S2-fwdbwd")]  # another race says nothing about this one
    report = compare.compare([base[0], *other], [timed(ids[0], 1.2), timed("layer-authors_tp1-S2-fwdbwd", 1.2)])
    assert report.counts["SLOWER"] == 2


def test_the_last_measurement_of_a_case_counts():
    report = compare.compare([timed("a")], [timed("a", 1.5), timed("a")])
    assert [v.verdict for v in report.verdicts] == ["SAME"]
