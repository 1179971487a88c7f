"""The race to a target: iterations and simulator runs until the misfit at the mean particle is small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.calibration.methods import Calibrator
from benchmarks.calibration.problems import InverseProblem
from eki_jax.solvers.protocol import makes_its_particles

TARGET = 1.0
ITERATIONS = 20


class Outcome(NamedTuple):
    """How one race went.

    Attributes:
        seed: seed of the particles, the method and the simulator.
        reached: flag, True where the target was reached.
        iterations: number of iterations until then, or until the end.
        runs: number of simulator runs of the particles in these iterations.
        ended: word for why it stopped: "reached", "time 1" (the method's own end), "limit", or the refusal's reason.
        misfits: root-mean-square misfits at the means, before every iteration and after the last.
        spread: root mean square of the last ensemble's standard deviations.
        error: root mean square of the last mean's distance from the truth.
        failed: number of particles that took no part, summed over the iterations.
    """

    seed: int
    reached: bool
    iterations: int
    runs: int
    ended: str
    misfits: list[float]
    spread: float
    error: float
    failed: int


def race(
    problem: InverseProblem, entry: Calibrator, particles: int, seeds: Iterable[int], limit: int = ITERATIONS
) -> list[dict[str, Any]]:
    """Run a method once a seed until the simulator at its mean is within the target, as EKIRace does.

    Before every iteration, and after the last, the simulator runs at the mean particle, from an initial condition of
    its own; the race is over where the root-mean-square misfit of that one run is below 1. These runs are the race's
    and are not counted; those of the particles are.

    Args:
        problem: problem to calibrate.
        entry: method.
        particles: number of particles J drawn from the prior, where the method does not make its own.
        seeds: seeds of the particles, of the method and of the simulator's initial conditions.
        limit: largest number of iterations.

    Returns:
        An :class:`Outcome` of each seed, as a dict.
    """
    # Compiled once for all seeds: the method's key is an argument.
    update = jax.jit(lambda key, state, outputs, data: entry.make(problem, key).update(state, outputs, data))
    return [_run(problem, entry, update, particles, seed, limit)._asdict() for seed in seeds]


def keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of a run: of its first particles, of the method, and of the simulator."""
    first, method, simulator = jax.random.split(jax.random.key(seed), 3)
    return first, method, simulator


def start(problem: InverseProblem, solver: eki_jax.Solver, particles: int, key: jax.Array) -> Any:
    """A solver's state at the prior: particles drawn from it, or its mean."""
    if makes_its_particles(solver):
        return solver.init(jnp.asarray(problem.prior_mean, float), key)
    return solver.init(problem.draw(key, particles))


def _run(problem: InverseProblem, entry: Calibrator, update: Any, particles: int, seed: int, limit: int) -> Outcome:
    first, method, simulator = keys(seed)
    solver = entry.make(problem, method)
    state = start(problem, solver, particles, first)
    misfits: list[float] = []
    runs = failed = iterations = 0
    while True:
        at_mean, at_particles = jax.random.split(jax.random.fold_in(simulator, iterations))
        mean = solver.estimate(state)
        misfits.append(problem.misfit(problem.simulate(at_mean, mean[None])[0]))
        if misfits[-1] < TARGET or solver.done(state) or iterations == limit:
            ended = "reached" if misfits[-1] < TARGET else "time 1" if solver.done(state) else "limit"
            break
        ensemble = solver.ensemble(state)
        outputs = problem.simulate(at_particles, ensemble)
        state, info = update(method, state, outputs, jnp.asarray(problem.data, outputs.dtype))
        runs, iterations, failed = runs + len(ensemble), iterations + 1, failed + int(info.failed)
        if not info.moved:
            ended = f"refused: {eki_jax.Reason(int(info.reason)).name}"
            break
    ensemble = np.asarray(solver.ensemble(state), np.float64)
    spread = float(np.sqrt(np.mean(ensemble.var(axis=0, ddof=1))))
    error = float(np.sqrt(np.mean((np.asarray(mean, np.float64) - problem.truth) ** 2)))
    return Outcome(seed, ended == "reached", iterations, runs, ended, misfits, spread, error, failed)
