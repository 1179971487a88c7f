"""What a calibration problem is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class InverseProblem(NamedTuple):
    """A simulator, noisy data and a Gaussian prior.

    Attributes:
        name: name of the problem.
        simulate: function ``simulate(key, ensemble)`` of particles, shape (J, P), that returns their outputs, shape
            (J, M); the key draws what the simulator has of randomness of its own, such as initial conditions.
        data: data y, shape (M,).
        noise_covariance: covariance Gamma of their noise, shape (M, M).
        prior_mean: mean of the prior, shape (P,).
        prior_covariance: covariance of the prior, shape (P, P).
        truth: parameters that made the data, shape (P,).
        parameter_coordinates: places of the parameters, shape (P,), where they have some.
        output_coordinates: places of the outputs, shape (M,), likewise.
        period: length after which places repeat.
        settings: settings of the simulator for another language or library, as JSON has them.
    """

    name: str
    simulate: Callable[[jax.Array, Any], Any]
    data: np.ndarray
    noise_covariance: np.ndarray
    prior_mean: np.ndarray
    prior_covariance: np.ndarray
    truth: np.ndarray
    parameter_coordinates: np.ndarray | None = None
    output_coordinates: np.ndarray | None = None
    period: float | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012  # of a tuple, which nobody changes

    def draw(self, key: jax.Array, particles: int) -> jax.Array:
        """Particles of the prior, shape (J, P), in JAX's default floating-point type."""
        root = np.linalg.cholesky(self.prior_covariance)
        normal = jax.random.normal(key, (particles, len(root)))
        return jnp.asarray(self.prior_mean, normal.dtype) + normal @ jnp.asarray(root, normal.dtype).T

    def whiten(self, outputs: Any) -> jax.Array:
        """Outputs or data in units of their noise: ``W G`` with ``W Gamma W^T = I``, shape (..., M)."""
        outputs = jnp.asarray(outputs)
        inverse = np.linalg.inv(np.linalg.cholesky(self.noise_covariance))
        return jnp.matmul(outputs, jnp.asarray(inverse, outputs.dtype).T, precision=jax.lax.Precision.HIGHEST)

    def misfit(self, outputs: Any) -> float:
        """Root-mean-square misfit ``||y - G||_Gamma / sqrt(M)`` of one particle's outputs, shape (M,)."""
        residual = np.asarray(outputs, np.float64) - self.data
        return float(np.sqrt(residual @ np.linalg.solve(self.noise_covariance, residual) / len(residual)))
