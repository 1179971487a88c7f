r"""Interacting Langevin samplers: particles that keep moving, as draws of the posterior.

.. math:: du_j = -C_{uw} \Gamma^{-1} (G(u_j) - y)\,dt - C\,C_0^{-1} (u_j - m_0)\,dt
                 + \tfrac{P + 1}{J} (u_j - \bar u)\,dt + \sqrt{2}\,C^{1/2} dW_j

with C the ensemble's covariance of P parameters and, for its root, the deviations themselves over :math:`\sqrt J`, so
that W_j has J components and nothing of size P x P exists. All of it is a combination of the particles.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, arrays, flag, function, pair, real
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params, StepSizeFn
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.health import particle_mean
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.linear_algebra import HIGHEST, eigen, spectral
from eki_jax.kernel.particles import ensemble_size, local_size, wide_dtype
from eki_jax.kernel.products import Products, centred
from eki_jax.solvers.kalman.analysis import covariance_and_data
from eki_jax.solvers.kalman.differences import whitened_differences
from eki_jax.solvers.kalman.noise_covariance import as_noise_covariance, is_usable
from eki_jax.solvers.kalman.tikhonov import prior_residuals, whitened_prior
from eki_jax.solvers.protocol import (
    Info,
    Options,
    SharedSettings,
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

if TYPE_CHECKING:
    from jaxtyping import Float

# A drift this many times as long as a stationary one, in root mean square, is met by shorter steps.
_FAR = 2.0


class LangevinState(NamedTuple):
    """State of :func:`aldi`.

    Attributes:
        ensemble: particles, shape (J, ...); where the outputs of the next step are wanted, and draws of the posterior.
        time: sum of the step sizes so far.
        count: number of steps taken, int32.
    """

    ensemble: Ensemble
    time: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble


def aldi(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | StepSizeFn = 0.5,
    *,
    prior: Any,
    key: Array,
    correction: bool = True,
    **settings: Unpack[SharedSettings],
) -> Solver:
    r"""The affine-invariant interacting Langevin sampler without derivatives, as a solver that never ends.

    (Garbuno-Inigo, Nuesken and Reich, SIAM Journal on Applied Dynamical Systems 19, 2020; without the correction the
    ensemble Kalman sampler of Garbuno-Inigo, Hoffmann, Li and Stuart, the same journal 19, 2020.) For a linear model
    the particles of the dynamics above, once they have forgotten their start, are draws of the posterior at every
    :math:`J > P + 1`; without the correction their covariance is too small by a share of about :math:`(P + 1) / J`.

    In a step the deviations are held, which makes of the model's linearization by them an Ornstein-Uhlenbeck process in
    the J weights of the particles. With Z and V the deviations of the outputs and of the parameters, whitened by the
    noise and by the prior, and r_j and v_j the differences of particle j from the data and from the prior's mean,

    .. math:: H = \tfrac1J (Z Z^T + V V^T), \quad g_j = \tfrac{1}{\sqrt J}(Z r_j + V v_j), \quad
              a_j = -H^{-1}(I - e^{-H dt})\, g_j + \tfrac{P + 1}{J} dt\, e^{-H dt} \sqrt J\, e_j
                    + \bigl(H^{-1} (I - e^{-2 H dt})\bigr)^{1/2} \xi_j,

    and :math:`u_j \leftarrow u_j + \tfrac{1}{\sqrt J} \sum_k a_{jk} (u_k - \bar u)`. This process is taken exactly, at
    any length of the step: for a linear model the step is stable and its noise makes the posterior's covariance, where
    Euler and Maruyama's would diverge or be off by a multiple of dt. The correction is damped with the step, which
    makes the law right to first order in P / J at every dt.

    Statistics are taken over particles and over steps, after some ten units of ``state.time`` for the start::

        _, draws = jax.lax.scan(lambda s, _: (s := solver.step(s, batch)[0], s.ensemble), state, length=1000)

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, as for :func:`enkf`.
        step_size: longest step dt > 0, in units of the relaxation to the posterior: neighbouring draws have a
            correlation of :math:`e^{-dt}`. Far from the stationary state, where :math:`\|D\|_F > 2 J \sqrt P`, it is
            shortened by that factor, so that a step does not leave what the particles know. A function
            ``step_size(drift_norm, J, count) -> dt``, such as :func:`eki_jax.constant_step_size` and
            :func:`eki_jax.frobenius_step_size`, is taken as it is; one that looks at the ensemble in its stationary
            state makes a law that is off by some percent.
        prior: Gaussian prior with an inverse covariance, from :func:`eki_jax.gaussian`.
        key: JAX random key of the noise; folded with the count of steps and each particle's index.
        correction: flag; False leaves out the term of finite ensembles, :math:`(P + 1) / J`.
        **settings: keywords that all solvers of ensembles share, see :class:`eki_jax.SharedSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`LangevinState`. In its ``Info``, ``losses`` are the misfits
        ``1/2 ||y - G(u_j)||^2_Gamma``, ``step_size`` is dt, and ``drift_norm`` is the norm of
        :math:`D_{jk} = \langle z_k, r_j \rangle + \langle V_k, v_j \rangle`, J times that of the weights' drift.

    Raises:
        TypeError: a prior that is no Gaussian, or one whose covariance is a function; a key that is none; an unknown
            setting.
        ValueError: a step size <= 0; a singular prior; from ``init``, J <= P + 1 with the correction, for which the
            particles do not span the parameters; outputs or targets that do not fit. Without the correction that is a
            warning: the draws stay in the span of the first particles.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> prior = eki_jax.gaussian(jnp.zeros(1), 1.0)
    >>> solver = aldi(lambda u, x: x * u, 1.0, prior=prior, key=jax.random.key(0))
    >>> state = solver.init(eki_jax.sample_ensemble(jax.random.key(1), prior, 20))
    >>> step = lambda s, _: (s := solver.step(s, (2.0, jnp.array([5.0])))[0], s.ensemble)
    >>> _, draws = jax.lax.scan(step, state, length=500)
    >>> draws[20:].mean().round(1), draws[20:].var().round(1)  # the posterior N(2, 0.2)
    (Array(2., dtype=float32), Array(0.2, dtype=float32))
    """
    covariance = None if noise_covariance is None else as_noise_covariance(noise_covariance)
    if callable(step_size):
        function("step_size", step_size, "a number, or a function of drift norm, J and count", arguments=3)
    else:
        real("step_size", step_size, POSITIVE, or_="a function such as constant_step_size(0.1)")
    flag("correction", correction)
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    options = Options.of(settings, SharedSettings)
    whitened = whitened_prior(prior)
    own_key = particle_key("key", key)
    axis = options.axis

    def init(ensemble: Ensemble) -> LangevinState:
        size = ensemble_size(ensemble, axis_name=options.axis_name)
        parameters = prior_residuals(whitened, ensemble).shape[1]  # raises where they are not the prior's
        if correction and size <= parameters + 1:
            raise ValueError(
                f"ensemble: J = {size} particles for P = {parameters} parameters; wanted more than P + 1, so that they "
                "span the parameters, or correction=False"
            )
        if size <= parameters:
            warnings.warn(
                f"ensemble: J = {size} particles for P = {parameters} parameters; the draws stay in the span of the "
                "first particles, wanted more than P",
                UserWarning,
                stacklevel=4,
            )
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(ensemble)))
        return LangevinState(ensemble, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def step_from(norm: Array, size: Array, parameters: int, count: Array) -> Array:
        if callable(step_size):
            return jnp.asarray(real("step_size", step_size(norm, size, count), NOT_NEGATIVE), norm.dtype)
        away = norm / (size * jnp.asarray(_FAR * parameters**0.5, norm.dtype))
        return jnp.asarray(step_size, norm.dtype) / jnp.maximum(away, 1)

    def update(state: LangevinState, outputs: Any, targets: Any) -> tuple[LangevinState, Info]:
        check_state(state, LangevinState, "aldi")
        local = local_size(state.ensemble, name="ensemble")
        check_rows(outputs, local)
        gamma, targets = covariance_and_data(covariance, targets, outputs)
        arrays("outputs", outputs), arrays("targets", targets)
        residuals, differences = whitened_differences(gamma, outputs, targets, options)
        of_prior = prior_residuals(whitened, state.ensemble).astype(residuals.dtype)
        misfits = 0.5 * jnp.sum(residuals * residuals, axis=1)
        both = jnp.concatenate([residuals, of_prior], axis=1)  # a particle may be far from the data or the prior
        healthy = health(both, both, misfits, (state.ensemble,), options)
        number = axis.sum(jnp.sum(healthy, dtype=jnp.int32))
        size = jnp.maximum(number, 1).astype(residuals.dtype)
        of_outputs = centred(differences, healthy, size, axis), jnp.where(healthy[:, None], residuals, 0)
        of_parameters = centred(of_prior, healthy, size, axis), jnp.where(healthy[:, None], of_prior, 0)
        drift, hessian = jnp.zeros((), residuals.dtype), jnp.zeros((), residuals.dtype)
        for z, r in (of_outputs, of_parameters):
            everyone = axis.gathered(z).T
            drift = drift + jnp.matmul(r, everyone, precision=HIGHEST)
            hessian = hessian + jnp.matmul(z, everyone, precision=HIGHEST) / size
        norm = jnp.sqrt(axis.sum(jnp.sum(drift * drift)))
        parameters = of_prior.shape[1]
        dt = step_from(norm, size, parameters, state.count)
        mean, decay, root = relaxation(dt * axis.gathered(hessian))
        keys = particle_keys(jax.random.fold_in(own_key, state.count), local, options.axis_name)
        noise = jax.vmap(lambda k: jax.random.normal(k, (local * axis.size,), residuals.dtype))(keys)
        weights = jnp.sqrt(size * dt) * jnp.matmul(noise, root, precision=HIGHEST)
        weights = weights - dt * jnp.matmul(drift, mean, precision=HIGHEST)
        if correction:
            weights = weights + (parameters + 1) * dt * axis.own_part(decay)
        weights = jnp.where(healthy[:, None], weights, 0)
        products = Products(of_outputs[0], of_outputs[1], size, healthy, axis, weights, precision=options.precision)
        blocks = lambda d, u: (u + d,)
        refusals = (
            (Reason.TARGETS, bad_targets(targets, options.targets_axis)),
            (Reason.SETTING, ~is_usable(gamma)),
        )
        (ensemble,), info = take_step(
            products, (state.ensemble,), blocks, misfits, dt, norm, healthy, state.count, options, *refusals
        )
        time = state.time + jnp.where(info.moved, dt, 0).astype(state.time.dtype)
        return LangevinState(ensemble, time, state.count + info.moved.astype(state.count.dtype)), info

    def step(state: LangevinState, batch: Batch) -> tuple[LangevinState, Info]:
        check_state(state, LangevinState, "aldi")
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

    def estimate(state: LangevinState) -> Params:
        return particle_mean(state.ensemble, axis_name=options.axis_name)

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: state.ensemble,
            estimate,
            lambda state, ensemble: state._replace(ensemble=ensemble),
            never_done,
            one_pass_a_particle,
        )
    )


@jax.custom_jvp
def relaxation(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, "n n"], Float[Array, "n n"]]:
    r"""``S^-1 (I - exp(-S))``, ``exp(-S)`` and ``(S^-1 (I - exp(-2 S)))^(1/2)`` of a positive semi-definite S.

    They have derivatives where eigenvalues coincide, which eigenvectors have not. Eigenvalues below zero are rounding
    and count as zero; where S is not finite, all is NaN.

    >>> mean, decay, root = relaxation(jnp.diag(jnp.array([0.0, jnp.log(2.0)])))
    >>> mean.diagonal().round(4), decay.diagonal(), (root @ root).diagonal().round(4)
    (Array([1.    , 0.7213], dtype=float32), Array([1. , 0.5], dtype=float32), Array([2.   , 1.082], dtype=float32))
    """
    vectors, values = eigen(matrix)
    return tuple(spectral(vectors, value(values)) for value, _ in _RELAXATION)  # type: ignore[return-value]


@relaxation.defjvp
def _relaxation_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (matrix,), (tangent,) = primals, tangents
    vectors, values = eigen(matrix)
    inner = jnp.linalg.multi_dot([vectors.T, 0.5 * (tangent + tangent.T), vectors], precision=HIGHEST)
    rows, columns = values[:, None], values[None]
    between, apart = 0.5 * (rows + columns), rows - columns
    close = jnp.abs(apart) < jnp.finfo(values.dtype).eps ** (1 / 3) * (1 + between)
    results, changes = [], []
    for value, derivative in _RELAXATION:
        found = value(values)
        difference = (found[:, None] - found[None]) / jnp.where(close, 1, apart)
        slopes = jnp.where(close, derivative(between), difference)  # Daleckii and Krein
        results.append(spectral(vectors, found))
        changes.append(jnp.linalg.multi_dot([vectors, slopes * inner, vectors.T], precision=HIGHEST))
    return tuple(results), tuple(changes)


def _mean(s: Array) -> Array:
    """``(1 - e^-s) / s``."""
    return jnp.where(s > 0, -jnp.expm1(-s) / jnp.where(s > 0, s, 1), 1)


def _mean_slope(s: Array) -> Array:
    """Its derivative; near zero by its series, since the difference there would cancel."""
    near = s < 0.1
    safe = jnp.where(near, 1, s)
    series = -1 / 2 + s * (1 / 3 - s * (1 / 8 - s * (1 / 30 - s * (1 / 144 - s / 840))))
    return jnp.where(near, series, (jnp.exp(-safe) * (1 + safe) - 1) / safe**2)


def _root(s: Array) -> Array:
    return jnp.sqrt(2 * _mean(2 * s))


#: Functions of an eigenvalue, each with its derivative.
_RELAXATION = (
    (_mean, _mean_slope),
    (lambda s: jnp.exp(-s), lambda s: -jnp.exp(-s)),
    (_root, lambda s: 2 * _mean_slope(2 * s) / _root(s)),
)
