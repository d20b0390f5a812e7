"""Comparing row files: the right verdicts, nothing hidden, and clear errors instead of empty tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import compare
from bench.__main__ import main
from bench.compare import gates, report
from bench.instrument import store

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
    ("head", "codes"),  # exit codes for worse, slower, different, any
    [
        ([timed("same")], (0, 0, 0, 0)),
        ([timed("same", 1.2)], (0, 1, 1, 1)),
        ([timed("same", 0.8)], (0, 0, 1, 1)),
        ([timed("same"), timed("fresh")], (0, 0, 0, 1)),
        ([timed("same", wrong="out: error 1")], (1, 1, 1, 1)),
        ([timed("same", launches=4)], (1, 1, 1, 1)),
        ([timed("same", launches=2)], (0, 0, 1, 1)),
    ],
)
def test_exit_code_on_demand(files, head, codes):
    paths = files([timed("same", launches=3)], head)
    assert main(["compare", *paths]) == 0
    assert tuple(main(["compare", *paths, "--fail-on", what]) for what in report.FAIL_ON) == codes


def test_a_case_that_became_wrong_is_broken_not_fast():
    found = compare.compare([timed("a"), timed("b")], [timed("a", wrong="dx: error 0.3"), timed("b")])
    assert found.headline == "1 BROKEN, 1 SAME of 2 cases"
    assert "BROKEN `a`: dx: error 0.3" in found.to_markdown()


def fixed(**figures) -> dict:
    """A row with fixed figures, some of them as older rows have them: in rates, or as errors."""
    errors = {"out": {"ours": figures.pop("error", 1e-7), "torch": 1e-7}, "dx": {"ours": 0.0, "torch": 0.0}}
    rates = {"gflops": figures.pop("flops", 4e6) / 1e5, "time_us_median": 100.0, "clock": "cpu"}
    return timed("a", errors=errors, figures={**rates, "peak_mib": figures.pop("peak_mib", None)}, **figures)


@pytest.mark.parametrize(
    ("head", "changed"),
    [
        (fixed(), []),
        (fixed(error=1.19e-7), []),
        (fixed(error=1.3e-7), [("error of out, times torch's", 1.0, 1.3, True)]),
        (fixed(error=0.5e-7), [("error of out, times torch's", 1.0, 0.5, False)]),
        (fixed(flops=5e6), [("flops", 4e6, 5e6, True)]),
        (fixed(saved_bytes=2, aten_calls=9), [("aten_calls", 10, 9, False), ("saved_bytes", 1, 2, True)]),
        (fixed(peak_mib=3.5), []),
        (timed("a", machine={"cpu": "other"}, saved_bytes=2), None),
    ],
    ids=["same", "rounding", "error", "less error", "flops", "counts", "base has none", "another machine"],
)
def test_what_does_not_wobble_is_judged_by_one_look(head, changed):
    base = [fixed(saved_bytes=1, aten_calls=10), timed("b")]
    head = {"saved_bytes": 1, "aten_calls": 10, **head}
    found = compare.compare(base, [head, timed("b")])
    got = [(c.figure, pytest.approx(c.base), pytest.approx(c.head), c.worse) for c in found.fixed]
    assert sorted(got, key=str) == sorted(changed or [], key=str)
    assert found.fails("worse") == any(worse for *_, worse in changed or [])
    for change in found.fixed:
        assert (
            f"- fixed: `a`: {change.figure} " in found.to_markdown() and change.figure.split(",")[0] in found.to_html()
        )
    assert [c["figure"] for c in found.to_json()["fixed"]] == [c.figure for c in gates.ordered(found.fixed)]


def test_instruction_counts_are_compared_where_both_sides_have_them():
    def rows(reason=None, **counts):
        return [timed("a"), store.row("instructions", counts=counts, reason=reason, wrong=None)]

    found = compare.compare(rows(x=1000, y=1000, z=1000, gone=1), rows(x=1004, y=1100, z=900))
    assert [str(c) for c in gates.ordered(found.fixed)] == [
        "`y`: instructions 1000 -> 1100 (worse)",
        "`z`: instructions 1000 -> 900",
    ]
    found = compare.compare(rows(x=1), rows("valgrind is not installed"))
    assert found.skipped == {"instructions": "head: valgrind is not installed"} and not found.fails("worse")


def test_markdown_and_page_are_written_on_demand_and_hold_no_foreign_markup(files, tmp_path):
    head = [timed("slow", 1.2), timed("fast", 0.8), timed("same"), timed("<script>")]
    out = [tmp_path / name for name in ("out.md", "out.html")]
    assert main(["compare", *files(BASE, head), "--markdown", str(out[0]), "--html", str(out[1])]) == 0
    markdown, page = (path.read_text() for path in out)
    assert markdown.startswith("**1 SLOWER, 1 FASTER, 1 SAME of 3 cases (1 new, 1 removed)**")
    assert "<h1>1 SLOWER, 1 FASTER, 1 SAME of 3 cases (1 new, 1 removed)</h1>" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "http" not in page, "needs nothing from elsewhere"


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
    found = compare.compare(base, head)
    assert [v.case for v in found.verdicts] == ["a"]
    assert sorted(found.skipped) == ["b", "c", "d", "e"]
    assert "cpu old" in found.skipped["b"] and "clock" in found.skipped["c"]
    assert "0.5 of their cores" in found.skipped["d"] and "always" in found.skipped["e"]
    assert "left out: `b`" in found.to_markdown()


def test_nothing_comparable_is_an_error_that_says_why(files, capsys):
    assert main(["compare", *files([timed("a")], [timed("a", machine={"isa": "another"})])]) == 2
    assert "head on another" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 cases in base, 1 others in head"):
        compare.compare([timed("a")], [timed("b")])
    with pytest.raises(ValueError, match="no rows of kind 'time'"):
        compare.compare([store.row("parity")], [store.row("parity")])


def test_files_that_cannot_be_read_are_errors(files, tmp_path, capsys):
    base, _ = files([timed("a")], [timed("a")])
    truncated, foreign = tmp_path / "truncated.jsonl", tmp_path / "foreign.jsonl"
    truncated.write_text('{"schema": 1, "kind"')
    foreign.write_text(json.dumps({**timed("a"), "schema": 99}))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xd8\xff\n")
    for name, message in (
        ("truncated", "truncated.jsonl:1: expected one JSON object, got a broken or truncated line"),
        ("foreign", "foreign.jsonl:1: got schema version 99, expected 1"),
        ("binary", "binary.jsonl:1: expected one JSON object, got a broken or truncated line"),
        ("empty", "empty.jsonl: expected rows (JSON lines), got an empty file"),
        ("none", "none.jsonl: expected a file of rows (JSON lines), got none"),
    ):
        assert main(["compare", base, str(tmp_path / f"{name}.jsonl")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_machine_that_slowed_down_is_not_a_slower_kernel():
    """The peers of the same race moved as much: their code did not change, so the machine did."""
    ids = [f"layer-{who}-S2-fwd" for who in ("native", "authors_tp1", "sorted_loop")]
    base = [timed(case) for case in ids]
    found = compare.compare(base, [timed(case, 1.2) for case in ids])
    assert found.counts["UNSURE"] == 3 and not found.fails("different")
    found = compare.compare(base, [timed(ids[0], 1.2), timed(ids[1]), timed(ids[2])])
    assert {v.case: v.verdict for v in found.verdicts} == dict(zip(ids, ("SLOWER", "SAME", "SAME"), strict=True))
    other = [timed("layer-authors_tp1-S2-fwdbwd")]  # another race says nothing about this one
    found = compare.compare([base[0], *other], [timed(ids[0], 1.2), timed("layer-authors_tp1-S2-fwdbwd", 1.2)])
    assert found.counts["SLOWER"] == 2


def test_the_last_measurement_of_a_case_counts():
    found = compare.compare([timed("a")], [timed("a", 1.5), timed("a")])
    assert [v.verdict for v in found.verdicts] == ["SAME"]
