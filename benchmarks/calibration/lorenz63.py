"""The race on Lorenz-63: two parameters, nine statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.calibration.methods import RACE
from benchmarks.calibration.problems import lorenz63
from benchmarks.calibration.racing import draw as draw
from benchmarks.calibration.racing import outcomes, race_all
from benchmarks.calibration.racing import table as table
from benchmarks.harness.store import Cells

TITLE = "Lorenz-63 in EKIRace's settings: iterations and simulator runs to the target"
SIZES = {"smoke": ((10,), 2), "cpu": ((20, 50, 100), 6), "full": ((20, 30, 50, 100), 50)}


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Every method of ``RACE``."""
    del peers
    sizes, seeds = SIZES[preset]
    cells.extra["sizes"] = list(sizes)
    race_all(lorenz63(), RACE, sizes, range(seeds), cells)
    cells.extra["claims"] = claims(cells.payload())


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """How many seeds reach the target with twenty particles, by method."""
    return {
        label: f"{sum(run['reached'] for run in by_size[20])}/{len(by_size[20])}"
        for label, by_size in outcomes(result).items()
        if 20 in by_size
    }
