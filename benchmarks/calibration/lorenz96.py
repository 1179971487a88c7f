"""The race on Lorenz-96: forty parameters, eighty statistics; and what helps a small ensemble there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration import racing
from benchmarks.calibration.methods import (
    RACE,
    Calibrator,
    has_places,
    kalman_step,
    localized,
    localized_race,
    remedies,
)
from benchmarks.calibration.problems import InverseProblem, lorenz96
from benchmarks.calibration.race import ITERATIONS
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number
from eki_jax import kalman

TITLE = "Lorenz-96 in EKIRace's settings: iterations and simulator runs to the target"
SIZES = {"smoke": ((20,), 2), "cpu": ((20, 50, 100), 6), "full": ((20, 30, 50, 100, 200), 50)}
RADII = {"smoke": (8.0,), "cpu": (4.0, 6.0, 8.0, 12.0, 16.0), "full": (3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)}
# The taper's radius is chosen on these seeds, for each of these sizes; what is reported has other seeds. A smaller
# ensemble wants a shorter one. Larger ensembles than these have that of the largest.
TUNING_SEEDS = range(1000, 1006)
TUNING_SIZES = (20, 50)


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Choose the taper's radius on seeds of its own; race every method; compare remedies for small ensembles."""
    del peers
    sizes, seeds = SIZES[preset]
    problem = lorenz96(window=5.0, samples=200) if preset == "smoke" else lorenz96()
    cells.extra["sizes"] = list(sizes)
    chosen = tuned_radii(problem, RADII[preset], TUNING_SEEDS[: 2 if preset == "smoke" else 6], cells)
    cells.extra["radius"] = {str(size): radius_of(chosen, size) for size in sizes}
    racing.race_all(problem, RACE, sizes, range(seeds), cells)
    for size in sizes:
        radius = radius_of(chosen, size)
        racing.race_all(problem, localized_race(radius), [size], range(seeds), cells, radius=radius)
    for size in set(sizes) & set(TUNING_SIZES):
        radius = radius_of(chosen, size)
        racing.race_all(problem, remedies(radius), [size], range(seeds), cells, "remedy/", radius=radius)
    cells.extra["claims"] = claims(cells.payload())


def tuned_radii(problem: InverseProblem, radii: tuple[float, ...], seeds: range, cells: Cells) -> dict[int, float]:
    """For each tuning size the radius with the fewest iterations over the seeds; a miss counts as the limit."""
    cost: dict[int, dict[float, int]] = {size: {} for size in TUNING_SIZES}
    for radius in radii:
        entry = Calibrator(f"radius {radius:g}", kalman_step(kalman.etki, localization=localized(radius)))
        found = racing.race_all(problem, {f"{radius:g}": entry}, TUNING_SIZES, seeds, cells, "tuning/")
        for (_, size), runs in found.items():
            cost[size][radius] = sum(run["iterations"] for run in runs)
    return {size: min(by_radius, key=lambda radius: by_radius[radius]) for size, by_radius in cost.items()}


def radius_of(chosen: dict[int, float], size: int) -> float:
    """The radius for J particles: that of the largest tuning size that is not larger, or of the smallest.

    >>> [radius_of({20: 4.0, 50: 8.0}, size) for size in (10, 20, 49, 50, 100)]
    [4.0, 4.0, 4.0, 8.0, 8.0]
    """
    return chosen[max((tuned for tuned in chosen if tuned <= size), default=min(chosen))]


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """The iterations of the steps that want places, seed by seed, None for a seed that missed the target."""
    found = racing.outcomes(result) | racing.outcomes(result, "remedy/")
    localizing = [entry for entry in (localized_race(1.0) | remedies(1.0)).values() if entry.where is has_places]
    return {
        f"{entry.label}, J = {size}": [run["iterations"] if run["reached"] else None for run in runs]
        for entry in localizing
        for size, runs in found[entry.label].items()
    }


def table(result: dict[str, Any]) -> str:
    """The race, the remedies, and how the radius was chosen."""
    radii = ", ".join(f"{radius:g} places for J = {size}" for size, radius in result["radius"].items())
    chosen = (
        f"Chosen on seeds of its own, {TUNING_SEEDS[0]} to {TUNING_SEEDS[-1]}, by the fewest iterations of all seeds "
        f"together, where a miss counts as {ITERATIONS}: {radii}."
    )
    parts = [racing.table(result), "### What helps a small ensemble", _remedies(result), "### The taper's radius"]
    return "\n\n".join([*parts, chosen, _radii(result)])


def _remedies(result: dict[str, Any]) -> str:
    raced = racing.outcomes(result)
    found = {"nothing": raced["ETKI"], "taper": raced["ETKI, taper"], **racing.outcomes(result, "remedy/")}
    sizes = [size for size in result["sizes"] if size in TUNING_SIZES]
    header = ["ETKI with", *(f"reached, J = {n}" for n in sizes), *(f"error of the mean, J = {n}" for n in sizes)]
    header += [f"spread / error, J = {n}" for n in sizes]
    rows = []
    for label, by_size in found.items():
        error = {n: np.median([run["error"] for run in runs]) for n, runs in by_size.items()}
        share = {n: np.median([run["spread"] / run["error"] for run in runs]) for n, runs in by_size.items()}
        rows.append([label, *(racing.cell(by_size.get(n)) for n in sizes)])
        rows[-1] += [number(values.get(n)) for values in (error, share) for n in sizes]
    return markdown(header, rows)


def _radii(result: dict[str, Any]) -> str:
    found = racing.outcomes(result, "tuning/")
    header = [
        "taper",
        *(f"J = {n}" for n in TUNING_SIZES),
        *(f"iterations of all seeds, J = {n}" for n in TUNING_SIZES),
    ]
    rows = []
    for label, by_size in found.items():
        totals = [str(sum(run["iterations"] for run in by_size[size])) for size in TUNING_SIZES]
        rows.append([label, *(racing.cell(by_size[size]) for size in TUNING_SIZES), *totals])
    return markdown(header, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """The race's picture."""
    racing.draw(result, path)
