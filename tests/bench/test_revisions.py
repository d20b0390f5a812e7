"""Two revisions through the whole chain: worktrees, builds, workers, the race, its report; what cannot be raced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.__main__ import main
from bench.compare import command, duel, instructions, revisions, trial
from bench.compare.seat import Calls, RevisionSeat
from bench.instrument import cases, store

ROOT = store.ROOT
# The package without its extension: nothing to compile.
CMAKE = "cmake_minimum_required(VERSION 3.25)\nproject(moe_kernels LANGUAGES NONE)\n"
BASE = "del experts\n"
HEAD = """
_combine, _gating = combine, gating

def combine(*args):
    for _ in range(3):
        out = _combine(*args)
    return out

def gating(*args):
    weights, *rest = _gating(*args)
    return 1.01 * weights, *rest
"""
QUICK = trial.Budget(rounds=15, visits=1, looks=(2, 4, 8, 16))  # on a quiet machine the first look decides


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Two revisions: base lacks the experts' op; head has it, combines three times over, and gates wrongly."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "CMakeLists.txt").write_text(CMAKE)
    shutil.copytree(ROOT / "moe_kernels", root / "moe_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    public = (ROOT / "moe_kernels" / "__init__.py").read_text()
    git(root, "init", "-q", "-b", "main")
    for tag, planted in (("base", BASE), ("head", HEAD)):
        (root / "moe_kernels" / "__init__.py").write_text(public + planted)
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    return root


@pytest.fixture(scope="module")
def checkouts(repository) -> tuple[revisions.Checkout, revisions.Checkout]:
    return revisions.checkout("base", repository), revisions.checkout("head", repository)


@pytest.fixture(scope="module")
def report(checkouts):
    chosen = cases.select(cases.all_cases("tiny"), "fp32 and fwd and not bwd", level="op", backend="eager")
    chosen = [case for case in chosen if case.level != "dispatch"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "PAIRS", 1)
        found = duel.duel(*checkouts, chosen, QUICK)
    return found, command.judged(found, "a title")


def room(report, name: str) -> list[str]:
    return [case for case in report if case.startswith(name)]


def test_a_planted_slowdown_is_slower_a_wrong_result_has_no_speed_and_a_missing_op_is_new(report):
    found, report = report
    assert [(v.case.split("-")[0], v.verdict) for v in report.verdicts] == [("combine", "SLOWER")]
    assert 0.2 < report.verdicts[0].speedup.value < 0.8 and report.verdicts[0].speedup.n % 30 == 0
    (gating,) = report.broken
    assert gating.startswith("gating-eager") and "topk_weights: error" in report.broken[gating]
    (experts,) = report.new
    assert report.reasons[experts].startswith("base lacks it: AttributeError") and not report.removed
    assert not any(row["samples_us"] for rows in found.rows.values() for row in rows if "gating" in row["case"])
    assert [change.figure for change in report.worse] == ["aten_calls"], "three times as many of them"
    assert all(report.fails(condition) for condition in ("worse", "slower", "different", "any"))
    assert "1 BROKEN, 1 SLOWER of 2 cases (1 fixed figure WORSE, 1 new)" in report.to_markdown()
    assert "a title" in report.to_html()


def test_rows_of_a_duel_name_their_revisions_and_can_be_compared_again(report, checkouts, tmp_path):
    found, _ = report
    for side, checkout in zip(duel.SIDES, checkouts, strict=True):
        for row in found.rows[side]:
            assert (row["commit"], row["dirty"]) == (checkout.commit, False)
            store.append(tmp_path / f"{side}.jsonl", row)
    assert main(["compare", str(tmp_path / "base.jsonl"), str(tmp_path / "head.jsonl"), "--fail-on", "slower"]) == 1


def test_a_revision_is_built_once_and_again_after_an_interrupted_build(repository, checkouts, monkeypatch):
    assert not built(lambda: revisions.checkout("head", repository), monkeypatch)
    (checkouts[1].folder / "built").unlink()
    assert built(lambda: revisions.checkout("head", repository), monkeypatch) == ["git", sys.executable]
    assert (checkouts[1].site / "moe_kernels" / "layer.py").exists()
    assert git(repository, "status", "--porcelain") == "", "the folder hides itself"


def built(call, monkeypatch) -> list[str]:
    """Return the programs that a call had write to its log."""
    seen, run = [], subprocess.run

    def watched(command, **kwargs):
        seen.extend([command[0]] if "stdout" in kwargs else [])
        return run(command, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(revisions.subprocess, "run", watched)
        call()
    return seen


def test_a_revision_that_does_not_build_says_why(repository):
    git(repository, "checkout", "-q", "-b", "broken")
    (repository / "CMakeLists.txt").write_text(CMAKE + 'message(FATAL_ERROR "no such compiler")\n')
    git(repository, "commit", "-qam", "broken")
    git(repository, "checkout", "-q", "main")
    with pytest.raises(OSError, match=r"broken \(\w{10}\) does not build: .*error.*see .*build.log"):
        revisions.checkout("broken", repository)


def test_unknown_revisions_and_uncommitted_trees_are_named(repository, tmp_path):
    with pytest.raises(ValueError, match=r"v9: got neither a row file nor a git revision, expected two of either$"):
        revisions.resolve("v9", repository)
    with pytest.raises(ValueError, match="--all: got neither"):
        revisions.resolve("--all", repository)
    with pytest.raises(ValueError, match="outside a git checkout"):
        revisions.resolve("HEAD", tmp_path)
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", repository.as_uri(), str(shallow))
    with pytest.raises(ValueError, match="this clone is shallow: git fetch --unshallow"):
        revisions.resolve("HEAD~1", shallow)
    commit = git(shallow, "rev-parse", "HEAD")
    (shallow / "README.md").write_text("changed")
    with pytest.raises(ValueError, match=rf"uncommitted tree \(1 changed files, README.md first\).*{commit[:10]}"):
        revisions.resolve("HEAD", shallow)
    assert revisions.resolve(commit[:10], shallow) == commit, "by its own name it is meant as it is"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-revision", "HEAD"], "no-such-revision: got neither a row file nor a git revision"),
        (["HEAD", "none.jsonl"], "got HEAD and none.jsonl, a row file and a revision, expected two row files or two"),
        (["HEAD~1", "HEAD", "-k", "zork"], "no case selected by -k 'zork'"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, capsys):
    assert main(["compare", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_interrupted_duel_keeps_what_it_has(checkouts, monkeypatch):
    chosen = cases.select(cases.all_cases("tiny"), "combine and fp32", backend="eager")
    monkeypatch.setattr(trial.Judge, "run", lambda judge: interrupt())
    report = command.judged(duel.duel(*checkouts, chosen, QUICK), "")
    assert set(report.skipped) == {case.id for case in chosen} and not report.verdicts
    assert set(report.skipped.values()) == {duel.INTERRUPTED}
    assert report.fails("any") and not report.counts["SLOWER"]


def interrupt():
    raise KeyboardInterrupt


def test_cases_of_base_alone_are_removed(checkouts, monkeypatch):
    base, head = checkouts
    (base.tree / "bench").mkdir(exist_ok=True)
    (base.tree / "bench" / "__init__.py").touch()
    (base.tree / "bench" / "__main__.py").write_text("import sys\nprint('gone', *sys.argv[2:])")
    assert revisions.case_ids(base, "-k", "fp32") == ["gone", "-k", "fp32"]
    (base.tree / "bench" / "__main__.py").write_text("raise SystemExit('no list')")
    assert revisions.case_ids(base) == []
    (base.tree / "bench" / "__main__.py").write_text("import sys\nprint('gone', *sys.argv[2:])")
    monkeypatch.setattr(revisions, "checkout", lambda name: dict(base=base, head=head)[name])
    monkeypatch.setattr(duel, "duel", lambda *args: duel.Outcome())
    monkeypatch.setattr(instructions, "rows", lambda checkout: [])
    args = SimpleNamespace(base="base", head="head", k="combine", size=None, backend="eager", seconds=1.0, rows=None)
    assert command.race(args).removed == ["--backend", "-k", "combine", "eager", "gone"]


def test_the_seat_counts_calls_and_saved_bytes_and_refuses_another_package():
    import torch

    with Calls() as calls:
        torch.ones(3) + torch.ones(3)
    assert calls.count == 3
    case = next(c for c in cases.all_cases("tiny") if (c.level, c.backend, c.mode) == ("layer", "eager", "fwdbwd"))
    seat = RevisionSeat(case.id, str(ROOT))
    fixed = seat.fixed()
    assert fixed == seat.fixed() and fixed["aten_calls"] > 10
    assert fixed["saved_bytes"] >= 4 * case.T * case.shape.H, "at least the input"
    with pytest.raises(RuntimeError, match="another moe_kernels"):
        RevisionSeat(case.id, "/nowhere")
    with pytest.raises(LookupError, match=r"'native' does not support this call .*torch\.float64"):
        RevisionSeat(case.id.replace("eager", "native").replace("fp32", "fp64"), str(ROOT))


def test_instructions_are_the_same_again_or_have_a_reason(tmp_path, monkeypatch):
    built = SimpleNamespace(tree=ROOT, site=tmp_path, commit="c0ffee")
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    (row,) = instructions.rows(built)
    assert row["reason"] is None
    monkeypatch.setattr(instructions, "LEVELS", ("avx2",))
    monkeypatch.setattr(instructions, "DTYPES", ("fp32",))
    again = instructions.count(built)["layer avx2 fp32"]
    assert again == pytest.approx(row["counts"]["layer avx2 fp32"], rel=1e-3)
    assert row["counts"]["layer portable fp32"] > 1.5 * again > 1e5, "SSE does half as much at a time"


@pytest.mark.parametrize(("tool", "reason"), [("valgrind", "valgrind is not"), ("c++", "a C\\+\\+ compiler is not")])
def test_without_its_tools_nothing_is_counted_and_the_reason_is_said(tool, reason, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(RuntimeError, match=reason):
        instructions.count(SimpleNamespace(tree=tmp_path))
    monkeypatch.undo()
    if shutil.which("valgrind") and shutil.which("c++"):
        with pytest.raises(RuntimeError, match=r"left no libmoe_native\.a"):
            instructions.count(SimpleNamespace(tree=tmp_path))


@pytest.mark.skipif(not os.environ.get("MOE_LONG_TESTS"), reason="compiles the kernels twice: MOE_LONG_TESTS=1")
def test_a_kernel_made_slower_is_found_in_a_clone_of_this_repository(tmp_path):
    """The micro-kernel empties its accumulators every 16 steps instead of 512: right results, later."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(ROOT), str(clone))
    for folder in ("bench", "reference"):  # the instrument as it is here
        shutil.copytree(ROOT / folder, clone / folder, dirs_exist_ok=True)
    kernels = clone / "csrc" / "cpu" / "kernels.h"
    kernels.write_text(kernels.read_text().replace("kChunkItems = 512", "kChunkItems = 16"))
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "slower")
    words = "dispatch or (experts and uniform and fp32 and fwd)"
    argv = [sys.executable, "-m", "bench", "compare", "HEAD~1", "HEAD", "-k", words, "--fail-on", "slower"]
    done = subprocess.run(argv, cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "| SLOWER | `experts-native" in done.stdout and "| SLOWER | `dispatch" not in done.stdout
