"""Figure 14, upper row: daily minimum temperatures in Melbourne."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.common import Found
from benchmarks.paper.series import draw as draw
from benchmarks.paper.series import measure_series
from benchmarks.problems import tables

TITLE = "Melbourne temperatures, learned online by OGD and EKI (Figure 14)"
PAPER = {"ogd_first": 2.653e-2, "ogd_final": 8.954e-3, "eki_first": 8.086e-3, "eki_final": 7.448e-3}


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """Both methods over the same seeds."""
    return measure_series(tables.temperatures, PAPER, preset, data, seed)
