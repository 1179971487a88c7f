"""From the particles' outputs to the weights of their deviations, on one device or spread over many."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._tree import finite_particles, flatten_outputs, wide_dtype
from eki_jax._types import Array, LossFn
from eki_jax.losses import SquaredError
from eki_jax.natural import _axes
from eki_jax.natural._axes import Axes
from eki_jax.natural._curvature import check_convex, curvature
from eki_jax.natural._losses import SampleLoss, SoftmaxCrossEntropy
from eki_jax.natural._solve import HIGHEST, Space, cheaper_space, damped_solve


class SpanStep(NamedTuple):
    """A step in the span of the deviations.

    Attributes:
        weights: w of this device's particles, shape (J,); the step is ``-sigma sum_j w_j e_j / sqrt(J - 1)``. Zero for
            particles that failed.
        loss: of the mean output.
        slope: ``v^T w``, the first-order decrease of the loss.
        bend: ``w^T A A^T w``, the second derivative along the step.
        healthy: the number of particles that took part.
        fallback: whether Cholesky's factorization failed.
        is_convex: whether the loss's Hessian was positive semi-definite.
        matrix: ``A A^T`` where it was formed, else None.
    """

    weights: Array
    loss: Array
    slope: Array
    bend: Array
    healthy: Array
    fallback: Array
    is_convex: Array
    matrix: Array | None


def span_step(
    loss: LossFn,
    outputs: Any,
    targets: Any,
    damping: Array,
    *,
    space: Space | None = None,
    axes: Axes = Axes(),  # noqa: B008
    precision: Any = HIGHEST,
) -> SpanStep:
    """The weights of one damped Gauss-Newton step.

    Args:
        loss: of one particle's outputs.
        outputs: shape (J, ...) on this device; with ``axes.batch`` the second axis is of samples.
        targets: of this device's samples.
        damping: lambda > 0.
        space: where to solve; where the matrix is smaller by default.
        axes: over which the particles and samples are spread.
        precision: of the products that form the matrix.

    Raises:
        ValueError: a loss that cannot be spread over samples in that space, or samples that the devices do not divide.
    """
    kind = _sum_over_samples(loss)
    local = jax.tree.leaves(outputs)[0].shape[0]
    count = local * _axes.size(axes.particles)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(outputs)) // local * _axes.size(axes.batch)
    if space is None:
        space = cheaper_space(count, numbers)
        if axes.names and kind is None:  # all outputs at once: nothing can be spread over samples
            space = "output"
    if space == "output":
        return _in_output_space(loss, outputs, targets, damping, axes, precision)
    if axes.names and kind is None:
        raise ValueError("space: 'ensemble' on several devices, for a loss that is no sum of samples; wanted 'output'")
    return _in_ensemble_space(loss, outputs, targets, damping, axes, precision, kind)


def _in_ensemble_space(
    loss: LossFn, outputs: Any, targets: Any, damping: Array, axes: Axes, precision: Any, kind: str | None
) -> SpanStep:
    healthy = _healthy(outputs, axes)
    outputs, targets = _all_particles(outputs, targets, axes)
    every = healthy if axes.particles is None else _of_all(healthy, axes)
    rows, mean, number = _centred(outputs, every)
    model = curvature(loss, mean, targets)
    check_convex(model)
    factor = model.times_factor(rows)
    # A mean over samples is the mean of the devices' means; a sum is their sum.
    share = 1 / axes.devices if kind == "mean" else 1.0
    # The slope is one more column of the matrix, so that one sum over devices brings both.
    right = rows @ model.gradient
    sums = jnp.concatenate([jnp.matmul(factor, factor.T, precision=precision), right[:, None]], axis=1)
    sums = share * axes.sum(sums)
    matrix, right = sums[:, :-1], sums[:, -1]
    weights, fallback = damped_solve(matrix, right, damping)
    value, convex = share * axes.sum(model.value), everywhere(model.is_convex, axes)
    bend = jnp.vdot(weights, jnp.matmul(matrix, weights, precision=HIGHEST))
    slope = jnp.vdot(right, weights)
    own = _axes.own_part(weights, axes.particles)
    return SpanStep(own, value, slope, bend, number, fallback, convex, matrix)


def _in_output_space(loss: LossFn, outputs: Any, targets: Any, damping: Array, axes: Axes, precision: Any) -> SpanStep:
    healthy = _healthy(outputs, axes)
    outputs, targets = _axes.gathered(outputs, axes.batch, axis=1), _axes.gathered(targets, axes.batch)
    rows, mean, number = _centred(outputs, healthy, axes.particles)
    model = curvature(loss, mean, targets)
    check_convex(model)
    factor = model.times_factor(rows)
    copies = 1 / _axes.size(axes.batch)  # every device along the batch axis now has the same
    matrix = copies * axes.sum(jnp.matmul(factor.T, factor, precision=precision))
    outside, inner = jnp.zeros((), factor.dtype), model.coordinates
    if model.remainder is not None:
        outside = rows @ model.remainder / damping
        inner = inner - copies * axes.sum(outside @ factor)
    if axes.batch is not None:
        inner = lax.pmean(inner, axes.batch)
    solution, fallback = damped_solve(matrix, inner, damping)
    weights = jnp.matmul(factor, solution, precision=precision) + outside
    if axes.batch is not None:
        weights = lax.pmean(weights, axes.batch)
    slope = copies * axes.sum(jnp.vdot(rows @ model.gradient, weights))
    moved = copies * axes.sum(weights @ factor)
    value, convex = model.value, model.is_convex
    if axes.batch is not None:
        value, convex = lax.pmean(value, axes.batch), everywhere(convex, Axes(batch=axes.batch))
    return SpanStep(weights, value, slope, jnp.vdot(moved, moved), number, fallback, convex, None)


def centred(outputs: Any, axes: Axes) -> tuple[Array, Array, Array]:
    """Rows ``(z_j - mean z) / sqrt(J - 1)``, zero for particles that failed; which did not; how many on all devices."""
    healthy = _healthy(outputs, axes)
    rows, _, number = _centred(outputs, healthy, axes.particles)
    return rows, healthy, number


def share_of_loss(loss: LossFn, axes: Axes) -> float:
    """What this device's samples count in the loss of all samples: a mean is the mean of the devices' means.

    Raises:
        ValueError: a loss that is no sum over samples, spread over them.
    """
    kind = _sum_over_samples(loss)
    if axes.batch is not None and kind is None:
        raise ValueError(
            "loss: is not known to be a sum over samples, which are spread over devices; wanted one that is"
        )
    return 1 / _axes.size(axes.batch) if kind == "mean" else 1.0


def _centred(outputs: Any, healthy: Array, axis: str | None = None) -> tuple[Array, Any, Array]:
    """Rows ``(z_j - mean z) / sqrt(J - 1)`` of the healthy particles, zeros for others; the mean; their number."""
    flat = flatten_outputs(outputs, len(healthy), name="outputs")
    flat = jnp.where(healthy[:, None], flat.astype(wide_dtype(flat.dtype)), 0)
    count, total = jnp.sum(healthy).astype(flat.dtype), jnp.sum(flat, axis=0)
    if axis is not None:
        count, total = lax.psum((count, total), axis)
    mean = total / jnp.maximum(count, 1)
    rows = jnp.where(healthy[:, None], (flat - mean) * lax.rsqrt(jnp.maximum(count - 1, 1)), 0)
    return rows, _like_one(mean, outputs), count


def _healthy(outputs: Any, axes: Axes) -> Array:
    """Which of this device's particles have finite outputs on all samples."""
    healthy = finite_particles(outputs)
    return healthy if axes.batch is None else lax.pmin(healthy.astype(jnp.int32), axes.batch) > 0


