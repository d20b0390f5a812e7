"""The rules of the house, executable: who imports whom, sizes, names, docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_kernels

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("reference", "moe_kernels", "bench", "tests")
FLOORS = ("reference", "moe_kernels/ops", "csrc/cpu", "csrc/cuda", "moe_kernels/backends/triton", "bench", "tests")
FORBIDDEN = {  # room -> what it must not import
    "reference": {"moe_kernels", "bench", "tests", "conftest"},
    "moe_kernels": {"reference", "bench", "tests", "conftest"},
    "bench": {"tests", "conftest"},
    "tests": set(),
}
REFERENCE_MAY = {"reference", "torch", "safetensors", *sys.stdlib_module_names}
BENCH = (
    ("instrument",),
    ("images", "machine_code", "clusters"),
    ("peers", "training"),
    ("gpu", "page"),
    ("compare",),
    ("",),
)  # "": its hall
HALL = 6  # modules at most
LONG_FILE, LONG_FUNCTION = 420, 40
PUBLIC = sorted(name for name in moe_kernels.__all__ if not name.startswith("_"))
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(moe_kernels, name))]


def python_files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def sources() -> list[Path]:
    native = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    return python_files(*ROOMS) + native


def imports(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parts[:-1]
    return {".".join(parts) for parts in imported(path.read_text(), package)}


def imported(text: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every dotted name that a module of `package` imports, relative ones made absolute, at any depth."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from ((*base, *(node.module.split(".") if node.module else ()), alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (tuple(arg.value.split(".")) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("word", ["gating", "dispatch", "experts", "combine"])
@pytest.mark.parametrize("floor", FLOORS)
def test_every_room_has_its_name_on_every_floor(floor, word):
    """Whoever greps the word finds what defines it: a file of that name, or a function or class in one."""
    files = [path for path in sources() if path.is_relative_to(ROOT / floor)]
    defines = re.compile(rf"^(def|class) {word}\b", re.MULTILINE)
    assert any(path.stem.removeprefix("test_") == word or defines.search(path.read_text()) for path in files)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room):
    breaches = [
        f"{relative(path)} imports {module}"
        for path in python_files(room)
        for module in imports(path)
        if module.partition(".")[0] in FORBIDDEN[room]
    ]
    assert python_files(room) and not breaches


def test_bench_has_floors_and_a_small_hall():
    """The instrument knows no job, a job none above or beside it; what joins several stands in the hall."""
    floor = {room: height for height, rooms in enumerate(BENCH) for room in rooms}
    hall, breaches = [], []
    for path in python_files("bench"):
        room = path.parent.relative_to(ROOT / "bench").parts[:1]
        room = room[0] if room else ""
        if not room and not path.stem.startswith(("__init__", "conftest", "test_")):
            hall.append(path.stem)
        for parts in (name.split(".") for name in imports(path) if name.startswith("bench.")):
            other = parts[1] if parts[1] in floor else ""
            if other != room and floor[other] >= floor[room]:
                breaches.append(f"{relative(path)} imports {'.'.join(parts)}")
    folders = {path.parent.name for path in (ROOT / "bench").glob("*/__init__.py")}
    assert folders == floor.keys() - {""} and not breaches and len(hall) <= HALL, (hall, breaches)


def test_reference_needs_torch_only():
    assert not [
        f"{relative(p)}: {m}"
        for p in python_files("reference")
        for m in imports(p)
        if m.split(".")[0] not in REFERENCE_MAY
    ]


def test_triton_kernels_know_triton_and_torch_only():
    """The adapter, backend.py, is what knows the rest of the product; what torch says of devices all may ask.

    launching.py has its keys from the extension.
    """
    folder, may = ROOT / "moe_kernels/backends/triton", {"triton", "torch", *sys.stdlib_module_names}
    ours = "moe_kernels.backends.triton.", "moe_kernels.backends._device"
    for path in folder.glob("*.py"):
        outside = {m for m in imports(path) if m.partition(".")[0] not in may}
        outside -= {"moe_kernels._C"} if path.name == "launching.py" else set()
        assert path.name == "backend.py" or all(m.startswith(ours) for m in outside), path


def test_statistics_know_no_torch():
    """Nor does what bench/instrument/stats.py pulls in from bench."""
    seen, queue = set(), [ROOT / "bench/instrument/stats.py"]
    while queue:
        path = queue.pop()
        seen.add(path)
        names = imports(path)
        assert not {name for name in names if name.partition(".")[0] in ("torch", "moe_kernels", "reference")}, (
            path.name
        )
        files = {ROOT / (n.replace(".", "/") + ".py") for name in names for n in (name, name.rpartition(".")[0]) if n}
        queue += [file for file in files if file.exists() and file not in seen]


def test_the_scan_sees_every_kind_of_import():
    lines = {
        "import bench.instrument.stats": "bench.instrument.stats",
        "from ..plan import RoutingPlan": "moe_kernels.plan.RoutingPlan",
        "from ... import bench": "bench",
        "def f():\n    from reference import moe": "reference.moe",
        "importlib.import_module('bench')": "bench",
    }
    for line, name in lines.items():
        assert [".".join(parts) for parts in imported(line, ("moe_kernels", "ops"))] == [name]


def test_native_code_knows_no_python():
    python = re.compile(r"^\s*#\s*include\s*[<\"](Python\.h|pybind11|torch|ATen|c10|numpy)", re.MULTILINE)
    native = [path for path in sources() if path.parent.name in ("core", "cpu", "cuda")]
    assert native and not [relative(path) for path in native if python.search(path.read_text())]


def test_import_is_light():
    """No benchmark, oracle, triton or data tools come along with the product, and one OpenMP runtime is mapped."""
    code = """
