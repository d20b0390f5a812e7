"""The history: a line per case, the machine's own drift taken out; the page holds what the rows say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.instrument import store
from bench.page import history

ROOT = Path(__file__).parents[2]


RACE = "layer-{}-S2-uniform-T256_H384_I1536_Is768_E8_K2-fp32-fwd-t1"


def row(who: str, commit: int, time: float, **changes) -> dict:
    figures = {"time_us_median": time, "time_us_p20": 0.9 * time, "time_us_p80": 1.1 * time}
    figures |= {"clock": "cpu", "disturbed": False}
    case = {"case": RACE.format(who), "race": RACE.format("any"), "ours": not who.endswith(("tp1", "loop"))}
    made = store.row("time", **case, figures=figures, wrong=None, samples_us=[time])
    return {**made, "commit": f"{commit:040x}", "date": f"2026-01-{commit + 1:02}T00:00:00+00:00", **changes}


def test_times_are_taken_relative_to_peers_that_ran_at_every_commit(tmp_path):
    slow = [2.0 if 3 <= i < 6 else 1.0 for i in range(9)]  # the machine, for three commits
    ours = [100 * s * (1.0 if i < 5 else 0.5) for i, s in enumerate(slow)]
    rows = [row("native", i, t) for i, t in enumerate(ours)] + [
        row("authors_tp1", i, 300 * s) for i, s in enumerate(slow)
    ]
    rows += [row("sorted_loop", 0, 7.0), {**row("native", 4, 1e9), "commit": None}, row("native", 4, 1e9, figures={})]
    (found,) = history.series(history.table(rows, root=tmp_path))
    assert found["peers"] and found["median"] == pytest.approx([100.0] * 5 + [50.0] * 4)
    alone = [r for r in rows if "native" in r["case"]]
    (found,) = history.series(history.table(alone, root=tmp_path))
    assert not found["peers"] and found["median"] == pytest.approx(ours)


def test_the_last_measurement_of_a_commit_counts_and_machines_are_apart(tmp_path):
    other = {**store.machine(), "cpu": "other"}
    rows = [row("native", 0, 1.0), row("native", 0, 2.0), row("native", 1, 3.0)]
    rows += [row("native", i, 9.0, machine=other) for i in range(2)] + [row("eager", 0, 1.0)]
    found = history.series(history.table(rows, root=tmp_path))
    assert sorted(s["median"] for s in found) == [[2.0, 3.0], [9.0, 9.0]]


def test_commits_are_ordered_as_they_were_made_not_as_they_were_measured():
    commits = store.git("log", "-2", "--format=%H").split()
    if len(commits) < 2:
        pytest.skip("a clone of one commit")
    rows = [{**row("native", i, 1.0 + i), "commit": commit} for i, commit in enumerate(commits)]
    (found,) = history.series(history.table(rows))
    assert found["commits"] == commits[::-1] and found["median"] == [2.0, 1.0]


def test_the_page_shows_a_line_of_each_case(tmp_path, capsys):
    for i in range(12):
        store.append(tmp_path / "rows.jsonl", row("native", i, 100.0 if i < 6 else 130.0))
        store.append(tmp_path / "rows.jsonl", row("eager", 3, 100.0))
    out, data = tmp_path / "sub" / "history.html", tmp_path / "history.json"
    assert main(["history", str(tmp_path / "rows.jsonl"), "--out", str(out), "--json", str(data)]) == 0
    said, text = capsys.readouterr().out, out.read_text()
    assert "1 cases over 12 commits, 1 measured at one commit only" in said
    assert len(re.findall(r"<svg", text)) == 1
    assert len(re.search(r'class="line" points="([^"]*)"', text)[1].split()) == 12
    assert json.loads(data.read_text())[0]["median"] == [100.0] * 6 + [130.0] * 6


def test_nothing_to_draw_is_an_error(tmp_path, monkeypatch, capsys):
    store.append(tmp_path / "rows.jsonl", row("native", 0, 1.0))
    assert main(["history", str(tmp_path / "rows.jsonl"), "-k", "zork"]) == 2
    assert "'zork' selects none of 1 timed rows" in capsys.readouterr().err
    monkeypatch.setattr(history, "RESULTS", tmp_path / "empty")
    assert main(["history"]) == 2
    assert "got no row file" in capsys.readouterr().err


def test_the_committed_rows_can_be_drawn(tmp_path):
    assert main(["history", "--out", str(tmp_path / "history.html")]) == 0
