"""The observation noise's covariance Gamma: diagonal, dense or diagonal plus low rank, never formed if need not be."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from eki_jax._checks import arrays, is_known
from eki_jax._types import Array
from eki_jax.kernel.linear_algebra import HIGHEST


class LowRankNoise(NamedTuple):
    """A covariance ``diag(diagonal) + factor factor^T`` that is never formed.

    Attributes:
        diagonal: number or array of shape (M,), > 0; without it the covariance would be singular.
        factor: matrix of shape (M, K), with K well below M.
    """

    diagonal: Any
    factor: Any


class Diagonal(NamedTuple):
    """Independent noise: standard deviations, a number or shape (M,)."""

    scale: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        return rows / jnp.asarray(self.scale, rows.dtype)


class Dense(NamedTuple):
    """Correlated noise: the lower Cholesky factor of Gamma, shape (M, M)."""

    cholesky: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        return solve_triangular(jnp.asarray(self.cholesky, rows.dtype), rows.T, lower=True).T


class DiagonalPlusLowRank(NamedTuple):
    """Noise of a `LowRankNoise`.

    With ``A`` the factor over the diagonal's root, ``(I + A A^T)^(-1/2) = I + A B A^T``.

    Attributes:
        scale: root of the diagonal, a number or shape (M,).
        factor: matrix A, shape (M, K).
        core: matrix B, shape (K, K).
    """

    scale: Any
    factor: Any
    core: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        scaled, factor = rows / jnp.asarray(self.scale, rows.dtype), jnp.asarray(self.factor, rows.dtype)
        inner = jnp.matmul(scaled, factor, precision=HIGHEST)
        inner = jnp.matmul(inner, jnp.asarray(self.core, rows.dtype), precision=HIGHEST)
        return scaled + jnp.matmul(inner, factor.T, precision=HIGHEST)


def is_usable(covariance: NoiseCovariance) -> Array:
    """Whether all numbers that whiten are finite and none of the scales is zero, which is known where they are."""
    parts = [jnp.asarray(part) for part in covariance]
    finite = jnp.stack([jnp.isfinite(part).all() for part in parts]).all()
    return finite & (isinstance(covariance, Dense) | (parts[0] > 0).all())


NoiseCovariance: TypeAlias = Diagonal | Dense | DiagonalPlusLowRank


def as_noise_covariance(value: Any) -> NoiseCovariance:
    """Check Gamma and factor it once.

    Args:
        value: covariance Gamma: a number or shape (M,), the noise's variances; shape (M, M), the matrix; or a
            `LowRankNoise`.

    Returns:
        The covariance with what is needed to whiten with it. What is not known while tracing and is no covariance
        whitens to NaN.

    Raises:
        ValueError: a covariance of another shape, not finite, not symmetric, or singular (where values are known).

    >>> import jax.numpy as jnp
    >>> as_noise_covariance([1.0, 4.0]).whiten(jnp.array([[2.0, 2.0]]))
    Array([[2., 1.]], dtype=float32)
    """
    if isinstance(value, LowRankNoise):
        return _low_rank(value)
    wanted = "wanted a number, (M,), (M, M) or a LowRankNoise"
    if isinstance(value, bool) or (not jax.tree_util.all_leaves([value]) and not isinstance(value, list | tuple)):
        raise TypeError(f"noise_covariance: {value!r}; {wanted}")
    arrays("noise_covariance", value)
    known = is_known(value)
    matrix = np.asarray(value, np.float64) if known else value
    if matrix.ndim > 2 or (matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(f"noise_covariance: shape {matrix.shape}; wanted a number, (M,), (M, M) or a LowRankNoise")
    if known and not np.all(np.isfinite(matrix)):
        raise ValueError("noise_covariance: has values that are not finite; wanted a covariance")
    if matrix.ndim < 2:
        if known and not np.all(matrix > 0):
            raise ValueError(f"noise_covariance: singular, least variance {matrix.min()}; wanted variances > 0")
        return Diagonal(np.sqrt(matrix) if known else jnp.sqrt(matrix))
    return Dense(_cholesky(matrix) if known else jnp.linalg.cholesky(matrix))


def check_size(covariance: NoiseCovariance, outputs: int) -> None:
    """Raise unless the covariance is one of ``outputs`` numbers."""
    shape = jnp.shape(covariance.factor if isinstance(covariance, DiagonalPlusLowRank) else covariance[0])
    if shape and shape[0] != outputs and shape != (1,):
        raise ValueError(f"noise_covariance: of {shape[0]} outputs, but a particle has {outputs}; wanted as many")


def _low_rank(value: LowRankNoise) -> DiagonalPlusLowRank:
    arrays("noise_covariance", value)
    known = all(map(is_known, value))
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
    xp: Any = np if known else jnp
    scale = xp.sqrt(diagonal)
    factor = factor / scale.reshape(-1, 1)
    squares, vectors = xp.linalg.eigh(factor.T @ factor)
    squares = xp.maximum(squares, 0)
    # ((1 + s)^(-1/2) - 1) / s, without a difference of numbers that are nearly equal
    root = xp.sqrt(1 + squares)
    return DiagonalPlusLowRank(scale, factor, (vectors / (-root * (1 + root))) @ vectors.T)


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    """The factor of a covariance that is symmetric and, to double precision, not singular."""
    if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-8 * np.abs(matrix).max()):
        raise ValueError("noise_covariance: a matrix that is not symmetric; wanted a covariance")
    diagonal = np.diag(matrix)
    if not np.all(diagonal > 0):
        raise ValueError(f"noise_covariance: singular, least variance {diagonal.min():.3g}; wanted variances > 0")
    # As correlations: variances over many magnitudes make a matrix no more singular.
    scale = np.sqrt(diagonal)
    correlations = matrix / np.outer(scale, scale)
    eigenvalues = np.linalg.eigvalsh(correlations)
    if not eigenvalues[0] > len(matrix) * np.finfo(np.float64).eps * eigenvalues[-1]:
        raise ValueError(
            f"noise_covariance: singular, eigenvalues of the correlations from {eigenvalues[0]:.3g} to "
            f"{eigenvalues[-1]:.3g}; wanted a positive definite matrix"
        )
    return scale[:, None] * np.linalg.cholesky(correlations)
