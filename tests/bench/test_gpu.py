"""The GPU command, rehearsed on a CPU: floors as designed, everybody verified, stages run, our own kernels found."""

from __future__ import annotations

import os
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.gpu import command, contenders, counters, plan, profiles, roof, steps, tables
from bench.gpu.floors import floor_s, kernels
from bench.instrument import measure, store, workloads
from bench.instrument.cases import Case, backends_on, kernels_on, make_inputs
from bench.instrument.contender import Contender
from bench.instrument.race import race
from bench.instrument.shapes import MODEL_SHAPES
from bench.instrument.verify import Check
from moe_kernels.backends import cuda
from reference.dit import DiTMoE

LAYER = Case("layer", "any", MODEL_SHAPES["S/2-8E2A"], "uniform", 8192, "bf16", "fwd", device="cuda")
TINY = Case("layer", "any", MODEL_SHAPES["digits"], "uniform", 32, "fp32", "fwd")
ROOF = {"fp32": 1e11, "bf16": 2e11, "copy": 1e10}


@pytest.mark.parametrize(
    ("name", "forward_us", "backward_us"),
    [("S/2-8E2A", 102, 243), ("B/2-8E2A", 387, 797), ("XL/2-8E2A", 856, 1691), ("G/2-8E2A", 1271, 2515)],
)
def test_floors_are_those_of_the_design(name, forward_us, backward_us):
    for mode, microseconds in (("fwd", forward_us), ("bwd", backward_us)):
        case = replace(LAYER, shape=MODEL_SHAPES[name], mode=mode)
        assert floor_s(case, 790e12, 4.3e12) * 1e6 == pytest.approx(microseconds, rel=0.05)


@pytest.mark.parametrize("level", ["gating", "experts", "layer"])
@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwdbwd"])
def test_kernels_of_a_floor_multiply_what_the_case_counts(level, mode):
    case = replace(LAYER, level=level, mode=mode)
    combine = case.flops if level == "gating" else replace(case, level="experts").flops
    assert sum(flops for flops, _ in kernels(case)) == pytest.approx(max(combine, 0.99 * case.flops), rel=0.02)
    assert kernels(replace(case, level="block")) == []


def test_ids_of_gpu_cases_read_back_and_those_of_the_cpu_are_as_before():
    assert LAYER.id.endswith("-bf16-fwd-cuda") and Case.from_id(LAYER.id) == LAYER
    assert replace(LAYER, device="cpu").id.endswith("-bf16-fwd-t1")


def test_backends_belong_to_their_device():
    assert backends_on("cpu") == ("native", "grouped", "eager") and kernels_on("cpu") == ("native",)
    assert backends_on("cuda") == ("triton", "cuda", "grouped", "eager") and kernels_on("cuda") == ("triton", "cuda")
    assert workloads.why_not(replace(TINY, backend="triton")) == "backend triton runs on cuda"
    assert workloads.why_not(replace(TINY, dtype="tf32")) == "only GPUs have TF32"
    if not torch.cuda.is_available():
        assert workloads.why_not(replace(LAYER, backend="grouped")) == "this machine has no CUDA device"


def test_inputs_for_a_device_are_the_cpu_numbers_in_fresh_tensors(monkeypatch):
    """On a device of its own type: meta tells shapes and dtypes, and what is moved there is drawn on the CPU."""
    case = replace(TINY, level="dispatch", routing="expert_choice")  # affinities as well
    moved = make_inputs(replace(case, device="meta"), dtype=torch.float64)
    kept = make_inputs(case, dtype=torch.float64)
    for name, tensor in vars(kept).items():
        there = getattr(moved, name)
        assert there.device.type == "meta" and (there.shape, there.dtype) == (tensor.shape, tensor.dtype), name


def test_tf32_is_on_for_its_cases_only():
    before = torch.backends.cuda.matmul.allow_tf32
    for dtype in ("tf32", "fp32"):
        with workloads.arithmetic(dtype):
            assert torch.backends.cuda.matmul.allow_tf32 == (dtype == "tf32")
    assert torch.backends.cuda.matmul.allow_tf32 == before


