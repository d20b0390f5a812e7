"""Render report/index.html (self-contained) and report/report.md from the rows of a run; every sentence is computed."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import inner_loops, pictures, static_gate, store
from bench.peers import tables

ROOMS = ("gating", "dispatch", "experts", "combine")
BASELINES = {"authors_tp1": "the authors' loop", "grouped": "grouped"}
ORDER = ("native", "grouped", "eager", "sorted_loop", "authors_tp1", "authors_tp2", "reference")
NAMES = {
    "authors_tp1": "authors' loop", "authors_tp2": "authors' loop, tp=2", "sorted_loop": "sorted loop",
}  # fmt: skip
TITLES = {
    "layer": "MoE layer", "block": "transformer block", "train_step": "training step", "sampling_step": "sampling step",
    "gating": "gating", "dispatch": "dispatch", "experts": "experts", "combine": "combine",
}  # fmt: skip
LOOP_FIGURES = ("FMA", *inner_loops.FIGURES[1:], "times in the file")
MODES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("report"), help="folder of a run (default: report)"
    )


def main(args: argparse.Namespace) -> int:
    """Render the folder's report again from its rows and pictures."""
    print(write(args.folder))
    return 0


def write(folder: Path) -> Path:
    """Write index.html and report.md beside rows.jsonl and the contest's peers.jsonl; returns the path of index.html.

    Raises: ValueError naming the file when it is empty or foreign, or rows.jsonl when there is neither.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    files = [path for name in ("peers.jsonl", "rows.jsonl") if (path := folder / name).exists()]
    rows = [row for path in files or [folder / "rows.jsonl"] for row in store.read(path)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(figure=figure, signed=signed)
    view = view_of(rows, load_pictures(folder / "pictures.npz"))
    (folder / "index.html").write_text(environment.get_template("report.html.j2").render(view), encoding="utf-8")
    (folder / "report.md").write_text(markdown(view), encoding="utf-8")
    return folder / "index.html"


def view_of(rows: Sequence[dict], images: dict[str, np.ndarray]) -> dict:
    """Turn rows and pictures into what the template shows; sections without rows are None or empty."""
    of = defaultdict(list)
    for row in rows:
        of[row["kind"]].append(row)
    run, training, figures = (of[kind][-1] if of[kind] else None for kind in ("run", "training", "figures"))
    counts = images.pop("counts", None)
    parity = sorted(of["parity"], key=lambda r: (rank(r["backend"]), r["dtype"] != "fp32"))
    races = races_of(of["time"])
    losses = training["losses"] if training else []
    inner = of["inner_loops"][-1] if of["inner_loops"] else None
    return {
        "headline": headline(rows), "last": rows[-1], "run": run, "training": training, "figures": figures,
        "checks": checks(figures) if figures else [], "curve": curve(losses) if losses else None,
        "grids": [(name, pictures.data_uri(value)) for name, value in images.items()],
        "parity": parity, "controls": of["control"], "forest": forest([*parity, *of["control"]]),
        "races": [r for r in races if r["level"] not in ROOMS], "rooms": [r for r in races if r["level"] in ROOMS],
        "stages": stages([r for r in races if r["level"] in ROOMS]),
        "loads": load_maps(counts) if counts is not None else [],
        "load_rows": of["load"][-1]["layers"] if of["load"] else [], "names": NAMES, "rooms_order": ROOMS,
        "contest": tables.view(of["contest"]) if of["contest"] else None, "inner_loops": inner,
        "loop_names": LOOP_FIGURES, "gate_names": static_gate.SUMMARY,
        "gate": static_gate.summary(static_gate.load()[1]),
        "loops": [loop_cells(loop) for loop in inner_loops.widest(inner["loops"])] if inner else [],
    }  # fmt: skip


def headline(rows: Sequence[dict]) -> str:
    """Say in two sentences which backends are at parity, and how fast the native layer is against its baselines."""
    verdicts = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "parity":
            verdicts[row["verdict"]][row["backend"]].append(row["dtype"])
    parts = []
    for verdict in ("DIFFERENT", "UNSURE", "PARITY"):
        groups = defaultdict(list)
        for backend, dtypes in sorted(verdicts[verdict].items(), key=lambda item: rank(item[0])):
            groups[" and ".join(dtypes)].append(backend)
        parts += [f"{verdict} in {dtypes}: {', '.join(backends)}" for dtypes, backends in groups.items()]
    sentences = ["; ".join(parts) + "." if parts else "No parity verdicts yet."]
    speeds = []
    for row in rows:
        if row["kind"] == "time" and row["level"] == "layer" and row["backend"] == "native" and row["mode"] == "fwd":
            ratios = [
                f"{ratio(row['speedups'][b])} as fast as {BASELINES[b]}" for b in BASELINES if b in row["speedups"]
            ]
            if ratios:
                speeds.append((row, f"{row['dtype']} {' and '.join(ratios)}"))
    if speeds:
        first = speeds[0][0]
        sentences.append(
            f"Speed of the native MoE layer at {first['model']} width, forward, T={first['T']}, "
            f"{plural(first['threads'], 'thread')}: " + "; ".join(text for _, text in speeds) + "."
        )
        if any(row["figures"]["disturbed"] for row, _ in speeds):
            sentences.append("Other programs used the cores meanwhile: these ratios are worth little.")
    return " ".join(sentences)


def races_of(rows: Sequence[dict]) -> list[dict]:
    """Group timed rows that ran against each other, in the order in which they ran; the fastest is marked."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["race"]].append(row)
    races = []
    for race, members in groups.items():
        first = members[0]
        members = sorted(members, key=lambda r: rank(r["backend"]))
        slowest = max((r["figures"]["time_us_median"] for r in members if not r["wrong"]), default=1.0)
        for r in members:
            r["share"] = 0.0 if r["wrong"] else r["figures"]["time_us_median"] / slowest
        title = f"{TITLES[first['level']]}, {MODES[first['mode']]}, {first['dtype']}"
        if first["level"] in ("train_step", "sampling_step"):
            title = f"{TITLES[first['level']]}, {first['dtype']}"
        races.append({**{k: first[k] for k in ("level", "mode", "dtype", "T", "threads", "model", "routing", "what")},
                      "race": race, "title": title, "rows": members})  # fmt: skip
    return races


