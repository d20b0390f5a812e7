"""`pytest --benchmark` in every way it is typed, with and without pytest-benchmark, in a small project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ("-p", "no:benchmark")  # as if pytest-benchmark were not installed


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "conftest.py", root)
    (root / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests", "bench"]\naddopts = "--strict-markers"\n'
    )
    for folder, name, body in (
        ("tests", "test_plain.py", "def test_plain():\n    pass\n"),
        (
            "bench",
            "test_bench_sum.py",
            "import pytest\n\n@pytest.mark.benchmark(max_time=0.01, min_rounds=3)\n"
            "@pytest.mark.parametrize('n', [10, 20], ids=['n10', 'n20'])\ndef test_sum(benchmark, n):\n"
            "    assert benchmark(sum, range(n)) is not None\n"
            "    benchmark.extra_info.update(gflops=1.5, gbps=2.5, peak_pct=None, error_ratio=0.9)\n",
        ),
    ):
        (root / folder).mkdir()
        (root / folder / name).write_text(body)
    return root


def run(project: Path, *arguments: str, inside: str = ".") -> tuple[dict[str, int], str, int]:
    """Run pytest; return the counts of its last line ("passed", "skipped" ...), all output, the exit code."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=project / inside, env=environment, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    return (
        {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", output.strip().splitlines()[-1])},
        output,
        done.returncode,
    )


@pytest.mark.parametrize(
    ("arguments", "inside", "passed", "skipped", "timed"),
    [
        ((), ".", 3, 0, 0),
        (("--benchmark",), ".", 2, 1, 2),
        (("tests", "--benchmark"), ".", 0, 1, 0),
        (("bench", "--benchmark"), ".", 2, 0, 2),
        (("--benchmark", "bench"), ".", 2, 0, 2),
        ((), "bench", 2, 0, 0),
        (("--benchmark",), "bench", 2, 0, 2),
        (("--benchmark-only",), ".", 2, 1, 2),
        (("--benchmark", "--benchmark-only"), ".", 2, 1, 2),
        (("--benchmark-enable",), ".", 3, 0, 2),
        (("--benchmark", "-k", "n10"), ".", 1, 0, 1),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, tuple) else str(value),
)
def test_with_pytest_benchmark(project, arguments, inside, passed, skipped, timed):
    pytest.importorskip("pytest_benchmark")
    counts, output, code = run(project, *arguments, inside=inside)
    assert code == 0, output
    assert (counts.get("passed", 0), counts.get("skipped", 0)) == (passed, skipped), output
    assert len(re.findall(r"^\s+[\d.]+ +1\.50 +2\.50 +- +0\.90  n\d0$", output, re.MULTILINE)) == timed, output


@pytest.mark.parametrize(
    ("arguments", "inside", "passed", "skipped"),
    [
        ((), ".", 3, 0),
        (("--benchmark",), ".", 2, 1),
        (("tests", "--benchmark"), ".", 0, 1),
        (("bench", "--benchmark"), ".", 2, 0),
        (("--benchmark",), "bench", 2, 0),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, tuple) else str(value),
)
def test_without_pytest_benchmark(project, arguments, inside, passed, skipped):
    counts, output, code = run(project, *WITHOUT, *arguments, inside=inside)
    assert code == 0, output
    assert (counts.get("passed", 0), counts.get("skipped", 0)) == (passed, skipped), output
    assert ("not installed" in output) == ("--benchmark" in arguments)


def test_the_option_is_in_the_help(project):
    assert re.search(r"--benchmark +Time the benchmarks", run(project, "--help")[1])


def test_json_holds_a_capped_number_of_samples(project, tmp_path):
    pytest.importorskip("pytest_benchmark")
    target = tmp_path / "out.json"
    _, output, code = run(project, "--benchmark", f"--benchmark-json={target}", "-k", "n10")
    assert code == 0, output
    (entry,) = json.loads(target.read_text())["benchmarks"]
    assert entry["stats"]["rounds"] > 200 and len(entry["stats"]["data"]) == 200
