"""Everything for the half hour with a GPU in one command: build, test, bench, end to end, profile.

Every stage ends inside its budget, writes rows as it goes, and skips what the folder has already: the machine may be
gone between two of them. On a CPU the same path is rehearsed at tiny size.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import moe_kernels
from bench.gpu import counters, plan, profiles, roof, steps, tables
from bench.gpu.contenders import contenders_of
from bench.gpu.watch import Watch
from bench.instrument import arguments, ledger, measure, store
from bench.instrument.cases import DEVICES, Case, kernels_on
from bench.instrument.progress import say
from bench.instrument.race import InProcess, Run, race

STAGES = ("build", "test", "bench", "e2e", "profile")
LEAST_S = 5.0  # what a case is expected to take before one has run
PATIENCE_S = 90.0  # without a sign of life a process hangs: Triton compiles a layer in half a minute,
LONG_PATIENCE_S = 240.0  # torch.compile takes one or two, and large models are built between two signs
NCU_S = 150.0  # of a profile under ncu
TESTED = ("cuda", "triton")  # in this order: the first compiles nothing
TEST_S, MOST_WORKERS = 90, 12  # of the machine's 16 cores: tests compile, and compute on the CPU, too
PYTEST = (sys.executable, "-m", "pytest", "-v", "--tb=short")
TESTS = "tests/product"
FAILED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (tests/.*)$", re.MULTILINE)
NOTHING_SELECTED = 5  # pytest's exit code
COMPILED = (".cpp", ".cu", ".h", ".txt")  # what the extension is made of
SOURCES = (".py", ".json", *COMPILED)  # not .so: built on the machine
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
MODULES = ("moe_kernels/_C", "moe_kernels/_cuda")  # how the files of the extensions begin
CMAKE_SAYS = "MOE_KERNELS_CUDA=ON: "  # and then why it cannot build for CUDA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and logs; what it has is not run again")
    parser.add_argument("--stage", choices=STAGES, help="one stage (default: all)")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu: the rehearsal")
    parser.add_argument("--size", choices=list(plan.SIZES), default="default")
    parser.add_argument("--wheel", type=Path, help="of this project, built elsewhere; by default it is built here")
    parser.add_argument("--cutlass", type=Path, help="wheel of nvidia-cutlass: its headers, where it is not installed")
    parser.add_argument("--minutes", type=arguments.positive, default=8.5, help="budget of each stage")


class Budget:
    """The time of a stage. A piece of work is begun if one like the longest so far still fits."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end, self.longest = clock, clock() + seconds, LEAST_S

    @property
    def left(self) -> float:
        return self.end - self.clock()

    def spend(self, work: Callable[[], object]) -> bool:
        """Do a piece of work and return True, or return False because it may not fit any more."""
        if self.left < self.longest:
            return False
        start = self.clock()
        work()
        self.longest = max(self.longest, self.clock() - start)
        return True


