"""Fresh printed seeds, poisoned allocations, and the error table at the end of a run."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests import error_rule
from tests.interpreter import enable_bfloat16, leave_out_the_overflow_check, patch_each_function_once
from tests.trap_cases import DEVICE, poison

# In the environment, where workers of pytest-xdist find the seed that is printed.
SESSION_SEED = int(os.environ.setdefault("MOE_TEST_SEED", str(random.SystemRandom().randrange(10**6))))
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
NEED_HYPOTHESIS = ["reference/test_reference_routing.py", "product/test_routing_properties.py"]
collect_ignore = [] if find_spec("hypothesis") else NEED_HYPOTHESIS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "apart: asks for the free memory of the GPU, so that nobody else may use any")
    config.addinivalue_line("markers", "unpoisoned: leave torch's allocators alone (torch.compile reads their code)")
    if DEVICE != "cpu":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"MOE_TEST_DEVICE: got {DEVICE!r}, expected 'cpu': torch sees no GPU here")
        torch.set_default_device(DEVICE)  # before the modules with tensors among their constants are collected
        torch.backends.cuda.matmul.allow_tf32 = False  # containers switch it on in the environment


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        enable_bfloat16()
        leave_out_the_overflow_check()
        patch_each_function_once()


def pytest_runtest_logfinish() -> None:
    """End a worker of pytest-xdist, which gets a successor, once its GPU is lost: all its other tests would fail."""
    if "PYTEST_XDIST_WORKER" in os.environ and DEVICE != "cpu":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_report_header() -> str:
    left_out = f", without hypothesis: not {', '.join(collect_ignore)}" if collect_ignore else ""
    return f"MOE_TEST_SEED={SESSION_SEED} MOE_TEST_DEVICE={DEVICE}{left_out}"


def pytest_terminal_summary(terminalreporter) -> None:
    if error_rule.TABLE:
        terminalreporter.section("e_ours / e_torch against the float64 oracle (bound 2), worst tensor")
        for line in error_rule.table_lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes are small: a second thread costs more than it gives, above all on a busy machine."""
    with error_rule.threads(1):
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run (fresh unless MOE_TEST_SEED is set) and this test."""
    return SESSION_SEED * 1000 + zlib.crc32(request.node.nodeid.encode()) % 1000


@pytest.fixture(autouse=True)
def poisoned_allocations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what moe_kernels allocates without initialising with NaN: a row nobody wrote must show."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "moe_kernels" and tensor.dtype in POISONED_DTYPES:
            tensor.fill_(poison(tensor.dtype))
        return tensor

    return allocate_poisoned


POISONED_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}