def _of_all(healthy: Array, axes: Axes) -> Array:
    """The flags of all particles, as numbers that are known to be the same on all devices."""
    local, devices = len(healthy), _axes.size(axes.particles)
    own = jnp.zeros(local * devices, jnp.int32)
    own = lax.dynamic_update_slice_in_dim(own, healthy.astype(jnp.int32), _axes.index(axes.particles) * local, 0)
    return lax.psum(own, axes.particles) > 0


def _all_particles(outputs: Any, targets: Any, axes: Axes) -> tuple[Any, Any]:
    """From some particles' outputs on many samples to all particles' outputs on fewer samples."""
    if axes.particles is None:
        return outputs, targets
    devices = _axes.size(axes.particles)
    samples = jax.tree.leaves(outputs)[0].shape[1]
    if samples % devices:
        raise ValueError(f"batch: {samples} samples a device on {devices} devices of particles; wanted a multiple")
    exchanged = jax.tree.map(lambda z: lax.all_to_all(z, axes.particles, 1, 0, tiled=True), outputs)
    return exchanged, jax.tree.map(lambda y: _axes.own_part(jnp.asarray(y), axes.particles), targets)


def everywhere(flag: Array, axes: Axes) -> Array:
    """Whether a flag is up on all devices."""
    return axes.sum(jnp.asarray(~flag, jnp.int32)) == 0


def _sum_over_samples(loss: LossFn) -> str | None:
    """Say "mean" or "sum" for losses that are one over the samples, else None."""
    if isinstance(loss, SoftmaxCrossEntropy | SampleLoss):
        return "mean"
    if isinstance(loss, SquaredError) and (loss.precision is None or jnp.ndim(loss.precision) == 0):
        return "sum"
    return None


def _like_one(flat: Array, outputs: Any) -> Any:
    """A flat (M,) array as one particle's outputs."""
    leaves = jax.tree.leaves(outputs)
    structure: Any = jax.tree.structure(outputs)
    parts, start = [], 0
    for leaf in leaves:
        numbers = leaf.size // leaf.shape[0]
        parts.append(flat[start : start + numbers].reshape(leaf.shape[1:]))
        start += numbers
    return structure.unflatten(parts)
