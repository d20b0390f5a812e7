"""Judge two lists of rows case by case: times by their samples, everything else by its change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bench.compare import gates
from bench.compare.report import Report
from bench.instrument import stats, store
from bench.instrument.cases import BACKENDS
from bench.machine_code import inner_loops

KINDS = ("time", "contest")
MACHINE_KEYS = ("cpu", "isa", "gpu")  # times from machines that differ in these say nothing about the code


def compare(
    base: list[dict], head: list[dict], expression: str = "", judged: Sequence[stats.Verdict] | None = None
) -> Report:
    """Compare the timed cases of two lists of rows; of a case measured twice the last row counts.

    Args:
        base, head: rows as `store.read` returns them; used are those of the kinds "time" and "contest", and the last
            of kinds "inner_loops" and "instructions", whatever the machine and the expression.
        expression: cases to compare, as pytest's -k.
        judged: verdicts of a race between the two, instead of those that the rows' samples would give; other cases have
            none.
    Returns:
        a Report. Rows of another machine (CPU model, ISA level, GPU), without samples or taken on
            cores that others used are left out and named.
    Raises: ValueError when the expression selects nothing, or no case is in both files, on the same machine, with
        samples.
    """
    wanted = store.keyword_filter(expression)
    sides = [{r["case"]: r for r in rows if r["kind"] in KINDS and wanted(r["case"])} for rows in (base, head)]
    if judged is None and not sides[0] and not sides[1]:
        raise ValueError(
            f"-k {expression!r} selects none of the timed rows" if expression else "no rows of kind 'time' or 'contest'"
        )
    report = Report(
        [], new=sorted(sides[1].keys() - sides[0].keys()), removed=sorted(sides[0].keys() - sides[1].keys())
    )
    pairs, settled = {}, {v.case for v in judged or ()}
    for case in sorted(sides[0].keys() & sides[1].keys()):
        a, b = sides[0][case], sides[1][case]
        if b.get("wrong") and not a.get("wrong") and b.get("ours", True):
            report.broken[case] = b["wrong"]
        elif case in settled:
            pass
        elif why := _incomparable(a, b) or (judged is not None and "there was no round in which both had their cores"):
            report.skipped[case] = why
        else:
            pairs[case] = (a["samples_us"], b["samples_us"])
        if not a.get("wrong") and not b.get("wrong") and not _other_machine(a, b):
            report.fixed += gates.changes(case, a, b)
    if judged is None and not pairs and not report.broken:
        why = next(iter(report.skipped.values()), f"{len(sides[0])} cases in base, {len(sides[1])} others in head")
        raise ValueError(f"no comparable case: {why}")
    report.verdicts = stats.verdicts(pairs, _controls(pairs)) if judged is None else list(judged)
    _compare_code(report, base, head)
    return report


def _compare_code(report: Report, base: Sequence[dict], head: Sequence[dict]) -> None:
    """Compare what the extensions are made of, where both sides counted it; a side that could not says why."""
    for kind in ("inner_loops", "instructions"):
        last = [next((r for r in reversed(rows) if r["kind"] == kind), None) for rows in (base, head)]
        if None in last:
            continue
        reasons = {name: row["reason"] for name, row in zip(("base", "head"), last, strict=True) if row["reason"]}
        if reasons:
            report.skipped[kind.replace("_", " ")] = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        elif kind == "inner_loops":
            report.inner_loops = inner_loops.changes(*last)
            report.fixed += gates.loop_changes(*last)
        else:
            report.fixed += gates.count_changes(*last)


def _controls(cases: Collection[str]) -> dict[str, list[str]]:
    """Return for every case the peers of its race: cases that differ in the backend alone, and that is a peer."""
    races = {case: (case.split("-")[0], *case.split("-")[2:]) for case in cases}
    backends = {case: (case.split("-")[1:2] or ["native"])[0] for case in cases}
    peers = [case for case, name in backends.items() if name not in BACKENDS and not name.startswith("native")]
    return {case: [p for p in peers if races[p] == race and p != case] for case, race in races.items()}


def _incomparable(a: Mapping, b: Mapping) -> str | None:
    if why := _other_machine(a, b):
        return why
    for name, row in (("base", a), ("head", b)):
        if not row.get("samples_us"):
            why = row.get("wrong") or row.get("reason")
            return f"{name} has no samples{': ' + why if why else ''}"
        if row["figures"].get("disturbed"):
            return f"{name} was disturbed: its threads had {row['figures'].get('cpu_share')} of their cores"
    if a["figures"].get("clock") != b["figures"].get("clock"):
        return f"base was taken by the {a['figures'].get('clock')} clock, head by {b['figures'].get('clock')}"
    return None


def _other_machine(a: Mapping, b: Mapping) -> str | None:
    for key in MACHINE_KEYS:
        if a["machine"].get(key) != b["machine"].get(key):
            return f"base was taken on {key} {a['machine'].get(key)}, head on {b['machine'].get(key)}"
    return None
