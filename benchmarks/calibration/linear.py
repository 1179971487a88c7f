"""Means and covariances of all methods on a linear-Gaussian problem, against the exact posterior."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.calibration.methods import LINEAR, Calibrator
from benchmarks.calibration.problems import InverseProblem, linear
from benchmarks.calibration.problems.linear import Posterior, posterior
from benchmarks.calibration.race import keys, start
from benchmarks.harness.figures import legend, panels, save
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number
from eki_jax.solvers.protocol import makes_its_particles

TITLE = "Linear problem: posterior mean and covariance against the exact ones"
PARAMETERS, OUTPUTS = 10, 20
SIZES = {
    "smoke": ((10, 40), 2),
    "cpu": ((10, 30, 100, 300, 1000), 12),
    "full": ((10, 20, 50, 100, 200, 500, 1000, 2000), 100),
}


class Distance(NamedTuple):
    """How far a Gaussian is from the exact one.

    Attributes:
        mean: distance of the means, root mean square over the directions, in exact standard deviations.
        covariance: ``||C*^-1/2 C C*^-1/2 - I||_F / sqrt(P)``; 1 where the covariance is zero.
        variance: mean ratio of the variances, ``tr(C*^-1 C) / P``.
    """

    mean: float
    covariance: float
    variance: float


def distance(mean: np.ndarray, covariance: np.ndarray, exact: Posterior) -> Distance:
    """The distance of N(mean, covariance) from the exact Gaussian.

    >>> exact = Posterior(np.zeros(2), np.diag([4.0, 1.0]))
    >>> found = distance(np.array([2.0, 1.0]), np.diag([8.0, 2.0]), exact)
    >>> [round(float(number), 6) for number in found]
    [1.0, 1.0, 2.0]
    """
    inverse = np.linalg.inv(np.linalg.cholesky(exact.covariance))
    whitened = inverse @ covariance @ inverse.T
    size = len(mean)
    shift = inverse @ (mean - exact.mean)
    return Distance(
        float(np.sqrt(shift @ shift / size)),
        float(np.linalg.norm(whitened - np.eye(size)) / np.sqrt(size)),
        float(np.trace(whitened) / size),
    )


def moments(ensemble: Any) -> Posterior:
    """Mean and covariance of particles (J, P), the sum of the latter over J as in the library."""
    rows = np.asarray(ensemble, np.float64)
    return Posterior(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False, ddof=0)))


def calibrate(problem: InverseProblem, entry: Calibrator, particles: int, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Run a method to its end, once a seed, in double precision.

    Args:
        problem: linear problem.
        entry: method.
        particles: number of particles J, where the method does not make its own.
        seeds: seeds of the particles and of the method.

    Returns:
        For each seed the distance from the problem's ``posterior``; and for particles that went to time 1, ``own``, the
        largest difference from the exact update of the mean and the covariance that they started with.

    Raises:
        StepRefused: a step was refused.
    """
    rows = []
    with jax.enable_x64(True):
        update = jax.jit(lambda key, state, outputs, data: entry.make(problem, key).update(state, outputs, data))
        for seed in seeds:
            first, method, _ = keys(seed)
            solver = entry.make(problem, method)
            state = start(problem, solver, particles, first)
            prior = moments(solver.ensemble(state))
            found: list[Posterior] = []
            for _ in range(entry.steps):
                outputs = problem.simulate(method, solver.ensemble(state))
                state, info = update(method, state, outputs, jnp.asarray(problem.data))
                if not info.moved:
                    raise eki_jax.StepRefused(eki_jax.Reason(int(info.reason)))
                found.append(_gaussian(solver, state))
                if solver.done(state):
                    break
            steps = len(found)
            mean, covariance = mixed(found[-max(1, round(entry.averaged * steps)) :])
            row = {"seed": seed, "steps": steps, **distance(mean, covariance, posterior(problem))._asdict()}
            if not makes_its_particles(solver) and hasattr(state, "time") and abs(float(state.time) - 1) < 1e-9:
                own = posterior(problem, *prior)
                row["own"] = max(float(np.abs(a - b).max()) for a, b in zip((mean, covariance), own, strict=True))
            rows.append(row)
    return rows