import sys, torch
before = set(sys.modules)
import moe_kernels
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
moe_kernels.backends()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules, runtimes = done.stdout.splitlines()
    assert "moe_kernels" in modules.split()
    assert not set(modules.split()) & {"bench", "reference", "tests", "triton", "pandas", "sklearn", "scipy"}
    assert int(runtimes) <= 1, "two OpenMP pools fight for the same cores"


def test_sizes_of_files():
    lines = {relative(path): len(path.read_text().splitlines()) for path in sources()}
    assert not {name: n for name, n in lines.items() if n > LONG_FILE}


def test_sizes_of_lines():
    """Neither formatter breaks a comment."""
    numbered = ((relative(path), *line) for path in sources() for line in enumerate(path.read_text().splitlines(), 1))
    assert not [f"{name}:{number}" for name, number, line in numbered if len(line) > 120]


def test_sizes_of_functions():
    """9 of 10 under 40 lines, docstring included."""
    lengths = {
        f"{relative(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in python_files(*ROOMS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    long = {name: n for name, n in lengths.items() if n > LONG_FUNCTION}
    assert len(long) <= len(lengths) / 10, long


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_say_what_a_caller_needs(name):
    function = getattr(moe_kernels, name)
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert re.match(r"[A-Z][a-z]+\b", text) and not missing, f"arguments not explained: {missing}"
    if any("Tensor" in str(p.annotation) for p in parameters.values()):
        assert re.search(r"\((T|E|R|G)(, ?\w+)*,?\)", text), "no shapes"
        order = [text.find(word) for word in ("Args", "Returns", "Raises", "Cost", "Source")]
        assert -1 not in order and order == sorted(order), "expected Args, Returns, Raises, Cost, Source in this order"


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isclass(getattr(moe_kernels, n))])
def test_public_classes_have_a_docstring(name):
    text = inspect.getdoc(getattr(moe_kernels, name)) or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), "a dataclass's generated text is not a docstring"


def test_public_names_are_those_documented():
    documented = "MoELayer RoutingPlan TokenChoice ExpertChoice replace_moe backends BackendInfo gating dispatch "
    documented += "dispatch_expert_choice experts combine moe_mlp aux_loss packed_weights "
    documented += "modulated_gating restore_moe set_nonfinite dispatch_mask dispatch_rows "
    documented += "select_top select_experts "
    documented += "Router RouterCall Scores GroupLimitedChoice ExpertRace DiffMoE ProMoE Biases ClampedSwiGLU"
    assert PUBLIC == sorted(documented.split()) and moe_kernels.__version__


def test_signatures_speak_the_words_of_the_field():
    words = {p for name in FUNCTIONS for p in inspect.signature(getattr(moe_kernels, name)).parameters}
    assert not words & {"w1", "w2", "w3", "w13", "idx", "mask", "gates", "h", "w"}
