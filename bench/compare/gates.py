"""What does not wobble: errors, FLOPs, bytes, launches, saved bytes, instructions. Worse here is worse, at n = 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.machine_code import inner_loops

ERROR_SLACK = 1.2  # between two commits that changed kernels, 148 tensors' errors moved by -2 to +12 %
COUNT_SLACK = 1.005  # instructions: the allocator's share differs from run to run
COUNTS = ("flops", "bytes", "launches", "host_syncs", "aten_calls", "saved_bytes", "peak_mib")
LOOP_COSTS = ("loads", "stores", "spills", "instructions")


@dataclass(frozen=True)
class Change:
    """A fixed figure that is not what it was; `worse`: larger, beyond its slack."""

    case: str
    figure: str
    base: float
    head: float
    worse: bool

    def __str__(self) -> str:
        return f"`{self.case}`: {self.figure} {self.base:.10g} -> {self.head:.10g}{' (worse)' * self.worse}"


def figures_of(row: Mapping) -> dict[str, float]:
    """Return a timed row's fixed figures by name; errors as multiples of plain torch's, FLOPs and bytes from rates."""
    figures = row["figures"]
    found = {name: row.get(name, figures.get(name)) for name in COUNTS}
    for name, rate in (("flops", "gflops"), ("bytes", "gbps")):
        if found[name] is None and figures.get(rate):
            found[name] = round(figures[rate] * figures["time_us_median"] * 1e3)
    for tensor, error in row.get("errors", {}).items():
        if error["torch"] and error["ours"] is not None:
            found[f"error of {tensor}, times torch's"] = error["ours"] / error["torch"]
    return {name: value for name, value in found.items() if value is not None}


def changes(case: str, base: Mapping, head: Mapping) -> Iterator[Change]:
    """Yield what differs between two rows of a case. Errors that moved within the slack are rounding in a new order."""
    was, now = figures_of(base), figures_of(head)
    for name in was.keys() & now.keys():
        slack = ERROR_SLACK if name.startswith("error") else 1.0
        if now[name] > slack * was[name] or was[name] > slack * now[name]:
            yield Change(case, name, was[name], now[name], now[name] > was[name])


def count_changes(base: Mapping, head: Mapping) -> Iterator[Change]:
    """Yield what differs between two rows of kind "instructions"."""
    for name, was in base["counts"].items():
        now = head["counts"].get(name)
        if now is not None and not 1 / COUNT_SLACK <= now / was <= COUNT_SLACK:
            yield Change(name, "instructions", was, now, now > was)


def loop_changes(base: Mapping, head: Mapping) -> Iterator[Change]:
    """Yield per tile what one step of the inner loops costs more or less; of equal tiles the worst counts."""
    was, now = (_worst(row["loops"]) for row in (base, head))
    for tile in was.keys() & now.keys():
        for name in LOOP_COSTS:
            if was[tile][name] != now[tile][name]:
                larger = now[tile][name] > was[tile][name]
                yield Change(f"inner loop {tile}", name, was[tile][name], now[tile][name], larger)


def _worst(loops: Sequence[Mapping]) -> dict[str, dict[str, int]]:
    worst: dict[str, dict[str, int]] = {}
    for loop in loops:
        costs = worst.setdefault(inner_loops.tile(loop), dict.fromkeys(LOOP_COSTS, 0))
        for name in LOOP_COSTS:
            costs[name] = max(costs[name], loop[name])
    return worst


def ordered(found: Iterable[Change]) -> list[Change]:
    """Sort: what got worse first, then by case and figure."""
    return sorted(found, key=lambda change: (not change.worse, change.case, change.figure))
