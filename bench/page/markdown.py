"""The report as GitHub markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.page import ladder
from bench.page.words import BASELINES, figure, name, ratio

LADDER = (
    "backend", "dtype", "verdict", "plans", "layer error / torch's (at most 2)", "flipped samples", "PSNR dB",
    "dFD [90 %]", "FD-cls",
)  # fmt: skip


def text(view: dict) -> str:
    """Write the headline, the means per level, verdicts and tables."""
    lines = ["# DiT-MoE main job", "", f"**{view['headline']}**", ""]
    if view["levels"]:
        against = view["against"]
        cells = [(r["title"], r["backend"], *(mean(r["cells"].get(a)) for a in against)) for r in view["levels"]]
        lines += table(("geometric mean (range)", "backend", *(f"x {a}" for a in against)), cells)
    if view["families"]:
        lines += table(("other people's models", "case", "ours", "times faster than"), view["families"])
    if view["routers"]:
        lines += table(view["routers_head"], view["routers"])
    if view["backends"]:
        cells = [
            (b["name"], ", ".join(b["places"]) or b["reason"], b["version"], "; ".join(b["verified"]) or b["label"])
            for b in view["backends"]
        ]
        lines += table(("backend", "ran here on", "version", "verified on"), cells)
    if view["checks"]:
        cells = [(c["name"], f"{c['value']:.1%}", f"{c['least']:.0%}") for c in view["checks"]]
        lines += table(("check", "came", "at least"), cells)
    if view["parity"]:
        lines += table(LADDER, [ladder.cells(r) for r in [*view["parity"], *view["controls"]]])
    for race in [*view["models"], *view["races"], *view["rooms"]]:
        lines += _race(race)
    lines += [*(f"- {why}" for why in view["unmeasured"]), ""] if view["unmeasured"] else []
    lines += table((f"stage: {view['took']} in all", "s"), view["spent"]) if view["spent"] else []
    return "\n".join([*lines, *_machine_code(view), *_footer(view["last"])])


def _race(race: dict) -> list[str]:
    unit = race["unit"]
    head = (f"{race['title']}: {race['what']}", "ms median [p20, p80]", "n", *([unit] if unit else []))
    cells = [
        (name(r["contender"]), r["wrong"] or times(r), r["figures"].get("n", ""),
         *([figure(rate) if (rate := r["figures"].get("images_per_s")) else ""] if unit else []),
         *(ratio(r["speedups"][b]) if b in r["speedups"] else "" for b in BASELINES))
        for r in race["rows"]
    ]  # fmt: skip
    return table((*head, *(f"x {title}" for title in BASELINES.values())), cells)


def _machine_code(view: dict) -> list[str]:
    lines = []
    if contest := view["contest"]:
        cells = [(r["title"], r["lead"], *(c["text"] for c in r["cells"])) for r in contest["rows"]]
        lines += table(("% of peak", "ours / best peer", *contest["titles"]), cells)
        lines += [*(f"- {why}" for why in contest["failures"]), ""]
    if view["loops"]:
        lines += table(("inner loop, per step", *view["loop_names"]), view["loops"])
    elif view["inner_loops"]:
        lines += [f"Inner loops not counted: {view['inner_loops']['reason']}.", ""]
    for kernels, cells in view["gates"].items():
        lines += table(("GPU", f"{kernels} kernel", *view["gate_names"]), cells)
    return lines


def _footer(last: dict) -> list[str]:
    machine = last["machine"]
    return [
        f"{machine['cpu']}, {machine['isa']}, {last['date'][:10]}, commit {last['commit'] or 'none'}. "
        "Ratios above 1 are faster; intervals are 95 % bootstrap over interleaved rounds.", "",
    ]  # fmt: skip


def mean(cell: dict | None) -> str:
    return f"{cell['mean']:.2f} ({cell['least']:.2f} to {cell['most']:.2f}, n={cell['n']})" if cell else ""


def table(head: Sequence[str], cells: Sequence[Sequence]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *cells)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def times(row: dict) -> str:
    median, p20, p80 = (row["figures"][f"time_us_{k}"] / 1e3 for k in ("median", "p20", "p80"))
    return f"{figure(median)} [{figure(p20)}, {figure(p80)}]"
