"""Two groups of processes for the whole session, started when first asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed

from tests.product.distributed.workers import Workers
from tests.product.ownership.conftest import SLOW
from tests.trap_cases import DEVICE

collect_ignore_glob = ["test_*.py"] if SLOW or DEVICE != "cpu" or not distributed.is_gloo_available() else []


@pytest.fixture(scope="session")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.stop()
