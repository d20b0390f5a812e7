"""What is shipped: the wheel's content."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
