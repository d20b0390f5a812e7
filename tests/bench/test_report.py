"""The report: computed from rows, complete in one file, right about what it says."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest

from bench.__main__ import main
from bench.images import pictures
from bench.instrument import store
from bench.instrument.cases import ROOMS
from bench.page import ladder, report, words

RUNGS = {
    "plans": "pass", "layers": "pass", "plans_equal": True, "outputs_ratio": 1.1, "experts_ratio": 0.9, "e_ours": 1e-7,
    "weights_ratio": 1.0, "ties": 0, "cosine": 1.0, "cosine_min": 0.99, "psnr_db": 80.0, "flipped_samples": 0.25,
    "flipped_tokens": 0.01, "recognised": 0.99, "fd_a": 0.02, "fd_b": 0.0201, "dfd": 0.0001, "standard_error": 5e-5,
    "degrees": 100.0, "low": 0.00002, "high": 0.00018, "level": 0.9, "margin": 0.001, "count": 500, "failed": [],
    "dfd_verdict": "PARITY",
}  # fmt: skip
ROOF = {"device": "cpu", "threads": 2, "peak": "loop", "fp32": 400e9, "bf16": 800e9, "copy": 20e9}


def parity_row(backend: str, dtype: str, verdict: str = "PARITY", **changes) -> dict:
    return store.row("parity", backend=backend, dtype=dtype, verdict=verdict, **{**RUNGS, **changes})


def time_row(
    backend: str, speedups: dict, level: str = "layer", dtype: str = "fp32", wrong: str | None = None, **figures
):
    times = {
        "time_us_median": 2000.0,
        "time_us_p20": 1900.0,
        "time_us_p80": 2100.0,
        "n": 9,
        "gflops": 50.0,
        "gbps": 2.0,
    }
    times |= {"disturbed": False, **figures}
    return store.row(
        "time", case="id", contender=backend, level=level, dtype=dtype, mode="fwd", T=1024, threads=2, device="cpu",
        model="S/2-8E2A", routing="gate", race=f"{level}-{dtype}", reason=None, wrong=wrong, ours=backend == "native",
        figures={} if wrong else times, errors={}, samples_us=[],
        speedups={name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name, value in speedups.items()},
    )  # fmt: skip


def all_rows() -> list[dict]:
    copies = {"share": 0.0, "sample_median": 0.3, "held_median": 0.26, "sample_min": 0.1, "held_min": 0.1}
    thresholds = {"classifier": (0.99, 0.97), "guided": (0.90, 0.95), "plain": (0.9, 0.85)}
    backends = [
        {"name": "native", "available": True, "reason": "", "verified": []},
        {"name": "cuda", "available": False, "reason": "no <GPU>", "verified": []},
    ]
    return [
        store.row("run", size="default", threads=2, data="digits", backends=backends),
        store.row("training", text="A model.", losses=[1.5, 1.0, 0.5], steps=3, seconds=1.0, origin="trained"),
        store.row("figures", thresholds=thresholds, copies=copies, no_copies=True, fd_guided=0.02, fd_plain=0.01,
                  fd_held=0.004, guidance=1.5, steps=16),
        store.row("load", layers=[{"layer": 0, "max_over_mean": 1.5, "idle_experts": 0, "position_bits": 0.2,
                                   "timestep_bits": 0.1}]),
        parity_row("native", "fp32"), parity_row("grouped", "fp32"), parity_row("native", "bf16"),
        parity_row("grouped", "bf16", "UNSURE", dfd_verdict="UNSURE"),
        store.row("control", control="dropped shared expert", dtype="fp32", verdict="DIFFERENT",
                  **{**RUNGS, "layers": "fail", "low": 0.5, "dfd": 0.6, "high": 0.7, "dfd_verdict": "DIFFERENT"}),
        time_row("native", {"authors_tp1": 2.0, "grouped": 1.25}), time_row("grouped", {"authors_tp1": 1.6}),
        time_row("authors_tp1", {"grouped": 0.6}), time_row("authors_tp2", {}, wrong="y: error 1e-1"),
        *[time_row(b, {"grouped": 1.0}, room) for room in ROOMS for b in ("native", "grouped")],
        time_row("native", {}, "train_step"), store.row("ceilings", **ROOF),
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for row in all_rows():
        store.append(tmp_path / "rows.jsonl", row)
    sheet = pictures.grid(np.zeros((20, 1, 8, 8)), 10)
    np.savez(tmp_path / "pictures.npz", counts=np.ones((2, 4, 16, 8), np.int32), **{"real images": sheet})
    return tmp_path


def test_headline_is_computed_from_the_rows():
    text = report.headline(all_rows())
    assert "UNSURE in bf16: grouped; PARITY in fp32 and bf16: native; PARITY in fp32: grouped." in text
    assert "native is faster than everything else in 1 of 5 cases, slower in 0, 4 undecided (95 % intervals)." in text
    assert "1 result of authors' loop, tp=2 failed the check and got no number" in text and "worth little" not in text
    assert "All 1 deliberate fault came out DIFFERENT." in text
    busy = [time_row("native", {"grouped": 1.0}, disturbed=True), time_row("grouped", {})]
    assert "worth little" in report.headline(busy) and "No parity verdicts yet" in report.headline(busy)


def test_headline_names_where_we_are_not_faster():
    rows = [
        time_row("native", {"grouped": 0.8}, "train_step"), time_row("grouped", {}, "train_step"),
        time_row("native", {"eager": 1.05}, "block"), time_row("eager", {}, "block"),
        time_row("native", {"grouped": 2.0}), time_row("grouped", {}),
    ]  # fmt: skip
    text = report.headline(rows)
    assert "native is faster than everything else in 1 of 3 cases, slower in 1, 1 undecided" in text
    lost = "training step, fp32, S/2-8E2A 0.80x [0.70, 0.90] grouped"
    open_ = "transformer block, forward, fp32, S/2-8E2A 1.05x [0.95, 1.15] eager"
    assert f"Not faster: {lost}; {open_}." in text and "MoE layer" not in text
    many = [time_row(b, {"grouped": 0.5}, dtype=f"d{n}") for n in range(15) for b in ("native", "grouped")]
    assert "; 3 more." in report.headline(many)
    assert "Not faster" not in report.headline(rows[4:])


def test_headline_counts_cases_in_which_whoever_else_ran_was_hopeless():
    rows = [time_row("native", {}), {**time_row("grouped", {}), "once": "called once: 9 s"}]
    assert "In 1 more case whoever else ran was called once, so slow is it." in report.headline(rows)
    assert "called once" not in report.headline([*rows, time_row("eager", {})])
    assert "grouped, layer-fp32: called once: 9 s" in report.view_of(rows, {})["unmeasured"]


def test_headline_says_when_a_deliberate_fault_was_not_found():
    rows = [{**row, "verdict": "UNSURE"} if row["kind"] == "control" else row for row in all_rows()]
    assert "The ladder is blind: dropped shared expert (fp32) UNSURE." in report.headline(rows)


def test_page_is_one_file_that_opens_offline(folder):
    page = report.write(folder).read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page) and "@import" not in page and "url(" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_page_shows_every_section_and_escapes(folder):
    page = report.write(folder).read_text()
    for text in ("Overview", "Backends", "Samples", "Training", "Whole models", "Layers and blocks", "The four rooms",
                 "Parity", "Expert load", "no &lt;GPU&gt;", "no number: y: error 1e-1", "dropped shared expert", 
                 "images/s", "missed", "2.00×"):  # fmt: skip
        assert text in page, text
    assert page.count("<img") == 1 + 2 * 8 + 2


def test_page_of_an_unfinished_run_leaves_out_what_is_missing(tmp_path):
    for row in all_rows()[:2]:
        store.append(tmp_path / "rows.jsonl", row)
    page = report.write(tmp_path).read_text()
    assert "Training" in page and "Expert load" not in page and "<h2>Parity" not in page and "<h2>Peers" not in page


def test_markdown_has_verdicts_and_ratios(folder):
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert (
        "| grouped | bf16 | UNSURE | pass |" in text and "| control: dropped shared expert | fp32 | DIFFERENT |" in text
    )
    assert "2.00x [1.90, 2.10]" in text and "2.00 [1.90, 2.10]" in text


def test_report_command_renders_again_and_names_a_missing_run(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0 and "index.html" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 2 and "rows.jsonl" in capsys.readouterr().err


def test_broken_pictures_are_named(folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    (tmp_path / "pictures.npz").write_text("no archive")
    assert main(["report", str(tmp_path)]) == 2 and "pictures.npz: expected an npz" in capsys.readouterr().err


def test_forest_places_margin_and_intervals():
    view = ladder.forest([parity_row("native", "fp32", low=-0.001, dfd=0.0, high=0.001)])
    line = view["lines"][0]
    assert view["left"] == pytest.approx(26) and view["right"] == pytest.approx(74)
    assert (line["left"], line["at"], line["width"]) == pytest.approx((26, 50, 48))
    far = ladder.forest([parity_row("native", "fp32", low=0.5, dfd=0.6, high=0.7)])["lines"][0]
    assert 74 < far["left"] < far["at"] < far["left"] + far["width"] <= 98 + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (99.95, "100.0"), (12.345, "12.3"), (0.0123456, "0.0123"), (1.5e-7, "1.5e-07")],
)
def test_figures_have_three_digits(value, text):
    assert words.figure(value) == text


def decode(data: bytes) -> np.ndarray:
    width, height, _, colour = struct.unpack(">IIBB", data[16:26])
    channels = {0: 1, 2: 3, 6: 4}[colour]
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    lines = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8)
    return lines.reshape(height, 1 + width * channels)[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    data = pictures.png(pixels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and np.array_equal(decode(data), pixels)
    other = np.asarray(pytest.importorskip("PIL.Image").open(io.BytesIO(data)))
    assert np.array_equal(other.reshape(pixels.shape), pixels)


def test_grid_shows_ink_colour_and_latents():
    ink = pictures.grid(np.stack([np.full((1, 2, 2), v) for v in (-1.0, 1.0, 1.0)]), 2)
    assert ink.shape == (5, 5, 4)
    assert ink[0, 0].tolist() == [255, 255, 255, 255] and ink[0, 3].tolist() == [0, 0, 0, 255]
    assert ink[2, 0, 3] == 0 and ink[3, 3, 3] == 0, "gaps and missing images are clear"
    colour = pictures.grid(np.array([1.0, -1, 0]).reshape(1, 3, 1, 1), 1)
    assert colour[0, 0].tolist() == [255, 0, 128, 255]
    latents = pictures.grid(np.random.default_rng(0).normal(size=(4, 4, 3, 3)) * 50, 2)
    assert latents[..., :3].min() == 0 and latents[..., :3].max() == 255


def test_load_map_is_clear_at_the_fair_share():
    below, fair, above = pictures.load_map(np.array([[0.0, 1.0, 5.0]]))[0]
    assert fair[3] == 0 and below[3] == above[3] == 255 and below[2] > below[0] and above[0] > above[2]
