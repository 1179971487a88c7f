"""Other libraries on the same problems, as published, each in an environment of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.calibration import racing
from benchmarks.calibration.linear import calibrate, distance
from benchmarks.calibration.methods import LINEAR, RACE, has_places, localized_race
from benchmarks.calibration.problems import InverseProblem, linear, lorenz63, lorenz96
from benchmarks.calibration.problems.linear import posterior
from benchmarks.calibration.race import ITERATIONS, TARGET, keys, race
from benchmarks.harness import peers, store
from benchmarks.harness.figures import legend, panels, save
from benchmarks.harness.peers import Unavailable, python_of
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number

TITLE = "Other libraries on the same problems"
SCRIPTS = Path(__file__).parent / "peers"
CHOSEN = Path(__file__).parents[1] / "results" / "calibration" / "lorenz96.jsonl"
LIMIT = 1800  # seconds for one library, one problem and one size


def chosen_radius(particles: int) -> float:
    """The taper's radius that ``lorenz96`` chose for our step with the nearest number of particles."""
    radii = store.result(CHOSEN, "run `calibration lorenz96` first")["radius"]
    return float(radii[min(radii, key=lambda size: abs(int(size) - particles))])


class Other(NamedTuple):
    """A method of another library.

    Attributes:
        label: name in the tables.
        package: name of its environment in ``benchmarks.harness.peers``.
        script: file in ``peers/``.
        settings: settings of the script.
        tapers: flag, True where it wants places.
        own_particles: flag, True where it makes its particles, ``2 P + 1``.
    """

    label: str
    package: str
    script: str
    settings: dict[str, Any] = {}  # noqa: RUF012  # of a tuple, which nobody changes
    tapers: bool = False
    own_particles: bool = False


IES, KIL = "iterative_ensemble_smoother", "kalman-inversion-lib"
STEPS, TO_ONE = {"step": 1.0, "ends": False}, {"step": 0.25, "ends": True}
OTHERS: dict[str, Other] = {
    "ies": Other(f"{IES}: ESMDA", IES, "ies_race.py", {"whitened": False}),
    "ies-whitened": Other(f"{IES}: ESMDA, whitened outputs", IES, "ies_race.py", {"whitened": True}),
    "ies-taper": Other(f"{IES}: ESMDA, taper", IES, "ies_race.py", {"whitened": False}, tapers=True),
    "pyesmda": Other("pyesmda: ESMDA", "pyesmda", "pyesmda_race.py"),
    "pyesmda-taper": Other("pyesmda: ESMDA, taper", "pyesmda", "pyesmda_race.py", tapers=True),
    "dapper": Other("DAPPER: square root, to time 1", "dapper", "dapper_race.py", TO_ONE),
    "dapper-steps": Other("DAPPER: square root, steps of 1", "dapper", "dapper_race.py", STEPS),
    "dapper-taper": Other("DAPPER: LETKF, taper, steps of 1", "dapper", "dapper_race.py", STEPS, tapers=True),
    "kil": Other(f"{KIL}: EKI", KIL, "kalman_inversion_race.py", {"unscented": False, "extended": False}),
    "kil-extended": Other(
        f"{KIL}: EKI, extended", KIL, "kalman_inversion_race.py", {"unscented": False, "extended": True}
    ),
    "kil-uki": Other(
        f"{KIL}: UKI", KIL, "kalman_inversion_race.py", {"unscented": True, "extended": False}, own_particles=True
    ),
    "kil-uki-extended": Other(
        f"{KIL}: UKI, extended",
        KIL,
        "kalman_inversion_race.py",
        {"unscented": True, "extended": True},
        own_particles=True,
    ),
}
OURS = ("etki", "etki-controlled", "enkf-controlled", "uki-prior", "etki-taper")
OURS_LINEAR = ("etki-controlled", "enkf-tempered", "uki")
SIZES: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "smoke": {"linear": ((20,), 2), "lorenz63": ((20,), 1)},
    "cpu": {"linear": ((20, 100), 6), "lorenz63": ((20,), 6), "lorenz96": ((50,), 6)},
    "full": {"linear": ((20, 100, 500), 50), "lorenz63": ((20, 50), 50), "lorenz96": ((20, 50, 100), 50)},
}
PROBLEMS: dict[str, Callable[[], InverseProblem]] = {"linear": linear, "lorenz63": lorenz63, "lorenz96": lorenz96}


