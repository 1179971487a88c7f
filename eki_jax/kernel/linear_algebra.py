"""Linear systems with a positive definite matrix that survive rounding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from eki_jax._types import Array

HIGHEST = lax.Precision.HIGHEST


def damped_solve(matrix: Array, right: Array, damping: Array) -> tuple[Array, Array]:
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
