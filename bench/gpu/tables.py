"""What came out on a device, in few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.instrument.cases import ONLY_ON
from bench.instrument.races import failures, fastest, races_of, speedup

SUMMARISED = ("build", "test", "failure", "lost")
ROOF = ("bf16", "fp16", "tf32", "fp32", "copy")
OURS = tuple(ONLY_ON)


def line(race: Sequence[dict]) -> str:
    """Return one case: the fastest of ours, the best peer, the ratio, what the rest of ours takes, who was wrong."""
    row = race[0]
    title = f"{row['level']} {row['model']} T={row['T']} {row['dtype']} {row['mode']}"
    kernels = [row for row in race if row["contender"].startswith(OURS)]
    ours, peer = fastest(kernels, ours=True) or fastest(race, ours=True), fastest(race, ours=False)
    parts = [_number(best) for best in (ours, peer) if best]
    if ours and peer and speedup(ours, peer):
        parts.append(_ratio(ours, peer))
    rest = [row for row in kernels if row is not ours and row["figures"]]
    parts += [f"{_ratio(ours, row)} {_number(row)}" for row in rest if ours and speedup(ours, row)]
    parts += [f"{r['contender']} wrong: {r['wrong']}" for r in race if r["wrong"]]
    return f"{title}: {'; '.join(parts) or 'nobody ran'}"


def _ratio(row: Mapping, other: Mapping) -> str:
    ratio = speedup(row, other)
    return f"x{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _number(row: Mapping) -> str:
    figures, notes = row["figures"], []
    if figures.get("ceiling_share"):
        notes.append(f"{figures['ceiling_share']:.0%} of GEMM")
    if figures.get("x_floor"):
        notes.append(f"{figures['x_floor']:.2f} x floor")
    if figures.get("images_per_s"):
        notes.append(f"{figures['images_per_s']:.4g} images/s")
    if figures.get("launches") is not None:
        notes.append(f"{figures['launches']} launches in {figures['issue_us']:.0f} us, {figures['host_syncs']} syncs")
        notes.append(f"{figures['peak_mib']:.0f} MiB")
    return f"{row['contender']} {figures['time_us_median']:.4g} us ({', '.join(notes)})"


def roof_line(roof: Mapping[str, float]) -> str:
    """Return the ceilings of a run."""
    products = ", ".join(f"{name} {flops / 1e12:.4g}" for name, flops in roof.items() if name != "copy")
    return f"ceilings: {products} TFLOP/s; copy {roof['copy'] / 1e12:.3g} TB/s"


def table(rows: Sequence[dict]) -> str:
    """Return what a folder of rows says: what failed, ceilings, a line per case, reasons of those who are not in."""
    lines = [f"{row['kind']}: {row['summary']}" for row in rows if row["kind"] in SUMMARISED]
    roofs = [row for row in rows if row["kind"] == "ceilings"]
    if roofs:
        lines.append(roof_line({name: roofs[-1][name] for name in ROOF if name in roofs[-1]}))
    timed = [row for row in rows if row["kind"] == "time"]
    lines += [line(race) for race in races_of(timed)]
    lines += failures(timed)
    return "\n".join(lines) or "no rows yet"
