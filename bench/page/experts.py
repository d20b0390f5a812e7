"""`python -m bench analyze`: where a model sends its tokens while it samples, as a page of heat maps and as tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.images import pictures
from bench.images.analysis import findings, statistics
from bench.images.analysis.run import analyse
from bench.images.sampling import command as sampling
from bench.instrument import store
from bench.instrument.outputs import keep_given
from bench.instrument.progress import say
from bench.instrument.readers import Npz
from bench.page import drawings
from bench.page.render import render
from bench.page.words import figure

TABLES, PAGE = "counts.npz", "experts.html"
FILES = (TABLES, "experts.jsonl", PAGE)
ROWS = 100  # classes in a picture, at most
COLUMNS = 6  # steps of the maps
CURVES = {
    "max_over_mean": "largest load / fair share",
    "entropy": "entropy / log2 E",
    "kept": "picks kept from the step before",
}
JSON_BYTES = 3  # of an id in the authors' JSON: digit, comma, blank
Arrays = Mapping[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    parser.set_defaults(out=Path("report/experts"), count=200, labels="cycle", guidance=1.5)


def main(args: argparse.Namespace) -> int:
    """Sample, count, write counts.npz, experts.jsonl and experts.html; 1 for a model whose output is not finite."""
    for name in FILES:
        keep_given("--out", args.out / name, {"--ckpt": args.ckpt})
    drawing, settings = sampling.prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        tables, _ = analyse(drawing, args.count)
    except FloatingPointError as error:
        say(f"stopped: {error}")
        return 1
    arrays = tables.arrays()
    np.savez_compressed(args.out / TABLES, **arrays)
    path, found = args.out / FILES[1], row(arrays, settings)
    path.unlink(missing_ok=True)
    store.append(path, found)
    for finding in found["findings"]:
        say(f"  {finding['claim']}: {finding['verdict']} ({said(finding)})")
    say(f"{write(args.out, found)}; counts.npz beside it, {tables.nbytes / 1e6:.1f} MB of tables")
    return 0


def row(arrays: Arrays, settings: Mapping) -> dict:
    """Return the row of a run: findings, layers and steps. An interval that is none, of too few images, is null."""
    found = [asdict(f) | {"verdict": f.verdict} for f in findings.findings(arrays)]
    for finding in found:
        finding |= {end: finding[end] if np.isfinite(finding[end]) else None for end in ("low", "high")}
    layers, steps = findings.by_layer(arrays), findings.by_step(arrays)
    return store.row("experts", settings=dict(settings), findings=found, layers=layers, steps=steps)


def load(found: Mapping) -> list[dict]:
    """Return of each layer of a row what the main report shows."""
    return [
        {
            **{name: layer[name] for name in ("layer", "max_over_mean", "idle_experts")},
            "position_bits": layer["position_bits"]["plain"],
            "timestep_bits": layer["step_bits"]["plain"],
        }
        for layer in found["layers"]
    ]


def write(folder: Path, found: dict) -> Path:
    """Render the page of a row from the tables in its folder; return its path."""
    file = Npz(folder / TABLES, "counts")
    path = folder / PAGE
    path.write_text(
        render("experts.html.j2", **view_of(found, {key: file.read(key) for key in file})), encoding="utf-8"
    )
    return path


def view_of(row: dict, arrays: Arrays) -> dict:
    """Turn a row and its tables into what the template shows."""
    L, S, _, P, E = arrays["load"].shape
    images, picks = int((arrays["labels"] >= 0).sum()), int(arrays["load"].sum())
    return {
        "row": row, "layers": row["layers"], "findings": row["findings"], "said": said, "figure": figure,
        "sizes": {"layers": L, "steps": S, "positions": P, "experts": E, "images": images, "picks": picks,
                  "mb": sum(a.nbytes for a in arrays.values()) / 1e6, "json_mb": JSON_BYTES * picks / 1e6},
        "classes": class_maps(arrays), "maps": drawings.load_maps(arrays["load"][:, :, 0]),
        "allocation": allocation(arrays), "pairs": [heat(statistics.pair_lift(p)) for p in arrays["pairs"]],
        "curves": [curve(row["steps"], name, title) for name, title in CURVES.items()],
    }  # fmt: skip


def class_maps(arrays: Arrays) -> list[str]:
    """Paint class x expert for each layer, of classes that were drawn, every n-th where they are many."""
    drawn = arrays["labels"] >= 0
    tables = statistics.by_class(arrays["images"][drawn], arrays["labels"][drawn]).transpose(1, 0, 2)
    tables = tables[:, :: -(-tables.shape[1] // ROWS)]
    return [heat(t * t.shape[1] / np.maximum(t.sum(1, keepdims=True), 1)) for t in tables]


def allocation(arrays: Arrays) -> dict:
    """Paint over the image, by layer and step, experts per token, as EC-DIT does; gate mass where all have as many."""
    load, mass = arrays["load"][:, :, 0].sum(-1).astype(np.float64), arrays["mass"][:, :, 0].astype(np.float64)
    fixed = all((histogram > 0).sum() == 1 for histogram in arrays["degrees"].sum(1))
    values = mass if fixed else load
    side = round(values.shape[2] ** 0.5)
    steps = sorted({round(s) for s in np.linspace(0, values.shape[1] - 1, COLUMNS)})
    share = values / np.maximum(values.mean(-1, keepdims=True), 1e-30)
    spread = share[:, steps].std(-1)
    rows = [[heat(share[layer, s].reshape(side, side)) for s in steps] for layer in range(len(share))]
    return {"what": "gate mass" if fixed else "experts per token", "steps": steps, "rows": rows, "spread": spread}


def heat(share: np.ndarray) -> str:
    return pictures.data_uri(pictures.load_map(share))


def curve(steps: Sequence[dict], name: str, title: str, size: tuple[int, int] = (300, 120)) -> dict:
    """Place a figure's course over the steps, a line for each layer, zero at the bottom."""
    values = np.array([step[name] for step in steps])[int(name == "kept") :]
    top = float(max(values.max(initial=0), 1e-9))
    lines = [" ".join(drawings.line(layer, size, top)) for layer in values.T]
    return {"title": title, "lines": lines, "top": top, "size": size}


def said(finding: Mapping) -> str:
    """Write a finding's number, as `0.12 [0.10 to 0.14] bits ...`, and what it has to pass where that is not 0."""
    low, high, least = finding["low"], finding["high"], finding.get("least", 0)  # rows of before had none
    interval = "too few images for an interval" if low is None else f"{low:.3f} to {high:.3f}"
    passes = f", at least {least:.3f} to count" if least else ""
    return f"{finding['value']:.3f} [{interval}] {finding['statistic']}{passes}"
