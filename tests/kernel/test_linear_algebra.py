"""Matrix functions that the solvers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax.kernel.linear_algebra import inverse_root


@pytest.mark.parametrize("eigenvalues", [(0.3, 2.0, 5.0), (0.7, 0.7, 3.0), (0.0, 0.0, 0.0)])
def test_the_inverse_root_has_a_derivative(eigenvalues: tuple[float, ...], x64: None) -> None:
    """Where eigenvalues coincide too: it is that of central differences."""
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    matrix = jnp.asarray(vectors * np.array(eigenvalues) @ vectors.T)
    tangent = jnp.asarray(np.cov(np.random.default_rng(1).normal(size=(3, 5))))
    found, slopes = jax.jvp(inverse_root, (matrix,), (tangent,))
    root, shrinkage = found
    np.testing.assert_allclose(root @ root @ (jnp.eye(3) + matrix), jnp.eye(3), atol=1e-12)
    np.testing.assert_allclose(root, jnp.eye(3) - matrix @ shrinkage, atol=1e-12)
    # Eigenvalues below zero count as zero, so that zero itself has a derivative from above alone.
    step = 1e-5
    if min(eigenvalues) > 0:
        after, before = inverse_root(matrix + step * tangent), inverse_root(matrix - step * tangent)
        differences = [(a - b) / (2 * step) for a, b in zip(after, before, strict=True)]
        tolerance = 1e-8
    else:
        differences = [(a - b) / step for a, b in zip(inverse_root(matrix + step * tangent), found, strict=True)]
        tolerance = 1e-4
    for slope, difference in zip(slopes, differences, strict=True):
        np.testing.assert_allclose(slope, difference, atol=tolerance)