class Job:
    """One run of the command: its folder, its rows, the budget of the stage it is in."""

    def __init__(self, args: argparse.Namespace):
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: got cuda, expected cpu: this machine has no CUDA device")
        for option, what in (("wheel", "this project"), ("cutlass", "nvidia-cutlass")):
            path = getattr(args, option)
            if path and not path.is_file():
                raise ValueError(f"--{option}: got {path}, expected a wheel of {what}")
        self.args, self.size, self.out = args, plan.SIZES[args.size], args.out
        path = self.out / f"rows_{args.device}_{args.size}.jsonl"
        self.ledger = ledger.Ledger(path, {"size": args.size})
        self.source = ledger.source_digest(SOURCES)
        self.budget = Budget(60 * args.minutes)
        self.watch = Watch(self.out)
        self._note_hang()

    def run(self, stage: str) -> None:
        say(f"== {stage}")
        self.budget = Budget(60 * self.args.minutes)
        getattr(self, f"_{stage}")()

    def _done(self, name: str) -> bool:
        """Tell whether a piece of work is in the folder; one that failed, or found one of ours wrong, is not done."""
        rows = self.ledger.complete(name)
        return bool(rows) and not any(map(bad, rows))

    def _once(self, name: str, produce: Callable[[], Iterable[dict]]) -> list[dict]:
        """Return the rows of a piece of work, made now or before."""
        if not self._done(name):
            self.ledger.rows = [row for row in self.ledger.rows if row["stage"] != name]
        return self.ledger.stage(name, lambda: [{**row, "source": self.source} for row in produce()])

    def _each(self, stage: str, cases: Sequence[Case], produce: Callable[[Case], Iterator[dict]]) -> None:
        """Work through cases in the order of their importance until the budget is spent; say what was dropped."""
        self.budget.longest = LEAST_S
        names = {f"{stage} {case.id}": case for case in cases}
        missing = [name for name in names if not self._done(name)]
        for at, name in enumerate(missing):
            if not self.budget.spend(lambda name=name: self._case(name, produce, names[name])):
                say(f"out of time, dropped {len(missing) - at} of {len(cases)} cases: {', '.join(missing[at:])}")
                return

    def _case(self, name: str, produce: Callable[[Case], Iterator[dict]], case: Case) -> None:
        """Run a case. One that raises is noted, and the others go on, unless the GPU itself is lost."""

        def rows_of() -> list[dict]:
            try:
                with self.watch.over():
                    rows = list(produce(case))
                rows = rows or [store.row("failure", summary=f"{case.id}: nothing came", failed=True)]
            except Exception as error:
                what = f"{case.id}: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
                rows = [store.row("failure", summary=what, failed=True)]
            self._look_after_gpu(case, rows)
            return rows

        rows = self._once(name, rows_of)
        say({"time": tables.line, "profile": profiles.table}.get(rows[0]["kind"], tables.table)(rows))

    def _look_after_gpu(self, case: Case, rows: Sequence[dict]) -> None:
        """Free memory; raise OSError where somebody's fault took the CUDA context down, and note who it was."""
        if self.args.device == "cpu":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            first = next((row for row in rows if row.get("raised") == 0), {})  # once it is down everybody raises
            who, why = first.get("contender", ""), first.get("wrong") or str(error).splitlines()[0]
            summary = f"{who or 'somebody'} took the GPU's context down in {case.id}: {why}"
            self._note_lost(who, summary)
            raise OSError(f"{summary}; the same command goes on without it, or with it once it is mended") from error

    def _note_lost(self, contender: str, summary: str) -> None:
        self._once(f"lost {time.time():.0f}", lambda: [store.row("lost", contender=contender, summary=summary)])

    def _note_hang(self) -> None:
        """Count as lost whom the last run began with these sources and never came back from."""
        begun = self.watch.left_behind()
        if begun and begun["source"] == self.source:
            contender = begun["contender"]
            self._note_lost(contender, f"{contender} did not come back in {begun['case']}: {self.watch.stacks.name}")

    def _begin(self, case: Case, patience_s: float = PATIENCE_S) -> Callable[[str], None]:
        """Return what is told who runs next in a case."""
        return lambda name: self.watch.begin(patience_s, case=case.id, contender=name, source=self.source)

    def _lost(self) -> set[str]:
        """Return who took the GPU down, or never came back, with the very sources that are here now."""
        rows = self.ledger.rows
        return {row["contender"] for row in rows if row["kind"] == "lost" and row["source"] == self.source}

    def _build(self) -> None:
        """Install the extension, from a wheel or by building one, and put it beside this checkout's Python too."""
        if self.args.device == "cpu":
            say("cpu: skipped, the rehearsal runs on what is installed")
            return
        name = f"build {ledger.source_digest(COMPILED)}"
        if not self._installed():  # the folder may come from another machine
            self.ledger.rows = [row for row in self.ledger.rows if row["stage"] != name]
        self._once(name, self._install)

    def _installed(self) -> bool:
        return any((store.ROOT / "moe_kernels").glob("_cuda*.so"))

    def _install(self) -> Iterator[dict]:
        wheel, start = self.args.wheel, time.monotonic()
        (self.out / "build.log").unlink(missing_ok=True)
        code = 0 if wheel else self._build_wheel()
        wheel = wheel or next(iter(sorted(self.out.glob(f"{store.DISTRIBUTION.replace('-', '_')}-*.whl"))), None)
        if not code and wheel:
            code = self._logged("build.log", [*PIP, "install", "--no-deps", "--force-reinstall", str(wheel)])
        if not code and wheel:
            with zipfile.ZipFile(wheel) as archive:
                modules = [name for name in archive.namelist() if name.startswith(MODULES)]
                archive.extractall(store.ROOT, modules)
            importlib.invalidate_caches()
        failed = bool(code) or wheel is None
        summary = f"failed, see build.log{self._why()}" if failed else f"{wheel.name} installed"
        say(f"build: {summary}")
        yield store.row("build", summary=summary, failed=failed, seconds=round(time.monotonic() - start, 1))
        self._present(kernels_on("cuda"))

    def _build_wheel(self) -> int:
        """Build this checkout with CUDA, offline: nvcc and the headers of CUTLASS must be there."""
        code = 0
        if self.args.cutlass:
            code = self._logged("build.log", [*PIP, "install", "--no-deps", str(self.args.cutlass)])
        options = ["--no-build-isolation", "--no-deps", "-C", "cmake.define.MOE_KERNELS_CUDA=ON", "-w", str(self.out)]
        return code or self._logged("build.log", [*PIP, "wheel", "-v", *options, str(store.ROOT)])

    def _why(self) -> str:
        """Return what CMake wrote about CUDA, as the end of a sentence."""
        log = self.out / "build.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return next((f": {line.partition(CMAKE_SAYS)[2]}" for line in reversed(lines) if CMAKE_SAYS in line), "")

    def _present(self, names: Sequence[str]) -> list[str]:
        """Return which of these backends can run here; say why the others cannot."""
        missing = {info.name: info.reason for info in moe_kernels.backends() if not info.available}
        for name in names:
            if name in missing:
                say(f"without {name}: {missing[name]}")
        return [name for name in names if name not in missing]

    def _test(self) -> None:
        """Run the tests of our backends: on the GPU, or Triton's interpreted.

        A run for each backend, on many cores: most of the time kernels are compiled. Then those of the layer once more,
        with kernels that start early. Those that ask for the free memory of the GPU come last, by themselves.
        """
        backends = ["triton"] if self.args.device == "cpu" else self._present(TESTED)
        early = ["cuda early"] if "cuda" in backends else []
        names = [*backends, *early, *(f"{backend} apart" for backend in backends)]
        missing = [name for name in names if not self._done(f"test {name}")]
        for at, name in enumerate(missing):
            if self.budget.left < LEAST_S:
                say(f"out of time, dropped tests of {', '.join(missing[at:])}")
                return
            seconds = max(LEAST_S, self.budget.left - sum(map(_reserve_s, missing[at + 1 :])))
            self._once(f"test {name}", lambda name=name, seconds=seconds: self._pytest(name, seconds))

    def _pytest(self, name: str, seconds: float) -> Iterator[dict]:
        start, log, (backend, *rest) = time.monotonic(), self.out / "test.log", name.split()
        apart, early = rest == ["apart"], rest == ["early"]
        before = log.stat().st_size if log.exists() else 0
        files = [f"{TESTS}/test_{file}.py" for file in (plan.EARLY_TESTS if early else self.size.tests)]
        environment = plan.TEST_ENVIRONMENT[self.args.device] | ({"MOE_KERNELS_PDL": "1"} if early else {})
        command = [*PYTEST, *_plugins(not apart), "-m", f"{'' if apart else 'not '}apart", "-k", backend, *files]
        code = self._logged(log.name, command, environment, seconds)
        output = log.read_bytes()[before:].decode(errors="replace").strip()
        failures = failed_tests(output)
        summary = f"{name}: {output.splitlines()[-1]}"
        say("\n".join([f"test {summary}", *failures]))
        failed = code not in (0, NOTHING_SELECTED)
        took = round(time.monotonic() - start, 1)
        yield store.row("test", summary=summary, failed=failed, failures=failures, seconds=took)

    def _logged(
        self,
        log: str,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        seconds: float = math.inf,
    ) -> int:
        """Run a command inside the budget, its output at the end of a log; return the exit code, 124 for no time."""
        with (self.out / log).open("ab") as file:
            process = subprocess.Popen(
                command, cwd=store.ROOT, env={**os.environ, **(environment or {})}, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(max(1.0, min(seconds, self.budget.left)))
            except subprocess.TimeoutExpired:
                file.write(b"\nstopped: out of time\n")
                return 124
            finally:
                with suppress(ProcessLookupError):  # workers outlive a pytest that is ended, and would stay on the GPU
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _bench(self) -> None:
        size, device = self.size, self.args.device
        ceilings = roof.ceilings(device, size.side, size.seconds)
        say(tables.roof_line(ceilings))
        self._once(f"ceilings {time.time():.0f}", lambda: [store.row("ceilings", device=device, **ceilings)])

        def produce(case: Case, compiled: bool = False) -> Iterator[dict]:
            contenders = [c for c in contenders_of(case, compiled) if c.name not in self._lost()]
            begin = self._begin(case, LONG_PATIENCE_S if compiled else PATIENCE_S)

            def more(name: str, run: Run, samples: Mapping[str, measure.Samples]) -> dict:
                begin(name)
                return roof.shares(case, samples[name], ceilings) | counters.count(run, device)

            for row in race(case, contenders, size.rounds, size.seconds, InProcess(begin), more):
                yield {**row, "race": row["race"] + "-compiled" * compiled}

        first, rest = plan.layers_and_rooms(size, device)
        self._each("bench", first, produce)
        self._each("compiled", plan.compiled(size, device), partial(produce, compiled=True))
        self._each("bench", rest, produce)

    def _e2e(self) -> None:
        size = self.size

        def produce(case: Case) -> Iterator[dict]:
            return steps.race_steps(case, size.rounds, size.seconds, self._lost(), self._begin(case, LONG_PATIENCE_S))

        self._each("e2e", plan.whole_models(size, self.args.device), produce)

    def _profile(self) -> None:
        backends = [name for name in self._present(kernels_on(self.args.device)) if name not in self._lost()]
        models = plan.profiled(self.size, self.args.device)
        cases = [replace(case, backend=name) for case in models for name in backends]

        def produce(case: Case) -> Iterator[dict]:
            self._begin(case)(case.backend)
            return profiles.profile(case)

        self._each("profile", cases, produce)
        for case in cases:
            rows = self.ledger.complete(f"profile {case.id}")
            kernels = [row["kernel"] for row in rows]
            seconds = min(NCU_S, max(1.0, self.budget.left))
            why = profiles.sections(case, kernels, self.out / "ncu.log", seconds)
            say(f"ncu: {why or 'sections in ncu.log'}")


def _reserve_s(name: str) -> float:
    """Return what earlier runs must leave of the time to a run of the stage "test"."""
    return {"apart": 25.0, "early": 60.0}.get(name.split()[-1], 210.0)


def _plugins(many: bool) -> list[str]:
    """Return options for what is installed: tests that hang are ended, and on many cores run beside each other."""
    timeout = [f"--timeout={TEST_S}", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return timeout + (["-n", str(workers)] if many and workers > 1 and importlib.util.find_spec("xdist") else [])


def failed_tests(output: str) -> list[str]:
    """Return the ids that pytest names in its output, which may have been cut off before the summary."""
    return list(dict.fromkeys(line.partition(" - ")[0].strip() for line in FAILED.findall(output)))


def main(args: argparse.Namespace) -> int:
    """Run the stages and print the table; returns 1 when one failed or a result of ours was wrong."""
    job = Job(args)
    for stage in [args.stage] if args.stage else STAGES:
        job.run(stage)
    say(f"\n{tables.table(job.ledger.rows)}\nrows: {job.ledger.path}")
    return int(any(map(bad, job.ledger.rows)))


def bad(row: dict) -> bool:
    """Tell whether a row says that something of ours failed or was wrong."""
    return bool(row.get("failed") or (row.get("ours") and row.get("wrong")))
