"""The committed tables are what the commands make of the committed results, to the digit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.forward_budget import summary
from benchmarks.harness import store
from benchmarks.paper.table import write_table
from benchmarks.performance import tables
from benchmarks.reporting import RESULTS

pytestmark = pytest.mark.benchmarks


def test_the_papers_table(tmp_path: Path) -> None:
    assert write_table(RESULTS / "paper", tmp_path / "paper.md").read_text() == (RESULTS / "paper.md").read_text()


def test_the_performance_tables(tmp_path: Path) -> None:
    for path in RESULTS.glob("performance-*.jsonl"):
        shutil.copy(path, tmp_path)
    assert tables.write(tmp_path).read_text() == (RESULTS / "performance.md").read_text()


def test_the_budgets_table() -> None:
    path = RESULTS / "forward_budget_cpu.jsonl"
    assert (
        summary.table(summary.summarized(path, store.read(path))) + "\n"
        == (RESULTS / "forward_budget_cpu.md").read_text()
    )