class Clock:
    """A GPU's clock for the timer: work and sleep move it, events read it."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 0.0, []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)
        monkeypatch.setattr(measure, "_flush_buffer", lambda device: (torch.ones(4), torch.ones(())))

    def work(self, milliseconds: float) -> str:
        self.now += milliseconds
        return "done"


class Event:
    def __init__(self, clock: Clock):
        self.clock, self.at = clock, None

    def record(self) -> None:
        self.at = self.clock.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_events_time_the_calls_and_nothing_between_them(monkeypatch):
    clock = Clock(monkeypatch)
    wall, cpu, result = measure.time_calls(lambda: clock.work(3.0), 4, "cuda")
    assert (wall, result) == (pytest.approx(3e-3), "done") and cpu >= 0 and not clock.slept
    assert measure.time_queued(lambda: clock.work(2.0), 3, "cuda")[0] == pytest.approx(2e-3)
    assert clock.slept == [measure.LEAD_CYCLES] * 3
    workloads.timer_of(replace(LAYER, mode="fwdbwd"))(lambda: clock.work(2.0), 1, "cuda")
    assert clock.slept[3:] == [measure.LONG_LEAD_CYCLES] and workloads.timer_of(LAYER) is measure.time_queued


def test_the_cache_is_flushed_by_reading_last(monkeypatch):
    """What is only overwritten is written back at the cost of the call that is timed."""
    buffer, total = torch.ones(4), torch.ones(())
    monkeypatch.setattr(measure, "_flush_buffer", lambda device: (buffer, total))
    measure._flush("cuda")
    assert total == 0 and not buffer.any()


def test_figures_of_a_gpu_say_cold_cache_and_what_launching_took(monkeypatch):
    clock = Clock(monkeypatch)
    samples = measure.interleave({"a": lambda: clock.work(0.06)}, 3, 0.0, device="cuda")
    figures = samples["a"].figures()
    assert (figures["clock"], figures["cache"], samples["a"].calls) == ("cuda", "cold", 2) and "issue_us" in figures


def of_the_roof(case: Case):
    return lambda name, run, samples: roof.shares(case, samples[name], ROOF)


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_a_race_verifies_times_and_says_who_is_missing(mode):
    case = replace(TINY, mode=mode)
    rows = list(race(case, contenders.contenders_of(case, compiled=False), 3, 0.0, more=of_the_roof(case)))
    by_name = {row["contender"]: row for row in rows}
    assert {"native", "grouped", "eager", "authors_tp1", "sorted_loop", "grouped_mm", "liger", "sonic"} == set(by_name)
    assert by_name["liger"]["reason"] == "runs on cuda"
    for name in ("grouped", "eager", "authors_tp1", "sorted_loop", "grouped_mm"):
        figures = by_name[name]["figures"]
        assert by_name[name]["wrong"] is None and figures["x_floor"] > 0 and figures["ceiling_share"] > 0
        assert "grouped" in by_name[name]["speedups"] or name == "grouped"
    assert "layer digits T=32 fp32" in tables.line(rows) and "x floor" in tables.line(rows)


def test_a_wrong_contender_and_one_that_cannot_be_built_get_no_number():
    def doubled(case: Case) -> workloads.Workload:
        work = workloads.build(case, "eager")
        return workloads.Workload(case, lambda: [2 * y for y in work.run()], work.named)

    def broken(case: Case) -> workloads.Workload:
        raise ImportError("no such symbol")

    chosen = [Contender("doubled", build=doubled), Contender("broken", build=broken)]
    chosen.append(Contender("ours", build=broken, package=store.DISTRIBUTION))
    wrong, failed, ours = race(TINY, chosen, 3, 0.0)
    assert "out: error" in wrong["wrong"] and wrong["figures"] == {}
    assert failed["reason"] == "ImportError: no such symbol" and failed["figures"] == {} and not command.bad(failed)
    assert ours["wrong"] == "raised ImportError: no such symbol" and command.bad(ours)
    assert [row["raised"] for row in (wrong, failed, ours)] == [None, 0, 1]


class OutOfResources(Exception):
    """As Triton's, whose name says nothing of an error."""


