r"""The discrete Kalman step of the ensemble, of which the vector field is the limit of short steps.

.. math:: u_j \leftarrow u_j + C_{uw} (C_{ww} + \Gamma / h)^{-1} (y + \xi_j - G(u_j)),
          \qquad \xi_j \sim N(0, \Gamma / h) \text{ or } 0

with ``C_ww`` the covariance of the outputs. Steps whose sizes h sum to one lead from prior to posterior.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from eki_jax._covariance import Products, _centred, _gather, _sum_devices, descended
from eki_jax._forward import evaluate
from eki_jax._noise_covariance import HIGHEST, NoiseCovariance, as_noise_covariance, check_size
from eki_jax._noise_covariance import LowRank as LowRank
from eki_jax._solvers import Info, Solver
from eki_jax._tempering import TemperingFn
from eki_jax._tempering import data_misfit_controller as data_misfit_controller
from eki_jax._tempering import tempered as tempered
from eki_jax._tree import ensemble_size, finite_particles, flatten_outputs, local_size, wide_dtype
from eki_jax._types import Array, Batch, Ensemble, ForwardFn
from eki_jax.ensembles import _particle_keys
from eki_jax.failures import FailurePolicy, keep_failed

Space = Literal["data", "ensemble"]

__all__ = ["KalmanState", "LowRank", "cheaper_space", "data_misfit_controller", "enkf", "tempered"]


class KalmanState(NamedTuple):
    """State of :func:`enkf`.

    Attributes:
        ensemble: the particles; where the outputs of the next step are wanted.
        time: the sum of the step sizes so far; tempering ends at 1.
        count: the number of steps taken, int32.
    """

    ensemble: Ensemble
    time: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble


def enkf(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    key: Array | None = None,
    space: Space | None = None,
    axis_name: str | None = None,
    failures: FailurePolicy = keep_failed(),  # noqa: B008
    chunk_size: int | None = None,
    precision: Any = None,
) -> Solver:
    r"""The ensemble Kalman filter's analysis step as a solver (slides; Iglesias, Law and Stuart, 2013).

    Implicit in the outputs, where :func:`eki_jax.euler` is explicit: it is stable for every step size, and for squared
    error its limit h -> 0 is the vector field, with h the time. The linear system is solved in the space of the data
    (M x M) or of the ensemble (J x J), whichever costs less.

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle; None where only ``update`` is used.
        noise_covariance: Gamma, positive definite: a number or shape (M,), variances; shape (M, M); or a
            :class:`LowRank`, which is never formed in the space of the ensemble.
        step_size: h > 0, or a function such as :func:`tempered` and :func:`data_misfit_controller`.
        key: a JAX random key perturbs the data of every particle by its own ``xi_j``; None does not.
        space: "data" or "ensemble" forces where the system is solved.
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map).
        failures: what to do about particles that turn non-finite; see :mod:`eki_jax.failures`.
        chunk_size: particles evaluated at a time; from a memory budget by default.
        precision: of the products with the ensemble.

    Returns:
        A :class:`Solver` with :class:`KalmanState`. In its ``Info``, ``losses`` are the misfits
        ``1/2 ||y - G(u_j)||^2_Gamma``, ``step_size`` is h, and ``drift_norm`` is the Frobenius norm of
        ``<G_k - mean G, (h C_ww + Gamma)^-1 (G_j - y - xi_j)>``.

    Raises:
        ValueError: a covariance that is singular, not symmetric, not finite or of a wrong shape; a step size <= 0; an
            unknown ``space``; outputs or targets that do not fit, from ``step`` and ``update``.

    >>> import jax.numpy as jnp
    >>> solver = enkf(lambda u, x: x * u, noise_covariance=4.0)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))  # mean 2, variance 1
    >>> state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> state.ensemble  # gain 2 / (4 + 4): u + (8 - 2 u) / 4
    Array([[2.5],
           [3.5]], dtype=float32)
    """
    covariance = as_noise_covariance(noise_covariance)
    _check(step_size, space)

    def init(ensemble: Ensemble) -> KalmanState:
        ensemble_size(ensemble, axis_name=axis_name)
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(ensemble)))
        return KalmanState(ensemble, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def update(state: KalmanState, outputs: Any, targets: Any) -> tuple[KalmanState, Info]:
        residuals = _residuals(state.ensemble, outputs, targets)
        check_size(covariance, residuals.shape[1])
        healthy = finite_particles(residuals)
        residuals = jnp.where(healthy[:, None], residuals, 0)
        misfits = 0.5 * jnp.sum(residuals * covariance.solve(residuals), axis=1)
        misfits = jnp.where(healthy, misfits, jnp.nan)
        if callable(step_size):
            h = step_size(_gather(misfits, axis_name), residuals.shape[1], state.time, state.count)
            if axis_name is not None:  # the same number everywhere, which shard_map cannot know of gathered misfits
                h = jax.lax.pmean(h, axis_name)
        else:
            h = step_size
        h = jnp.asarray(h, residuals.dtype)
        perturbed = residuals
        if key is not None:
            noise = _noise(jax.random.fold_in(key, state.count), covariance, residuals, axis_name)
            perturbed = residuals - jnp.where(h > 0, jax.lax.rsqrt(jnp.where(h > 0, h, 1)), 0) * noise
        system = _System(state.ensemble, residuals, perturbed, covariance, h, healthy, axis_name, precision)
        in_data = (space or _choose(system)) == "data"
        products = _solve_in_data_space(system) if in_data else _solve_in_ensemble_space(system)
        norm = products.norm()
        ok = jnp.isfinite(norm) & jnp.isfinite(h)
        moved, variance = products.map_blocks(lambda d, u: (descended(u, h, d),), state.ensemble, when=ok)
        ensemble = failures.apply(moved[0], healthy, state.count, axis_name)
        failed = _sum_devices(jnp.sum(~healthy, dtype=jnp.int32), axis_name)
        time = state.time + jnp.where(ok, h, 0).astype(state.time.dtype)
        info = Info(misfits, h, norm, jnp.sqrt(variance), ok & (failed == 0), failed)
        return KalmanState(ensemble, time, state.count + 1), info

    def step(state: KalmanState, batch: Batch) -> tuple[KalmanState, Info]:
        if forward is None:
            raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
        x, targets = batch
        return update(state, evaluate(forward, state.ensemble, x, chunk_size=chunk_size), targets)

    return Solver(init, step, update)


def cheaper_space(ensemble_size: int, outputs: int, parameters: int, solve_cost: float | None = None) -> Space:
    """Where the Kalman step's linear system takes fewer operations to solve.

    In the space of the data: ``C_ww`` and the right-hand sides, 4 J M^2, a factorization, M^3 / 3, and the cheaper
    product with the ensemble. In that of the ensemble: two matrices of inner products, 4 J^2 M, a factorization and J
    right-hand sides, 7 J^3 / 3, a solution with Gamma for every particle, and 2 J^2 P.

    Args:
        ensemble_size: J.
        outputs: M.
        parameters: P.
        solve_cost: operations of J solutions with Gamma; J M, that of a diagonal one, by default.

    >>> cheaper_space(50, 2000, 100), cheaper_space(2000, 50, 100)
    ('ensemble', 'data')
    """
    J, M, P = float(ensemble_size), float(outputs), float(parameters)
    data = 4 * J * M**2 + M**3 / 3 + min(4 * J * M * P, 2 * J**2 * (M + P))
    ensemble = 4 * J**2 * M + 7 * J**3 / 3 + (J * M if solve_cost is None else solve_cost) + 2 * J**2 * P
    return "ensemble" if ensemble < data else "data"


def _residuals(ensemble: Ensemble, outputs: Any, targets: Any) -> Array:
    """``G(u_j) - y`` as one array of shape (J, M)."""
    flat = flatten_outputs(outputs, local_size(ensemble, name="ensemble"), name="outputs")
    wanted = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], outputs)
    found = jax.tree.map(jnp.shape, targets)
    if wanted != found:
        raise ValueError(f"targets: shape {found}; wanted that of one particle's outputs, {wanted}")
    y = flatten_outputs(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], targets), 1, name="targets")
    return flat.astype(wide_dtype(flat.dtype)) - y


def _noise(key: Array, covariance: NoiseCovariance, residuals: Array, axis_name: str | None) -> Array:
    """Draws of N(0, Gamma), shape (J, M), that do not depend on how the particles are spread."""
    keys = _particle_keys(key, residuals.shape[0], axis_name)
    return jax.vmap(lambda k: covariance.noise(k, residuals.shape[1], residuals.dtype))(keys)


class _System(NamedTuple):
    """What the two ways to solve a step need: residuals ``G_j - y`` and perturbed ones, ``G_j - y - xi_j``, (J, M)."""

    ensemble: Ensemble
    residuals: Array
    perturbed: Array
    covariance: NoiseCovariance
    step_size: Array
    healthy: Array
    axis_name: str | None
    precision: Any

    def anomalies(self) -> tuple[Array, Array]:
        """The centred outputs of the healthy particles, shape (J, M), and the number of those."""
        count = _sum_devices(jnp.sum(self.healthy, dtype=jnp.int32), self.axis_name)
        size = jnp.maximum(count, 1).astype(self.residuals.dtype)
        return _centred(self.residuals, self.healthy, size, self.axis_name), size


def _solve_in_data_space(system: _System) -> Products:
    """The kernel's products with the cotangents ``(h C_ww + Gamma)^-1 (G_j - y - xi_j)``, by an M x M system."""
    z, size = system.anomalies()
    gram = _sum_devices(jnp.matmul(z.T, z, precision=HIGHEST), system.axis_name)
    matrix = system.covariance.add_to(system.step_size / size * gram)
    cotangents = cho_solve(cho_factor(matrix, lower=True), system.perturbed.T).T
    return Products.of(
        system.ensemble,
        system.residuals,
        cotangents,
        healthy=system.healthy,
        axis_name=system.axis_name,
        precision=system.precision,
    )


