"""What is shipped: the content of sdist and wheel, that the wheel works, and what an import says where it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = {".ci", "csrc", "moe_kernels", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "constraints.txt"}
SUFFIXES = {".cpp", ".cu", ".h", ".json", ".md", ".py", ".toml", ".txt", ".typed"}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run an interpreter that takes packages from PYTHONPATH first, and no editable install before them."""
    command = [sys.executable, "-S", *arguments]  # without site nothing puts a finder in front
    path = [environment.pop("PYTHONPATH", ""), *sys.path]
    environment = {**os.environ, **environment, "PYTHONPATH": ":".join(filter(None, path))}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60, cwd=ROOT)
    (file,) = folder.iterdir()
    return file


def test_the_sdist_holds_what_builds_a_wheel_and_nothing_else(sdist):
    """No rows, report, environment, cache or build product, whatever lies about here."""
    assert sdist.name == f"dit_moe_kernels-{PROJECT['version']}.tar.gz" and sdist.stat().st_size < 500_000
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.split("/")[0] for name in names} == {*SHIPPED, "pyproject.toml"}
    assert {Path(name).suffix for name in names - {"LICENSE", "PKG-INFO"}} == SUFFIXES
    assert {name for name in names if name.startswith(".ci")} == {".ci/check_wheel.py"}
    for folder, pattern in (("moe_kernels", "*.py"), ("moe_kernels", "*.json"), ("csrc", "*.*")):
        assert {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob(pattern)} <= names


def test_the_wheel_of_the_sdist_works_and_holds_nothing_else(sdist, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist]
    subprocess.run([*command, f"-Cbuild-dir={tmp_path / 'build'}"], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("dit_moe_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moe_kernels"}
    assert any(re.fullmatch(r"moe_kernels/_C\..*\.so", name) for name in names)
    assert {"moe_kernels/verified.json", "moe_kernels/py.typed", "moe_kernels/backends/native.py"} <= set(names)
    done = python(str(ROOT / ".ci/check_wheel.py"), PYTHONPATH=str(tmp_path / "installed"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" in {tmp_path}/installed/moe_kernels, " in done.stdout


def test_without_torch_the_import_says_what_to_install():
    done = python("-c", "import sys; sys.modules['torch'] = None; import moe_kernels", PYTHONPATH=str(ROOT))
    (needed,) = (name for name in PROJECT["dependencies"] if name.startswith("torch"))
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: moe_kernels needs {needed}, and {sys.executable} has no torch: pip install")
    assert f"pip install '{needed}' --index-url https://download.pytorch.org/whl/cpu" in said


def test_a_torch_that_lacks_something_speaks_for_itself(tmp_path):
    (tmp_path / "torch.py").write_text("import missing_of_torch")
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import moe_kernels", PYTHONPATH=str(tmp_path))
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'missing_of_torch'"


def installed(folder: Path, name: str, version: str, *files: str) -> None:
    """Put a distribution's description into a folder, as pip does."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.mark.parametrize("package, clash", [("moe_kernels", True), ("moe_kernels_of_theirs", False)])
def test_two_distributions_of_the_package_are_a_warning(package, clash, tmp_path):
    installed(tmp_path, "moe-kernels", "0.8.2", f"{package}/__init__.py", f"{package}/fused_moe.py")
    installed(tmp_path, PROJECT["name"], "0.1.0", "moe_kernels/__init__.py")
    done = python("-c", "import moe_kernels", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert not done.stderr or clash
    if clash:
        assert "RuntimeWarning: two distributions provide the package moe_kernels: dit-moe-kernels 0.1.0" in done.stderr
        assert "moe-kernels 0.8.2: another project's" in done.stderr
        assert "pip uninstall moe-kernels dit-moe-kernels" in done.stderr


def test_without_a_compiler_the_build_says_what_to_do(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    if not (cmake and ninja):
        pytest.skip("needs cmake and ninja")
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
        env={"PATH": str(tmp_path), "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode and "needs a C++17 compiler; none was found: CXX='/no/such/compiler'" in said
    assert "apt install g++" in said and "No CMAKE_CXX_COMPILER could be found" not in said
