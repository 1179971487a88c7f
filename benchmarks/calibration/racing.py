"""What the races on the Lorenz models share: their cells, their table and their picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration.methods import Calibrator
from benchmarks.calibration.problems import InverseProblem
from benchmarks.calibration.race import ITERATIONS, race
from benchmarks.harness.figures import legend, panels, save
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown


def race_all(
    problem: InverseProblem,
    entries: dict[str, Calibrator],
    sizes: Iterable[int],
    seeds: range,
    cells: Cells,
    prefix: str = "",
    **more: Any,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Race every method with every number of particles, a cell each.

    Args:
        problem: problem to calibrate.
        entries: methods by their names.
        sizes: numbers of particles J.
        seeds: seeds of every cell.
        cells: cells of the experiment.
        prefix: text before the cells' names.
        **more: further settings of the methods, which the cells remember.

    Returns:
        The outcomes of every cell, by the method's name and J.
    """
    found = {}
    for name, entry in entries.items():
        if not entry.where(problem):
            continue
        own = 2 * len(problem.prior_mean) + 1
        for particles in [own] if entry.own_particles else sizes:
            if particles < entry.least(len(problem.prior_mean)):
                continue
            settings = {"label": entry.label, "particles": particles, "seeds": list(seeds), "limit": ITERATIONS, **more}
            measure = lambda: race(problem, entry, particles, seeds)  # noqa: B023
            found[name, particles] = cells.get(f"{prefix}{name} {particles}", settings, measure)
    return found


def outcomes(result: dict[str, Any], prefix: str = "") -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The outcomes of a result file, by the methods' labels and J, of the cells whose names begin with ``prefix``."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name, cell in result["cells"].items():
        begins, _, rest = name.rpartition("/")
        if (begins + "/" if begins else "") == prefix and rest:
            settings = cell["settings"]
            found.setdefault(settings["label"], {})[settings["particles"]] = cell["found"]
    return found


def cell(runs: list[dict[str, Any]] | None) -> str:
    """Seeds that reached the target, and the iterations that these took: median, and least to most.

    >>> cell([{"reached": True, "iterations": 3}, {"reached": True, "iterations": 5}])
    '2/2, 4 [3, 5]'
    >>> cell([{"reached": False, "iterations": 20}])
    '0/1'
    """
    if not runs:
        return "–"
    took = [run["iterations"] for run in runs if run["reached"]]
    text = f"{len(took)}/{len(runs)}"
    return text + (f", {np.median(took):g} [{min(took)}, {max(took)}]" if took else "")


def simulator_runs(by_size: dict[int, list[dict[str, Any]]]) -> str:
    """The least median number of simulator runs among the sizes with which every seed reached the target.

    >>> simulator_runs({20: [{"reached": True, "runs": 60}], 50: [{"reached": True, "runs": 100}]})
    '60, J = 20'
    """
    whole = {
        size: float(np.median([run["runs"] for run in runs]))
        for size, runs in by_size.items()
        if all(run["reached"] for run in runs)
    }
    if not whole:
        return "–"
    best = min(whole, key=lambda size: whole[size])
    return f"{whole[best]:g}, J = {best}"


def columns(label: str, by_size: Iterable[int], sizes: list[int]) -> tuple[str, list[int]]:
    """A method's name in a table, and the J of each column; one that makes its particles has its own J in the first.

    >>> columns("UKI", [81], [20, 50])  # no run has no particles
    ('UKI (J = 81)', [81, 0])
    """
    others = [size for size in by_size if size not in sizes]
    return label + "".join(f" (J = {n})" for n in others), others + [0] * (len(sizes) - 1) if others else sizes


def table(result: dict[str, Any], prefix: str = "") -> str:
    """Seeds that reached the target and iterations until then, for every method and J."""
    found = outcomes(result, prefix)
    sizes = result["sizes"]
    header = ["method", *(f"J = {size}" for size in sizes), "least simulator runs, all seeds", "members failed"]
    rows = []
    for label, by_size in found.items():
        name, shown = columns(label, by_size, sizes)
        failed = sum(run["failed"] for runs in by_size.values() for run in runs)
        rows.append([name, *(cell(by_size.get(n)) for n in shown), simulator_runs(by_size), str(failed)])
    return markdown(header, rows)


def median_misfits(runs: list[dict[str, Any]]) -> np.ndarray:
    """The misfit at the mean before each iteration, median over the seeds; a race that is over stays where it ended."""
    longest = max(len(run["misfits"]) for run in runs)
    misfits = [run["misfits"] + run["misfits"][-1:] * (longest - len(run["misfits"])) for run in runs]
    return np.median(misfits, axis=0)


def draw(result: dict[str, Any], path: Path) -> None:
    """The misfit at the mean against simulator runs: the median over the seeds, a panel for each J."""
    found, sizes = outcomes(result), result["sizes"]
    figure, (axes,) = panels(1, len(sizes), (5 * len(sizes), 5.4), sharey=True)
    for axis, size in zip(axes, sizes, strict=True):
        for index, (label, by_size) in enumerate(found.items()):
            used = size if size in by_size else next(iter(by_size)) if not set(by_size) & set(sizes) else None
            if used is None:
                continue
            style = {"color": f"C{index % 10}", "ls": ("-", "--", ":")[index // 10 % 3]}
            misfits = median_misfits(by_size[used])
            axis.plot(used * np.arange(len(misfits)), misfits, lw=1.5, label=label, **style)
        misfit_axis(axis, size * ITERATIONS)
        axis.set_title(f"J = {size}")
    axes[0].set_ylabel("root-mean-square misfit at G(mean), median of seeds")
    legend(figure, "", axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def misfit_axis(axis: Any, most_runs: float) -> None:
    """Axes of a race: simulator runs up to the limit of iterations, and misfits with the target as a line."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axhline(1, color="0.4", lw=0.8)
    axis.set(xlabel="simulator runs", yscale="log", xlim=(0, most_runs), ylim=(0.6, 8))
    ticks = (0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8)
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