def mixed(parts: list[Posterior]) -> Posterior:
    """Mean and covariance of the mixture of some Gaussians.

    >>> found = mixed([Posterior(np.zeros(1), np.eye(1)), Posterior(np.full(1, 2.0), np.eye(1))])
    >>> float(found.mean[0]), float(found.covariance[0, 0])
    (1.0, 2.0)
    """
    means = np.stack([part.mean for part in parts])
    between = np.atleast_2d(np.cov(means, rowvar=False, ddof=0)) if len(parts) > 1 else 0
    return Posterior(means.mean(axis=0), np.mean([part.covariance for part in parts], axis=0) + between)


def _gaussian(solver: eki_jax.Solver, state: Any) -> Posterior:
    """What a state says of the parameters."""
    if makes_its_particles(solver):
        return Posterior(np.asarray(state.position), np.asarray(state.covariance))
    return moments(state.position)


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Every method of ``LINEAR`` with every number of particles."""
    del peers
    sizes, seeds = SIZES[preset]
    problem = linear(PARAMETERS, OUTPUTS)
    cells.extra["problem"] = {"parameters": PARAMETERS, "outputs": OUTPUTS, "seeds": seeds, "sizes": list(sizes)}
    cells.extra["labels"] = {name: entry.label for name, entry in LINEAR.items()}
    for name, entry in LINEAR.items():
        for particles in sizes if not entry.own_particles else [2 * PARAMETERS + 1]:
            if not entry.least(PARAMETERS) <= particles <= entry.most:
                continue
            settings = {"particles": particles, "seeds": seeds, "steps": entry.steps}
            cells.get(f"{name} {particles}", settings, lambda: calibrate(problem, entry, particles, range(seeds)))  # noqa: B023


def medians(result: dict[str, Any], name: str, quantity: str) -> dict[int, float]:
    """The median over the seeds of one method's quantity, by the number of particles."""
    found = {}
    for key, cell in result["cells"].items():
        values = [row[quantity] for row in cell["found"] if quantity in row]
        if key.rpartition(" ")[0] == name and values:
            found[cell["settings"]["particles"]] = float(np.median(values))
    return found


def table(result: dict[str, Any]) -> str:
    """Errors of the mean and the variance for a small, a middle and a large ensemble, or of a method's only one."""
    sizes = result["problem"]["sizes"]
    shown = sizes if len(sizes) <= 3 else [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    header = ["method", "steps", *(f"mean, J = {n}" for n in shown), *(f"variance, J = {n}" for n in shown)]
    rows = []
    for name, label in result["labels"].items():
        mean, variance = (medians(result, name, quantity) for quantity in ("mean", "variance"))
        steps, own = (medians(result, name, quantity) for quantity in ("steps", "own"))
        only = [n for n in mean if n not in sizes or len(mean) == 1]
        columns = only + [0] * (len(shown) - 1) if only else shown  # no run has no particles
        rows.append([label + "".join(f" (J = {n})" for n in only), f"{max(steps.values()):.0f}"])
        rows[-1] += [number(values.get(n)) for values in (mean, variance) for n in columns]
        # The largest of the medians: rounding alone where the step is exact.
        rows[-1].append(f"{max(own.values()):.0e}" if own else "–")
    return markdown([*header, "from the exact update of its own prior"], rows)


ROUNDING = 1e-6  # below it an error is none


def draw(result: dict[str, Any], path: Path) -> None:
    """Errors of mean and covariance against J."""
    figure, (axes,) = panels(1, 2, (11, 5.4))
    titles = {"mean": "Error of the mean, in posterior standard deviations", "covariance": "Error of the covariance"}
    sizes = np.asarray(result["problem"]["sizes"], float)
    for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
        for index, (name, label) in enumerate(result["labels"].items()):
            values = medians(result, name, quantity)
            exact = max(values) if values[max(values)] < ROUNDING else None
            text = label if exact is None else f"{label}: exact to rounding from J = {_from(values)}"
            style = {"color": f"C{index % 10}", "marker": "osD^v<>Ph*X"[index % 11], "ls": "-" if index < 10 else "--"}
            axis.loglog(*zip(*values.items(), strict=True), label=text, ms=6, lw=1.3, **style)
        scale = medians(result, "etki", quantity)
        last = max(scale)
        axis.loglog(sizes, scale[last] * np.sqrt(last / sizes), color="0.8", lw=5, zorder=0, label="$J^{-1/2}$")
        axis.set(title=title, xlabel="particles J", ylim=(4e-3, 12))
    legend(figure, "", axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def _from(values: dict[int, float]) -> int:
    """The least J from which on an error is rounding alone."""
    large = [size for size, value in values.items() if value >= ROUNDING]
    return min(size for size in values if size > max(large, default=0))