def stages(races: Sequence[dict]) -> list[dict]:
    """Line up the four rooms' times per dtype and backend, as shares of the longest line."""
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for race in races:
        for row in race["rows"]:
            if not row["wrong"]:
                times[race["dtype"], row["backend"]][race["level"]] = row["figures"]["time_us_median"] / 1e3
    whole = {key: rooms for key, rooms in times.items() if len(rooms) == len(ROOMS)}
    longest = max((sum(rooms.values()) for rooms in whole.values()), default=1.0)
    return [
        {"dtype": dtype, "backend": backend, "total_ms": sum(rooms.values()),
         "rooms": [(room, rooms[room], 100 * rooms[room] / longest) for room in ROOMS]}
        for (dtype, backend), rooms in sorted(whole.items(), key=lambda item: (item[0][0] != "fp32", rank(item[0][1])))
    ]  # fmt: skip


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


def forest(rows: Sequence[dict]) -> dict | None:
    """Place each dFD interval on one axis in percent from the left, linear inside the margin, logarithmic outside."""
    if not rows:
        return None
    margin = rows[0]["margin"]
    reach = max(2.0, *(abs(r[k]) / margin for r in rows for k in ("low", "high")))

    def place(value: float) -> float:
        x = value / margin
        bent = x if abs(x) <= 1 else np.sign(x) * (1 + np.log(abs(x)) / np.log(reach))
        return 50 + 48 * bent / 2

    lines = [
        {"name": r.get("backend") or r["control"], "dtype": r["dtype"], "verdict": r["dfd_verdict"],
         "left": place(r["low"]), "width": max(0.4, place(r["high"]) - place(r["low"])), "at": place(r["dfd"]),
         "row": r}
        for r in rows
    ]  # fmt: skip
    return {"lines": lines, "margin": margin, "left": place(-margin), "right": place(margin)}


