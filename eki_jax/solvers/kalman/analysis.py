"""What all Kalman steps of an ensemble share: residuals, misfits, tempering, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.particles import (
    ensemble_size,
    finite_particles,
    flatten_outputs,
    local_size,
    particle_mean,
    wide_dtype,
)
from eki_jax.kernel.products import Products, centred
from eki_jax.solvers.kalman.noise_covariance import NoiseCovariance, check_size
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.protocol import (
    Info,
    Options,
    Solver,
    check_rows,
    given,
    never_done,
    one_pass_a_particle,
    take_step,
)

# Rounding that a sum of step sizes may leave between the end of tempering and 1.
_END = 1 - 1e-5


class KalmanState(NamedTuple):
    """State of a Kalman step.

    Attributes:
        ensemble: particles, shape (J, ...); where the outputs of the next step are wanted.
        time: sum of the step sizes so far; tempering ends at 1.
        count: number of steps taken, int32.
    """

    ensemble: Ensemble
    time: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble


class System(NamedTuple):
    """The linear-Gaussian problem of one step.

    Attributes:
        ensemble: particles, shape (J, ...).
        residuals: differences ``G_j - y``, shape (J, M).
        perturbed: differences from each particle's own data, ``G_j - y - xi_j``, shape (J, M).
        covariance: covariance Gamma of the noise.
        step_size: step size h.
        healthy: flags of the particles that take part, shape (J,).
        axis: devices over which the particles are spread.
        precision: precision of the products with the ensemble.
    """

    ensemble: Ensemble
    residuals: Array
    perturbed: Array
    covariance: NoiseCovariance
    step_size: Array
    healthy: Array
    axis: Axis
    precision: Any

    def anomalies(self) -> tuple[Array, Array]:
        """The centred outputs of the healthy particles, shape (J, M), and the number of those."""
        count = self.axis.sum(jnp.sum(self.healthy, dtype=jnp.int32))
        size = jnp.maximum(count, 1).astype(self.residuals.dtype)
        return centred(self.residuals, self.healthy, size, self.axis), size


def analysis(
    forward: ForwardFn | None,
    covariance: NoiseCovariance,
    step_size: float | TemperingFn,
    solve: Callable[[System], Products],
    options: Options,
    key: Array | None = None,
) -> Solver:
    """A Kalman step as a solver, from how it solves its linear system.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        covariance: covariance Gamma of the noise.
        step_size: step size h > 0, or a function of the misfits and the time.
        solve: function of a :class:`System` that returns the kernel's products with the ensemble.
        options: settings of the solver.
        key: JAX random key of the data's perturbations, or None for none.
    """
    axis = options.axis

    def init(ensemble: Ensemble) -> KalmanState:
        ensemble_size(ensemble, axis_name=options.axis_name)
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(ensemble)))
        return KalmanState(ensemble, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def update(state: KalmanState, outputs: Any, targets: Any) -> tuple[KalmanState, Info]:
        check_rows(outputs, local_size(state.ensemble, name="ensemble"))
        residuals = _residuals(outputs, targets, options.targets_axis)
        check_size(covariance, residuals.shape[1])
        healthy = finite_particles(residuals)
        residuals = jnp.where(healthy[:, None], residuals, 0)
        misfits = 0.5 * jnp.sum(residuals * covariance.solve(residuals), axis=1)
        misfits = jnp.where(healthy, misfits, jnp.nan)
        h: Any = step_size
        if callable(step_size):
            h = step_size(axis.gathered(misfits), residuals.shape[1], state.time, state.count)
            h = axis.mean(h)  # the same number everywhere, which shard_map cannot know of gathered misfits
        h = jnp.asarray(h, residuals.dtype)
        perturbed = residuals
        if key is not None:
            noise = _noise(jax.random.fold_in(key, state.count), covariance, residuals, options.axis_name)
            perturbed = residuals - jnp.where(h > 0, jax.lax.rsqrt(jnp.where(h > 0, h, 1)), 0) * noise
        products = solve(System(state.ensemble, residuals, perturbed, covariance, h, healthy, axis, options.precision))
        blocks = lambda d, u: (u - h.astype(d.dtype) * d,)
        (ensemble,), info = take_step(
            products, (state.ensemble,), blocks, misfits, h, products.norm(), healthy, state.count, options
        )
        time = state.time + jnp.where(info.moved, h, 0).astype(state.time.dtype)
        return KalmanState(ensemble, time, state.count + 1), info

    def step(state: KalmanState, batch: Batch) -> tuple[KalmanState, Info]:
        x, targets = batch
        return update(state, evaluate(given(forward), state.ensemble, x, chunk_size=options.chunk_size), targets)

    def estimate(state: KalmanState) -> Params:
        return particle_mean(state.ensemble, axis_name=options.axis_name)

    def done(state: KalmanState) -> Array:
        return state.time >= _END if callable(step_size) else never_done(state)

    return Solver(
        init,
        step,
        update,
        lambda state: state.ensemble,
        estimate,
        lambda state, ensemble: state._replace(ensemble=ensemble),
        done,
        one_pass_a_particle,
    )


def _residuals(outputs: Any, targets: Any, targets_axis: int | None) -> Array:
    """``G(u_j) - y``, or ``G(u_j) - y_j`` for targets of each particle's own, as one array of shape (J, M)."""
    size = local_size(outputs, name="outputs")
    flat = flatten_outputs(outputs, size, name="outputs")
    own = targets_axis == 0
    wanted = jax.tree.map(lambda leaf: jnp.shape(leaf)[0 if own else 1 :], outputs)
    found = jax.tree.map(jnp.shape, targets)
    if wanted != found:
        what = "the outputs', a row for every particle" if own else "one particle's outputs"
        raise ValueError(f"targets: shape {found}; wanted that of {what}, {wanted}")
    rows = targets if own else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], targets)
    return flat.astype(wide_dtype(flat.dtype)) - flatten_outputs(rows, size if own else 1, name="targets")


def _noise(key: Array, covariance: NoiseCovariance, residuals: Array, axis_name: str | None) -> Array:
    """Draws of N(0, Gamma), shape (J, M), that do not depend on how the particles are spread."""
    keys = particle_keys(key, residuals.shape[0], axis_name)
    return jax.vmap(lambda k: covariance.noise(k, residuals.shape[1], residuals.dtype))(keys)