def _solve_in_ensemble_space(system: _System) -> Products:
    """The same products by a J x J system.

    ``Z (Gamma + (h/J) Z^T Z)^-1 = (I + (h/J) Z Gamma^-1 Z^T)^-1 Z Gamma^-1``: no difference of large numbers, and the
    weights with which the particles are combined are there at once.
    """
    z, size = system.anomalies()
    everyone = _gather(z, system.axis_name)
    whitened = system.covariance.solve(everyone)
    gram = jnp.matmul(whitened, everyone.T, precision=HIGHEST)
    matrix = jnp.eye(len(everyone), dtype=z.dtype) + system.step_size / size * gram
    perturbed = jnp.where(system.healthy[:, None], system.perturbed, 0)
    weights = cho_solve(cho_factor(matrix, lower=True), jnp.matmul(whitened, perturbed.T, precision=HIGHEST)).T
    return Products(z, perturbed, size, system.healthy, system.axis_name, weights, system.precision)


def _choose(system: _System) -> Space:
    size, outputs = ensemble_size(system.ensemble, axis_name=system.axis_name), system.residuals.shape[1]
    leaves = jax.tree.leaves(system.ensemble)
    parameters = sum(leaf.size for leaf in leaves) // leaves[0].shape[0]
    return cheaper_space(size, outputs, parameters, system.covariance.solve_cost(size, outputs))


def _check(step_size: Any, space: Any) -> None:
    if space not in ("data", "ensemble", None):
        raise ValueError(f"space: {space!r}; wanted 'data', 'ensemble' or None")
    if not callable(step_size) and not isinstance(step_size, jax.core.Tracer) and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size: {step_size}; wanted a finite number > 0, or a function such as tempered(10)")