@pytest.mark.parametrize("fault", [OutOfResources("out of resource: shared memory"), StopIteration(), SystemError("x")])
@pytest.mark.parametrize("when", ["build", "run", "judge"])
def test_what_ours_raises_is_wrong_whenever_and_whatever_it_is(fault, when):
    def build(case: Case) -> workloads.Workload:
        def fall(*_: object) -> None:
            raise fault

        work = workloads.build(case, "eager")
        if when == "build":
            fall()
        return workloads.Workload(case, fall if when == "run" else work.run, fall if when == "judge" else work.named)

    (row,) = race(TINY, [Contender("ours", build=build, package=store.DISTRIBUTION)], 3, 0.0)
    assert row["wrong"].startswith(f"raised {type(fault).__name__}") and row["reason"] is None and row["raised"] == 0


def test_who_raised_first_is_known():
    """As when a kernel takes the GPU down: everybody raises after that, in whatever order they stand in the rows."""
    calls = []

    def build(case: Case) -> workloads.Workload:
        work = workloads.build(case, "eager")

        def run() -> list:
            calls.append(case.backend)
            if calls.count("second") > 4:
                raise RuntimeError("CUDA error")
            return work.run()

        return workloads.Workload(case, run, work.named)

    rows = list(race(TINY, [Contender(name, build=build) for name in ("first", "second")], 9, 0.0))
    assert [row["raised"] for row in rows] == [1, 0] and all(row["errors"] for row in rows)


def test_the_compiled_race_among_few():
    compiled = {c.name for c in contenders.contenders_of(LAYER, compiled=True)}
    assert compiled == {"triton", "cuda", "authors_tp1", "grouped_mm", "authors_compiled", "grouped_mm_compiled"}
    assert not {c.name for c in contenders.contenders_of(LAYER, compiled=False)} & {"authors_compiled", "native"}
    assert {"triton", "cuda", "cuda_early"} <= {c.name for c in contenders.contenders_of(LAYER, compiled=False)}
    other = replace(LAYER, shape=MODEL_SHAPES["XL/2-8E2A"])
    assert "cuda_early" not in {c.name for c in contenders.contenders_of(other, compiled=False)}


@pytest.mark.skipif(cuda.FIBERS not in os.environ, reason=f"needs {cuda.FIBERS}: make test-cuda")
def test_cuda_early_is_cuda_with_early_starts(monkeypatch):
    case = replace(TINY, backend="cuda_early")
    work = contenders.EARLY.build(case)
    assert workloads.check(case, work.named(work.run()), contenders.EARLY.bound).wrong is None
    monkeypatch.setattr(workloads, "build", lambda case, how: replace(work, run=cuda._c.early_starts))
    assert contenders.EARLY.build(case).run() and not cuda._c.early_starts()


def test_sonic_rows_are_told_apart():
    E, I, H = 2, 3, 4
    stacked = torch.arange(E * 2 * I * H).view(E, 2 * I, H)
    in_turn = stacked.view(E, 2, I, H).transpose(1, 2).reshape(E, 2 * I, H)
    assert torch.equal(in_turn[0, 1], stacked[0, I])
    assert torch.equal(contenders._rows_apart({"dgate_up_proj": in_turn})["dgate_up_proj"], stacked)


def test_a_line_holds_the_best_of_ours_against_the_best_peer_and_the_rest_of_ours():
    ratio = {"value": 1.2, "low": 1.1, "high": 1.3}
    names = {"triton": 12.0, "cuda": 10.0, "eager": 90.0, "sonic": 20.0}
    facts = {"level": "layer", "model": "S", "T": 1, "dtype": "bf16", "mode": "fwd", "wrong": None}
    race = [
        {
            **facts,
            "contender": name,
            "ours": name != "sonic",
            "reason": None,
            "figures": {"time_us_median": us},
            "speedups": {other: ratio for other in names if other != name},
        }
        for name, us in names.items()
    ]
    told = "layer S T=1 bf16 fwd: cuda 10 us (); sonic 20 us (); x1.20 [1.10, 1.30]; x1.20 [1.10, 1.30] triton 12 us ()"
    assert tables.line(race) == told
    assert tables.line([race[0], race[3]]).endswith("triton 12 us (); sonic 20 us (); x1.20 [1.10, 1.30]")


