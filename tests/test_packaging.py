"""What is shipped: the wheel's content, and that README's examples run."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_wheel_holds_moe_kernels_and_nothing_else(tmp_path):
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run([*command, f"-Cbuild-dir={tmp_path / 'build'}"], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moe_kernels"}
    assert any(re.fullmatch(r"moe_kernels/_C\..*\.so", name) for name in names)
    assert {"moe_kernels/verified.json", "moe_kernels/py.typed", "moe_kernels/backends/native.py"} <= set(names)


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 MoE blocks")


COMMANDS = re.findall(r"^\| `([^`]+)` \|", README.split("## Measure and check")[1], re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m bench")])
def test_commands_exist(command):
    words = command.replace("BASE HEAD", "").split()
    if words[3] in ("compare", "run", "record"):
        words = [*words[:4], "--help"]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = {word for line in re.findall(r"make ([a-z][a-z -]*)", documents) for word in line.split()[:1]}
    assert {"bench", "test"} <= named
    for target in named & {"bench", "test", "setup", "lint", "clean", "asan", "tsan", "native-test"}:
        assert re.search(rf"^(.* )?{target}( .*)?:", makefile, re.M), target
