"""From the particles' outputs to the weights of their deviations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._tree import finite_particles, flatten_outputs, wide_dtype
from eki_jax._types import Array, LossFn
from eki_jax.natural._curvature import check_convex, curvature
from eki_jax.natural._solve import Space, cheaper_space, damped_solve


class SpanStep(NamedTuple):
    """A step in the span of the deviations.

    Attributes:
        weights: w, shape (J,); the step is ``-sigma sum_j w_j e_j / sqrt(J - 1)``. Zero for failed particles.
        loss: of the mean output.
        slope: ``v^T w``, the first-order decrease of the loss.
        bend: ``w^T A A^T w``, the second derivative along the step.
        healthy_count: the particles that took part.
        fallback: whether Cholesky's factorization failed.
        is_convex: whether the loss's Hessian was positive semi-definite.
    """

    weights: Array
    loss: Array
    slope: Array
    bend: Array
    healthy_count: Array
    fallback: Array
    is_convex: Array

    def predicted(self, rate: Array) -> Array:
        """The decrease of the loss's second-order model after ``rate`` times the step."""
        return rate * self.slope - 0.5 * rate**2 * self.bend


def span_step(
    loss: LossFn, outputs: Any, targets: Any, damping: Array, *, space: Space | None = None, precision: Any = None
) -> SpanStep:
    """The weights of one step, from outputs of shape (J, ...)."""
    size = jax.tree.leaves(outputs)[0].shape[0]
    flat = flatten_outputs(outputs, size, name="outputs")
    flat = flat.astype(wide_dtype(flat.dtype))
    healthy = finite_particles(flat)
    count = jnp.sum(healthy).astype(flat.dtype)
    rows = jnp.where(healthy[:, None], flat, 0)
    mean = jnp.sum(rows, axis=0) / jnp.maximum(count, 1)
    norm = lax.rsqrt(jnp.maximum(count - 1, 1))
    rows = jnp.where(healthy[:, None], (rows - mean) * norm, 0)
    model = curvature(loss, _unflatten(mean, outputs), targets)
    check_convex(model)
    factor = model.times_factor(rows)
    right = jnp.matmul(rows, model.gradient, precision=precision)
    space = cheaper_space(*factor.shape) if space is None else space
    if space == "ensemble":
        matrix = jnp.matmul(factor, factor.T, precision=precision)
        weights, fallback = damped_solve(matrix, right, damping)
    else:
        matrix = jnp.matmul(factor.T, factor, precision=precision)
        gamma = model.coordinates
        outside = 0.0 if model.remainder is None else jnp.matmul(rows, model.remainder, precision=precision) / damping
        inner = gamma if model.remainder is None else gamma - jnp.matmul(factor.T, outside, precision=precision)
        solution, fallback = damped_solve(matrix, inner, damping)
        weights = jnp.matmul(factor, solution, precision=precision) + outside
    moved = jnp.matmul(weights, factor, precision=precision)
    return SpanStep(
        weights, model.value, jnp.vdot(right, weights), jnp.vdot(moved, moved), count, fallback, model.is_convex
    )


def _unflatten(flat: Array, outputs: Any) -> Any:
    leaves, structure = jax.tree.flatten(outputs)
    parts, start = [], 0
    for leaf in leaves:
        size = leaf.size // leaf.shape[0]
        parts.append(flat[start : start + size].reshape(leaf.shape[1:]))
        start += size
    return structure.unflatten(parts)