def test_counters_of_a_cpu_are_none_and_its_operators_are_seen():
    assert counters.count(lambda: None, "cpu") == {"launches": None, "host_syncs": None, "peak_mib": None}
    assert "aten::mm" in {event.name for event in counters.events(lambda: torch.ones(4, 4) @ torch.ones(4, 4), "cpu")}


def test_everything_important_comes_first():
    first, rest = plan.layers_and_rooms(plan.SIZES["default"], "cuda")
    assert len({case.id for case in first + rest}) == len(first + rest)
    assert {case.dtype for case in first[:16]} == {"bf16"} and {case.level for case in first[:16]} == {"layer"}
    assert {case.dtype for case in rest} == {"fp16", "tf32", "fp32"}
    cases = plan.whole_models(plan.SIZES["default"], "cuda")
    assert [case.level for case in cases[:4]] == ["sampling_step", "train_step"] * 2


def test_the_stage_bench_runs_on_a_cpu_and_resumes(tmp_path, capsys):
    argv = ["gpu", "--device", "cpu", "--size", "tiny", "--stage", "bench", "--out", str(tmp_path)]
    assert main(argv) == 0
    rows = store.read(tmp_path / "rows_cpu_tiny.jsonl")
    assert {r["kind"] for r in rows} == {"ceilings", "time"} and len({r["race"] for r in rows if "race" in r}) == 14
    assert all(r["source"] for r in rows)
    assert main(argv) == 0
    assert len(store.read(tmp_path / "rows_cpu_tiny.jsonl")) == len(rows) + 1  # the ceilings of the second run
    assert "layer digits T=64 bf16 fwdbwd: " in capsys.readouterr().out


def test_e2e_and_profile_run_on_a_cpu(tmp_path, capsys):
    for stage in ("e2e", "profile", "build"):
        argv = ["gpu", "--device", "cpu", "--size", "tiny", "--stage", stage, "--out", str(tmp_path)]
        assert main(argv) == 0
    rows = store.read(tmp_path / "rows_cpu_tiny.jsonl")
    steps = {(r["level"], r["contender"]): r for r in rows if r["kind"] == "time"}
    assert len(steps) == 12 and steps["train_step", "authors_tp1"]["figures"]["images_per_s"] > 0
    assert steps["sampling_step", "grouped_graph"]["reason"] == "no CUDA graph: runs on cuda"
    assert sum(r["share"] for r in rows if r["kind"] == "profile") == pytest.approx(1)
    assert "cpu: skipped" in capsys.readouterr().out


def test_nsight_compute_gets_the_slowest_of_our_kernels(tmp_path, monkeypatch):
    case = replace(TINY, backend="grouped")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profiles.sections(case, ["experts_fwd_up"], tmp_path / "ncu.log", 9.0) == "ncu is not on PATH"
    (tmp_path / "ncu").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "ncu").chmod(0o755)
    product = "void moe::cuda::sm90::product_sm90<moe::cuda::Up<moe::bf16, true> >(moe::cuda::Up<moe::bf16, true>)"
    kernels = ["void at::native::sort<int>(int)", "experts_fwd_up", product, product.replace("Up", "Down")]
    assert profiles.sections(case, kernels, tmp_path / "ncu.log", 9.0) is None
    words = (tmp_path / "ncu.log").read_text().splitlines()
    assert "regex:^(experts_fwd_up|product_sm90)$" in words and words[words.index("--launch-count") + 1] == "6"
    assert words[words.index("--clock-control") + 1] == "none" and "SourceCounters" in words
    assert words[-1] == f"from bench.gpu import profiles; profiles.one_call({case.id!r})"
    profiles.one_call(case.id)


def test_kernels_are_known_by_their_names():
    name = "void moe::cuda::(anonymous namespace)::gating_fwd_tokens<float, 8, 2>(moe::cuda::Router, float const*)"
    assert profiles.base_name(name) == "gating_fwd_tokens" and profiles.base_name("combine_fwd") == "combine_fwd"
    assert profiles.base_name("void cutlass::Kernel<moe::cuda::X>(int)") is None
    lines = profiles.table([{"case": "c", "us": 1.0, "share": 1.0, "calls": 1.0, "kernel": name}])
    assert "1.0 x  gating_fwd_tokens<float, 8, 2>(Router" in lines


