"""The method of a calibration: one by its name, or a function of the noise's covariance."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays, function, one_of
from eki_jax.calibrate.first import matched
from eki_jax.calibrate.joint import JointPrior
from eki_jax.calibrate.observations import Observations
from eki_jax.solvers import Solver, kalman
from eki_jax.solvers.failures import redraw_failed
from eki_jax.solvers.kalman.localization import Fitted, as_localization
from eki_jax.solvers.protocol import makes_its_particles

# Draws that stand for a mean and a covariance.
_DRAWS = 200


def solver_of(
    method: Any, prior: JointPrior, wanted: Observations, seed: int, localization: Any, inflation: Any
) -> Solver:
    """The solver of a calibration.

    Args:
        method: name of a method, or a function of the noise's covariance that returns a solver.
        prior: prior of the parameters.
        wanted: data and noise.
        seed: number from which its keys are made.
        localization: localization of a named method, which is told outputs by their names; None for none.
        inflation: inflation of a named method, or None.

    Raises:
        TypeError: a function that returns another thing; a localization or an inflation with it.
        ValueError: another name; noise that is correlated between outputs, with a localization; weights that do not
            fit.
    """
    if not callable(method):
        one_of("method", method, ("etki", "enkf"))
        if localization is None and inflation is None:
            return _standard(method, seed)
        if localization is None:
            return _named(method, seed, 1.0, inflation=inflation)
        near = _as_given(localization, prior.entry_shapes, wanted)
        return _named(method, seed, wanted.residual_noise(), localization=near, inflation=inflation)
    for name, value in (("localization", localization), ("inflation", inflation)):
        if value is not None:
            raise TypeError(f"{name}: {value!r} with a method of your own; wanted None, and it in that method")
    solver = function("method", method, "a method(noise_covariance) -> solver", arguments=1)(np.ones(wanted.size))
    if not isinstance(solver, Solver):
        raise TypeError(f"method: it returned {solver!r}; wanted an eki_jax.Solver, such as kalman.enkf(None, ...)")
    return solver


def started(solver: Solver, prior: JointPrior, particles: int, seed: int) -> Any:
    """The first state: particles that are drawn from the prior, or a mean and a covariance that are the prior's.

    Args:
        solver: solver of a calibration.
        prior: prior of the parameters.
        particles: number of members J.
        seed: number from which the draws are made.

    Raises:
        TypeError: a solver that makes its own particles and does not say what their covariance is.
        ValueError: another number of members than such a solver makes.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if not makes_its_particles(solver):
        draws = jax.random.normal(key, (particles, prior.size))
        return solver.init(prior.split(jnp.asarray(matched(np.asarray(draws, np.float64)), draws.dtype)))
    state = solver.init(prior.latent().mean, key)
    if not hasattr(state, "covariance"):
        raise TypeError("method: its solver makes its own particles, of no covariance; wanted etki or uki, for example")
    if (made := len(jax.tree.leaves(solver.ensemble(state))[0])) != particles:
        raise ValueError(f"particles: {particles}; wanted {made}, those that the method makes itself")
    return state


def predicting(solver: Solver, state: Any, healthy: np.ndarray) -> dict[str, np.ndarray]:
    """The latent particles to predict with, shape (N, size) for each entry of the prior.

    Those of a state that looks ahead, or is inflated, are not where it asks; and a mean and a covariance stand for
    draws, always the same ones, that have them.

    Args:
        solver: solver of a calibration.
        state: state of it.
        healthy: flags of the members that took part in the last step, shape (J,).
    """
    if not makes_its_particles(solver):
        position = getattr(state, "position", None) or solver.ensemble(state)
        return {name: np.asarray(values)[healthy] for name, values in position.items()}
    means = {name: np.asarray(values, np.float64) for name, values in state.position.items()}
    names, size = sorted(means), sum(len(mean) for mean in means.values())  # in the order of JAX's leaves
    draws = matched(np.random.default_rng(0).normal(size=(max(_DRAWS, 4 * size), size)))
    rows = draws @ _root(np.asarray(state.covariance, np.float64)).T + np.concatenate([means[name] for name in names])
    ends = np.cumsum([len(means[name]) for name in names])
    return dict(zip(names, np.split(rows, ends[:-1], axis=1), strict=True))


def _as_given(localization: Any, shapes: Mapping[str, tuple[int, ...]], wanted: Observations) -> kalman.Localization:
    """A localization of the latent rows and the observed numbers, from one of parameters and data as they are given.

    Args:
        localization: one of the shapes of the prior's entries and of the data; or weights, whose rows and columns are
            in the order in which prior and data were given.
        shapes: shapes of the prior's entries.
        wanted: data and noise.

    Raises:
        TypeError: no localization.
        ValueError: weights of another shape, or out of [0, 1].
    """
    # JAX has the names of a dict in their order, whatever that of a caller is.
    places = wanted.split(np.arange(len(wanted.data))[None])
    order = np.concatenate([places[name].ravel() for name in sorted(places)])
    if not isinstance(localization, kalman.Localization):
        localization = _weights(localization, shapes, len(order))
        localization = {name: weights[..., order] for name, weights in localization.items()}
    given: kalman.Localization = as_localization(localization)  # type: ignore[assignment]  # which is not None
    blank = lambda sizes: {name: np.zeros((1, *shape), np.float32) for name, shape in sizes.items()}
    seen = np.flatnonzero(wanted.observed[order])

    def fit(ensemble: Any, outputs: Any) -> Fitted:
        fitted = given.fit(blank(shapes), blank(wanted.shapes))
        if fitted.looks:  # at the anomalies of what was observed
            return given.fit(ensemble, outputs)
        return fitted._replace(weights=lambda place, *rows: fitted.weights(place, *rows)[seen])

    return kalman.Localization(fit)


def _weights(weights: Any, shapes: Mapping[str, tuple[int, ...]], number: int) -> dict[str, np.ndarray]:
    """Weights by the names of the prior's entries, shape (..., N) each."""
    wanted = {name: (*shape, number) for name, shape in shapes.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    words = (
        f"wanted ({sum(sizes)}, {number}), a weight of each of the data for every number of the prior, or a dict of "
        f"arrays of shapes {wanted}"
    )
    if isinstance(weights, Mapping):
        found = {name: np.asarray(arrays(f"localization[{name!r}]", part)) for name, part in weights.items()}
        if {name: part.shape for name, part in found.items()} != wanted:
            raise ValueError(f"localization: of shapes { {name: part.shape for name, part in found.items()} }; {words}")
        return found
    table = np.asarray(arrays("localization", weights))
    if table.shape != (sum(sizes), number):
        raise ValueError(f"localization: of shape {table.shape}; {words}")
    parts = np.split(table, np.cumsum(sizes)[:-1])
    return {name: part.reshape(wanted[name]) for name, part in zip(wanted, parts, strict=True)}


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


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
