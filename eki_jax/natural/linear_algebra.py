r"""The damped Gauss-Newton step in the span of the deviations.

With the centred outputs' rows Z / sqrt(J - 1), the factor ``A = Z S`` of their curvature and ``v = Z g`` it solves

.. math:: w = (A A^T + \lambda I)^{-1} v

in the space of the ensemble (J x J), or of the outputs (R x R) by the push-through identity

.. math:: w = A (A^T A + \lambda I)^{-1} (\gamma - A^T v_\perp / \lambda) + v_\perp / \lambda,
          \qquad v = A \gamma + v_\perp .
"""

from __future__ import annotations

import jax.numpy as jnp

from eki_jax._types import Array, Space
from eki_jax.kernel.linear_algebra import HIGHEST


def cheaper_space(particles: int, outputs: int) -> Space:
    """The space whose matrix is smaller.

    >>> cheaper_space(10, 3), cheaper_space(3, 10)
    ('output', 'ensemble')
    """
    return "output" if outputs < particles else "ensemble"


def inverse_square_root(matrix: Array, damping: Array) -> Array:
    """``(I + matrix / damping)^(-1/2)``, symmetric: how the deviations shrink to the posterior's.

    >>> import jax.numpy as jnp
    >>> inverse_square_root(jnp.diag(jnp.array([3.0, 0.0])), jnp.array(1.0))[0, 0]
    Array(0.5, dtype=float32)
    """
    values, vectors = jnp.linalg.eigh(matrix)
    roots = jnp.sqrt(1 + jnp.maximum(values, 0) / damping.astype(values.dtype))
    return jnp.matmul(vectors / roots[None], vectors.T, precision=HIGHEST)
