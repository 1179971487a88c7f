r"""The discrete Kalman step of the ensemble, of which the vector field is the limit of short steps.

.. math:: u_j \leftarrow u_j + C_{uw} (C_{ww} + \Gamma / h)^{-1} (y + \xi_j - G(u_j)),
          \qquad \xi_j \sim N(0, \Gamma / h) \text{ or } 0

with ``C_ww`` the covariance of the outputs. Steps whose sizes h sum to one lead from prior to posterior.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import one_of, whole
from eki_jax._types import Array, ForwardFn, Space
from eki_jax.kernel.linear_algebra import HIGHEST, damped_solve, inverse_root
from eki_jax.kernel.products import Products
from eki_jax.solvers.kalman.analysis import Method, System, analysis
from eki_jax.solvers.kalman.settings import KalmanSettings
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.protocol import Solver


def enkf(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    key: Array | None = None,
    space: Space | Literal["data"] | None = None,
    **settings: Unpack[KalmanSettings],
) -> Solver:
    r"""The ensemble Kalman filter's analysis step as a solver (slides; Iglesias, Law and Stuart, 2013).

    Implicit in the outputs, where :func:`eki_jax.euler` is explicit: it is stable for every step size, and for squared
    error its limit h -> 0 is the vector field, with h the time. The linear system is solved in the space of the outputs
    (M x M) or of the ensemble (J x J), whichever costs less.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, positive definite: a number or shape (M,), variances; shape (M,
            M); a :class:`LowRankNoise`, which is never formed in the space of the ensemble; or a mapping of these with
            the keys of the outputs, blocks that are independent. None where the targets are :class:`Data`, which bring
            their own.
        step_size: step size h > 0, or a function such as :func:`tempered` and :func:`data_misfit_controller`.
        key: JAX random key that perturbs the data of every particle by its own ``xi_j``; None does not.
        space: space in which the system is solved, "output" (M x M) or "ensemble" (J x J); by default the cheaper one.
            "data" is another name for "output".
        **settings: keywords that all Kalman steps share, see :class:`KalmanSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`KalmanState`. In its ``Info``, ``losses`` are the misfits
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
    one_of("space", space, ("output", "ensemble", "data", None))

    def solve(system: System) -> Products:
        among_outputs = (space or cheaper_space_of(system)) != "ensemble"
        return _solve_among_outputs(system) if among_outputs else _solve_among_particles(system)

    return analysis(forward, noise_covariance, step_size, Method("enkf", solve, _combination), settings, key)


def cheaper_space(ensemble_size: int, outputs: int, parameters: int) -> Space:
    """Where the Kalman step's linear system takes fewer operations to solve.

    In the space of the outputs: ``C_ww`` and the right-hand sides, 4 J M^2, a factorization, M^3 / 3, and the cheaper
    product with the ensemble. In that of the ensemble: two matrices of inner products, 4 J^2 M, a factorization and J
    right-hand sides, 7 J^3 / 3, and 2 J^2 P.

    Args:
        ensemble_size: number of particles J.
        outputs: number of outputs M.
        parameters: number of parameters P.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 0.

    >>> cheaper_space(50, 2000, 100), cheaper_space(2000, 50, 100)
    ('ensemble', 'output')
    """
    sizes = {"ensemble_size": ensemble_size, "outputs": outputs, "parameters": parameters}
    J, M, P = (float(whole(name, size, 0)) for name, size in sizes.items())
    output = 4 * J * M**2 + M**3 / 3 + min(4 * J * M * P, 2 * J**2 * (M + P))
    ensemble = 4 * J**2 * M + 7 * J**3 / 3 + 2 * J**2 * P
    return "ensemble" if ensemble < output else "output"


def _solve_among_outputs(system: System) -> Products:
    """The kernel's products with the cotangents ``(I + h C_ww)^-1 (G_j - y - xi_j)``, whitened, by an M x M system."""
    z, size = system.anomalies()
    scale = system.step_size / size

    gram = scale * system.axis.sum(jnp.matmul(z.T, z, precision=HIGHEST))

    def by_matrix() -> tuple[Array, Array]:
        return z, damped_solve(gram, system.perturbed.T, jnp.ones((), z.dtype))[0].T

    def by_singular_values() -> tuple[Array, Array]:
        left, values, right = resolved_singular_values(system.axis.gathered(z))
        shrunk = values / (1 + scale * values**2)
        left, right = (
            system.axis.own_part(left * shrunk[None]),
            jnp.matmul(system.perturbed, right.T, precision=HIGHEST),
        )
        missing = z.shape[1] - left.shape[1]
        return jnp.pad(left, ((0, 0), (0, missing))), jnp.pad(right, ((0, 0), (0, missing)))

    outputs, cotangents = lax.cond(is_resolved(gram), by_matrix, by_singular_values)
    return system.products(outputs, cotangents)


def _solve_among_particles(system: System) -> Products:
    """The same products by a J x J system.

    ``Z (I + (h/J) Z^T Z)^-1 = (I + (h/J) Z Z^T)^-1 Z``: no difference of large numbers, and the weights with which the
    particles are combined are there at once.
    """
    z, size = system.anomalies()
    scale, everyone = system.step_size / size, system.axis.gathered(z)

    gram = scale * jnp.matmul(everyone, everyone.T, precision=HIGHEST)

    def by_matrix() -> Array:
        right = jnp.matmul(everyone, system.perturbed.T, precision=HIGHEST)
        return damped_solve(gram, right, jnp.ones((), z.dtype))[0].T

    def by_singular_values() -> Array:
        left, values, right = resolved_singular_values(everyone)
        shrunk = values / (1 + scale * values**2)
        inner = jnp.matmul(right, system.perturbed.T, precision=HIGHEST)
        return jnp.matmul(left * shrunk[None], inner, precision=HIGHEST).T

    weights = lax.cond(is_resolved(gram), by_matrix, by_singular_values)
    return Products(z, system.perturbed, size, system.healthy, system.axis, weights, system.precision)


def is_resolved(matrix: Array) -> Array:
    """Whether the 1 in ``I + S`` is left of its rounding, so that a matrix S of inner products may be taken.

    Where the noise is small beside the outputs it is not: a square has half of the digits. The largest eigenvalue is at
    most the trace, and at most the largest sum of a row.
    """
    largest = jnp.minimum(jnp.trace(matrix), jnp.max(jnp.sum(jnp.abs(matrix), axis=1)))
    return ~(largest * jnp.finfo(matrix.dtype).eps > 1e-3)


def resolved_singular_values(z: Array) -> tuple[Array, Array, Array]:
    """P, s and Q^T of ``Z = P diag(s) Q^T``; NaN where Z is not finite.

    Values that the rounding of the outputs alone explains are zero: no parameter stands behind them, but a large
    residual would be fitted by them.
    """
    finite = jnp.isfinite(z).all()
    left, values, right = jnp.linalg.svd(jnp.where(finite, z, 0), full_matrices=False)
    rounding = max(z.shape) * jnp.finfo(z.dtype).eps * values[0]
    return left, jnp.where(values > rounding, values, 0), jnp.where(finite, right, jnp.nan)


def _combination(scale: Array, everyone: Array, own: Any, residuals: Array, mean: Array) -> Array:
    """``R Z^T (I + scale Z Z^T)^-1``, the rows of this device's particles."""
    del own, mean
    root, _ = inverse_root(scale * jnp.matmul(everyone, everyone.T, precision=HIGHEST))
    inner = jnp.matmul(residuals, everyone.T, precision=HIGHEST)
    return jnp.matmul(jnp.matmul(inner, root, precision=HIGHEST), root, precision=HIGHEST)


def cheaper_space_of(system: System) -> Space:
    """The cheaper space of a step's linear system; see :func:`cheaper_space`."""
    size, outputs = len(system.perturbed) * system.axis.size, system.perturbed.shape[1]
    leaves = jax.tree.leaves(system.ensemble)
    parameters = sum(leaf.size for leaf in leaves) // leaves[0].shape[0]
    return cheaper_space(size, outputs, parameters)
