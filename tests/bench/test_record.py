"""What is kept for good names its commit and its machine, and every file under results/ does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import record
from bench.instrument import store

ROOT = Path(__file__).parents[2]
FILLER = {"command": "python -m bench run", "versions": {}}
MACHINE = {"cpu": "Test CPU", "isa": "avx2", "gpu": None}


def rows(**changes):
    base = {
        **FILLER,
        "machine": MACHINE,
        "schema": store.SCHEMA,
        "commit": "c0ffee" * 6,
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
    }
    start = {**base, "kind": "run"}
    parity = {**base, "kind": "parity", "backend": "native", "dtype": "fp32", "verdict": "PARITY"}
    return [{**start, **changes}, {**parity, **changes}]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "moe_kernels").mkdir()
    (tmp_path / "moe_kernels/verified.json").write_text('{"native": ["Other CPU, 2020-01-01: fp32"]}')
    return tmp_path


def write(checkout, lines):
    (checkout / "report/rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_kept_and_noted_once(checkout):
    write(checkout, rows())
    for _ in range(2):
        target = record.record(checkout / "report", checkout)
    assert target.name == "2026-01-02_Test-CPU-avx2_c0ffeec0ff.jsonl"
    verified = json.loads((checkout / "moe_kernels/verified.json").read_text())
    assert verified["native"] == ["Other CPU, 2020-01-01: fp32", "Test CPU avx2, 2026-01-02: fp32"]


@pytest.mark.parametrize(
    "changes", [{"dirty": True}, {"commit": None}, {"wrong": "out: 3x", "case": "x"}, {"verdict": "UNSURE"}]
)
def test_what_proves_nothing_is_refused(checkout, changes):
    write(checkout, rows(**changes))
    with pytest.raises(ValueError, match="expected"):
        record.record(checkout / "report", checkout)


@pytest.mark.parametrize(("file", "name"), record.ROWS.items())
def test_other_rows_are_kept_where_one_commit_made_them(checkout, file, name):
    lines, path = rows(), checkout / "report" / file
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = record.record_rows(path, checkout)
    assert kept.name == f"2026-01-02_Test-CPU-avx2_c0ffeec0ff_{name}.jsonl" and kept.read_text() == path.read_text()
    with path.open("a") as more:
        more.write(json.dumps(lines[0] | {"commit": "other"}) + "\n")
    with pytest.raises(ValueError, match="rows of one commit"):
        record.record_rows(path, checkout)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_name_an_existing_commit_and_a_clean_tree(path):
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    for commit, dirty in {(row["commit"], row["dirty"]) for row in store.read(path)}:
        assert not dirty
        if shallow.stdout.strip() == "false":
            subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, check=True)
