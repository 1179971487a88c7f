"""Linear systems with a positive definite matrix that survive rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from eki_jax._types import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

HIGHEST = lax.Precision.HIGHEST


def damped_solve(
    matrix: Float[Array, "n n"], right: Float[Array, " n *k"], damping: Float[Array, ""]
) -> tuple[Float[Array, " n *k"], Bool[Array, ""]]:
    """``(matrix + damping I)^-1 right`` and whether Cholesky's factorization failed.

    Where it fails, because ``damping`` drowns in the rounding of a positive semi-definite ``matrix``, the eigenvalues
    are cut off at zero instead.

    >>> import jax.numpy as jnp
    >>> x, failed = damped_solve(jnp.ones((2, 2)), jnp.array([3.0, 3.0]), jnp.array(1.0))
    >>> jnp.round(x, 4), bool(failed)
    (Array([1., 1.], dtype=float32), False)
    >>> x, failed = damped_solve(jnp.diag(jnp.array([1.0, -1e-7])), jnp.array([1.0, 1.0]), jnp.array(1e-9))
    >>> bool(jnp.isfinite(x).all()), bool(failed)
    (True, True)
    """
    damping = damping.astype(matrix.dtype)
    damped = matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(damped)
    failed = ~jnp.isfinite(factor).all()

    def by_eigenvalues(_: Any) -> Array:
        # What is not finite must stay so: eigh would be undefined, or never return.
        safe = jnp.where(jnp.isfinite(matrix).all(), matrix, 0)
        values, vectors = jnp.linalg.eigh(safe)
        inverse = 1 / (jnp.maximum(values, 0) + damping)
        inner = jnp.matmul(vectors.T, right, precision=HIGHEST)
        scaled = inverse.reshape(-1, *[1] * (inner.ndim - 1)) * inner
        solution = jnp.matmul(vectors, scaled, precision=HIGHEST)
        return jnp.where(jnp.isfinite(matrix).all(), solution, jnp.nan)

    solution = lax.cond(failed, by_eigenvalues, lambda _: cho_solve((factor, True), right), None)
    return solution, failed


@jax.custom_jvp
def inverse_root(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    r"""``T = (I + S)^(-1/2)`` for a positive semi-definite S, and ``g(S)`` with ``T = I - S g(S)``.

    .. math:: g(s) = \frac{1}{\sqrt{1 + s}\,(1 + \sqrt{1 + s})}

    Neither is a difference of numbers that are nearly equal, and both have derivatives where eigenvalues coincide,
    which eigenvectors have not. Eigenvalues below zero are rounding and count as zero.

    >>> s = jnp.array([[3.0, 0.0], [0.0, 0.0]])
    >>> root, shrinkage = inverse_root(s)
    >>> root.diagonal(), (jnp.eye(2) - s @ shrinkage).diagonal()
    (Array([0.5, 1. ], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """
    vectors, p = _roots(matrix)
    return spectral(vectors, 1 / p), spectral(vectors, 1 / (p * (1 + p)))


@inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (matrix,), (tangent,) = primals, tangents
    vectors, p = _roots(matrix)
    rows, columns = p[:, None], p[None]
    inner = jnp.linalg.multi_dot([vectors.T, 0.5 * (tangent + tangent.T), vectors], precision=HIGHEST)
    # The divided differences of both functions in the eigenvalues p^2 - 1 (Daleckii and Krein).
    slope = -1 / (rows * columns * (rows + columns))
    slopes = slope, slope * (1 + rows + columns) / ((1 + rows) * (1 + columns))
    changes = tuple(jnp.linalg.multi_dot([vectors, by * inner, vectors.T], precision=HIGHEST) for by in slopes)
    return (spectral(vectors, 1 / p), spectral(vectors, 1 / (p * (1 + p)))), changes


def _roots(matrix: Array) -> tuple[Array, Array]:
    """The eigenvectors of S, and the roots of ``1 + s``."""
    vectors, values = eigen(matrix)
    return vectors, jnp.sqrt(1 + values)


def eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    """Eigenvectors and eigenvalues of a positive semi-definite matrix, those below zero, which are rounding, as zero.

    The values are NaN where the matrix is not finite, for which eigh is undefined.

    >>> eigen(jnp.diag(jnp.array([-1e-9, 2.0])))[1]
    Array([0., 2.], dtype=float32)
    """
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return vectors, jnp.where(finite, jnp.maximum(values, 0), jnp.nan)


def spectral(vectors: Float[Array, "n k"], values: Float[Array, " k"]) -> Float[Array, "n n"]:
    """``V diag(values) V^T``, a function of the matrix with these eigenvectors.

    >>> spectral(jnp.eye(2), jnp.array([1.0, 2.0])).diagonal()
    Array([1., 2.], dtype=float32)
    """
    return jnp.matmul(vectors * values[None], vectors.T, precision=HIGHEST)