def task(problem: InverseProblem, other: Other, particles: int, seeds: range) -> dict[str, Any]:
    """What a script in ``peers/`` reads: the problem, and the first particles of every seed, which are ours too."""
    draws = [problem.draw(keys(seed)[0], particles) for seed in seeds]
    arrays = {
        name: None if value is None else np.asarray(value, np.float64).tolist()
        for name, value in problem._asdict().items()
        if name in InverseProblem._fields and name not in ("name", "simulate", "settings", "period")
    }
    return {
        **arrays,
        **other.settings,
        "settings": problem.settings,
        "period": problem.period,
        "radius": chosen_radius(particles) if other.tapers else None,
        "target": 0.0 if problem.name == "linear" else TARGET,
        "limit": ITERATIONS,
        "seeds": list(seeds),
        "ensembles": [np.asarray(draw, np.float64).tolist() for draw in draws],
    }


def ask(other: Other, request: dict[str, Any], environments: Path) -> dict[str, Any]:
    """What a script prints, or ``{"skipped": reason}`` where it cannot run."""
    quiet = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        python = python_of(other.package, environments)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.json"
            path.write_text(json.dumps(request), encoding="utf-8")
            return peers.ask([str(python), str(SCRIPTS / other.script), str(path)], SCRIPTS, limit=LIMIT, **quiet)
    except Unavailable as error:
        return {"skipped": str(error)}


def run(preset: str, cells: Cells, environments: Path) -> None:
    """Every method of ``OTHERS`` and some of ours on every problem."""
    cells.extra |= {"sizes": {name: list(sizes) for name, (sizes, _) in SIZES[preset].items()}, "versions": {}}
    cells.extra["skipped"] = {}
    for name, (sizes, seeds) in SIZES[preset].items():
        problem = PROBLEMS[name]()
        _race_ours(problem, sizes, range(seeds), cells)
        for key, other in OTHERS.items():
            if other.tapers and problem.parameter_coordinates is None:
                continue
            if other.settings.get("ends") is False and name == "linear":
                continue  # nothing ends it
            for particles in [2 * len(problem.prior_mean) + 1] if other.own_particles else sizes:
                settings = {"label": other.label, "particles": particles, "seeds": seeds, **other.settings}
                settings |= {"radius": chosen_radius(particles)} if other.tapers else {}
                request = task(problem, other, particles, range(seeds))
                measure = lambda: ask(other, request, environments)  # noqa: B023
                found = cells.get(f"{name}/{key} {particles}", settings, measure)
                if "skipped" in found:
                    cells.extra["skipped"][f"{name}, {other.label}, J = {particles}"] = found["skipped"]
                else:
                    cells.extra["versions"][other.package] = found["version"]


def _race_ours(problem: InverseProblem, sizes: tuple[int, ...], seeds: range, cells: Cells) -> None:
    on_linear = problem.name == "linear"
    for key in OURS_LINEAR if on_linear else OURS:
        for size in sizes:
            entry = LINEAR[key] if on_linear else (RACE | localized_race(chosen_radius(size)))[key]
            particles = 2 * len(problem.prior_mean) + 1 if entry.own_particles else size
            if not entry.where(problem):
                continue
            settings = {"label": f"eki_jax: {entry.label}", "particles": particles, "seeds": list(seeds)}
            settings |= {"radius": chosen_radius(size)} if entry.where is has_places else {}
            measure = lambda: {"rows": (calibrate if on_linear else race)(problem, entry, particles, seeds)}  # noqa: B023
            cells.get(f"{problem.name}/{key} {particles}", settings, measure)


