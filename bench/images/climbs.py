"""The parity ladder within a run's budget: how many samples fit, who climbs, and who is left out for time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from bench.images import parity
from bench.instrument import cases, progress, store
from bench.instrument.budget import Budget
from bench.instrument.ledger import Ledger

FEW, LEAST = 100, 20  # samples: of the deliberate faults, and where time is short; fewer say nothing
DRAWING = 0.8  # of the time; the rest goes to plans and layers
Keep = Callable[[str, Tensor, Tensor], None]


def pace(ladder: parity.Ladder, dtype: str, seconds: float, draws: float) -> dict:
    """Return a row of kind "pace": how long a sample takes the oracle, which is the slowest, and how many can be drawn.

    Where not everybody can draw FEW, `samples` are as the oracle and our own kernels can; 0 for less than LEAST.
    Args: seconds: for all that draws. draws: by how many, the deliberate faults not counted.
    """
    sample_s, asked = ladder.pace(parity.DTYPES[dtype]), ladder.case.samples
    drawn, few = DRAWING * seconds / sample_s, min(FEW, asked)
    count = (drawn - few * len(ladder.sabotages)) / draws
    if count < few:
        count = min(few, drawn / 2)
    count = min(asked, int(count)) if count >= min(LEAST, asked) else 0
    return store.row("pace", dtype=dtype, sample_s=sample_s, samples=count, asked=asked)


@dataclass
class Climbs:
    """All that climb the ladder in one dtype, each a stage of the ledger, with `count` samples of the oracle.

    until: on the budget's clock; who would take longer is left out. Our own kernels climb first, and whatever the time.
    keep: told the name of every set of samples, and their labels.
    """

    ladder: parity.Ladder
    dtype: str
    count: int
    budget: Budget
    until: float
    keep: Keep
    drawn: list[tuple[parity.Baseline, float]] = field(default_factory=list)

    def run(self, ledger: Ledger, backends: Sequence[str]) -> None:
        """Let every backend climb, and the sabotaged models, which must fall."""
        ladder, own = self.ladder, cases.kernels_on("cpu")
        for name in sorted(backends, key=lambda name: name not in own):
            self._stage(ledger, "parity", name, lambda model, name=name: ladder.replaced(model, name), name in own)
        for name, sabotage in ladder.sabotages.items():
            self._stage(ledger, "control", name, lambda model, s=sabotage: s(ladder.replaced(model, "eager")), False)

    def _stage(self, ledger: Ledger, kind: str, name: str, build: Callable[[nn.Module], nn.Module], own: bool) -> None:
        ledger.stage(f"{kind}: {name}, {self.dtype}", lambda: [self._climb(kind, name, build, own)])

    def _climb(self, kind: str, name: str, build: Callable[[nn.Module], nn.Module], own: bool) -> dict:
        count = min(self.count, FEW) if kind == "control" else self.count  # the layers show the faults
        if not count:
            return self.budget.left_out(f"{kind} of {name} in {self.dtype}")
        whole, seconds = self._baseline()
        if not own and self.budget.clock() + seconds * count / self.count > self.until:
            return self.budget.left_out(f"{kind} of {name} in {self.dtype}")
        base = whole if count == self.count else whole.first(count)
        record, samples = self.ladder.climb(build(base.model), base)
        progress.say(f"  {name} {self.dtype}: {record['verdict']}")
        if kind == "control":
            return store.row(kind, control=name, dtype=self.dtype, **record)
        self.keep(f"{name} {self.dtype}", samples, self.ladder.labels[:count])
        return store.row(kind, backend=name, dtype=self.dtype, **record)

    def _baseline(self) -> tuple[parity.Baseline, float]:
        """Return the oracle's samples, drawn when somebody first climbs, and the seconds that they took."""
        if not self.drawn:
            start = time.monotonic()
            found = self.ladder.baseline(parity.DTYPES[self.dtype], self.count)
            self.drawn.append((found, time.monotonic() - start))
            self.keep(f"oracle {self.dtype}", found.samples, self.ladder.labels[: self.count])
        return self.drawn[0]
