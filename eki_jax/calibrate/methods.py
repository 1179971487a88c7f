"""The method of a calibration: one by its name, or a function of the noise's covariance."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from eki_jax._checks import function, one_of
from eki_jax.calibrate.observations import Observations
from eki_jax.solvers import Solver, kalman
from eki_jax.solvers.failures import redraw_failed
from eki_jax.solvers.protocol import makes_its_particles


def solver_of(method: Any, wanted: Observations, seed: int, localization: Any, inflation: Any) -> Solver:
    """The solver of a calibration.

    Args:
        method: name of a method, or a function of the noise's covariance that returns a solver.
        wanted: data and noise.
        seed: number from which its keys are made.
        localization: localization of a named method, which is told outputs by their names; None for none.
        inflation: inflation of a named method, or None.

    Raises:
        TypeError: a function that returns another thing; a localization or an inflation with it.
        ValueError: another name; noise that is correlated between outputs, with a localization.
    """
    if not callable(method):
        one_of("method", method, ("etki", "enkf"))
        if localization is None and inflation is None:
            return _standard(method, seed)
        noise = 1.0 if localization is None else wanted.residual_noise()
        return _named(method, seed, noise, localization=localization, inflation=inflation)
    for name, value in (("localization", localization), ("inflation", inflation)):
        if value is not None:
            raise TypeError(f"{name}: {value!r} with a method of your own; wanted None, and it in that method")
    solver = function("method", method, "a method(noise_covariance) -> solver", arguments=1)(np.ones(wanted.size))
    if not isinstance(solver, Solver):
        raise TypeError(f"method: it returned {solver!r}; wanted an eki_jax.Solver, such as kalman.enkf(None, ...)")
    if makes_its_particles(solver):
        raise TypeError("method: its solver makes its own particles; wanted one that starts from an ensemble")
    return solver


@functools.lru_cache(maxsize=8)
def _standard(method: str, seed: int) -> Solver:
    """A method by its name; kept, so that a second calibration of the same seed and sizes compiles nothing."""
    return _named(method, seed, 1.0)


def _named(method: str, seed: int, noise_covariance: Any, **settings: Any) -> Solver:
    key = jax.random.key(seed)
    failures, schedule = redraw_failed(jax.random.fold_in(key, 1)), kalman.data_misfit_controller()
    if method == "etki":
        return kalman.etki(None, noise_covariance, schedule, failures=failures, **settings)
    draws = jax.random.fold_in(key, 2)
    return kalman.enkf(None, noise_covariance, schedule, key=draws, failures=failures, **settings)
