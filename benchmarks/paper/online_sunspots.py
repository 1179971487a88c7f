"""Figure 14, lower row: monthly sunspot numbers from Zürich."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.common import Found
from benchmarks.paper.series import draw as draw
from benchmarks.paper.series import measure_series
from benchmarks.problems import tables

TITLE = "Zürich sunspots, learned online by OGD and EKI (Figure 14)"
PAPER = {"ogd_first": 4.939e-2, "ogd_final": 6.480e-3, "eki_first": 8.671e-3, "eki_final": 6.006e-3}


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """Both methods over the same seeds."""
    return measure_series(tables.sunspots, PAPER, preset, data, seed)
