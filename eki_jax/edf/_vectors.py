"""Pytrees as vectors: the handful of operations that the Krylov iterations need."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eki_jax._types import Array, PyTree


def dot(left: PyTree, right: PyTree) -> Array:
    """Inner product over all leaves, accumulated in single precision at least."""

    def product(a: Array, b: Array) -> Array:
        # Accelerators would round the factors of a product to fewer bits, which MINRES's recurrence does not stand.
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)

    products = [product(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)]
    if not products:
        raise ValueError("vector: has no arrays; wanted at least one")
    return sum(products[1:], products[0])


def norm(vector: PyTree) -> Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(dot(vector, vector))


def combine(*terms: tuple[Array | float, PyTree]) -> PyTree:
    """``sum(scale * vector)``, computed in single precision at least; leaves keep the first vector's types."""
    scales = [scale for scale, _ in terms]

    def leaf(*parts: Array) -> Array:
        wide = jnp.promote_types(parts[0].dtype, jnp.float32)
        total = sum(scale * part.astype(wide) for scale, part in zip(scales, parts, strict=True))
        return jnp.asarray(total).astype(parts[0].dtype)

    return jax.tree.map(leaf, *(vector for _, vector in terms))


def zeros_like(vector: PyTree) -> PyTree:
    """The zero vector of the same structure."""
    return jax.tree.map(jnp.zeros_like, vector)


def select(condition: Array, true: PyTree, false: PyTree) -> PyTree:
    """``true`` where the scalar ``condition`` holds, else ``false``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), true, false)
