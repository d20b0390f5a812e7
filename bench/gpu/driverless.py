"""Triton's launches on a machine without a GPU: all of Triton is real, down to the C that calls the CUDA driver.

The driver is a library that says yes and counts launches; kernels are compiled for sm_90 and never run. What the driver
itself takes for a launch, for a tensor map and for looking up addresses is therefore not in what is measured here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch

NOTHING = """cuInit cuDriverGetVersion cuDeviceGet cuDevicePrimaryCtxRetain cuCtxGetDevice cuCtxSetCurrent cuCtxGetLimit
cuCtxSetLimit cuModuleLoadData cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString
cuStreamIsCapturing cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled cuTensorMapEncodeIm2col"""
SOURCE = "".join(f"int {name}(void) {{ return 0; }}\n" for name in NOTHING.split())
SOURCE += """static long launches;
long launched(void) { return launches; }
int cuLaunchKernelEx(void) { ++launches; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuModuleGetFunction(void** function) { *function = (void*)1; return 0; }
int cuFuncGetAttribute(int* value, int which) { *value = which == 0 ? 1024 : 0; return 0; }  /* 0: threads of a block */
int cuDeviceGetAttribute(int* value) { *value = 227 << 10; return 0; }  /* asked for shared memory only */
int cuPointerGetAttribute(void** value, int which, void* pointer) { *value = pointer; return 0; }
"""


def why_not() -> str | None:
    """Say why a driver that does nothing cannot take the place of CUDA's here, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET: got 1, expected it unset: interpreted kernels are not launched"
    if torch.version.cuda:
        return f"torch {torch.__version__} would take the driver that does nothing for CUDA's: needs torch for CPUs"
    if _compiler() is None:
        return "needs a C compiler, as Triton's launcher does: no gcc, no clang, no CC"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@contextmanager
def driver() -> Iterator[Callable[[], int]]:
    """Let Triton launch on CPU tensors, for sm_90; yield what counts the launches so far."""
    import triton

    with mock.patch.object(triton.runtime.driver, "_active", _nvidia()):
        yield _library().launched


@cache
def _library() -> ctypes.CDLL:
    """Build the driver beside what Triton keeps, and load it: whoever asks for libcuda.so.1 from now on gets it."""
    import triton

    folder = Path(triton.knobs.cache.dir) / "driverless"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"{os.getpid()}.so"
    command = [_compiler(), "-x", "c", "-", "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-o", str(built)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return ctypes.CDLL(str(built.replace(folder / "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)


@cache
def _nvidia() -> object:
    """Return Triton's driver for NVIDIA GPUs, which asks torch.cuda for nothing: one GPU, one stream."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    folder = Path(_library()._name).parent
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.libcuda_path = str(folder)
        alone = object.__new__(CudaDriver)
        alone.utils, alone.launcher_cls = CudaUtils(), CudaLauncher
    alone.get_device_capability = lambda device: (9, 0)
    alone.get_current_device = lambda: 0
    alone.get_current_stream = lambda device: 0
    return alone
