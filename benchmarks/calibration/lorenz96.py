"""The race on Lorenz-96: forty parameters, eighty statistics; and what helps a small ensemble there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.calibration import racing
from benchmarks.calibration.methods import (
    RACE,
    Calibrator,
    Chosen,
    has_places,
    kalman_step,
    localized,
    localized_race,
    noisy,
    remedies,
)
from benchmarks.calibration.problems import InverseProblem, lorenz96
from benchmarks.calibration.race import ITERATIONS, TARGET
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number
from eki_jax import kalman

TITLE = "Lorenz-96 in EKIRace's settings: iterations and simulator runs to the target"
SIZES = {"smoke": ((20,), 2), "cpu": ((20, 50, 100), 6), "full": ((20, 30, 50, 100, 200), 50)}
# The race's misses take all iterations; what helps a small ensemble is read from more seeds than it can have.
REMEDY_SEEDS = {"smoke": 2, "cpu": 24, "full": 50}
RADII = {"smoke": (8.0,), "cpu": (4.0, 6.0, 8.0, 12.0, 16.0), "full": (3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)}
FACTORS = {"smoke": (1.1,), "cpu": (1.05, 1.1, 1.2), "full": (1.02, 1.05, 1.1, 1.2, 1.3)}
SCALES = {"smoke": (0.2,), "cpu": (0.1, 0.2, 0.3, 0.4), "full": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)}
# The taper's radius is chosen on these seeds, for each of these sizes, and then what is beside it; what is reported has
# other seeds. A smaller ensemble wants a shorter radius. Larger ensembles than these have what the largest has.
TUNING_SEEDS = range(1000, 1024)
TUNING_SIZES = (20, 50)
# Runs of the simulator at the truth: how often chance alone is beyond the target.
TRUTH_RUNS = 500
# What is chosen, and its unit in a sentence.
NAMES = {"radius": "radius {:g}", "factor": "inflation by {:g}", "scale": "noise of {:g} prior deviations"}


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Choose the settings on seeds of their own; race every method; compare remedies for small ensembles."""
    del peers
    sizes, seeds = SIZES[preset]
    problem = lorenz96(window=5.0, samples=200) if preset == "smoke" else lorenz96()
    cells.extra["sizes"] = list(sizes)
    tuning = TUNING_SEEDS[:2] if preset == "smoke" else TUNING_SEEDS
    tuned = {size: tuned_settings(problem, size, preset, tuning, cells) for size in TUNING_SIZES}
    chosen = {size: nearest(tuned, size) for size in sizes}
    for name in Chosen._fields:
        cells.extra[name] = {str(size): getattr(settings, name) for size, settings in chosen.items()}
    cells.get("truth/misfits", {"runs": TRUTH_RUNS}, lambda: {"misfits": at_the_truth(problem)})
    racing.race_all(problem, RACE, sizes, range(seeds), cells)
    for size, settings in chosen.items():
        radius = settings.radius
        racing.race_all(problem, localized_race(radius), [size], range(seeds), cells, radius=radius)
    for size in set(sizes) & set(TUNING_SIZES):
        settings = chosen[size]
        more = range(REMEDY_SEEDS[preset])
        racing.race_all(problem, remedies(settings), [size], more, cells, "remedy/", **settings._asdict())
    cells.extra["claims"] = claims(cells.payload())


def tuned_settings(problem: InverseProblem, size: int, preset: str, seeds: range, cells: Cells) -> Chosen:
    """The radius with the fewest iterations over the seeds, a miss counting as the limit; then what is beside it."""

    def best(name: str, values: tuple[float, ...], keywords: Callable[[float], dict[str, Any]], **more: float) -> float:
        cost = {}
        for value in values:
            entry = Calibrator(NAMES[name].format(value), kalman_step(kalman.etki, **keywords(value)))
            found = racing.race_all(problem, {f"{value:g}": entry}, [size], seeds, cells, f"tuning/{name}/", **more)
            cost[value] = sum(run["iterations"] for run in found[f"{value:g}", size])
        return min(cost, key=lambda value: cost[value])

    radius = best("radius", RADII[preset], lambda radius: {"localization": localized(radius)})
    near = localized(radius)
    grown = lambda factor: {"localization": near, "inflation": kalman.multiplicative_inflation(factor)}
    noise = lambda scale: {"localization": near, "inflation": noisy(scale)}
    return Chosen(
        radius,
        best("factor", FACTORS[preset], grown, radius=radius),
        best("scale", SCALES[preset], noise, radius=radius),
    )


