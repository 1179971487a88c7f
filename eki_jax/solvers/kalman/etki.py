r"""The deterministic Kalman step: the ensemble's mean and its deviations, moved so that nothing is left to chance.

.. math:: \bar u \leftarrow \bar u + C_{uw} (C_{ww} + \Gamma / h)^{-1} (y - \bar G), \qquad
          U \leftarrow (I + \tfrac{h}{J} Z \Gamma^{-1} Z^T)^{-1/2} U

with U the deviations of the parameters, one row a particle, and Z those of the outputs. Mean and covariance are
Kalman's at every J.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax.numpy as jnp
from jax import lax

from eki_jax._checks import one_of
from eki_jax._types import Array, ForwardFn, Space
from eki_jax.kernel.linear_algebra import HIGHEST, inverse_root
from eki_jax.kernel.products import Products
from eki_jax.solvers.kalman.analysis import Method, System, analysis
from eki_jax.solvers.kalman.enkf import cheaper_space_of, is_resolved, resolved_singular_values
from eki_jax.solvers.kalman.settings import KalmanSettings
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.protocol import Solver


def etki(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    space: Space | Literal["data"] | None = None,
    **settings: Unpack[KalmanSettings],
) -> Solver:
    r"""The ensemble transform Kalman inversion as a solver: a deterministic square-root step, calibration's default.

    For a linear model the ensemble's mean and covariance after a step of size h are exactly those of Kalman's update of
    its own mean and covariance with noise ``Gamma / h``, whatever J is; steps whose sizes sum to one lead from prior to
    posterior. Particles stay in the affine span of the first ensemble. No random numbers are needed.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, positive definite: a number or shape (M,), variances; shape (M,
            M); a :class:`LowRankNoise`; or a mapping of these with the keys of the outputs, for blocks that are
            independent. None where the targets are :class:`Data`, which bring their own.
        step_size: step size h > 0, or a function such as :func:`tempered` and :func:`data_misfit_controller`.
        space: space in which the system is solved, "output" (M x M) or "ensemble" (J x J); by default the cheaper one.
            "data" is another name for "output".
        **settings: keywords that all Kalman steps share, see :class:`KalmanSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`KalmanState`. In its ``Info``, ``losses`` are the misfits
        ``1/2 ||y - G(u_j)||^2_Gamma``, ``step_size`` is h, and ``drift_norm`` is the Frobenius norm of the matrix that
        combines the particles; with a localization, that of the direction.

    Raises:
        ValueError: a covariance that is singular, not symmetric, not finite or of a wrong shape; a step size <= 0; an
            unknown ``space``; outputs or targets that do not fit, from ``step`` and ``update``.

    >>> import jax.numpy as jnp
    >>> solver = etki(lambda u, x: x * u, noise_covariance=4.0)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))  # mean 2, variance 1
    >>> state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> [round(float(u), 2) for u in state.ensemble.ravel()]  # mean 2 + 2 / 8 (8 - 4), variance 1 - 2 / 8 2
    [2.29, 3.71]

    Huang, Huang, Reich and Stuart, Inverse Problems 38, 2022; Bishop, Etherton and Majumdar, Monthly Weather Review
    129, 2001.
    """
    one_of("space", space, ("output", "ensemble", "data", None))

    def solve(system: System) -> Products:
        among_outputs = (space or cheaper_space_of(system)) != "ensemble"
        return _among_outputs(system) if among_outputs else _among_particles(system)

    return analysis(forward, noise_covariance, step_size, Method("etki", solve, _combination), settings)


def _among_outputs(system: System) -> Products:
    """The kernel's products with the cotangents ``(I + S)^-1 mean + g(S) z_j`` and ``S = (h/J) Z^T Z``."""
    z, size = system.anomalies()
    scale, mean = system.step_size / size, system.mean_residual(size)
    matrix = scale * system.axis.sum(jnp.matmul(z.T, z, precision=HIGHEST))

    def by_matrix() -> tuple[Array, Array]:
        root, shrinkage = inverse_root(matrix)
        shift = jnp.matmul(root, jnp.matmul(root, mean, precision=HIGHEST), precision=HIGHEST)
        return z, jnp.matmul(z, shrinkage, precision=HIGHEST) + shift[None]

    def by_singular_values() -> tuple[Array, Array]:
        left, cotangents = _by_singular_values(system.axis.gathered(z), scale, mean)
        missing = ((0, 0), (0, z.shape[1] - left.shape[1]))
        own = lambda part: jnp.pad(system.axis.own_part(part), missing)
        return own(left), own(cotangents)

    outputs, cotangents = lax.cond(is_resolved(matrix), by_matrix, by_singular_values)
    return system.products(outputs, cotangents)


def _among_particles(system: System) -> Products:
    """The same products by a J x J system; the weights with which the particles are combined are there at once."""
    z, size = system.anomalies()
    scale, mean = system.step_size / size, system.mean_residual(size)
    everyone, own = system.axis.gathered(z), system.axis.own_part
    gram = jnp.matmul(everyone, everyone.T, precision=HIGHEST)

    def by_singular_values() -> Array:
        left, cotangents = _by_singular_values(everyone, scale, mean)
        return jnp.matmul(own(cotangents), left.T, precision=HIGHEST)

    by_matrix = lambda: _by_matrix(gram, scale, everyone, own, mean)
    weights = lax.cond(is_resolved(scale * gram), by_matrix, by_singular_values)
    weights = jnp.where(system.healthy[:, None], weights, 0)
    return Products(z, system.residuals, size, system.healthy, system.axis, weights, system.precision)


def _by_matrix(gram: Array, scale: Array, everyone: Array, own: Any, mean: Array) -> Array:
    """``A g(scale A) + 1 (Z mean)^T (I + scale A)^-1`` with ``A = Z Z^T``, the rows of this device's particles."""
    root, shrinkage = inverse_root(scale * gram)
    shift = jnp.matmul(root, jnp.matmul(everyone, mean, precision=HIGHEST), precision=HIGHEST)
    shift = jnp.matmul(root, shift, precision=HIGHEST)
    return jnp.matmul(own(gram), shrinkage, precision=HIGHEST) + shift[None]


def _combination(scale: Array, everyone: Array, own: Any, residuals: Array, mean: Array) -> Array:
    """The weights of an analysis of single parameters; no particle has residuals of its own."""
    del residuals
    return _by_matrix(jnp.matmul(everyone, everyone.T, precision=HIGHEST), scale, everyone, own, mean)


def _by_singular_values(everyone: Array, scale: Array, mean: Array) -> tuple[Array, Array]:
    """Outputs and cotangents of all particles with the same products, from ``Z = P diag(s) Q^T``; shape (J, K) each."""
    left, values, right = resolved_singular_values(everyone)
    square = scale * values**2
    root = jnp.sqrt(1 + square)
    shift = values / (1 + square) * jnp.matmul(right, mean, precision=HIGHEST)
    return left, (values**2 / (root * (1 + root)))[None] * left + shift[None]
