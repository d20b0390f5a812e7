"""Kernels in Triton's interpreter or on fibers are too slow for whole models; of these only layouts concern them."""

from __future__ import annotations

import os
from pathlib import Path

SLOW = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("MOE_KERNELS_FIBERS")
collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py") if SLOW and p.name != "test_layouts.py"]
