"""What a comparison found, as a line, JSON, GitHub markdown and a page; every sentence is computed from verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from bench.compare.gates import Change, ordered
from bench.instrument import stats
from bench.page.render import render

FAIL_ON = {
    "worse": "a case is BROKEN, or a figure that does not wobble got worse",
    "slower": "the same, or a case is SLOWER",
    "different": "the same, or a case is FASTER, or such a figure or an inner loop changed at all",
    "any": "the same, or a case is UNSURE, was added, removed or left out",
}
LEGEND = (
    f"speedup > 1: head is faster. Median ratio with {stats.LEVEL:.0%} bootstrap interval, p after Holm over the "
    f"cases; a change counts at p <= {stats.ALPHA:g}, beyond {stats.EFFECT:.0%}, unless the peers of its race moved "
    "too; UNSURE: the interval did not decide."
)
LOUD = ("SLOWER", "FASTER")


@dataclass
class Report:
    """What base and head say about each other.

    broken: right in base, wrong in head, which is worse than slow. skipped: cases without a verdict, with the reason.
    reasons: why a new or removed case is in one side only, where more is known than that it is not there.
    notes: how the two sides were measured. fixed: changes of figures that do not wobble.
    """

    verdicts: list[stats.Verdict]
    new: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    inner_loops: list[str] = field(default_factory=list)
    fixed: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {name: sum(v.verdict == name for v in self.verdicts) for name in stats.VERDICTS}

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.fixed if change.worse]

    @property
    def headline(self) -> str:
        """One line: what is broken, worse, slower, faster, and how many cases that rests on."""
        parts = [f"{len(self.broken)} BROKEN"] if self.broken else []
        parts += [f"{n} {name}" for name in ("SLOWER", "FASTER", "UNSURE", "SAME") if (n := self.counts[name])]
        extra = [f"{n} fixed figure{'s' * (n > 1)} WORSE" for n in [len(self.worse)] if n]
        extra += [
            f"{len(x)} {name}"
            for name, x in (("new", self.new), ("removed", self.removed), ("left out", self.skipped))
            if x
        ] + ["inner loops changed"] * bool(self.inner_loops)
        return f"{', '.join(parts) or 'nothing comparable'} of {len(self.verdicts) + len(self.broken)} cases" + (
            f" ({', '.join(extra)})" if extra else ""
        )

    def fails(self, condition: str | None) -> bool:
        """Tell whether a --fail-on condition holds; each includes those before it in FAIL_ON."""
        if condition is None:
            return False
        found = {
            "worse": self.broken or self.worse,
            "slower": self.counts["SLOWER"],
            "different": self.counts["FASTER"] or self.fixed or self.inner_loops,
            "any": self.counts["UNSURE"] or self.new or self.removed or self.skipped,
        }
        names = list(FAIL_ON)
        return any(found[name] for name in names[: names.index(condition) + 1])

    def to_json(self) -> dict:
        fields = asdict(replace(self, fixed=ordered(self.fixed)))
        return {"headline": self.headline, "counts": self.counts, "rows": fields.pop("verdicts"), **fields}

    def split(self) -> tuple[list[stats.Verdict], list[stats.Verdict]]:
        """Return the verdicts to show first, slowest on top, and the rest."""
        loud = [v for v in self.verdicts if v.verdict in LOUD]
        return sorted(loud, key=lambda v: v.speedup.value), [v for v in self.verdicts if v.verdict not in LOUD]

    def to_markdown(self) -> str:
        """Write the headline, what does not wobble, a table of what changed, and the rest folded away."""
        loud, quiet = self.split()
        lines = [f"**{self.headline}**", ""]
        lines += [f"- BROKEN `{case}`: {what}" for case, what in self.broken.items()]
        lines += [f"- fixed: {change}" for change in ordered(self.fixed)]
        lines += [f"- inner loops changed: {what}" for what in self.inner_loops]
        lines += ["", *_table(loud), ""]
        if quiet:
            fold = f"<details><summary>{len(quiet)} cases unchanged or unsure</summary>"
            lines += [fold, "", *_table(quiet), "", "</details>", ""]
        for title, cases in (("new", self.new), ("removed", self.removed)):
            lines += [f"- {title}: `{case}`{self.why(case)}" for case in cases]
        lines += [f"- left out: `{case}`: {why}" for case, why in self.skipped.items()]
        lines += ["", *self.notes, LEGEND]
        return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))

    def why(self, case: str) -> str:
        return f": {self.reasons[case]}" if case in self.reasons else ""

    def to_html(self) -> str:
        """Return the page, which needs no other file."""
        loud, quiet = self.split()
        view = {"report": self, "groups": [loud, quiet], "legend": LEGEND, "place": _axis(self.verdicts)}
        return render("compare.html.j2", **view, fixed=ordered(self.fixed), effect=stats.EFFECT)


def _table(verdicts: Sequence[stats.Verdict]) -> list[str]:
    if not verdicts:
        return []
    head = ["| verdict | case | speedup | p | n |", "|---|---|---|---|---|"]
    return head + [f"| {v.verdict} | `{v.case}` | {v.speedup} | {v.p:.2g} | {v.speedup.n} |" for v in verdicts]


def _axis(verdicts: Sequence[stats.Verdict]) -> Callable[[float], float]:
    """Return a function from a speedup to percent of one axis, on which 1 is the middle and all intervals fit."""
    reach = max([1 + 2 * stats.EFFECT, *(max(v.speedup.high, 1 / v.speedup.low) for v in verdicts)])

    return lambda value: 50 + 49 * math.log(value) / math.log(reach)
