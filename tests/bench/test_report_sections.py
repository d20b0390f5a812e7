"""What the sections of the report compute: means per level, roof, backends, the ladder in words."""

from __future__ import annotations

import re

import pytest

from bench import stages
from bench.instrument import store
from bench.page import ladder, overview, races, report, roofline
from tests.bench.test_report import ROOF, all_rows, parity_row, time_row


def means(rows: list[dict]) -> dict[str, dict]:
    return {line["title"]: line for line in overview.levels(overview.gains(rows))}


def test_means_are_geometric_and_of_one_level():
    rows = [
        time_row("native", {"grouped": 2.0}), time_row("grouped", {}),
        time_row("native", {"grouped": 8.0}, dtype="bf16"), time_row("grouped", {}, dtype="bf16"),
        time_row("native", {"grouped": 100.0}, "train_step"), time_row("grouped", {}, "train_step"),
    ]  # fmt: skip
    layer = means(rows)["MoE layer"]["cells"]["grouped"]
    assert (layer["mean"], layer["least"], layer["most"], layer["n"]) == (pytest.approx(4.0), 2.0, 8.0, 2)
    assert means(rows)["training step"]["cells"]["grouped"]["mean"] == pytest.approx(100.0)
    assert set(means(rows)) == {"MoE layer", "training step"}, "nothing is averaged across levels"


def test_means_leave_wrong_results_out_and_count_disturbed_cases():
    rows = [
        time_row("native", {}, wrong="y: error 1"), time_row("grouped", {}),
        time_row("native", {"grouped": 3.0}, dtype="bf16", disturbed=True), time_row("grouped", {}, dtype="bf16"),
    ]  # fmt: skip
    line = means(rows)["MoE layer"]
    assert line["n"] == 1 and line["disturbed"] == 1 and line["cells"]["grouped"]["mean"] == pytest.approx(3.0)
    assert overview.levels(overview.gains(rows[:2])) == []


def test_best_other_is_the_fastest_that_is_not_ours():
    rows = [
        time_row("native", {"grouped": 4.0, "eager": 1.5, "authors_tp1": 9.0}), time_row("grouped", {}),
        time_row("eager", {}, time_us_median=700.0), time_row("authors_tp1", {}, time_us_median=9000.0),
    ]  # fmt: skip
    cells = means(rows)["MoE layer"]["cells"]
    assert cells["best other"]["mean"] == pytest.approx(1.5) and cells["authors' loop"]["mean"] == pytest.approx(9.0)


def test_the_contest_is_a_level_of_its_own():
    def contender(name: str, us: float, ours: bool) -> dict:
        figures = {"time_us_median": us, "disturbed": False}
        ratio = {"native_packed": {"value": 0.8, "low": 1 / 1.4, "high": 1 / 1.1}}
        return store.row("contest", race="r", contender=name, ours=ours, figures=figures, speedups=ratio)

    rows = [contender("native_packed", 8.0, True), contender("native", 9.0, True), contender("onednn", 10.0, False)]
    line = means([*rows, time_row("native", {"grouped": 2.0}), time_row("grouped", {})])
    assert line["layer, contest"]["cells"]["best other"]["mean"] == pytest.approx(1.25)
    assert line["MoE layer"]["n"] == 1


def test_a_case_measured_again_counts_once():
    rows = [time_row("native", {"grouped": 2.0}), time_row("grouped", {}), time_row("native", {"grouped": 3.0})]
    (race,) = races.of(rows)
    assert len(race["rows"]) == 2 and means(rows)["MoE layer"]["cells"]["grouped"]["mean"] == pytest.approx(3.0)


def room_race(**figures) -> dict:
    (race,) = races.of([time_row("native", {}, "combine", **figures)])
    return race


def test_points_lie_under_the_roof_where_they_belong():
    slope, flat = room_race(gflops=1.0, gbps=10.0), room_race(gflops=200.0, gbps=2.0)
    assert roofline.share(slope["rows"][0], ROOF) == pytest.approx(0.5), "0.1 FLOP/B x 20 GB/s = 2 GFLOP/s"
    assert roofline.share(flat["rows"][0], ROOF) == pytest.approx(0.5), "400 GFLOP/s is the peak"
    moved = room_race(gflops=None, gbps=5.0)["rows"][0]
    assert roofline.share(moved, ROOF) == pytest.approx(0.25), "no arithmetic: the copy alone"
    assert roofline.share(moved, None) is None
    (chart,) = roofline.charts([slope], ROOF)
    (start, ridge, end), point = chart["roof"], chart["points"][0]
    assert ridge[1] == end[1] < start[1] and end[0] == roofline.WIDTH
    decade = chart["y_ticks"][0][0] - chart["y_ticks"][1][0]
    above = start[1] - (point["x"] - start[0]) * (start[1] - ridge[1]) / (ridge[0] - start[0])
    assert point["y"] - above == pytest.approx(decade * 0.30103, abs=0.2), "half the roof is log10(2) of a decade below"


def test_no_ceilings_no_roofline(tmp_path):
    assert roofline.charts([room_race()], None) == [] and roofline.charts([room_race()], {**ROOF, "fp32": None}) == []
    for name, rows in (("with", all_rows()), ("without", [r for r in all_rows() if r["kind"] != "ceilings"])):
        for row in rows:
            store.append(tmp_path / name / "rows.jsonl", row)
    pages = [report.write(tmp_path / name).read_text() for name in ("with", "without")]
    assert [page.count('aria-label="roofline') for page in pages] == [1, 0]
    assert "% of roof" in pages[0] and "% of roof" not in pages[1]


