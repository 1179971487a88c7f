"""What all Kalman steps of an ensemble share: residuals, misfits, tempering, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, arrays, function, pair, real
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.health import particle_mean
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.particles import ensemble_size, flatten_outputs, local_size, wide_dtype
from eki_jax.kernel.products import Products, centred
from eki_jax.solvers.kalman.noise_covariance import NoiseCovariance, check_size, is_usable
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.protocol import (
    Info,
    Options,
    Solver,
    bad_targets,
    check_rows,
    check_state,
    compiled,
    given,
    health,
    never_done,
    one_pass_a_particle,
    take_step,
)
from eki_jax.solvers.reasons import Reason


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
    """The linear-Gaussian problem of one step, whitened: noise of covariance I. Rows of failed particles are zero.

    Attributes:
        ensemble: particles, shape (J, ...).
        residuals: differences ``G_j - y``, shape (J, M).
        perturbed: differences from each particle's own data, ``G_j - y - xi_j``, shape (J, M).
        step_size: step size h.
        healthy: flags of the particles that take part, shape (J,).
        axis: devices over which the particles are spread.
        precision: precision of the products with the ensemble.
    """

    ensemble: Ensemble
    residuals: Array
    perturbed: Array
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
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    if key is not None:
        key = particle_key("key", key)

    def init(ensemble: Ensemble) -> KalmanState:
        ensemble_size(ensemble, axis_name=options.axis_name)
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(ensemble)))
        return KalmanState(ensemble, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def update(state: KalmanState, outputs: Any, targets: Any) -> tuple[KalmanState, Info]:
        check_state(state, KalmanState, "enkf")
        check_rows(outputs, local_size(state.ensemble, name="ensemble"))
        residuals = _residuals(arrays("outputs", outputs), arrays("targets", targets), options.targets_axis)
        check_size(covariance, residuals.shape[1])
        # Whitened before anything is multiplied: data of many magnitudes, and the noise's own, keep their digits.
        residuals = covariance.whiten(residuals)
        misfits = 0.5 * jnp.sum(residuals * residuals, axis=1)
        healthy = health(residuals, residuals, misfits, (state.ensemble,), options)
        residuals = jnp.where(healthy[:, None], residuals, 0)
        misfits = jnp.where(healthy, misfits, jnp.nan)
        h: Any = step_size
        if callable(step_size):
            h = step_size(axis.gathered(misfits), residuals.shape[1], state.time, state.count)
            h = axis.mean(h)  # the same number everywhere, which shard_map cannot know of gathered misfits
        h = jnp.asarray(real("step_size", h, NOT_NEGATIVE), residuals.dtype)
        perturbed = residuals
        if key is not None:
            noise = _noise(jax.random.fold_in(key, state.count), residuals, options.axis_name)
            perturbed = residuals - jnp.where(h > 0, jax.lax.rsqrt(jnp.where(h > 0, h, 1)), 0) * noise
            perturbed = jnp.where(healthy[:, None], perturbed, 0)
        products = solve(System(state.ensemble, residuals, perturbed, h, healthy, axis, options.precision))
        blocks = lambda d, u: (u - h.astype(d.dtype) * d,)
        refusals = (
            (Reason.ENDED, done(state)),
            (Reason.TARGETS, bad_targets(targets, options.targets_axis)),
            (Reason.SETTING, ~is_usable(covariance)),
        )
        (ensemble,), info = take_step(
            products, (state.ensemble,), blocks, misfits, h, products.norm(), healthy, state.count, options, *refusals
        )
        taken = h.astype(state.time.dtype)
        later = state.time + taken
        if callable(step_size):  # tempering ends at exactly 1, whatever the rounding of its sum
            later = jnp.where(taken >= 1 - state.time, 1, later).astype(later.dtype)
        time = jnp.where(info.moved, later, state.time)
        return KalmanState(ensemble, time, state.count + info.moved.astype(state.count.dtype)), info

    def step(state: KalmanState, batch: Batch) -> tuple[KalmanState, Info]:
        check_state(state, KalmanState, "enkf")
        x, targets = pair("batch", batch)
        return update(state, evaluate(given(forward), state.ensemble, x, chunk_size=options.chunk_size), targets)

    def estimate(state: KalmanState) -> Params:
        return particle_mean(state.ensemble, axis_name=options.axis_name)

    def done(state: KalmanState) -> Array:
        return state.time >= 1 if callable(step_size) else never_done(state)

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: state.ensemble,
            estimate,
            lambda state, ensemble: state._replace(ensemble=ensemble),
            done,
            one_pass_a_particle,
        )
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


def _noise(key: Array, residuals: Array, axis_name: str | None) -> Array:
    """Draws of N(0, I), shape (J, M), that do not depend on how the particles are spread."""
    keys = particle_keys(key, residuals.shape[0], axis_name)
    return jax.vmap(lambda k: jax.random.normal(k, residuals.shape[1:], residuals.dtype))(keys)
