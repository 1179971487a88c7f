"""The observation noise's covariance Gamma: diagonal, dense or diagonal plus low rank, never formed if need not be."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular

from eki_jax._types import Array

HIGHEST = lax.Precision.HIGHEST


class LowRankNoise(NamedTuple):
    """A covariance ``diag(diagonal) + factor factor^T`` that is never formed.

    Attributes:
        diagonal: number or array of shape (M,), > 0; without it the covariance would be singular.
        factor: matrix of shape (M, K), with K well below M.
    """

    diagonal: Any
    factor: Any


class Diagonal(NamedTuple):
    """Independent noise: variances, a number or shape (M,)."""

    variances: Any

    def solve(self, rows: Array) -> Array:
        """``rows Gamma^-1``, shape (J, M)."""
        return rows / jnp.asarray(self.variances, rows.dtype)

    def add_to(self, matrix: Array) -> Array:
        """``matrix + Gamma``, shape (M, M)."""
        return matrix + jnp.diag(jnp.broadcast_to(jnp.asarray(self.variances, matrix.dtype), matrix.shape[:1]))

    def noise(self, key: Array, outputs: int, dtype: Any) -> Array:
        """One draw of N(0, Gamma), shape (M,)."""
        return jnp.sqrt(jnp.asarray(self.variances, dtype)) * jax.random.normal(key, (outputs,), dtype)

    def solve_cost(self, ensemble_size: int, outputs: int) -> float:
        """Operations of `solve`."""
        return ensemble_size * outputs


class Dense(NamedTuple):
    """Correlated noise: the matrix, shape (M, M), and its lower Cholesky factor."""

    matrix: Any
    cholesky: Any

    def solve(self, rows: Array) -> Array:
        """``rows Gamma^-1``, shape (J, M)."""
        return cho_solve((jnp.asarray(self.cholesky, rows.dtype), True), rows.T).T

    def add_to(self, matrix: Array) -> Array:
        """``matrix + Gamma``, shape (M, M)."""
        return matrix + jnp.asarray(self.matrix, matrix.dtype)

    def noise(self, key: Array, outputs: int, dtype: Any) -> Array:
        """One draw of N(0, Gamma), shape (M,)."""
        return jnp.matmul(
            jnp.asarray(self.cholesky, dtype), jax.random.normal(key, (outputs,), dtype), precision=HIGHEST
        )

    def solve_cost(self, ensemble_size: int, outputs: int) -> float:
        """Operations of `solve`: two triangular systems."""
        return 2.0 * ensemble_size * outputs**2


class DiagonalPlusLowRank(NamedTuple):
    """See `LowRankNoise`; ``core`` is the Cholesky factor of ``I + L^T D^-1 L``, shape (K, K)."""

    diagonal: Any
    factor: Any
    core: Any

    def solve(self, rows: Array) -> Array:
        """``rows Gamma^-1``, shape (J, M), by the Woodbury identity."""
        scaled = rows / jnp.asarray(self.diagonal, rows.dtype)
        factor = jnp.asarray(self.factor, rows.dtype)
        inner = solve_triangular(
            jnp.asarray(self.core, rows.dtype), jnp.matmul(scaled, factor, precision=HIGHEST).T, lower=True
        )
        reduced = solve_triangular(
            jnp.asarray(self.core, rows.dtype),
            (factor / jnp.asarray(self.diagonal, rows.dtype).reshape(-1, 1)).T,
            lower=True,
        )
        return scaled - jnp.matmul(inner.T, reduced, precision=HIGHEST)

    def add_to(self, matrix: Array) -> Array:
        """``matrix + Gamma``, shape (M, M)."""
        factor = jnp.asarray(self.factor, matrix.dtype)
        return Diagonal(self.diagonal).add_to(matrix) + jnp.matmul(factor, factor.T, precision=HIGHEST)

    def noise(self, key: Array, outputs: int, dtype: Any) -> Array:
        """One draw of N(0, Gamma), shape (M,)."""
        own, shared = jax.random.split(key)
        factor = jnp.asarray(self.factor, dtype)
        common = jnp.matmul(factor, jax.random.normal(shared, factor.shape[1:], dtype), precision=HIGHEST)
        return Diagonal(self.diagonal).noise(own, outputs, dtype) + common

    def solve_cost(self, ensemble_size: int, outputs: int) -> float:
        """Operations of `solve`."""
        return 4.0 * ensemble_size * outputs * np.shape(self.factor)[1]


NoiseCovariance: TypeAlias = Diagonal | Dense | DiagonalPlusLowRank


def as_noise_covariance(value: Any) -> NoiseCovariance:
    """Check Gamma and factor it once.

    Args:
        value: covariance Gamma: a number or shape (M,), the noise's variances; shape (M, M), the matrix; or a
            `LowRankNoise`.

    Returns:
        The covariance with what is needed to solve with it.

    Raises:
        ValueError: a covariance of another shape, not finite, not symmetric, or singular (where values are known).

    >>> import jax.numpy as jnp
    >>> as_noise_covariance([1.0, 4.0]).solve(jnp.array([[2.0, 2.0]]))
    Array([[2. , 0.5]], dtype=float32)
    """
    if isinstance(value, LowRankNoise):
        return _low_rank(value)
    known = not isinstance(value, jax.core.Tracer)
    matrix = np.asarray(value, np.float64) if known else value
    if matrix.ndim > 2 or (matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(f"noise_covariance: shape {matrix.shape}; wanted a number, (M,), (M, M) or a LowRankNoise")
    if known and not np.all(np.isfinite(matrix)):
        raise ValueError("noise_covariance: has values that are not finite; wanted a covariance")
    if matrix.ndim < 2:
        if known and not np.all(matrix > 0):
            raise ValueError(f"noise_covariance: singular, least variance {matrix.min()}; wanted variances > 0")
        return Diagonal(matrix)
    return Dense(matrix, _cholesky(matrix) if known else jnp.linalg.cholesky(matrix))


def check_size(covariance: NoiseCovariance, outputs: int) -> None:
    """Raise unless the covariance is one of ``outputs`` numbers."""
    shape = jnp.shape(covariance.factor if isinstance(covariance, DiagonalPlusLowRank) else covariance[0])
    if shape and shape[0] != outputs and shape != (1,):
        raise ValueError(f"noise_covariance: of {shape[0]} outputs, but a particle has {outputs}")


def _low_rank(value: LowRankNoise) -> DiagonalPlusLowRank:
    known = not any(isinstance(part, jax.core.Tracer) for part in value)
    diagonal, factor = (np.asarray(part, np.float64) for part in value) if known else map(jnp.asarray, value)
    if factor.ndim != 2 or diagonal.shape not in ((), (1,), factor.shape[:1]):
        raise ValueError(
            f"noise_covariance: diagonal of shape {diagonal.shape} and factor of shape {factor.shape}; wanted a number "
            "or (M,), and (M, K)"
        )
    if known and not (np.all(np.isfinite(diagonal)) and np.all(np.isfinite(factor))):
        raise ValueError("noise_covariance: has values that are not finite; wanted a covariance")
    if known and not np.all(diagonal > 0):
        raise ValueError(f"noise_covariance: singular, least diagonal {diagonal.min()}; wanted a diagonal > 0")
    xp = np if known else jnp
    core = xp.eye(factor.shape[1]) + factor.T @ (factor / diagonal.reshape(-1, 1))
    return DiagonalPlusLowRank(diagonal, factor, xp.linalg.cholesky(core))


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    """The factor of a covariance that is symmetric and, to double precision, not singular."""
    if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-8 * np.abs(matrix).max()):
        raise ValueError("noise_covariance: a matrix that is not symmetric; wanted a covariance")
    eigenvalues = np.linalg.eigvalsh(matrix)
    if not eigenvalues[0] > len(matrix) * np.finfo(np.float64).eps * eigenvalues[-1]:
        raise ValueError(
            f"noise_covariance: singular, eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}; "
            "wanted a positive definite matrix"
        )
    return np.linalg.cholesky(matrix)
