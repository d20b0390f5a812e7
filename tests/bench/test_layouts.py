"""`bench layouts`: every layout gives the oracle's gradients before it gets a number, and FSDP2's units."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from unittest import mock

import pytest
from torch import distributed, nn

from bench.__main__ import main
from bench.instrument import store
from bench.training import layouts
from tests.product.distributed.workers import Workers
from tests.product.ownership.conftest import SLOW
from tests.trap_cases import DEVICE

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(bool(SLOW) or DEVICE != "cpu" or not distributed.is_gloo_available(), reason="a job for CPUs"),
]
WORDS = "layouts --size tiny --models digits --timeout 120".split()


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


def raced(out: str, broken: str = "") -> tuple[int, str]:
    """Run the command; `broken` is left undivided, so that each rank has gradients of its own samples."""
    distribute, said = layouts.distribute, io.StringIO()

    def breaking(model, parallel, sharing, ranks):
        return model if parallel == broken else distribute(model, parallel, sharing, ranks)

    with mock.patch.object(layouts, "distribute", breaking), contextlib.redirect_stdout(said):
        code = main([*WORDS, "--out", out])
    return code, said.getvalue()


def test_every_layout_is_timed_against_the_first(two, tmp_path):
    out = tmp_path / "rows.jsonl"
    (code, said), (other, quiet) = two.run(raced, out=str(out))
    rows = store.read(out)
    assert (code, other, quiet) == (0, 0, "") and [row["layout"] for row in rows] == list(layouts.LAYOUTS)
    assert all(row["kind"] == "layout" and row["figures"]["images_per_s"] > 0 and not row["wrong"] for row in rows)
    assert [list(row["speedups"]) for row in rows] == [[], ["ddp"], ["ddp"], ["ddp"]]
    assert all(len(row["samples_us"]) == 3 and len(row["errors"]) > 10 for row in rows)
    assert "of ddp" in said and "rows.jsonl" in said


def test_a_wrong_layout_gets_no_number(two, tmp_path):
    out = tmp_path / "rows.jsonl"
    (code, said), (other, _) = two.run(raced, out=str(out), broken="ep-ddp")
    wrong = {row["layout"]: row for row in store.read(out) if row["wrong"]}
    assert (code, other) == (1, 1) and list(wrong) == ["ep-ddp"] and "ep-ddp-W2-B8-fp32: wrong: " in said
    assert not wrong["ep-ddp"]["figures"] and not wrong["ep-ddp"]["speedups"] and not wrong["ep-ddp"]["samples_us"]


def test_what_is_not_there_is_refused(capsys):
    assert main([*WORDS, "--layouts", "ddp,tp"]) == 2
    assert "--layouts: got 'tp', expected some of ddp, fsdp, ep, ep-ddp" in capsys.readouterr().err
    assert main([*WORDS[:1], "--models", "XL"]) == 2
    assert "--models: got 'XL', expected some of digits, S" in capsys.readouterr().err


def test_small_blocks_are_one_unit_and_large_ones_each_their_own(monkeypatch):
    """The last block, where it alone is too small, goes with the model's own unit."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))  # 256 bytes each
    for least, expected in ((256, [1, 1, 1, 1, 1]), (257, [2, 2]), (2000, [])):
        monkeypatch.setattr(layouts, "UNIT_BYTES", least)
        assert [len(unit) for unit in layouts.units(model)] == expected
