"""The parity ladder in words: what each rung asks, and what came; the dFD intervals on one axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.page.words import figure, listed, plural, signed

RUNGS = (
    ("Plans", "Does every token go to the experts, with the weights, that the oracle's float64 router picks?"),
    ("Layers", "Is each layer's error against float64 at most twice that of plain PyTorch on the same inputs?"),
    ("Paired samples", "Does the same image come out of the same weights, noise and label?"),
    ("dFD", "Are the images as far from the data, by Fréchet distance, as the oracle's, give or take the margin? Both "
            "start from the same noise, so that most of what chance adds cancels."),
    ("Absolute FD", "Is the distance itself of the size to expect? No verdict rests on it."),
)  # fmt: skip


def rungs(rows: Sequence[dict]) -> list[dict]:
    """Return the five rungs: name, what it asks, and what came over all backends and dtypes of the parity rows."""
    if not rows:
        return []
    came = (
        _passed(rows, "plans") + _ties(rows), _passed(rows, "layers") + _worst(rows), _samples(rows), _dfd(rows),
        _absolute(rows),
    )  # fmt: skip
    return [{"name": name, "asks": asks, "came": text} for (name, asks), text in zip(RUNGS, came, strict=True)]


def _passed(rows: Sequence[dict], rung: str) -> str:
    failed = [f"{row['backend']} {row['dtype']}" for row in rows if row[rung] != "pass"]
    return f"Failed by {listed(failed)}." if failed else f"{len(rows)} of {len(rows)} pass."


def _ties(rows: Sequence[dict]) -> str:
    ties = max(row["ties"] for row in rows)
    return f" {plural(ties, 'token')} of images with a near tie between experts left out." if ties else ""


def _worst(rows: Sequence[dict]) -> str:
    worst = max(rows, key=_error)
    return f" The largest is {figure(_error(worst))} times PyTorch's ({worst['backend']}, {worst['dtype']})."


def _error(row: dict) -> float:
    return max(row["outputs_ratio"], row["experts_ratio"])


def _samples(rows: Sequence[dict]) -> str:
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        cosine, psnr = (min(row[key] for row in mine) for key in ("cosine", "psnr_db"))
        flipped = max(row["flipped_samples"] for row in mine)
        parts.append(
            f"In {dtype} the cosine is at least {cosine:.5f}, the PSNR at least {psnr:.1f} dB, and in up to "
            f"{100 * flipped:.1f} % of the samples some token was routed otherwise."
        )
    return " ".join(parts)


def _dfd(rows: Sequence[dict]) -> str:
    widest = max(rows, key=lambda row: max(abs(row["low"]), abs(row["high"])))
    inside = sum(row["dfd_verdict"] == "PARITY" for row in rows)
    text = (
        f"{inside} of {len(rows)} intervals at {100 * widest['level']:.0f} % lie within ±{widest['margin']:g}. "
        f"The one that reaches farthest: {widest['backend']} {widest['dtype']}, [{signed(widest['low'])}, "
        f"{signed(widest['high'])}] from {widest['count']} pairs"
    )
    if "correlation" not in widest:
        return text + "."
    return (
        f"{text}, of which {widest['effective']:.0f} carry the variance; pairing took "
        f"{100 * widest['correlation']:.2f} % of it off. A fault that hits fewer than 3 of {widest['count']} samples "
        f"can stay unseen; 3 would move dFD by {figure(widest['unseen'])}."
    )


def _absolute(rows: Sequence[dict]) -> str:
    low, high = (pick(row["fd_b"] for row in rows) for pick in (min, max))
    text = f"FD-cls of the oracle {figure(rows[0]['fd_a'])}, of the backends {figure(low)} to {figure(high)}"
    if "bias_b" in rows[0]:
        text += f", of which {figure(max(row['bias_b'] for row in rows))} is what {rows[0]['count']} samples add"
    recognised = min(row["recognised"] for row in rows)
    return f"{text}. The classifier recognises at least {100 * recognised:.1f} % of the samples as their label."


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


def cells(row: dict) -> tuple:
    """Return a line of the markdown table."""
    return (
        row.get("backend") or f"control: {row['control']}", row["dtype"], row["verdict"], row["plans"],
        figure(_error(row)), f"{row['flipped_samples']:.1%}", f"{row['psnr_db']:.1f}",
        f"{signed(row['dfd'])} [{signed(row['low'])}, {signed(row['high'])}]", f"{row['fd_b']:.4f}",
    )  # fmt: skip
