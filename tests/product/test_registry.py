"""Who computes: why a backend is not here, and what "auto" means where a table says which one was faster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.instrument.cases import kernels_on
from moe_kernels.backends import _device, cuda, preferred, registry
from moe_kernels.backends.base import Backend, Request
from moe_kernels.backends.eager import EagerBackend

LAYER = Request("moe_mlp", torch.bfloat16, "cuda", 8, 384, 1536, 768)
GPU = "NVIDIA H200"
FOR_GPUS = ("triton", "cuda")


@pytest.fixture
def fresh():
    """Forget what was asked for before and after."""
    caches = (registry._load, registry._choose, preferred.table, preferred._gpu)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def two_for_gpus(monkeypatch, fresh):
    """Backends for GPUs that are there, as far as the registry can see; returns reasons to fill, and the table."""
    reasons, entries = dict.fromkeys(FOR_GPUS), {}

    def load(name: str) -> tuple[Backend | None, str]:
        if name not in FOR_GPUS:
            return None, "not here"
        return SimpleNamespace(name=name, supports=lambda case: reasons[name]), ""

    monkeypatch.setattr(registry, "_load", load)
    monkeypatch.setattr(preferred, "table", lambda: entries)
    monkeypatch.setattr(preferred, "_gpu", lambda: GPU)
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    return reasons, entries


@pytest.mark.parametrize(
    ("module", "on_gpu", "reason"),
    [
        (None, False, "built without CUDA (pip install . -C cmake.define.MOE_KERNELS_CUDA=ON)"),
        (None, True, "built without CUDA (pip install . -C cmake.define.MOE_KERNELS_CUDA=ON)"),
        (SimpleNamespace(on_fibers=False), False, "built, no device"),
        (SimpleNamespace(on_fibers=False), True, ""),
        (SimpleNamespace(on_fibers=True), False, ""),
    ],
    ids=["not built", "not built, a GPU", "no GPU", "a GPU", "fibers"],
)
def test_cuda_says_why_it_is_not_here(module, on_gpu, reason, monkeypatch, fresh):
    monkeypatch.setattr(cuda, "_c", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    (info,) = (info for info in registry.backends() if info.name == "cuda")
    assert (info.available, info.reason) == (not reason, reason)
    if reason:
        with pytest.raises(RuntimeError) as raised:
            registry.choose("cuda", LAYER)
        assert str(raised.value) == f"backend 'cuda' is not available: {reason}"


@pytest.mark.parametrize(
    ("version", "capabilities", "reason"),
    [
        ("13.0", [(9, 0)], None),
        ("13.0", [(6, 1), (8, 0)], None),
        ("13.0", [(7, 5)], "compute capability 7.5, expected at least 8.0"),
        (None, [(9, 0)], f"torch {torch.__version__}, expected one for CUDA"),
    ],
    ids=["H200", "a small one beside", "T4", "ROCm"],
)
def test_devices_that_kernels_are_not_for(version, capabilities, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert _device.unfit_devices.__wrapped__((8, 0)) == reason


SWITCHES = {
    "nothing": "pass",
    "older": "torch.backends.cuda.matmul.allow_tf32 = True",
    "matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "all": "torch.backends.fp32_precision = 'tf32'",
    "precision": "torch.set_float32_matmul_precision('high')",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_tf32_is_seen_whichever_switch_allowed_it(switch):
    """In a process of its own: torch refuses to mix its switches."""
    code = f"import torch; {SWITCHES[switch]}; from moe_kernels.backends._device import tf32_allowed as a; print(a())"
    env = {name: value for name, value in os.environ.items() if "TF32" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(switch != "nothing"), done.stderr


def test_an_extension_that_cannot_be_loaded_is_a_reason(monkeypatch, fresh):
    def broken(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    assert registry._load("cuda") == (None, "libcudart.so.13: cannot open shared object file")


def test_auto_takes_triton_until_something_was_measured(two_for_gpus):
    assert registry.choose("auto", LAYER).name == "triton"
    assert tuple(name for name in registry.CLASSES if name in FOR_GPUS) == FOR_GPUS == kernels_on("cuda")


def test_auto_takes_what_was_faster_for_this_gpu_and_class_of_shapes(two_for_gpus):
    _, entries = two_for_gpus
    entries[GPU] = {preferred.key(LAYER): "cuda"}
    entries["NVIDIA A100"] = {preferred.key(other(hidden_size=768)): "cuda"}
    assert registry.choose("auto", LAYER).name == "cuda"
    assert registry.choose("auto", other(shared_intermediate_size=0)).name == "cuda"
    for change in ({"hidden_size": 768}, {"num_experts": 16}, {"dtype": torch.float16}, {"room": "experts"}):
        assert registry.choose("auto", other(**change)).name == "triton", change
    assert registry.choose("triton", LAYER).name == "triton"


def other(**changes) -> Request:
    return LAYER._replace(**changes)


def test_what_was_faster_but_cannot_compute_this_is_passed_over(two_for_gpus):
    reasons, entries = two_for_gpus
    entries[GPU] = {preferred.key(LAYER): "cuda"}
    reasons["cuda"] = "hidden_size 12, expected a multiple of 8"
    assert registry.choose("auto", LAYER).name == "triton"


def test_an_entry_for_a_backend_that_is_not_there_is_passed_over(two_for_gpus):
    _, entries = two_for_gpus
    entries[GPU] = {preferred.key(LAYER): "grouped"}
    assert registry.choose("auto", LAYER).name == "triton"


def test_the_environment_comes_before_the_table(two_for_gpus, monkeypatch):
    _, entries = two_for_gpus
    entries[GPU] = {preferred.key(LAYER): "cuda"}
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    assert registry.choose("auto", LAYER).name == "triton"


def test_the_table_is_asked_once_per_case(two_for_gpus, monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "preferred", asked.append)
    for _ in range(5):
        registry.choose("auto", LAYER)
        registry.choose("auto", other(room="gating"))
    assert len(asked) == 2


def test_cases_of_a_cpu_have_no_preference(two_for_gpus):
    _, entries = two_for_gpus
    entries[GPU] = {preferred.key(LAYER): "cuda"}
    assert preferred.preferred(other(device="cpu")) is None and preferred.preferred(LAYER) == "cuda"


def test_the_file_is_read_where_there_is_one(tmp_path, monkeypatch, fresh):
    monkeypatch.setattr(preferred, "FILE", tmp_path / "preferred.json")
    assert preferred.table() == {}
    preferred.table.cache_clear()
    preferred.FILE.write_text(json.dumps({GPU: {"moe_mlp-bfloat16-E8-H384-I1536": "cuda"}}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    assert preferred.preferred(LAYER) == "cuda"


@pytest.mark.parametrize("names", [(), (GPU, "NVIDIA A100")], ids=["no GPU", "different ones"])
def test_which_gpu_is_meant_must_be_clear(names, monkeypatch, fresh):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert preferred._gpu() == ""


def test_committed_preferences_name_backends_for_gpus():
    for device, entries in preferred.table().items():
        assert set(entries.values()) <= set(kernels_on("cuda")), device


def test_backends_say_which_routers_select_with_kernels_of_theirs():
    for info in registry.backends():
        kind = getattr(sys.modules.get(f"moe_kernels.backends.{info.name}"), registry.CLASSES[info.name], None)
        if kind is not None:
            plain = kind.dispatch_expert_choice is EagerBackend.dispatch_expert_choice
            assert plain == (not info.selects), info