def test_waits_for_the_gpu_are_counted_and_keep_a_step_from_being_captured(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def twice() -> None:
        for text in (counters.SYNC, "something else", counters.SYNC):
            warnings.warn(text, stacklevel=1)

    assert counters.host_syncs(twice) == 2 and modes == ["warn", "default"]
    assert steps._graph(LAYER, twice, 2) == "the step waits for the GPU 2 times"


def test_a_backend_that_is_not_here_has_its_reason_in_a_step_too(monkeypatch):
    reason = "backend native is not available: not built"
    missing = lambda case: reason if case.backend == "native" else None  # noqa: E731
    monkeypatch.setattr(workloads, "why_not", missing)
    monkeypatch.setattr(steps, "_verify", lambda case, contender: Check({}, "left out"))
    rows = {r["contender"]: r for r in steps.race_steps(replace(TINY, level="train_step", mode="fwdbwd"), 3, 0.0)}
    assert (rows["native"]["reason"], rows["native"]["wrong"]) == (reason, None) and not command.bad(rows["native"])
    assert rows["grouped"]["wrong"] == "left out" and "native_graph" not in rows


def test_graphs_are_captured_one_after_another_and_freed(monkeypatch):
    """Each holds gradients and activations of a whole model. One that was lost before is not captured again."""
    alive, begun = [], []

    class Graph:
        def __init__(self, step: steps.Step):
            assert all(graph() is None for graph in alive)
            alive.append(weakref.ref(self))
            self.step = step

        def __call__(self) -> torch.Tensor:
            return self.step()

    monkeypatch.setattr(steps, "_graph", lambda case, step, host_syncs: Graph(step))
    case = replace(TINY, level="sampling_step", routing="gate")
    rows = {r["contender"]: r for r in steps.race_steps(case, 3, 0.0, {"native", "grouped_graph"}, begun.append)}
    assert rows["grouped_graph"]["reason"] == f"no CUDA graph: {steps.LOST}" and len(alive) == 1
    assert set(rows[f"{steps.AUTHORS}_graph"]["speedups"]) == {steps.AUTHORS}
    assert {"grouped", "grouped_graph", steps.AUTHORS, f"{steps.AUTHORS}_graph"} == set(begun)


def test_memory_that_runs_out_is_a_reason_and_nothing_wrong(monkeypatch):
    def full(case: Case) -> workloads.Workload:
        def run() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 15 GiB")

        return workloads.Workload(case, run, dict)

    for package in ("torch", store.DISTRIBUTION):
        (row,) = race(TINY, [Contender("full", build=full, package=package)], 3, 0.0)
        assert row["wrong"] is None and "out of memory" in row["reason"]
    why = Check({}, "raised OutOfMemoryError: CUDA out of memory")
    monkeypatch.setattr(steps, "_verify", lambda case, contender: why)
    for row in steps.race_steps(replace(TINY, level="train_step", mode="fwdbwd"), 3, 0.0):
        assert row["wrong"] is None and "out of memory" in row["reason"]


def test_the_largest_training_step_fits_a_gpu_of_80_gb():
    """Parameters, gradients, both moments and a graph's own gradients, with 20 GB left for activations."""
    for shape, _ in plan.SIZES["default"].models["train_step"]:
        shape = MODEL_SHAPES.get(shape, shape)
        experts = shape.E * 3 * shape.H * shape.I + 3 * shape.H * shape.Is
        assert shape.depth * (experts + 10 * shape.H**2) * (16 + 4) < 60e9


def test_twins_own_the_same_parameters():
    case = replace(TINY, level="train_step", routing="gate", mode="fwdbwd")
    model = workloads.build_model(DiTMoE, case, steps.AUTHORS)
    twin = steps._twin(model, "eager")
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert all(a == b and p is q for (a, p), (b, q) in pairs) and type(twin.blocks[0].moe) is not type(
        model.blocks[0].moe
    )
