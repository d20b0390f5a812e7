"""Render report/index.html (self-contained) and report/report.md from the rows of a run; every sentence is computed."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.images import pictures, routers
from bench.instrument import store
from bench.instrument.cases import ROOMS
from bench.instrument.races import called_once, failures
from bench.instrument.readers import Npz
from bench.machine_code import inner_loops, static_gate
from bench.page import chains, drawings, experts, ladder, markdown, overview, races, roofline, samplers
from bench.page.overview import headline
from bench.page.render import render
from bench.page.words import BASELINES, NAMES, STEPS, figure, rank, signed
from bench.peers import tables

__all__ = ["add_arguments", "headline", "load_pictures", "main", "view_of", "write"]

# of the contest, the main job, `bench gpu`, `bench time --model`, `bench routers`
FILES = ("peers.jsonl", "rows.jsonl", "rows_cuda_*.jsonl", "family.jsonl", routers.FILE)
LOOP_FIGURES = ("FMA", *inner_loops.FIGURES[1:], "times in the file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("report"), help="folder of a run (default: report)"
    )


def main(args: argparse.Namespace) -> int:
    """Render the folder's report again from its rows and pictures."""
    print(write(args.folder))
    return 0


def write(folder: Path) -> Path:
    """Write index.html and report.md beside the files of rows that are there (FILES), and chains' page beside theirs.

    Returns: the path of index.html; in a folder of chains alone that of their page.
    Raises: ValueError naming the file when it is empty or foreign, or rows.jsonl when there is none at all.
    """
    files, page = [path for pattern in FILES for path in sorted(folder.glob(pattern))], chains.write(folder)
    if page and not files:
        return page
    rows = [row for path in files or [folder / "rows.jsonl"] for row in store.read(path)]
    view = view_of(rows, load_pictures(folder / "pictures.npz"))
    if view["experts"] and (folder / experts.TABLES).exists():
        experts.write(folder, view["experts"])
    if view["samplers"] and (folder / samplers.STRIPS).exists():
        samplers.write(folder, view["samplers"])
    (folder / "index.html").write_text(render("report.html.j2", **view), encoding="utf-8")
    (folder / "report.md").write_text(markdown.text(view), encoding="utf-8")
    return folder / "index.html"


def view_of(rows: Sequence[dict], images: dict[str, np.ndarray]) -> dict:
    """Turn rows and pictures into what the template shows; sections without rows are None or empty."""
    of = defaultdict(list)
    for row in rows:
        of[row["kind"]].append(row)
    run, training, figures = (of[kind][-1] if of[kind] else None for kind in ("run", "training", "figures"))
    parity = sorted(of["parity"], key=lambda r: (rank(r["backend"]), r["dtype"] != "fp32"))
    inner = of["inner_loops"][-1] if of["inner_loops"] else None
    refused = [row for row in of["time"] if row["reason"]]
    return {
        "headline": headline(rows), "last": rows[-1], "run": run, "training": training, "figures": figures,
        "backends": overview.backends(rows), "checks": checks(figures) if figures else [],
        "parity": parity, "controls": of["control"], "forest": ladder.forest([*parity, *of["control"]]),
        "rungs": ladder.rungs(parity), **speeds(rows, of["time"], of["ceilings"]),
        "unmeasured": [
            *overview.fewer(of["pace"]), *(row["what"] for row in of["left_out"]), *failures(refused),
            *called_once(of["time"]),
        ],
        **overview.spent(rows),
        **pictures_of(images, training, of["load"]), "experts": of["experts"][-1] if of["experts"] else None,
        "samplers": of["sampler"], "nearest": samplers.sentence(of["sampler"]),
        "families": overview.families(rows), "routers": routers.table(rows), "routers_head": routers.HEAD,
        "contest": tables.view(of["contest"]) if of["contest"] else None, "inner_loops": inner,
        "loops": [loop_cells(loop) for loop in inner_loops.widest(inner["loops"])] if inner else [],
        "loop_names": LOOP_FIGURES, **gates(),
        "names": NAMES, "rooms_order": ROOMS, "baselines": BASELINES, "figure": figure, "signed": signed,
    }  # fmt: skip


def speeds(rows: Sequence[dict], timed: Sequence[dict], ceilings: Sequence[dict]) -> dict:
    """Return what the timed rows say: means per level, whole models, layers and blocks, rooms under their roof."""
    found, raced = overview.gains(rows), races.of(timed)
    rooms = [race for race in raced if race["level"] in ROOMS]
    roofs = {row["device"]: row for row in ceilings}
    roof = roofs.get(rooms[0]["device"]) if rooms else None
    return {
        "levels": overview.levels(found), "against": [overview.BEST, *BASELINES.values()],
        "models": [race for race in raced if race["level"] in STEPS],
        "races": [race for race in raced if race["level"] not in (*ROOMS, *STEPS)], "rooms": rooms,
        "memory": any("peak_mib" in row["figures"] for race in raced for row in race["rows"]),
        "stages": races.stages(rooms), "roof": roof, "charts": roofline.charts(rooms, roof),
        "share": lambda row: roofline.share(row, roofs.get(row["device"])),
    }  # fmt: skip


def pictures_of(images: dict[str, np.ndarray], training: dict | None, load: Sequence[dict]) -> dict:
    losses = training["losses"] if training else []
    counts = images.get("counts")
    return {
        "grids": [(name, pictures.data_uri(value)) for name, value in images.items() if name != "counts"],
        "curve": drawings.curve(losses) if losses else None,
        "loads": drawings.load_maps(counts) if counts is not None else [],
        "load_rows": load[-1]["layers"] if load else [],
    }


def gates() -> dict:
    """Return the committed figures of the static gates, a table for each backend that has some."""
    found = {name: gate.summary(gate.load()[1]) for name, gate in static_gate.GATES.items()}
    return {"gates": {name: cells for name, cells in found.items() if cells}, "gate_names": static_gate.machine.SUMMARY}


def checks(figures: dict) -> list[dict]:
    """List the main job's own thresholds, what came, and whether it holds."""
    names = {
        "classifier": "classifier on held-out images", "guided": "samples recognised, with guidance",
        "plain": "samples recognised, without guidance",
    }  # fmt: skip
    return [
        {"name": names[key], "value": value, "least": least, "holds": value >= least}
        for key, (value, least) in figures["thresholds"].items()
    ]


def loop_cells(loop: dict) -> tuple:
    return (inner_loops.tile(loop), *(loop[name] for name in (*inner_loops.FIGURES, "times")))


def load_pictures(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    file = Npz(path)
    return {key: file.read(key) for key in file}