def curve(losses: Sequence[float], width: int = 600, height: int = 160) -> dict:
    """Return SVG paths of the losses and of their running mean over 1/30 of the run."""
    y = np.asarray(losses, dtype=np.float64)
    window = max(1, len(y) // 30)
    smooth = np.convolve(np.pad(y, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid")
    low, high = 0.0, float(max(y.max(), 1e-9))

    def path(values: np.ndarray) -> str:
        xs = np.linspace(0, width, len(values))
        ys = height * (1 - (values - low) / (high - low))
        return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))

    return {"raw": path(y), "smooth": path(smooth), "high": high, "last": float(smooth[-1]), "size": (width, height)}


def load_maps(counts: np.ndarray) -> list[dict]:
    """Paint, per layer, each expert's load over positions (one small map each) and over timesteps (experts x steps)."""
    experts = counts.shape[-1]
    side = round(counts.shape[2] ** 0.5)
    maps = []
    for layer, count in enumerate(counts.astype(np.float64)):
        position = count.sum(0) * experts / count.sum((0, 2))[:, None]
        timestep = count.sum(1) * experts / count.sum((1, 2))[:, None]
        maps.append(
            {
                "layer": layer,
                "position": [
                    pictures.data_uri(pictures.load_map(position[:, e].reshape(side, side))) for e in range(experts)
                ],
                "timestep": pictures.data_uri(pictures.load_map(timestep.T)),
            }
        )
    return maps


def markdown(view: dict) -> str:
    """Write the headline, verdicts and tables as GitHub markdown."""
    lines = ["# DiT-MoE main job", "", f"**{view['headline']}**", ""]
    if view["checks"]:
        lines += table(
            ("check", "came", "at least"),
            [(c["name"], f"{c['value']:.1%}", f"{c['least']:.0%}") for c in view["checks"]],
        )
    if view["parity"]:
        head = (
            "backend",
            "dtype",
            "verdict",
            "plans",
            "layer error / torch's (at most 2)",
            "flipped samples",
            "PSNR dB",
            "dFD [90 %]",
            "FD-cls",
        )
        lines += table(head, [parity_cells(r) for r in [*view["parity"], *view["controls"]]])
    for race in [*view["races"], *view["rooms"]]:
        head = (
            f"{race['title']}: {race['what']}",
            "ms median [p20, p80]",
            "n",
            *(f"x {NAMES.get(b, b)}" for b in BASELINES),
        )
        cells = [
            (NAMES.get(r["backend"], r["backend"]), r["wrong"] or times(r), r["figures"].get("n", ""),
             *(ratio(r["speedups"][b]) if b in r["speedups"] else "" for b in BASELINES))
            for r in race["rows"]
        ]  # fmt: skip
        lines += table(head, cells)
    if view["contest"]:
        head = ("% of peak", "ours / best peer", *view["contest"]["titles"])
        lines += table(
            head, [(r["title"], r["lead"], *(c["text"] for c in r["cells"])) for r in view["contest"]["rows"]]
        )
        lines += [*(f"- {why}" for why in view["contest"]["failures"]), ""]
    if view["loops"]:
        lines += table(("inner loop, per step", *view["loop_names"]), view["loops"])
    elif view["inner_loops"]:
        lines += [f"Inner loops not counted: {view['inner_loops']['reason']}.", ""]
    lines += table(("GPU", "kernel", *view["gate_names"]), view["gate"])
    last = view["last"]
    lines += [
        f"{last['machine']['cpu']}, {last['machine']['isa']}, {last['date'][:10]}, commit {last['commit'] or 'none'}. "
        "Ratios above 1 are faster; intervals are 95 % bootstrap over interleaved rounds.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def parity_cells(row: dict) -> tuple:
    return (
        row.get("backend") or f"control: {row['control']}", row["dtype"], row["verdict"], row["plans"],
        figure(max(row["outputs_ratio"], row["experts_ratio"])), f"{row['flipped_samples']:.1%}",
        f"{row['psnr_db']:.1f}",
        f"{signed(row['dfd'])} [{signed(row['low'])}, {signed(row['high'])}]", f"{row['fd_b']:.4f}",
    )  # fmt: skip


def loop_cells(loop: dict) -> tuple:
    return (inner_loops.tile(loop), *(loop[name] for name in (*inner_loops.FIGURES, "times")))


def table(head: Sequence[str], cells: Sequence[Sequence]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *cells)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def times(row: dict) -> str:
    median, p20, p80 = (row["figures"][f"time_us_{k}"] / 1e3 for k in ("median", "p20", "p80"))
    return f"{figure(median)} [{figure(p20)}, {figure(p80)}]"


def ratio(value: dict) -> str:
    return f"{value['value']:.2f}x [{value['low']:.2f}, {value['high']:.2f}]"


def figure(value: float) -> str:
    """Format a number to three significant digits without exponents where they can be avoided."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"
    return f"{value:.1e}"


def signed(value: float) -> str:
    return "0" if abs(value) < 5e-7 else f"{value:+.1e}" if abs(value) < 1e-3 else f"{value:+.4f}"


def rank(backend: str) -> int:
    return ORDER.index(backend) if backend in ORDER else len(ORDER)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def load_pictures(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as file:
        return {key: file[key] for key in file.files}
