"""What has to hold of an installation. The first thing `import moe_kernels` reads: without torch it says what to do."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata

NAME = "dit-moe-kernels"
NAMESAKE = "moe-kernels"  # another project's distribution on PyPI; its package is called moe_kernels as well
TORCH = "torch>=2.11"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # torch is there, and lacks something itself
    raise ImportError(
        f"moe_kernels needs {TORCH}, and {sys.executable} has no torch: pip install '{TORCH}' "
        f"(on Linux PyPI's is the CUDA build, several gigabytes), or pip install '{TORCH}' --index-url {CPU_INDEX} "
        "for the CPU build",
        name="torch",
    ) from error


def warn_of_namesake() -> None:
    """Warn where the other distribution is installed as well. Looks up two names and lists no other files: it is fast.

    A warning and no error: where this runs, our files were written last and work. Where theirs were, it does not run.
    """
    try:
        theirs, ours = metadata.distribution(NAMESAKE), metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return
    if any("moe_kernels" in file.parts[:1] for file in theirs.files or ()):
        warnings.warn(
            f"two distributions provide the package moe_kernels: {NAME} {ours.version}, which was imported, and "
            f"{NAMESAKE} {theirs.version}: another project's, or this one's under its old name. Each overwrites files "
            f"of the other, and uninstalling one breaks both: pip uninstall {NAMESAKE} {NAME}, then install the one "
            "that you want",
            RuntimeWarning,
            stacklevel=3,
        )
