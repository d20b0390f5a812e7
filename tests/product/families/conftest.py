"""Interpreted kernels, and those on fibers, are too slow for whole models, and see what eager sees: stacked weights."""

from __future__ import annotations

import os
from pathlib import Path

SLOW = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("MOE_KERNELS_FIBERS")
collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if SLOW]