def rows_of(result: dict[str, Any], problem: str) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The runs on a problem, by label and J; an empty list where a library was skipped."""
    cells: dict[str, Any] = racing.outcomes(result, f"{problem}/")
    return {label: {n: found.get("rows", []) for n, found in by_size.items()} for label, by_size in cells.items()}


def linear_distance(row: dict[str, Any]) -> tuple[float, float]:
    """A run's error of the mean and ratio of variances on the linear problem."""
    if "covariance" in row and isinstance(row["covariance"], list):
        found = distance(np.array(row["mean"]), np.array(row["covariance"]), posterior(linear()))
        return found.mean, found.variance
    return row["mean"], row["variance"]


def table(result: dict[str, Any]) -> str:
    """A table for each problem, and what was skipped."""
    parts = []
    for problem, sizes in result["sizes"].items():
        found = rows_of(result, problem)
        parts += [f"### {problem}", (_linear if problem == "linear" else _raced)(found, sizes)]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    parts.append(f"Versions: {versions or 'none could be had'}.")
    if result["skipped"]:
        parts += ["Skipped:", "\n".join(f"* {name}: {reason}" for name, reason in result["skipped"].items())]
    return "\n\n".join(parts)


def _linear(found: dict[str, dict[int, list[dict[str, Any]]]], sizes: list[int]) -> str:
    header = ["library and method", *(f"mean, J = {n}" for n in sizes), *(f"variance, J = {n}" for n in sizes)]
    rows = []
    for label, by_size in found.items():
        values = {n: np.median([linear_distance(run) for run in runs], axis=0) for n, runs in by_size.items() if runs}
        name, shown = racing.columns(label, by_size, sizes)
        rows.append([name, *(number(values[n][i] if n in values else None) for i in (0, 1) for n in shown)])
    return markdown(header, rows)


def _raced(found: dict[str, dict[int, list[dict[str, Any]]]], sizes: list[int]) -> str:
    header = ["library and method", *(f"J = {n}" for n in sizes), *(f"least misfit, J = {n}" for n in sizes)]
    header.append("least simulator runs, all seeds")
    rows = []
    for label, by_size in found.items():
        name, shown = racing.columns(label, by_size, sizes)
        least = {n: np.median([min(run["misfits"]) for run in runs]) for n, runs in by_size.items() if runs}
        broken = {n: [run["ended"] for run in runs if run["ended"].startswith("error")] for n, runs in by_size.items()}
        cells = [
            racing.cell(by_size.get(n)) + (f" ({len(broken[n])} by {broken[n][0]})" if broken.get(n) else "")
            for n in shown
        ]
        asked = racing.simulator_runs({n: runs for n, runs in by_size.items() if runs})
        rows.append([name, *cells, *(number(least.get(n)) for n in shown), asked])
    return markdown(header, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """The misfit at the mean against simulator runs: the median over the seeds, a panel for each race."""
    from matplotlib import colormaps

    raced = [name for name in result["sizes"] if name != "linear"]
    figure, axes = panels(1, len(raced), (6.5 * len(raced), 6))
    labels = list(dict.fromkeys(label for problem in raced for label in rows_of(result, problem)))
    shown, colours = {}, colormaps["tab20"]
    for axis, problem in zip(axes[0], raced, strict=True):
        size = max(result["sizes"][problem])
        for label, by_size in rows_of(result, problem).items():
            index = labels.index(label)
            used = size if size in by_size else max(by_size)
            runs = by_size[used]
            if not runs:
                continue
            ours = label.startswith("eki_jax")
            misfits = racing.median_misfits(runs)
            cost = np.median([run["runs"] / max(1, run["iterations"]) for run in runs])
            style = {"lw": 2 if ours else 1.2, "ls": "-" if ours else "--", "color": colours(index % 20)}
            style["marker"] = "osD^v<>Ph*Xd"[index % 12]
            (shown[label],) = axis.plot(cost * np.arange(len(misfits)), misfits, ms=4, **style)
        racing.misfit_axis(axis, size * ITERATIONS)
        axis.set_title(f"{problem}, J = {size}")
    axes[0][0].set_ylabel("misfit at G(mean), median of seeds")
    handles = {label: shown[label] for label in labels if label in shown}
    legend(figure, "", (handles.values(), handles.keys()), loc="outside lower center", ncols=2)
    save(figure, path)
