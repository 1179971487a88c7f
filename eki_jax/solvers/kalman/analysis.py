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
from eki_jax.kernel.particles import ensemble_size, local_size, wide_dtype
from eki_jax.kernel.products import Products, centred
from eki_jax.solvers.kalman.differences import raw_differences
from eki_jax.solvers.kalman.inflation import inflated
from eki_jax.solvers.kalman.localization import LocalProducts, as_localization
from eki_jax.solvers.kalman.noise_covariance import Data, NoiseCovariance, as_noise_covariance, fitted, is_usable
from eki_jax.solvers.kalman.settings import KalmanSettings
from eki_jax.solvers.kalman.tempering import TemperingFn, check_step_size
from eki_jax.solvers.kalman.tikhonov import prior_residuals, whitened_prior
from eki_jax.solvers.protocol import (
    Info,
    Options,
    SharedSettings,
    Solver,
    bad_targets,
    check_rows,
    check_settings,
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
    """The linear-Gaussian problem of one step. Rows of failed particles are zero.

    Attributes:
        ensemble: particles, shape (J, ...).
        raw: differences ``G_j - y`` in the outputs' units, shape (J, M), with one y for all particles.
        shifts: differences of each particle's own data from these, ``y_j - y``, shape (J, M); None for common data.
        covariance: covariance Gamma, which whitens them.
        prior: whitened differences ``u_j - m_0``, shape (J, P), where a prior is imposed; else None.
        residuals: whitened ``raw``, the prior's differences last, whose noise has covariance I; shape (J, M or M + P).
        noise: draws around the data, whitened, in the shape of ``residuals``; None for none.
        perturbed: whitened differences from each particle's own data, less the noise: what it is moved by.
        step_size: step size h.
        healthy: flags of the particles that take part, shape (J,).
        axis: devices over which the particles are spread.
        precision: precision of the products with the ensemble.
    """

    ensemble: Ensemble
    raw: Array
    shifts: Array | None
    covariance: NoiseCovariance
    prior: Array | None
    residuals: Array
    noise: Array | None
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

    def mean_residual(self, size: Array) -> Array:
        """The mean of the healthy particles' residuals, shape (M,); ``size`` is the number of those."""
        return self.axis.sum(jnp.sum(self.residuals, axis=0)) / size

    def products(self, outputs: Array, cotangents: Array) -> Products:
        """The kernel's products of the ensemble with outputs and cotangents, shape (J, K) each."""
        settings: Any = {"healthy": self.healthy, "axis": self.axis, "precision": self.precision}
        return Products.of(self.ensemble, outputs, cotangents, **settings)


class Method(NamedTuple):
    """What one Kalman method does with the system of a step.

    Attributes:
        name: name of the method in errors.
        solve: function of a :class:`System` that returns the kernel's products with the ensemble.
        combination: function ``(scale, Z, own, residuals, mean) -> W`` for an analysis of single parameters: the
            direction of a column of deviations U is ``W U / J``. It is given h / J, the anomalies of all particles, the
            function that takes this device's rows, its rows of the residuals, perturbed or not, and their mean.
    """

    name: str
    solve: Callable[[System], Products]
    combination: Callable[..., Array]


def analysis(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn,
    method: Method,
    settings: KalmanSettings,
    key: Array | None = None,
) -> Solver:
    """A Kalman step as a solver, from how it solves its linear system.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise; None where the targets bring it.
        step_size: step size h > 0, or a function of the misfits and the time.
        method: name and algebra of the method.
        settings: keywords that all Kalman steps share.
        key: JAX random key of the data's perturbations, or None for none.
    """
    covariance = None if noise_covariance is None else as_noise_covariance(noise_covariance)
    check_step_size(step_size)
    check_settings(settings, KalmanSettings)
    prior, localization, inflation = settings.get("prior"), settings.get("localization"), settings.get("inflation")
    shared = {name: value for name, value in settings.items() if name in SharedSettings.__optional_keys__}
    options = Options.of(shared, SharedSettings)
    axis, local = options.axis, as_localization(localization)
    whitened = None if prior is None else whitened_prior(prior)
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    if key is not None:
        key = particle_key("key", key)

    def init(ensemble: Ensemble) -> KalmanState:
        ensemble_size(ensemble, axis_name=options.axis_name)
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(ensemble)))
        return KalmanState(ensemble, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def update(state: KalmanState, outputs: Any, targets: Any) -> tuple[KalmanState, Info]:
        check_state(state, KalmanState, method.name)
        check_rows(outputs, local_size(state.ensemble, name="ensemble"))
        gamma, targets = covariance_and_data(covariance, targets, outputs)
        own_raw, raw = raw_differences(arrays("outputs", outputs), arrays("targets", targets), options)
        # Whitened before anything is multiplied: data of many magnitudes, and the noise's own, keep their digits.
        residuals = gamma.whiten(raw)
        own = residuals if own_raw is raw else gamma.whiten(own_raw)
        of_prior = None if whitened is None else prior_residuals(whitened, state.ensemble).astype(residuals.dtype)
        if of_prior is not None:
            residuals, own = (jnp.concatenate([rows, of_prior], axis=1) for rows in (residuals, own))
        misfits = 0.5 * jnp.sum(own * own, axis=1)
        healthy = health(own, own, misfits, (state.ensemble,), options)
        shifts = None if own_raw is raw else jnp.where(healthy[:, None], raw - own_raw, 0)
        raw, residuals, own = (jnp.where(healthy[:, None], rows, 0) for rows in (raw, residuals, own))
        if of_prior is not None:
            of_prior = jnp.where(healthy[:, None], of_prior, 0)
        misfits = jnp.where(healthy, misfits, jnp.nan)
        h: Any = step_size
        if callable(step_size):
            h = step_size(axis.gathered(misfits), residuals.shape[1], state.time, state.count)
            # The same number everywhere, which shard_map cannot know of gathered misfits.
            h = axis.mean(real("step_size", h, NOT_NEGATIVE))
        h = jnp.asarray(real("step_size", h, NOT_NEGATIVE), residuals.dtype)
        noise, perturbed = None, own
        if key is not None:
            noise = _noise(jax.random.fold_in(key, state.count), residuals, options.axis_name)
            noise = jnp.where(h > 0, jax.lax.rsqrt(jnp.where(h > 0, h, 1)), 0) * noise
            perturbed = jnp.where(healthy[:, None], own - noise, 0)
        system = System(
            state.ensemble,
            raw,
            shifts,
            gamma,
            of_prior,
            residuals,
            noise,
            perturbed,
            h,
            healthy,
            axis,
            options.precision,
        )
        if local is None:
            products: Any = method.solve(system)
        else:
            products = LocalProducts.of(system, method.combination, local, outputs)
        blocks = lambda d, u: (u - h.astype(d.dtype) * d,)
        refusals = (
            (Reason.ENDED, done(state)),
            (Reason.TARGETS, bad_targets(targets, options.targets_axis)),
            (Reason.SETTING, ~is_usable(gamma)),
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
        check_state(state, KalmanState, method.name)
        x, targets = pair("batch", batch)
        outputs = evaluate(
            given(forward),
            state.ensemble,
            x,
            chunk_size=options.chunk_size,
            axis_name=options.axis_name,
            precision=options.precision,
        )
        return update(state, outputs, targets)

    def estimate(state: KalmanState) -> Params:
        return particle_mean(state.ensemble, axis_name=options.axis_name)

    def done(state: KalmanState) -> Array:
        return state.time >= 1 if callable(step_size) else never_done(state)

    solver = compiled(
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
    return solver if inflation is None else inflated(solver, inflation, options.axis_name)


def covariance_and_data(covariance: NoiseCovariance | None, targets: Any, outputs: Any) -> tuple[NoiseCovariance, Any]:
    """The covariance of these outputs, and the data: the targets, or what they are with a covariance of their own."""
    if isinstance(targets, Data):
        name = "targets.noise_covariance"
        return fitted(as_noise_covariance(targets.noise_covariance, name), outputs, name), targets.values
    if covariance is None:
        raise TypeError(
            "noise_covariance: None; wanted a covariance, or targets that are Data(values, noise_covariance)"
        )
    return fitted(covariance, outputs), targets


def _noise(key: Array, residuals: Array, axis_name: str | None) -> Array:
    """Draws of N(0, I), shape (J, M), that do not depend on how the particles are spread."""
    keys = particle_keys(key, residuals.shape[0], axis_name)
    return jax.vmap(lambda k: jax.random.normal(k, residuals.shape[1:], residuals.dtype))(keys)