def at_the_truth(problem: InverseProblem) -> list[float]:
    """Misfits of single runs of the simulator at the truth, from initial conditions of their own."""
    ensemble = jnp.tile(jnp.asarray(problem.truth, float), (TRUTH_RUNS, 1))
    return [problem.misfit(outputs) for outputs in problem.simulate(jax.random.key(0), ensemble)]


def nearest(tuned: dict[int, Chosen], size: int) -> Chosen:
    """The settings for J particles: those of the largest tuning size that is not larger, or of the smallest.

    >>> tuned = {20: Chosen(4.0, 1.1, 0.2), 50: Chosen(8.0, 1.1, 0.1)}
    >>> [nearest(tuned, size).radius for size in (10, 20, 49, 50, 100)]
    [4.0, 4.0, 4.0, 8.0, 8.0]
    """
    return tuned[max((own for own in tuned if own <= size), default=min(tuned))]


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """The iterations of the steps that want places, seed by seed, None for a seed that missed the target."""
    found = racing.outcomes(result) | racing.outcomes(result, "remedy/")
    any_settings = Chosen(1.0, 1.1, 0.1)
    entries = [*localized_race(1.0).values(), *remedies(any_settings).values()]
    localizing = [entry for entry in entries if entry.where is has_places]
    return {
        f"{entry.label}, J = {size}": [run["iterations"] if run["reached"] else None for run in runs]
        for entry in localizing
        for size, runs in found[entry.label].items()
    }


def table(result: dict[str, Any]) -> str:
    """The race, the remedies, and how their settings were chosen."""
    sizes = [size for size in result["sizes"] if size in TUNING_SIZES]
    chosen = "; ".join(
        f"J = {size}: " + ", ".join(words.format(result[name][str(size)]) for name, words in NAMES.items())
        for size in sizes
    )
    tuning = next(cell["settings"]["seeds"] for name, cell in result["cells"].items() if name.startswith("tuning/"))
    text = (
        f"Chosen on seeds of their own, {tuning[0]} to {tuning[-1]}, by the fewest iterations of all seeds "
        f"together, where a miss counts as {ITERATIONS}: first the radius, with nothing beside it, then the inflation "
        f"and the noise beside a taper of that radius. For {chosen}."
    )
    misfits = np.array(result["cells"]["truth/misfits"]["found"]["misfits"])
    below = (
        f"Of {len(misfits)} single runs at the truth itself {100 * np.mean(misfits < TARGET):.0f} % are below the "
        f"target; their median misfit is {np.median(misfits):.2f}."
    )
    parts = [racing.table(result), below, "### What helps a small ensemble", _remedies(result, sizes)]
    return "\n\n".join([*parts, "### How it was tuned", text, _tuning(result)])


def _remedies(result: dict[str, Any], sizes: list[int]) -> str:
    found = racing.outcomes(result, "remedy/")
    header = ["ETKI with", *(f"reached, J = {n}" for n in sizes), *(f"error of the mean, J = {n}" for n in sizes)]
    header += [f"spread / error, J = {n}" for n in sizes]
    rows = []
    for label, by_size in found.items():
        error = {n: np.median([run["error"] for run in runs]) for n, runs in by_size.items()}
        share = {n: np.median([run["spread"] / run["error"] for run in runs]) for n, runs in by_size.items()}
        rows.append([label, *(racing.cell(by_size.get(n)) for n in sizes)])
        rows[-1] += [number(values.get(n)) for values in (error, share) for n in sizes]
    return markdown(header, rows)


def _tuning(result: dict[str, Any]) -> str:
    header = [
        "taper",
        *(f"J = {n}" for n in TUNING_SIZES),
        *(f"iterations of all seeds, J = {n}" for n in TUNING_SIZES),
    ]
    rows = []
    for name in NAMES:
        for label, by_size in racing.outcomes(result, f"tuning/{name}/").items():
            totals = [str(sum(run["iterations"] for run in by_size[size])) for size in TUNING_SIZES]
            rows.append([label, *(racing.cell(by_size[size]) for size in TUNING_SIZES), *totals])
    return markdown(header, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """The race's picture."""
    racing.draw(result, path)
