r"""The discrete Kalman step of the ensemble, of which the vector field is the limit of short steps.

.. math:: u_j \leftarrow u_j + C_{uw} (C_{ww} + \Gamma / h)^{-1} (y + \xi_j - G(u_j)),
          \qquad \xi_j \sim N(0, \Gamma / h) \text{ or } 0

with ``C_ww`` the covariance of the outputs. Steps whose sizes h sum to one lead from prior to posterior.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from eki_jax._types import Array, ForwardFn, Space
from eki_jax.kernel.products import Products
from eki_jax.solvers.kalman.analysis import System, analysis
from eki_jax.solvers.kalman.noise_covariance import HIGHEST, as_noise_covariance
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.protocol import Options, SharedSettings, Solver


def enkf(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    key: Array | None = None,
    space: Space | Literal["data"] | None = None,
    **settings: Unpack[SharedSettings],
) -> Solver:
    r"""The ensemble Kalman filter's analysis step as a solver (slides; Iglesias, Law and Stuart, 2013).

    Implicit in the outputs, where :func:`eki_jax.euler` is explicit: it is stable for every step size, and for squared
    error its limit h -> 0 is the vector field, with h the time. The linear system is solved in the space of the outputs
    (M x M) or of the ensemble (J x J), whichever costs less.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, positive definite: a number or shape (M,), variances; shape (M,
            M); or a :class:`LowRankNoise`, which is never formed in the space of the ensemble.
        step_size: step size h > 0, or a function such as :func:`tempered` and :func:`data_misfit_controller`.
        key: JAX random key that perturbs the data of every particle by its own ``xi_j``; None does not.
        space: space in which the system is solved, "output" (M x M) or "ensemble" (J x J); by default the cheaper one.
            "data" is another name for "output".
        **settings: keywords that all solvers of ensembles share, see :class:`eki_jax.SharedSettings`.

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
    covariance = as_noise_covariance(noise_covariance)
    _check(step_size, space)

    def solve(system: System) -> Products:
        among_outputs = (space or _choose(system)) != "ensemble"
        return _solve_among_outputs(system) if among_outputs else _solve_among_particles(system)

    return analysis(forward, covariance, step_size, solve, Options.of(settings, SharedSettings), key)


def cheaper_space(ensemble_size: int, outputs: int, parameters: int, solve_cost: float | None = None) -> Space:
    """Where the Kalman step's linear system takes fewer operations to solve.

    In the space of the outputs: ``C_ww`` and the right-hand sides, 4 J M^2, a factorization, M^3 / 3, and the cheaper
    product with the ensemble. In that of the ensemble: two matrices of inner products, 4 J^2 M, a factorization and J
    right-hand sides, 7 J^3 / 3, a solution with Gamma for every particle, and 2 J^2 P.

    Args:
        ensemble_size: number of particles J.
        outputs: number of outputs M.
        parameters: number of parameters P.
        solve_cost: operations of J solutions with Gamma; J M, that of a diagonal one, by default.

    >>> cheaper_space(50, 2000, 100), cheaper_space(2000, 50, 100)
    ('ensemble', 'output')
    """
    J, M, P = float(ensemble_size), float(outputs), float(parameters)
    output = 4 * J * M**2 + M**3 / 3 + min(4 * J * M * P, 2 * J**2 * (M + P))
    ensemble = 4 * J**2 * M + 7 * J**3 / 3 + (J * M if solve_cost is None else solve_cost) + 2 * J**2 * P
    return "ensemble" if ensemble < output else "output"


def _solve_among_outputs(system: System) -> Products:
    """The kernel's products with the cotangents ``(h C_ww + Gamma)^-1 (G_j - y - xi_j)``, by an M x M system."""
    z, size = system.anomalies()
    gram = system.axis.sum(jnp.matmul(z.T, z, precision=HIGHEST))
    matrix = system.covariance.add_to(system.step_size / size * gram)
    cotangents = cho_solve(cho_factor(matrix, lower=True), system.perturbed.T).T
    return Products.of(
        system.ensemble,
        system.residuals,
        cotangents,
        healthy=system.healthy,
        axis=system.axis,
        precision=system.precision,
    )


def _solve_among_particles(system: System) -> Products:
    """The same products by a J x J system.

    ``Z (Gamma + (h/J) Z^T Z)^-1 = (I + (h/J) Z Gamma^-1 Z^T)^-1 Z Gamma^-1``: no difference of large numbers, and the
    weights with which the particles are combined are there at once.
    """
    z, size = system.anomalies()
    everyone = system.axis.gathered(z)
    whitened = system.covariance.solve(everyone)
    gram = jnp.matmul(whitened, everyone.T, precision=HIGHEST)
    matrix = jnp.eye(len(everyone), dtype=z.dtype) + system.step_size / size * gram
    perturbed = jnp.where(system.healthy[:, None], system.perturbed, 0)
    weights = cho_solve(cho_factor(matrix, lower=True), jnp.matmul(whitened, perturbed.T, precision=HIGHEST)).T
    return Products(z, perturbed, size, system.healthy, system.axis, weights, system.precision)


def _choose(system: System) -> Space:
    size, outputs = len(system.residuals) * system.axis.size, system.residuals.shape[1]
    leaves = jax.tree.leaves(system.ensemble)
    parameters = sum(leaf.size for leaf in leaves) // leaves[0].shape[0]
    return cheaper_space(size, outputs, parameters, system.covariance.solve_cost(size, outputs))


def _check(step_size: Any, space: Any) -> None:
    if space not in ("output", "ensemble", "data", None):
        raise ValueError(f"space: {space!r}; wanted 'output', 'ensemble' or None")
    if not callable(step_size) and not isinstance(step_size, jax.core.Tracer) and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size: {step_size}; wanted a finite number > 0, or a function such as tempered(10)")