def test_ceilings_of_a_run_have_the_keys_of_those_of_a_gpu():
    found = stages.ceilings("tiny", 1)
    assert found["device"] == "cpu" and found["threads"] == 1 and found["peak"] in ("loop", "mm")
    assert found["bf16"] > 1e8 and found["fp32"] > 1e8 and found["copy"] > 1e7


def test_backends_say_where_they_ran_or_why_not(monkeypatch, tmp_path):
    known = tmp_path / "verified.json"
    known.write_text('{"native": ["EPYC, 2026-01-01: fp32"]}')
    monkeypatch.setattr(overview, "VERIFIED", known)
    native, cuda = overview.backends(all_rows())
    assert native["verified"] == ["EPYC, 2026-01-01: fp32"] and native["label"] == ""
    assert native["places"][0].endswith("2 threads") and native["version"].startswith("dit-moe-kernels ")
    assert cuda == {**cuda, "places": [], "reason": "no <GPU>", "label": "not yet run on hardware"}
    known.write_text("{}")
    assert [b["label"] for b in overview.backends(all_rows())] == ["", "not yet run on hardware"], "native ran here"
    assert overview.backends(all_rows()[1:]) == []


def gpu_row(name: str, **fields) -> dict:
    figures = {"time_us_median": 50.0, "time_us_p20": 49.0, "time_us_p80": 51.0, "n": 9, "gflops": 9e4, "gbps": 900.0,
               "clock": "cuda", "disturbed": False, "images_per_s": 1234.0, "peak_mib": 321.0}  # fmt: skip
    row = store.row(
        "time", case="id", race="gpu", level="sampling_step", model="XL/2-8E2A", routing="gate", T=512, dtype="bf16",
        mode="fwd", threads=1, device="cuda", contender=name, ours=name == "triton", reason=None, wrong=None,
        figures=figures, speedups={}, errors={}, samples_us=[],
    )  # fmt: skip
    return {**row, "machine": {**row["machine"], "gpu": "NVIDIA <X>"}, **fields}


def test_rows_of_a_gpu_are_shown_with_memory_and_reasons(tmp_path):
    absent = gpu_row("authors_tp1", reason="out of memory", figures={})
    for row in (gpu_row("triton"), gpu_row("grouped"), absent):
        store.append(tmp_path / "rows_cuda_default.jsonl", row)
    page = report.write(tmp_path).read_text()
    assert "peak MiB" in page and page.count("<td>321</td>") == 2 and "images/s of one step" in page
    assert "authors_tp1: out of memory (1 case)" in page and "NVIDIA &lt;X&gt;" in page
    assert "1234" in (tmp_path / "report.md").read_text()


def test_memory_is_not_shown_where_no_row_has_it(tmp_path):
    for row in all_rows():
        store.append(tmp_path / "rows.jsonl", row)
    assert "peak MiB" not in report.write(tmp_path).read_text()


def test_every_rung_says_what_came():
    paired = {"bias_b": 0.0031, "effective": 17.4, "correlation": 0.9987, "unseen": 0.0042}
    rows = [
        parity_row("native", "fp32", **paired),
        parity_row(
            "grouped", "bf16", plans="fail", experts_ratio=1.9, low=-0.005, flipped_samples=0.5, ties=3, **paired
        ),
    ]
    came = {rung["name"]: rung["came"] for rung in ladder.rungs(rows)}
    assert list(came) == ["Plans", "Layers", "Paired samples", "dFD", "Absolute FD"]
    assert "Failed by grouped bf16." in came["Plans"] and "3 tokens of images with a near tie" in came["Plans"]
    assert came["Layers"] == "2 of 2 pass. The largest is 1.90 times PyTorch's (grouped, bf16)."
    assert "In bf16" in came["Paired samples"] and "up to 50.0 % of the samples" in came["Paired samples"]
    for text in ("grouped bf16, [-0.0050, ", "17 carry the variance", "99.87 % of it off", "move dFD by 0.00420"):
        assert text in came["dFD"], text
    assert "0.00310 is what 500 samples add" in came["Absolute FD"]


def test_rungs_of_older_rows_say_less_and_invent_nothing():
    came = {rung["name"]: rung["came"] for rung in ladder.rungs([parity_row("native", "fp32")])}
    assert came["dFD"].endswith("from 500 pairs.") and "add" not in came["Absolute FD"] and ladder.rungs([]) == []


def test_both_gates_are_shown(tmp_path):
    for row in all_rows()[:2]:
        store.append(tmp_path / "rows.jsonl", row)
    page = report.write(tmp_path).read_text()
    shown = report.gates()["gates"]
    assert "triton" in shown and all(f"<th>{name} kernel</th>" in page for name in shown)


def test_nothing_is_wider_than_a_phone_outside_its_own_box(tmp_path):
    """Tables stand in boxes that scroll; nothing else has a width of its own."""
    for row in all_rows():
        store.append(tmp_path / "rows.jsonl", row)
    body = report.write(tmp_path).read_text().partition("<body>")[2]
    assert body.count("<table") == len(re.findall(r'<div class="scroll"><table', body)) > 5
    assert not re.search(r"<(?:svg|img|div)[^>]*\swidth=", body) and not re.search(r"[\s;\"]width: *\d+px", body)
